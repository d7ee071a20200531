"""The workers of one machine, in a group that is spread over several."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distributed.cli.errors import INTERRUPTED
from mlx_distributed.cli.local import GRACE_S, LAST_S, LocalGroup
from mlx_distributed.cli.meeting.place import Line, Place
from mlx_distributed.errors import ConfigError, MlxDistributedError


class MachineGroup(LocalGroup):
    """They end together with those of the other machines.

    Args:
        place: of this machine.
        lines: from the first machine to all others, from any other to the first.
        jobs, log_files, env, debug, module, grace_s, on_message: as of `LocalGroup`.
    """

    def __init__(
        self,
        place: Place,
        lines: Sequence[Line],
        jobs: Sequence[Mapping[str, Any]],
        log_files: Sequence[Path | None],
        env: Mapping[str, str],
        debug: bool,
        module: str,
        grace_s: float = GRACE_S,
        on_message: Callable[[Mapping[str, Any]], None] = lambda message: None,
    ) -> None:
        self._place, self._lines = place, list(lines)
        self._gone: list[str] = []
        """Machines that have ended otherwise than well, or are lost."""
        self._refusal = ""
        """What another machine has said of why it cannot take part."""
        self._interrupted = False
        """Another machine was."""
        super().__init__(jobs, log_files, env, debug, module, grace_s, on_message)
        for worker in self._workers:
            worker.name = str(place.first_rank + worker.rank)

    def run(self) -> int:
        """As of `LocalGroup`; the other machines are told the status, and the error where there is one."""
        try:
            status = super().run()
            errors = [worker.error for worker in self._workers if worker.error]
            for line in self._lines:
                line.control.send(ended=status, error=errors[0] if errors else None)
            return status
        finally:
            for line in self._lines:
                line.control.close()

    def _all_addresses(self, here: list[str]) -> list[str]:
        """Of all ranks, which the first machine collects and gives out."""
        try:
            if self._place.first_rank:
                (first,) = self._lines
                first.control.send(addresses=here)
                return first.addresses()
            found = list(here)
            for line in self._lines:
                found += line.addresses()
            if len(found) != len(self._place.machines):
                raise MlxDistributedError(f"{len(found)} addresses have come for {len(self._place.machines)} workers")
        except ConfigError as error:
            self._refusal = str(error)
            raise
        for line in self._lines:
            line.control.send(addresses=found)
        return found

    def _has_failed(self) -> bool:
        self._listen(0.0)
        return bool(self._gone) or super()._has_failed()

    def _listen(self, timeout_s: float) -> None:
        """Hear which machines have ended, and how: nothing else is due."""
        for line in [line for line in self._lines if line.control.heard(timeout_s)]:
            message = line.receive()
            status = message.get("ended")
            self._lines.remove(line)
            line.control.close()
            if status == ConfigError.exit_status:
                self._refusal = line.last_words(message)
            if status == INTERRUPTED:
                self._interrupted = True
            if status != 0:
                self._gone.append(line.who)

    def _report(self) -> int:
        first, statuses = self._workers[0], {worker.process.returncode for worker in self._workers}
        if self._place.first_rank and 1 in statuses:
            self._listen(LAST_S)  # The others say what the first machine has refused each from where it stands.
        if self._refusal and ConfigError.exit_status not in statuses:
            print(f"error: {self._refusal}", file=sys.stderr)
            return ConfigError.exit_status
        gone = ", ".join(self._gone)
        if first.dismissed and first.error is None and gone:
            if self._interrupted:
                print(f"interrupted on {gone}", file=sys.stderr)
                return INTERRUPTED
            first.error = f"{gone} has gone"
        return super()._report()
