"""`mlx-train`: one YAML file in, a fine-tuned model out."""

from __future__ import annotations

import argparse
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_distributed.cli.errors import run as run_and_report
from mlx_distributed.cli.local import LocalGroup, log_files, training_job, worker_environment, worker_jobs
from mlx_distributed.cli.output_dir import open_output_dir
from mlx_distributed.config import Config, load_config, to_yaml
from mlx_distributed.config.checks import is_address
from mlx_distributed.errors import ConfigError

EPILOG = """\
examples:
  mlx-train --config configs/quickstart.yaml
  mlx-train --config my.yaml --nproc 2 optimizer.learning_rate=2e-4 train.max_steps=500
  mlx-train --config my.yaml --resume
  mlx-train --config my.yaml --resume best --eval-only eval.generate=true eval.metrics='[bleu, chrf]'
  mlx-train --config my.yaml --nproc 2 elastic.enabled=true elastic.listen=192.168.1.20:4000
  mlx-train --config my.yaml parallel.pipeline.num_stages=2 parallel.num_workers=2 parallel.listen=192.168.1.20:4000
  mlx-train --join STRING

exit status: 0 done; 1 failed while running; 2 the configuration or the data was refused; 130 interrupted, after saving
"""

LISTEN = ("elastic.listen=", "parallel.listen=")
_OVERRIDE = re.compile(r"[a-z_0-9]+(\.[A-Za-z_0-9]+)*=")


def parser() -> argparse.ArgumentParser:
    """The command line of `mlx-train`."""
    parser = argparse.ArgumentParser(
        prog="mlx-train",
        description="Fine-tune a language model on several workers; the result is that of one.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run = parser.add_mutually_exclusive_group(required=True)
    run.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the run")
    run.add_argument(
        "--join", metavar="STRING", help="take part in the run that has printed this; - reads it from standard input"
    )
    parser.add_argument("--nproc", metavar="N", help="workers to start on this machine (parallel.nproc)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="WHICH",
        help="go on from a checkpoint: auto (the default: the newest whole one, else anew), last, best, or a path",
    )
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate a checkpoint (--resume WHICH), or without one the model as it begins, into DIR/eval.json; train "
        "nothing",
    )
    parser.add_argument("--output-dir", metavar="DIR", help="where everything is written (output_dir)")
    parser.add_argument("--dry-run", action="store_true", help="check configuration and data, print the plan, stop")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    parser.add_argument(
        "--attended",
        action="store_true",
        help="with --join -: each further line of standard input is a Ctrl-C; for mlx-distributed launch",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a value of the file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    command_line = parser()
    args = command_line.parse_intermixed_args([*_spelled_out(sys.argv[1:] if argv is None else argv)])
    if args.attended and args.join != "-":
        command_line.error("--attended only goes with --join -")
    if args.join is not None:
        return run_and_report(lambda: _join(args), debug=args.debug)
    return run_and_report(lambda: _train(args), debug=args.debug)


def _spelled_out(argv: Sequence[str]) -> Iterator[str]:
    """The command line with `--resume=auto` for a `--resume` that a change of a value follows."""
    for arg, after in pairwise([*argv, ""]):
        is_bare = arg == "--resume" and _OVERRIDE.match(after) and not Path(after).exists()
        yield "--resume=auto" if is_bare else arg


def _train(args: argparse.Namespace) -> int:
    overrides = list(args.overrides)
    if args.nproc is not None:
        overrides.append(f"parallel.nproc={args.nproc}")
    if args.output_dir is not None:
        overrides.append(f"output_dir={args.output_dir}")
    config = load_config(args.config, overrides)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    if args.dry_run:
        from mlx_distributed.cli.dry_run import dry_run

        return dry_run(config)
    if args.eval_only:
        return _evaluate(config, args.resume, args.debug)
    if config.parallel.backend == "native":
        from mlx_distributed.cli.native import run_native

        return run_native(config, args.resume)
    record = open_output_dir(config, resume=args.resume is not None)
    if config.elastic.enabled:
        from mlx_distributed.cli.elastic.host import host

        return host(config, record, args.resume, args.debug)
    return _run_workers(config, training_job(record, args.resume), config.output_dir / "logs", args.debug)


def _join(args: argparse.Namespace) -> int:
    own = {"--resume": args.resume, "--dry-run": args.dry_run, "--print-config": args.print_config}
    own["--eval-only"] = args.eval_only
    listen = [text for text in args.overrides if text.startswith(LISTEN)]
    given = [*(name for name, value in own.items() if value), *args.overrides]
    given = [text for text in given if not text.startswith(LISTEN)]
    if given:
        raise ConfigError(
            f"{given[0]} cannot stand beside --join, as the run that is joined decides it; only --nproc, --output-dir "
            "and elastic.listen or parallel.listen can"
        )
    address = listen[-1].partition("=")[2] if listen else None
    if address is not None and not is_address(address):
        raise ConfigError(
            f"{listen[-1]}: must be an address or an interface of this machine, and a port or 0, such as en5:0"
        )
    from mlx_distributed.cli.elastic.attended import READY, Attendance, read_line
    from mlx_distributed.cli.elastic.invitation import Invitation
    from mlx_distributed.cli.elastic.join import join
    from mlx_distributed.cli.machine.interfaces import resolve
    from mlx_distributed.cli.machine.machine import this_machine

    if address is not None:
        address = resolve(address, this_machine().interfaces(), listen[-1].partition("=")[0])
    text, attendance = args.join, None
    if text == "-":
        stdin = sys.stdin.fileno()
        if args.attended:
            print(READY, flush=True)
        text = read_line(stdin)
        attendance = Attendance(stdin) if args.attended else None
    folder = args.output_dir and Path(args.output_dir)
    if Invitation.decode(text).kind == "group":
        from mlx_distributed.cli.meeting.training import join as take_part

        return take_part(text, args.nproc, folder, args.debug, quiet=attendance is not None, listen=address)
    return join(text, args.nproc, folder, args.debug, attendance=attendance, listen=address)


def _evaluate(config: Config, resume: str | None, debug: bool) -> int:
    """With files of its own, so that the run that is evaluated may be under way meanwhile."""
    with tempfile.TemporaryDirectory(prefix="mlx-train-") as name:
        config_file = Path(name) / "config.yaml"
        config_file.write_text(to_yaml(config), encoding="utf-8")
        job = {"config_file": str(config_file), "run_id": "", "wandb_id": "", "resume": resume, "eval_only": True}
        return _run_workers(config, job, Path(name), debug)


def _run_workers(config: Config, job: Mapping[str, Any], logs: Path, debug: bool) -> int:
    """Start the workers of a run on this machine, and on others, wait for their end, and return the exit status.

    Args:
        config: of the run.
        job: what all of them are told.
        logs: folder of the log files of those that are not rank 0.
        debug: have them print tracebacks.
    """
    if config.parallel.size > config.parallel.nproc:
        from mlx_distributed.cli.meeting.training import lead

        return lead(config, job, logs, debug)
    env, hint = worker_environment(os.environ, sys.platform)
    if hint:
        print(hint, file=sys.stderr)
    nproc = config.parallel.nproc
    jobs = worker_jobs(job, nproc, secrets.token_hex(16))
    return LocalGroup(jobs, log_files(logs, nproc), env, debug).train()
