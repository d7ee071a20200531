"""An elastic run whose workers take SIGUSR1 and SIGUSR2 for their machine going to sleep and waking up."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_distributed.cli import worker
from mlx_distributed.cli.elastic.host import host
from mlx_distributed.cli.errors import run
from mlx_distributed.cli.machine.machine import Plain
from mlx_distributed.cli.output_dir import open_output_dir
from mlx_distributed.config import load_config


class Sleepy(Plain):
    """Tells its worker in another thread, as a Mac does."""

    @contextmanager
    def on_sleep(self, will_sleep: Callable[[], None], woke: Callable[[], None]) -> Iterator[None]:
        for number, tell in ((signal.SIGUSR1, will_sleep), (signal.SIGUSR2, woke)):
            signal.signal(number, lambda *_, tell=tell: threading.Thread(target=tell).start())
        yield


def main(path: str, *overrides: str) -> int:
    config = load_config(Path(path), ["elastic.enabled=true", *overrides])
    return host(config, open_output_dir(config, resume=False), None, debug=False, module="sleepy_run")


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        code = worker.main(int(sys.argv[1]), False, Sleepy())
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(run(lambda: main(*sys.argv[1:]), debug=False))
