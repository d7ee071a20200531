"""`mlx-distributed import-config`: a configuration of another program as one of ours."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlx_distributed.cli.import_config.render import report, to_text
from mlx_distributed.cli.import_config.tools import TOOLS, detect
from mlx_distributed.cli.import_config.translate import Translation, translate
from mlx_distributed.cli.verb import Verbs, add_verb
from mlx_distributed.config.checks import listed
from mlx_distributed.config.load import parse_config, read_mapping
from mlx_distributed.errors import ConfigError

EPILOG = """\
examples:
  mlx-distributed import-config qlora.yml --output my.yaml
  mlx-distributed import-config --from llamafactory --devices 4 qwen3_lora_sft.yaml --output my.yaml
  mlx-distributed import-config lora_config.yaml > my.yaml

The report names every key of the file: what it became, or why it is not needed, or that it has no counterpart. Run this
where the other program was run: paths in its files start there. LLaMA-Factory's dataset_info.json is looked for in
dataset_dir and beside the file.

exit status: 0 done; 1 it was written, and something in it must be set by hand; 2 nothing was written, because the file
cannot be read, or asks for something that would make the training another one (--force leaves that out)
"""


def add_import_config(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb `import-config`."""
    verb = add_verb(
        verbs,
        "import-config",
        _import_config,
        summary="turn a YAML file of Axolotl, LLaMA-Factory or mlx-lm into one of ours",
        description="Turn a YAML file of Axolotl, LLaMA-Factory or mlx-lm into one for mlx-train.",
        epilog=EPILOG,
    )
    verb.add_argument("file", type=Path, metavar="FILE", help="YAML file of the other program")
    verb.add_argument("--from", dest="tool", choices=TOOLS, help="whose it is (default: found out from its keys)")
    verb.add_argument("--output", type=Path, metavar="FILE", help="where ours is written (default: standard output)")
    verb.add_argument(
        "--devices", type=int, default=1, metavar="N", help="that it was meant for; batches there are per device (1)"
    )
    verb.add_argument("--force", action="store_true", help="leave out what would make the training another one")


def _import_config(args: argparse.Namespace) -> int:
    output: Path | None = args.output
    if args.devices < 1:
        raise ConfigError(f"--devices {args.devices}: there was at least one; give 1 or more")
    if output is not None and output.exists():
        raise ConfigError(f"--output {output} is there already; give another name, or remove it")
    translation = import_config(args.file, args.tool, args.devices, Path() if output is None else output.parent)
    print(report(translation, args.file.name), file=sys.stdout if output else sys.stderr)
    if (refused := translation.of("refused")) and not args.force:
        keys = ", ".join(finding.key for finding in refused)
        raise ConfigError(
            f"{args.file} asks for what is not here, and without it something else would be trained: {keys}. Nothing "
            "was written; give --force to leave that out, or go on training it there"
        )
    text = to_text(translation, args.file.name)
    if output is None:
        print(text, end="")
    else:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output {output} cannot be written ({error.strerror}); give another place") from error
        print(f"written: {output}")
    return check(text, output or Path("standard output"))


def import_config(path: Path, name: str | None, num_devices: int, base: Path) -> Translation:
    """The configuration at `path`, of the program `name`, or of the one whose keys it has.

    Raises:
        ConfigError: it cannot be read, is of no known program, or configures no training.
    """
    root = read_mapping(path)
    tool = detect(path, [key.value for key, _ in root.value]) if name is None else TOOLS[name]
    translation = translate(root, tool, num_devices, path.parent, base)
    if not translation.of("mapped"):
        raise ConfigError(
            f"{path} configures no training of {tool.title}: no key of it means anything here. Give the file that the "
            f"training is started with, or say of which program it is with --from {listed([*TOOLS])}"
        )
    return translation


def check(text: str, path: Path) -> int:
    """Exit status: 0 where our loader takes `text`, which stands at `path`; else 1, after saying what it lacks."""
    try:
        parse_config(text, path)
    except ConfigError as error:
        _, _, problems = str(error).partition("\n")
        print(f"Set by hand before it can be trained:\n{problems}", file=sys.stderr)
        return 1
    return 0
