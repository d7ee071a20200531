"""Import every YAML of a folder, such as a clone of Axolotl, LLaMA-Factory or mlx-lm, and count what became of keys.

    python tests/benchmarks/import_configs.py --folder axolotl/examples --root axolotl

A file that crashes the import, or a key that is not named exactly once, ends it with status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mlx_distributed.cli.import_config.command import import_config
from mlx_distributed.cli.import_config.render import to_text
from mlx_distributed.cli.import_config.translate import UNKNOWN, Translation, leaves
from mlx_distributed.config.load import parse_config, read_mapping
from mlx_distributed.errors import ConfigError

KINDS = ("mapped", "not needed", "no counterpart", "refused")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="with YAML files, also in folders of it")
    parser.add_argument("--root", type=Path, help="where the other program is run (default: the folder)")
    parser.add_argument("--verbose", action="store_true", help="print a line for every file")
    args = parser.parse_args()
    folder = args.folder.absolute()
    os.chdir(args.root or folder)
    files: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml")):
        group, line = "no training of theirs", ""
        with contextlib.suppress(ConfigError):
            translation = import_config(path, None, 1, Path())
            check_every_key(path, translation)
            counts = Counter(finding.fate.kind for finding in translation.findings if not finding.default)
            refused = [finding.key for finding in translation.of("refused")]
            group = "refused" if refused else "imported"
            problems = [] if refused else [*to_be_set(translation)]
            files["imported, and to be completed by hand"] += bool(problems)
            if not refused:
                keys.update(counts)
                unknown.update(finding.key for finding in translation.findings if finding.fate == UNKNOWN)
            line = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
            line = f"{translation.tool.name}: {line}; {' '.join(refused)}{'; '.join(problems)}"
        files[group] += 1
        if args.verbose:
            print(f"{path.relative_to(folder)}: {group}: {line}")
    print(", ".join(f"{files[group]} {group}" for group in sorted(files)))
    print(f"keys of the imported: {', '.join(f'{keys[kind]} {kind}' for kind in KINDS[:3])}")
    print(f"of those without a counterpart, {sum(unknown.values())} are named only: {dict(unknown.most_common())}")
    return 0


def check_every_key(path: Path, translation: Translation) -> None:
    wanted = Counter(key for key, _ in leaves(read_mapping(path)))
    found = Counter(finding.key for finding in translation.findings if not finding.default)
    if wanted != found:
        raise AssertionError(f"{path}: {wanted - found} are not named, {found - wanted} are named too often")


def to_be_set(translation: Translation) -> Iterator[str]:
    try:
        parse_config(to_text(translation, "x"), Path("x"))
    except ConfigError as error:
        yield from str(error).splitlines()[1:]


if __name__ == "__main__":
    sys.exit(main())
