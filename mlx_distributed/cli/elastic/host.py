"""`mlx-train` with `elastic.enabled`: the coordinator and the first workers of a run, in one command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlx_distributed.cli.elastic.access import Access, prepare_access
from mlx_distributed.cli.elastic.crew import WORKER, Crew, Enrolment, Place, exit_status, hostname, start_crew
from mlx_distributed.cli.elastic.serving import Serving, make_rules, resumed
from mlx_distributed.cli.elastic.ssh import Remotes
from mlx_distributed.cli.errors import INTERRUPTED
from mlx_distributed.cli.output_dir import ACCESS, JOURNAL, RunRecord
from mlx_distributed.config import Config
from mlx_distributed.elastic.protocol import End, Record
from mlx_distributed.elastic.state import State

POLL_S = 0.1
LAST_S = 2.0
"""So long after the last worker of this machine the coordinator may take to see that the run is over."""


def host(
    config: Config,
    record: RunRecord,
    resume: str | None,
    debug: bool,
    module: str = WORKER,
    remotes: Remotes | None = None,
) -> int:
    """Start a run, or go on with it, and stay until it is over; returns the exit status.

    Args:
        config: of the run.
        record: of the run.
        resume: `auto`, `last`, `best` or the path of a checkpoint; None begins anew.
        debug: have workers print tracebacks.
        module: the program of a worker.
        remotes: to be started when there is a coordinator for them.

    Raises:
        ConfigError: the coordinator cannot start.
        TrainingError: the coordinator cannot go on.
    """
    access = prepare_access(config, record.run_id)
    interface = access.address.rpartition(":")[0]
    crew = start_crew(
        config, record, Place(hostname(), interface, access.token, access.identity), resume, debug, module
    )
    serving: Serving | None = None
    end: End | None = None
    told = False
    try:
        while True:
            living = crew.watch(POLL_S)
            if serving is None:
                if enrolment := crew.enrolment:
                    serving = _serve(config, record, access, enrolment, resume, crew)
                    crew.answer(serving.access.address)
                    invite(serving.access, remotes)
                elif not living:
                    break
                continue
            end = end or serving.end(0.0 if living else POLL_S)
            if living:
                continue
            others = remotes is None or remotes.may_train or serving.has_workers
            if end is not None or not (others and _goes_on_elsewhere(config, crew)):
                end = end or serving.end(LAST_S if 0 in crew.statuses else 0.0)
                break
            if not told and 0 not in crew.statuses:  # Where one has come to the end, the others are about to.
                print("no worker is left on this machine; the coordinator stays for others, Ctrl-C ends it", flush=True)
                told = True
        if end is not None and end.failed:
            crew.say(end.reason)
        return exit_status(crew.statuses, crew.num_interrupts, end)
    finally:
        crew.close()
        if remotes is not None:
            remotes.close(over=end is not None)  # To leave in good order they need the coordinator.
        if serving is not None:
            serving.stop()
            _tidy(config, over=end is not None and not end.failed)


def _serve(
    config: Config, record: RunRecord, access: Access, enrolment: Enrolment, resume: str | None, crew: Crew
) -> Serving:
    def tell_unless_stopping(line: str) -> None:
        if not crew.num_interrupts:
            tell(line)

    def go_on(state: State) -> Sequence[Record]:
        # In a new run there is nothing to go on from. Workers elsewhere may hold a later step than our checkpoint.
        ahead = state.committed.step - enrolment.begins_with.step
        if resume is None or (resume == "auto" and ahead > 0 and _has_others(state)):
            return ()
        return resumed(state, enrolment.begins_with)

    rules = make_rules(config, record.run_id, enrolment.num_steps, enrolment.config_digest)
    rules = replace(rules, first_workers=config.parallel.nproc)
    serving = Serving(config, record, access, rules, tell_unless_stopping, go_on)
    serving.access.write(config.output_dir)
    return serving


def invite(access: Access, remotes: Remotes | None = None) -> None:
    """Print how workers on other machines join, and start those that are to be started from here."""
    if access.invitation is not None:
        text = access.invitation.encode()
        print(f"join string, for whoever may read the data and the model: {text}")
        print(f"on another machine: mlx-train --join {text}", flush=True)
        if remotes is not None:
            remotes.start(text)


def tell(line: str) -> None:
    """Print what the coordinator says."""
    print(f"coordinator: {line}", flush=True)


def _has_others(state: State) -> bool:
    """Whether workers of other commands were in the last epoch."""
    seats = state.epoch.seats if state.epoch else ()
    return any(seat.worker.name.rpartition("-")[0] != hostname() for seat in seats)


def _goes_on_elsewhere(config: Config, crew: Crew) -> bool:
    stopped = crew.num_interrupts > 0 or INTERRUPTED in crew.statuses
    return config.elastic.listen is not None and not stopped


def _tidy(config: Config, over: bool) -> None:
    """Remove the secrets of a run that is over, and all traces of one that has not begun."""
    begun = (config.output_dir / "config.yaml").is_file()
    if over or not begun or config.elastic.listen is None:
        (config.output_dir / ACCESS).unlink(missing_ok=True)
    if not begun:
        (config.output_dir / JOURNAL).unlink(missing_ok=True)
