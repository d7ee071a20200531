"""`mlx-distributed export`: a trained model as others load it."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_distributed.cli.verb import Verbs, add_verb
from mlx_distributed.errors import ConfigError

EPILOG = """\
examples:
  mlx-distributed export runs/my-model
  mlx-distributed export runs/my-model --checkpoint best --output my-model
  mlx-distributed export runs/my-qlora --dequantize --dtype float16 --gguf f16
  mlx-distributed export runs/my-model/checkpoints/step-00000100 --adapter --output my-adapter
  mlx-distributed export runs/my-model --output my-model --upload me/my-model --private

Adapters are fused into the model that they were trained on, so that the folder needs nothing else. A quantised model
stays quantised: the sum is rounded to its few bits again, which loses some of what was learned; --dequantize keeps it
for more bytes, and --adapter leaves the two apart. The folder comes with a model card of the run: its configuration
with names in place of local paths, what became of the data, and what was measured. Read it before you show it.
Weights are written one by one; a GGUF file, which is for llama and mistral models, is made in memory. Nothing is sent
anywhere but with --upload.

exit status: 0 done; 1 a checkpoint is not whole, the disk is full, or what is whole could not be uploaded; 2 it was
refused, and nothing was written
"""


def add_export(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb `export`."""
    verb = add_verb(
        verbs,
        "export",
        _export,
        summary="write a trained model as others load it, with a model card",
        description="Write a trained model as a folder that others load, with a model card, and upload it if asked to.",
        epilog=EPILOG,
    )
    verb.add_argument(
        "path", type=Path, metavar="PATH", help="an output_dir, a checkpoint in it, or a model or adapter folder"
    )
    verb.add_argument("--output", type=Path, metavar="DIR", help="what to write (default: `export` beside the model)")
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    verb.add_argument("--checkpoint", choices=("last", "best"), help="of the output_dir, in place of its final/")
    verb.add_argument("--adapter", action="store_true", help="the adapters alone, not fused")
    verb.add_argument("--dequantize", action="store_true", help="turn quantised weights into plain ones")
    verb.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as they are)"
    )
    verb.add_argument("--gguf", choices=("f16", "f32"), help="write a GGUF file too, for llama.cpp and its kin")
    verb.add_argument("--upload", metavar="USER/NAME", help="send it to this repository of the Hugging Face Hub")
    verb.add_argument("--private", action="store_true", help="nobody else may see the repository")


def _export(args: argparse.Namespace) -> int:
    given = [f"--{name}" for name in ("dequantize", "dtype", "gguf") if getattr(args, name)]
    if args.adapter and given:
        raise ConfigError(f"--adapter leaves the model below the adapters as it is; leave {given[0]} out, or --adapter")
    if args.private and args.upload is None:
        raise ConfigError("--private is about what is uploaded; give --upload USER/NAME too, or leave it out")
    # These import mlx-lm, which takes seconds: `--help` and a mistyped argument need not wait for it.
    from mlx_distributed.cli.export.card import is_export
    from mlx_distributed.cli.export.source import open_source, place
    from mlx_distributed.cli.export.upload import open_hub, upload
    from mlx_distributed.cli.export.write import Wish, write

    folder = place(args.path, args.checkpoint)
    output: Path = args.output or _beside(folder)
    if output.exists():
        if not is_export(output):
            raise ConfigError(f"--output {output} is there already, and is no export; give another name")
        if not args.overwrite:
            raise ConfigError(
                f"--output {output} is an earlier export; give another name, or --overwrite to replace it"
            )
        if output.resolve() == folder.resolve():
            raise ConfigError(f"--output {output} is what is to be exported; give another name")
    hub = None if args.upload is None else open_hub(args.upload)
    source = open_source(folder)
    print(f"exporting {source.title}")
    wish = Wish(args.adapter, args.dequantize, args.dtype, args.gguf)
    name = args.upload or (output if args.output else output.parent).resolve().name
    for line in write(source, wish, output, name):
        print(line)
    print(f"written: {output}, with a model card in README.md")
    if hub is not None:
        print(f"uploaded: {upload(hub, args.upload, output, private=args.private)}")
    return 0


def _beside(folder: Path) -> Path:
    """`export` in the folder of the run, or beside a model of no run."""
    parent = folder.resolve().parent
    return (parent.parent if parent.name == "checkpoints" else folder.parent) / "export"
