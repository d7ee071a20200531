"""`mlx-train`, with `--join` too, and `mlx-distributed coordinator` and `launch`, with workers that compute nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlx_distributed.cli.distributed import parser
from mlx_distributed.cli.elastic.attended import READY, Attendance, read_line
from mlx_distributed.cli.elastic.coordinator import coordinate
from mlx_distributed.cli.elastic.host import host
from mlx_distributed.cli.elastic.join import join
from mlx_distributed.cli.elastic.launch import launch
from mlx_distributed.cli.errors import run
from mlx_distributed.cli.output_dir import open_output_dir
from mlx_distributed.config import load_config

WORKER = "small_worker"


def main(verb: str, arguments: list[str]) -> int:
    if verb == "join":
        text, folder, nproc = arguments
        return join(text, nproc, Path(folder), debug=False, module=WORKER)
    if verb == "attended":
        print(READY, flush=True)
        folder = Path(arguments[arguments.index("--output-dir") + 1])
        return join(read_line(0), None, folder, debug=False, module=WORKER, attendance=Attendance(0))
    if verb == "launch":
        return launch(parser().parse_args([verb, *arguments]), WORKER)
    path, *overrides = arguments
    if verb == "coordinator":
        args = argparse.Namespace(config=Path(path), output_dir=None, debug=False, overrides=overrides)
        return coordinate(args, WORKER)
    config = load_config(Path(path), ["elastic.enabled=true", *overrides])
    return host(config, open_output_dir(config, resume=False), None, debug=False, module=WORKER)


if __name__ == "__main__":
    raise SystemExit(run(lambda: main(sys.argv[1], sys.argv[2:]), debug=False))
