"""`mlx-distributed doctor`: what is wrong with the data of a run, before any weights are read."""

from __future__ import annotations

import argparse
import json

from mlx_distributed.cli.verb import Verbs, add_config, add_verb

EPILOG = """\
examples:
  mlx-distributed doctor --config configs/quickstart.yaml
  mlx-distributed doctor --config my.yaml data.max_seq_length=1024
  mlx-distributed doctor --config my.yaml --json | jq '.findings[] | select(.status != "ok")'

It reads, tokenises and plans as a run would, and goes on where a run would be refused. Nothing is trained, no weights
are read, and of a model of the Hub only the tokenizer is downloaded.

exit status: 0 nothing stands in the way, though there may be warnings; 2 a run would be refused, or train something
else than is meant
"""


def add_doctor(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb `doctor`."""
    verb = add_verb(
        verbs,
        "doctor",
        _doctor,
        summary="examine the data of a run, and what the model would see of them",
        description="Examine rows, chat template, labels, lengths, duplicates, settings, memory and time of a run.",
        epilog=EPILOG,
    )
    add_config(verb)
    verb.add_argument("--json", action="store_true", help="print one JSON object with all figures")


def _doctor(args: argparse.Namespace) -> int:
    # These import MLX and mlx-lm, which takes a second: `--help` need not wait for it.
    from mlx_distributed.cli.doctor.case import look
    from mlx_distributed.cli.doctor.estimate import estimate
    from mlx_distributed.cli.doctor.report import as_json, examine, show
    from mlx_distributed.cli.run import choose_device
    from mlx_distributed.config import load_config

    config = load_config(args.config, args.overrides)
    choose_device(config.train.device)
    case = look(config)
    report = examine(case, estimate(case))
    if args.json:
        print(json.dumps(as_json(report), indent=2))
    else:
        show(report)
    return report.exit_status
