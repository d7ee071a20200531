"""`mlx-distributed`: what there is to do besides training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_distributed.cli.bench.command import add_bench
from mlx_distributed.cli.doctor.command import add_doctor
from mlx_distributed.cli.elastic.verbs import add_coordinator, add_launch, add_status
from mlx_distributed.cli.errors import run
from mlx_distributed.cli.export.command import add_export
from mlx_distributed.cli.import_config.command import add_import_config
from mlx_distributed.cli.plan.command import add_plan
from mlx_distributed.cli.preview.command import add_preview
from mlx_distributed.cli.score import add_score
from mlx_distributed.cli.verb import add_verb

EPILOG = """\
examples:
  mlx-distributed digest outputs/quickstart
  mlx-distributed doctor --config my.yaml
  mlx-distributed plan --config my.yaml
  mlx-distributed preview --config my.yaml
  mlx-distributed import-config axolotl.yml --output my.yaml
  mlx-distributed export runs/my-model
  mlx-distributed bench allreduce --nproc 2
  mlx-distributed score answers.txt references.txt
  mlx-distributed launch --hosts b.local,c.local --config my.yaml
  mlx-distributed coordinator --config my.yaml elastic.listen=192.168.1.20:4000
  mlx-distributed status runs/my-model

`mlx-distributed VERB --help` says more about a verb.
"""
DIGEST_EPILOG = """\
examples:
  mlx-distributed digest outputs/quickstart
  mlx-distributed digest outputs/quickstart/checkpoints/step-00000100

exit status: 0 done; 1 there is no whole checkpoint; 2 a newer program wrote it
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `mlx-distributed`."""
    parser = argparse.ArgumentParser(
        prog="mlx-distributed",
        description="Tools around distributed fine-tuning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    digest = add_verb(
        verbs,
        "digest",
        _digest,
        summary="print the SHA-256 of the state in a checkpoint",
        description="Print two lines, the SHA-256 of the parameters and of the optimizer state: equal for equal bits.",
        epilog=DIGEST_EPILOG,
    )
    digest.add_argument(
        "path", type=Path, metavar="PATH", help="a checkpoint, or an output_dir, whose newest whole one is taken"
    )
    add_doctor(verbs)
    add_plan(verbs)
    add_preview(verbs)
    add_import_config(verbs)
    add_export(verbs)
    add_bench(verbs)
    add_score(verbs)
    add_launch(verbs)
    add_coordinator(verbs)
    add_status(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    command_line = parser()
    # argparse takes positional arguments in one place only, and changes of values may stand before and after options.
    args, rest = command_line.parse_known_args(argv)
    if any(text.startswith("-") for text in rest) or (rest and "overrides" not in args):
        command_line.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return run(lambda: args.body(args), args.debug)


def _digest(args: argparse.Namespace) -> int:
    # These import mlx-lm, which takes seconds: `--help` and a mistyped verb need not wait for it.
    from mlx_distributed.train.checkpoint import locate
    from mlx_distributed.train.state import digest

    parameters, optimizer = locate(args.path, lambda message: print(message, file=sys.stderr)).load()
    print(f"{digest(parameters)}  params")
    print(f"{digest(optimizer)}  optimizer")
    return 0
