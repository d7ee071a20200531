"""One worker of an elastic run, from its configuration to the end of the run, or to where it leaves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from mlx_distributed import __version__
from mlx_distributed.cli.beside import Beside
from mlx_distributed.cli.elastic.transfer import snapshot_of, sums_layout, take, views
from mlx_distributed.cli.errors import INTERRUPTED
from mlx_distributed.cli.interrupt import Interrupt
from mlx_distributed.cli.load import Loaded, load_all
from mlx_distributed.cli.machine.machine import Machine
from mlx_distributed.cli.measure import pays_no_more
from mlx_distributed.cli.output_dir import accept_config
from mlx_distributed.cli.run import Job, choose_device, make_checkpointer, open_trackers, restore
from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.endpoint import Endpoint
from mlx_distributed.comm.grpc_comm import GrpcComm
from mlx_distributed.comm.tls import Identity
from mlx_distributed.config import to_dict
from mlx_distributed.elastic.loop import run_elastic
from mlx_distributed.elastic.membership import Membership
from mlx_distributed.elastic.protocol import NOTHING, START, EpochId, Facts, Fetch, Outcome, WorkerId
from mlx_distributed.elastic.recovery import NotReceived, fetch_state
from mlx_distributed.elastic.snapshots import StateServer
from mlx_distributed.elastic.state import listed
from mlx_distributed.elastic.worker import View
from mlx_distributed.errors import ConfigError, StreamError, TrainingError
from mlx_distributed.tracking import Trackers, open_worker_tracker
from mlx_distributed.train import attempts
from mlx_distributed.train.agreement import broadcast_bytes
from mlx_distributed.train.attempts import AnyAttempt
from mlx_distributed.train.halving import Halving, explained
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.private import hand_out
from mlx_distributed.train.setup import exchange_layout, init_state
from mlx_distributed.train.step_info import StepInfo
from mlx_distributed.train.trainer import check_progress

SECTIONS = ("train", "optimizer", "scheduler", "eval", "checkpoint")
"""Of the configuration: what must be the same on all workers."""


@dataclass(frozen=True)
class Seat:
    """How a worker takes its place in a run."""

    name: str
    """In the run; of no other worker that is alive."""
    listen: str
    """Address at which the others reach it; port 0 takes a free one."""
    token: str = field(repr=False)
    """Secret of the run."""
    identity: Identity | None = None
    """For mutual TLS; None means that nothing is encrypted."""
    joined: bool = False
    """It has come to a run that others have started: Ctrl-C ends it, and not the run."""
    console: int | None = None
    """Descriptor of the console of the command, for a worker whose standard output is a log file."""
    first: bool = True
    """It is the one that goes on from the checkpoint where the run is resumed; others are given what it has."""


def config_digest(loaded: Loaded, config: Mapping[str, object]) -> str:
    """SHA-256 of all that workers must have in common: data, model and settings.

    Args:
        loaded: data and model.
        config: from `to_dict`.
    """
    common = {"facts": dict(loaded.facts), "validation": loaded.rows.validation_digest}
    text = json.dumps(common | {name: config[name] for name in SECTIONS}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def train_elastic(
    job: Job, seat: Seat, enroll: Callable[[int, str, Outcome], str], interrupt: Interrupt, machine: Machine
) -> int:
    """Train as one worker of a run whose members come and go; returns the exit status.

    Args:
        job: what is trained.
        seat: how this worker takes part.
        enroll: told the number of steps, the `config_digest` and the state that this worker begins with, gives the
            address of the coordinator.
        interrupt: asks for a stop.
        machine: that this runs on. Before it sleeps this worker leaves, and it comes back when it is awake.
    """
    choose_device(job.config.train.device)
    server = StateServer(seat.token)
    run = _Run(job, seat, interrupt, server)
    run.endpoint = endpoint = Endpoint(seat.listen, seat.identity, handlers=server.handlers)
    facts = Facts(job.run_id, __version__, run.digest)
    coordinator = run.coordinator = enroll(run.num_steps, run.digest, run.outcome)
    view = View(WorkerId(seat.name, uuid.uuid4().hex), committed=run.outcome)
    member = Membership(coordinator, seat.token, facts, view, endpoint.address, seat.identity)

    def form(epoch: EpochId, rank: int, size: int) -> GrpcComm:
        timeout_s = job.config.parallel.timeout_s
        generation = epoch.term << 32 | epoch.sequence
        return GrpcComm(rank, size, seat.token, generation, timeout_s, endpoint=endpoint)

    try:
        interrupt.training = True
        measures_links = job.config.parallel.bandwidth == "auto"
        with explained(), machine.on_sleep(partial(member.leave, "its machine goes to sleep"), member.come_back):
            elastic = job.config.elastic
            run_elastic(run, member, form, elastic.coordinator_grace_s, elastic.wait_s, measures_links)
        interrupt.training = False
        run.end()
    except StreamError:
        run.keep()
        raise
    finally:
        member.close("it was asked to end" if run.leaving else "its work is done")
        endpoint.close()
        run.trackers.finish(INTERRUPTED if run.stopped else 0)
    return INTERRUPTED if run.stopped else 0


class _Run:
    """What this worker trains. Rank 0 of an epoch saves, tracks and speaks."""

    endpoint: Endpoint
    coordinator: str
    """Its address."""

    def __init__(self, job: Job, seat: Seat, interrupt: Interrupt, server: StateServer) -> None:
        self._job, self._config, self._token, self._server = job, job.config, seat.token, server
        self._interrupt, self._joined, self._name = interrupt, seat.joined, seat.name
        self._console = None if seat.console is None else os.fdopen(seat.console, "w", buffering=1)
        self._loaded = load_all(job.config, LocalComm())
        self._state = init_state(self._loaded.model, job.config, LocalComm())
        self._checkpointer = make_checkpointer(job.config)
        self._wandb_id = job.wandb_id
        self.digest = config_digest(self._loaded, to_dict(job.config))
        self._phases = Phases(
            job.config, self._loaded.plan, self._loaded.train, lambda: self.leaving and not self.leaving_others
        )
        self._phases.halving = Halving(lambda line: self.trackers.message(f"worker {seat.name}: {line}"), job.halvings)
        self.num_steps = attempts.num_taken(self._phases, self._loaded.plan.num_steps)
        self.outcome = self._begin(seat)
        """What the state is the state of."""
        if pays_no_more(job.config, self._state):
            self.num_steps = self.step
        server.publish(snapshot_of(self._state, self.outcome))
        self.stopped = False
        self.trackers = Trackers([])
        self._leads = self._spoke = self._introduced = False
        self._members: Sequence[str] = ()
        self._group: Communicator | None = None
        self._beside: Beside | None = None
        self._before: dict[str, float] = {}
        self._faulty: frozenset[str] = frozenset()
        """Sources of the state to be passed over while there are others."""
        self._telling = -1
        """The last step that was begun to be told of."""

    @property
    def step(self) -> int:
        return attempts.num_taken(self._phases, self._state.step)

    @property
    def leaving(self) -> bool:
        return self._interrupt.requested

    @property
    def leaving_others(self) -> bool:
        return self._interrupt.requested and (self._joined or self._interrupt.terminated)

    def end(self) -> None:
        """Where the run has been left while nobody trained, what there is is saved."""
        if self.step < self.num_steps:
            self.stopped = True
            # Others of this command go on, and save into the same folder.
            others_save = self.leaving_others and not self._joined
            if self._spoke and self._beside is not None and not others_save:
                self._beside.save.alone(self._state)

    def keep(self) -> None:
        """Save what is committed before this worker ends, which can read no more data, if it is the one that saves."""
        if self._leads and self._beside is not None:
            self._beside.save.alone(self._state)

    def enter(self, group: Communicator, members: Sequence[str]) -> None:
        attempts.enter(self._phases, self._state, group)
        gone = sorted({*self._members} - {*members})
        self._members = members
        if gone and group.rank == 0 and self._config.parallel.wire != "fp32":
            wire, names = self._config.parallel.wire, " and ".join(gone)
            self.trackers.message(
                f"what parallel.wire={wire} had left out of the gradients of {names} is lost with them"
            )

    def attempt(self) -> AnyAttempt:
        return attempts.begin(self._phases, self._state)

    def commit(self, attempt: AnyAttempt) -> StepInfo:
        # Of the state of before nothing is kept, but for what of the sums others still want.
        sums = views(attempt.sums) if self._server.release() else None
        info = replace(attempt.commit(), data_s=self._phases.take_data_s())
        self._publish(Outcome(self.step, attempt.digest), sums)
        return info

    def fetch(self, offer: Fetch) -> Outcome | None:
        layout = partial(sums_layout, self._phases, self._state)
        mine = snapshot_of(self._state, self.outcome)
        sources = [source for source in offer.sources if source not in self._faulty] or offer.sources
        try:
            received = fetch_state(self.endpoint, sources, offer.outcome, mine, layout, self._token)
        except NotReceived as error:
            self._faulty = frozenset()
            self.trackers.message(f"the state could not be had: {error}")
            return None
        self._faulty |= received.faulty
        self._publish(take(self._phases, self._state, self.outcome, received), None)
        return self.outcome

    def taken(self, info: StepInfo | None, group: Communicator) -> None:
        beside, state = self._in_group(group, info), self._state
        if not state.step:
            self._before = beside.at_start()
            return
        if info is not None and self._telling == state.step:  # The group has failed before all was done.
            self.trackers.rewind(state.step - info.num_steps)
        self._telling = state.step
        beside.after_step(info)
        if info is not None:
            check_progress(state, info)
        if info is not None and info.stop_requested:
            self.stopped, self.num_steps = self.step < self.num_steps, self.step
        if beside.stops_early:
            self.num_steps = self.step
        if self.step < self.num_steps:
            return
        if not self.stopped:
            beside.evaluate_last()
        beside.save(state)
        if self.stopped:
            self.trackers.message(f"interrupted: step {state.step} is saved, --resume goes on from there")
        else:
            beside.finish(self._before)

    def alone(self) -> None:
        """The coordinator has been away for long: what there is is saved, and training waits."""
        self.trackers.message("the coordinator is away; what was committed is saved, and this worker waits for it")
        if self._spoke and self._beside is not None:  # Others have other folders, and may be lost.
            self._beside.save.alone(self._state)

    def abandoned(self, away_s: float) -> TrainingError:
        others = listed({*self._members} - {self._name})
        return TrainingError(
            f"no coordinator has answered at {self.coordinator} for {away_s:.0f} s (elastic.coordinator_grace_s and "
            f"elastic.wait_s): the run is over, or was ended. This worker has step {self.step} of {self.num_steps}, "
            f"and what it has saved is in {self._config.output_dir}"
            + (f"; if the run is over, its model is in the output folder of {others}" if others else "")
            + ". To go on with it, start it with --resume where it was begun, and join with the string printed there"
        )

    def missed(self, result: str) -> None:
        if self._beside is None:  # It had fetched what others have, and was never one of them.
            raise TrainingError(f"this run is over: {result}")
        self.trackers.message(f"the run has ended without this worker, which has step {self.step}: {result}")
        self.num_steps = self.step

    def _begin(self, seat: Seat) -> Outcome:
        """What this worker begins with."""
        if self._job.resume is None:
            return START
        if not seat.first:
            return NOTHING
        checkpoint = restore(self._state, self._checkpointer, self._job.resume, self._loaded.facts)
        if checkpoint is None:
            return START
        self._wandb_id = checkpoint.meta.wandb_id or self._wandb_id
        hand_out(self._state, exchange_layout(self._state.parameters, self._config), checkpoint, LocalComm())
        if self._state.pending is not None:
            raise ConfigError(
                f"{checkpoint.folder} was saved while a sum was under way, which an elastic run knows nothing of; "
                "go on from it with elastic.enabled=false"
            )
        files = {name: entry.sha256 for name, entry in checkpoint.manifest.files.items()}
        # Whoever goes on from the same checkpoint has the same state; from the gradient that led to it, nobody knows.
        return Outcome(self.step, hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16])

    def _publish(self, outcome: Outcome, sums: dict[str, np.ndarray] | None) -> None:
        """Let others have the state as it is now."""
        self.outcome = outcome
        self._server.publish(snapshot_of(self._state, outcome), sums)

    def _in_group(self, group: Communicator, info: StepInfo | None) -> Beside:
        """What is done beside steps, in this group."""
        if self._beside is None or group is not self._group:
            # After a resume, the checkpoint says it, which only the first worker has read.
            self._wandb_id = broadcast_bytes(self._wandb_id.encode(), group, "the W&B run").decode()
            self._follow(group.rank == 0, info)
            self._group = group
            self._beside = Beside(
                self._config,
                self._job.run_id,
                self._wandb_id,
                self._loaded,
                self._state,
                group,
                self._checkpointer,
                self.trackers,
                partial(attempts.num_steps, self._phases),
            )
            if not self._introduced:
                self._introduced = True
                self._beside.introduce()
        return self._beside

    def _follow(self, leads: bool, info: StepInfo | None) -> None:
        """Open the trackers of rank 0, or of another one, where this worker has become that."""
        speaks = leads or self._speaks()
        if leads and not self._leads:
            with contextlib.suppress(FileNotFoundError):  # Another worker of this folder has done so.
                accept_config(self._config)
            self.trackers.finish(0)
            # Of what `info` is of somebody may have told, or not.
            step = self._state.step - (info.num_steps if info is not None else 0)
            metrics = self._state.metrics if info is None else None
            self.trackers = open_trackers(
                self._config, self._loaded, self._wandb_id, step or None, metrics, self._console
            )
        elif not leads and ((self._leads, self._spoke) != (leads, speaks) or self._beside is None):
            self.trackers.finish(0)
            stream = self._console if speaks else None
            tells = self._job.log and (speaks or self._console is not None)
            total = self._loaded.plan.num_steps
            self.trackers = open_worker_tracker(self._config, total, self._wandb_id, self._name, tells, stream)
        self._leads, self._spoke = leads, speaks

    def _speaks(self) -> bool:
        """Whether this worker is the one of its command that people hear: the leader, or the first that there is."""
        command = self._name.rpartition("-")[0]
        here = [member for member in self._members if member.rpartition("-")[0] == command]
        return self._name == (self._members[0] if self._members[0] in here else here[0])
