"""Seconds of `mlx-distributed doctor` on files of rows, from its start to its end, and whether its counts add up.

A model of 0.1 M parameters stands for the one to be trained, with a tokenizer that is trained on the rows.

    uv run python tests/benchmarks/doctor.py --data FOLDER

exit status: 0 every report adds up and comes in time; 1 one does not
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from common import MODELS, Table, parser, print_machine, workplace

LIMIT_S = 10.0


def configuration(data: Path) -> dict[str, Any]:
    """Of a run on one file."""
    scratch = MODELS["0.1M"] | {"model_type": "qwen3", "max_position_embeddings": 4096, "vocab_size": 2048}
    return {
        "model": {"scratch": scratch},
        "method": "full",
        "data": {"train": str(data), "val_fraction": 0.1},
        "optimizer": {"learning_rate": 1e-3},
    }


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="of .json files of rows")
    args = arguments.parse_args()
    print_machine()
    table = Table("file", "rows", "train", "validation", "invalid", "dropped", "untrainable", "adds up", "seconds")
    fine = True
    with workplace(args.blas) as folder:
        for data in sorted(args.data.glob("*.json")):
            config = folder / "config.yaml"
            config.write_text(yaml.safe_dump(configuration(data.resolve())), encoding="utf-8")
            command = [Path(sys.executable).with_name("mlx-distributed"), "doctor", "--json", "--config", config]
            begin_s = time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            seconds = time.perf_counter() - begin_s
            rows = json.loads(done.stdout)["rows"]
            names = ("num_train", "num_validation", "num_dropped", "num_untrainable")
            train, validation, dropped, untrainable = (rows[name] for name in names)
            invalid = sum(rows["invalid"].values())
            adds_up = train + validation + invalid + dropped + untrainable == rows["num_read"]
            fine = fine and adds_up and seconds < LIMIT_S
            figures = (rows["num_read"], train, validation, invalid, dropped, untrainable)
            table.print(data.name, *figures, "yes" if adds_up else "NO", f"{seconds:.1f}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
