"""What the parent prints of what rank 0 says."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_distributed.cli.bench.figures import Link, Row
from mlx_distributed.cli.bench.options import Options
from mlx_distributed.cli.bench.picture import draw_links
from mlx_distributed.cli.bench.table import link_lines, machine, row_heading, row_line


class Report:
    """Lines for a person, or JSON and nothing else, on stdout.

    Args:
        options: of the benchmark.
        as_json: print rows as JSON.
        picture: where to draw the links, or None.
    """

    where = "on this machine"
    """The ranks are."""

    def __init__(self, options: Options, as_json: bool, picture: Path | None) -> None:
        self._options, self._as_json, self._picture = options, as_json, picture
        self._links: list[Link] = []

    def begin(self) -> None:
        """Before any rank is started."""
        if self._as_json:
            return
        options = self._options
        print(machine())
        print(f"{options.op}, {options.num_ranks} ranks {self.where}, medians of {options.num_rounds} rounds\n")
        if options.op != "links":
            print(row_heading(), flush=True)

    def hear(self, message: Mapping[str, Any]) -> None:
        """Take in what rank 0 says: a row, a link or a note."""
        if "note" in message:
            print(f"note: {message['note']}", file=sys.stderr)
        elif "row" in message:
            self._print(Row(**message["row"]))
        elif "link" in message:
            link = Link(**message["link"])
            self._links.append(link)
            if self._as_json:
                for row in link.rows():
                    self._print(row)

    def end(self) -> None:
        """After all ranks have ended well."""
        if not self._links:
            return
        if not self._as_json:
            print("\n".join(link_lines(self._links)))
        if self._picture is not None:
            self._picture.write_text(draw_links(self._links), encoding="utf-8")

    def _print(self, row: Row) -> None:
        print(json.dumps(row.as_json()) if self._as_json else row_line(row), flush=True)
