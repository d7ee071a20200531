"""`mlx-distributed preview`: rows as the model is given them, before anything is trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_distributed.cli.verb import Verbs, add_config, add_verb
from mlx_distributed.errors import ConfigError

NUM_ROWS = 3
EPILOG = """\
examples:
  mlx-distributed preview --config configs/quickstart.yaml
  mlx-distributed preview --config my.yaml --row 120 data.train_on=last
  mlx-distributed preview --config my.yaml --split validation --rows 20 | less
  mlx-distributed preview --config my.yaml --step 1 data.packing=true
  mlx-distributed preview --config my.yaml --html preview.html

Everything comes from what trains: the same reading, chat template, tokens, labels and micro-batches. No weights are
read, and of a Hugging Face model only the small files are downloaded. With data.packing the first micro-batch is shown
too, as it is trained.

exit status: 0 done; 2 the configuration, the data or an argument was refused
"""


def add_preview(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb `preview`."""
    verb = add_verb(
        verbs,
        "preview",
        _preview,
        summary="show rows as the model sees them, and what of them is trained",
        description="Show the text of rows, token by token as the model is given it, with what is trained marked.",
        epilog=EPILOG,
    )
    add_config(verb)
    verb.add_argument("--split", choices=("train", "validation"), help="which rows (default: train)")
    verb.add_argument("--row", type=int, metavar="K", help="begin at this row, from 1, of those that are not left out")
    verb.add_argument("--rows", type=int, metavar="N", help=f"how many (default: {NUM_ROWS}; 1 with --row)")
    verb.add_argument("--step", type=int, metavar="T", help="all micro-batches of this step, from 1, instead")
    verb.add_argument("--html", type=Path, metavar="FILE", help="write a page for the browser instead")


def _preview(args: argparse.Namespace) -> int:
    _check(args)
    # These import mlx-lm, which takes a second: `--help` and a mistyped argument need not wait for it.
    from mlx_distributed.cli.parts import load_rows, make_plan
    from mlx_distributed.cli.preview.html import page
    from mlx_distributed.cli.preview.pieces import Viewer
    from mlx_distributed.cli.preview.text import show
    from mlx_distributed.config import load_config

    config = load_config(args.config, args.overrides)
    tokenizer, rows = load_rows(config)
    viewer = Viewer(config, tokenizer, rows, None if config.data.streaming else make_plan(config, rows))
    if args.step is not None:
        sections = viewer.step(args.step)
    else:
        count = args.rows or (NUM_ROWS if args.row is None else 1)
        sections = [viewer.rows(args.split or "train", args.row or 1, count)]
        if config.data.packing and not config.data.streaming and args.split != "validation":
            sections.append(viewer.step(1)[0])
    notes = rows.report.lines()
    if args.html is None:
        show(sections, notes)
        return 0
    try:
        args.html.write_text(page(f"preview of {args.config}", sections, notes), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {args.html} cannot be written: {error.strerror}") from error
    print(f"written to {args.html}; open it in a browser")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Arguments that are wrong whatever the data are."""
    for name in ("row", "rows", "step"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name} {value}: give a number from 1 on")
    if args.step is not None:
        given = [f"--{name}" for name in ("split", "row", "rows") if getattr(args, name) is not None]
        if given:
            raise ConfigError(f"--step shows all rows of a step, which are training rows; leave {given[0]} out")
