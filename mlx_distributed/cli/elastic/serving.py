"""The coordinator inside a command: in a thread of its own, with the journal of the run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from mlx_distributed import __version__
from mlx_distributed.cli.elastic.access import Access
from mlx_distributed.cli.output_dir import JOURNAL, RunRecord
from mlx_distributed.config import Config, to_yaml
from mlx_distributed.elastic.coordinator import Coordinator
from mlx_distributed.elastic.inquiry import Description
from mlx_distributed.elastic.journal import Journal
from mlx_distributed.elastic.protocol import (
    CommitRecord,
    End,
    Epoch,
    EpochId,
    EpochRecord,
    Facts,
    Outcome,
    Record,
    RollbackRecord,
    TermRecord,
)
from mlx_distributed.elastic.protocol import (
    RunRecord as JournalHead,
)
from mlx_distributed.elastic.replay import started
from mlx_distributed.elastic.state import Rules, State

T = TypeVar("T")


def make_rules(config: Config, run_id: str, num_steps: int, config_digest: str) -> Rules:
    """What a run demands, from its configuration and from what its first worker has found out."""
    elastic, share = config.elastic, config.parallel.share
    return Rules(
        Facts(run_id, __version__, config_digest),
        num_steps,
        elastic.min_workers,
        elastic.wait_s,
        config.parallel.timeout_s,
        "speed" if share == "speed" else "even",
    )


class Serving:
    """A coordinator that serves until `stop`.

    Args:
        config: of the run.
        record: of the run.
        access: as of `prepare_access`.
        rules: of the run.
        tell: is given what people should know, a line at a time, from a thread of this coordinator.
        resume: makes of the state in which the journal leaves the run what is to be written down before it goes on.

    Raises:
        ConfigError: the journal is of another run, damaged or in use, or the address cannot be listened on.
    """

    def __init__(
        self,
        config: Config,
        record: RunRecord,
        access: Access,
        rules: Rules,
        tell: Callable[[str], None],
        resume: Callable[[State], Sequence[Record]] = lambda state: (),
    ) -> None:
        self._journal = Journal(config.output_dir / JOURNAL)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="coordinator", daemon=True)
        try:
            state, _ = started(rules, self._journal.records, 0.0)
            entries = list(resume(state))
            if entries and not self._journal.records:
                entries.insert(0, JournalHead(record.run_id))
            for entry in entries:
                self._journal.append(entry)
                self._journal.records.append(entry)
            identity, description = access.identity, None
            if identity is not None:
                description = Description(
                    __version__, record.run_id, record.wandb_id, to_yaml(config), identity.key, identity.certificate
                )
            self._coordinator = Coordinator(rules, self._journal, access.token, self._hear, identity, description)
            self._tell = tell
            self._thread.start()
            self.access = replace(access, address=self._call(self._coordinator.start(access.address)).result())
            """How it is reached."""
        except BaseException:
            self._close()
            raise
        self._end: Future[End] = self._call(self._coordinator.end())

    @property
    def has_workers(self) -> bool:
        """Whether any worker is with the coordinator; or all steps are taken, and it is about to end by itself."""
        return bool(self._coordinator.state.members) or self._coordinator.state.finished

    def end(self, timeout_s: float) -> End | None:
        """Why the run is over, None while it is not.

        Args:
            timeout_s: so long it is waited for.

        Raises:
            TrainingError: this coordinator cannot go on.
        """
        try:
            return self._end.result(timeout_s)
        except TimeoutError:
            return None

    def stop(self) -> None:
        """Serve no more. Workers that are left hold what they have, and wait."""
        self._end.cancel()
        self._call(self._coordinator.stop()).result()
        self._close()

    def _hear(self, line: str) -> None:
        # How the run has ended is said by whoever asks for it.
        if self._coordinator.state.ended is None:
            self._tell(line)

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()
        self._journal.close()


def resumed(state: State, begins_with: Outcome) -> list[Record]:
    """What is written down so that a run goes on from a checkpoint, wherever its journal has left it.

    Args:
        state: in which the journal leaves it, as of `started`.
        begins_with: what the checkpoint is the state of.
    """
    if begins_with == state.committed:
        return []
    records: list[Record] = []
    if begins_with.step > state.committed.step:
        # The journal was moved away, or there was none as the run was not elastic. A journal knows of steps only as
        # those of an epoch: this one has no members.
        epoch = Epoch(EpochId(state.term, 1), state.committed, (), "the run goes on from a checkpoint")
        records += [TermRecord(state.term), EpochRecord(epoch), CommitRecord(begins_with, ())]
    return [*records, RollbackRecord(begins_with)]
