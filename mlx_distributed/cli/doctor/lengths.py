"""How long the rows are, what a limit would cost, and how much of a micro-batch is padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import numpy as np

from mlx_distributed.cli.doctor.case import Case
from mlx_distributed.cli.doctor.finding import Finding, counted, percent
from mlx_distributed.cli.parts import make_plan
from mlx_distributed.cli.plan.inputs import MAX_STEPS, all_batches
from mlx_distributed.config.schema import ParallelConfig

PERCENTILES = (50, 90, 95, 99)
_BAR_CHARS = 40
_LINE = "{:>8}  {:>8}  {:<40}  {}"


@dataclass(frozen=True)
class Bin:
    """Rows with `first` to `last` tokens."""

    first: int
    last: int
    num_rows: int
    num_longer: int
    """Rows that are longer than `last`."""
    longer_tokens: int
    """Tokens of those rows."""


@dataclass(frozen=True)
class Lengths:
    """Of all valid rows in tokens, before any is cut or dropped."""

    num_rows: int
    num_tokens: int
    longest: int
    percentiles: tuple[tuple[int, int], ...]
    """Percent of the rows, and the most tokens that they have."""
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Padding:
    """Share of the tokens of micro-batches."""

    side_by_side: float
    """By length, as without `data.packing`."""
    packed: float


def measure_lengths(case: Case) -> Lengths | None:
    """None where nothing was tokenised."""
    lengths = np.sort([seen.outcome.num_tokens for seen in case.seen if seen.outcome and not seen.outcome.invalid])
    if not len(lengths):
        return None
    ranks = [(share, -(-len(lengths) * share // 100) - 1) for share in PERCENTILES]
    return Lengths(
        num_rows=len(lengths),
        num_tokens=int(lengths.sum()),
        longest=int(lengths[-1]),
        percentiles=tuple((share, int(lengths[rank])) for share, rank in ranks),
        bins=tuple(_bins(lengths, case.config.data.max_seq_length)),
    )


def measure_padding(case: Case) -> Padding | None:
    """Of a run, or of its first `MAX_STEPS`; None where there is no plan."""
    if case.tokenized is None:
        return None
    shares = []
    for packing in (False, True):
        # Padding does not depend on the number of workers, which one way of packing may be too few micro-batches for.
        config = replace(case.config, data=replace(case.config.data, packing=packing), parallel=ParallelConfig())
        plan, batches = make_plan(config, case.tokenized), all_batches(config, case.tokenized)
        num_steps = min(plan.num_steps, MAX_STEPS)
        rows = chain.from_iterable(chain.from_iterable(map(plan.microbatches, range(num_steps))))
        num_places = sum(batch.tokens.size for batch in batches)
        shares.append(1 - sum(plan.lengths[row] for row in rows) / num_places)
    return Padding(*shares)


def check_lengths(case: Case, lengths: Lengths) -> Iterator[Finding]:
    """Against the limit of the configuration."""
    limit = case.config.data.max_seq_length
    shown = ", ".join(f"{share} % have at most {tokens}" for share, tokens in lengths.percentiles)
    mean = lengths.num_tokens / lengths.num_rows
    text = f"{mean:.0f} tokens on average, {shown}, the longest {lengths.longest}; data.max_seq_length={limit}"
    yield Finding("lengths", "ok", text)


def check_padding(case: Case, padding: Padding) -> Iterator[Finding]:
    """With the micro-batches of the configuration, and the other way to lay rows."""
    if case.config.data.packing:
        yield Finding("padding", "ok", f"{padding.packed:.1%} packed; {padding.side_by_side:.1%} without data.packing")
    else:
        text = f"{padding.side_by_side:.1%}, rows side by side by length; {padding.packed:.1%} with data.packing=true"
        yield Finding("padding", "ok", text)


def histogram(lengths: Lengths) -> Iterator[str]:
    """A line for each bin from the first that holds rows on."""
    yield _LINE.format("tokens", "rows", "", "longer, which a limit here drops or cuts")
    most = max(bin.num_rows for bin in lengths.bins)
    for bin in lengths.bins:
        if bin.num_longer < lengths.num_rows:
            bar = "#" * -(-_BAR_CHARS * bin.num_rows // most)
            shares = percent(bin.num_longer, lengths.num_rows), percent(bin.longer_tokens, lengths.num_tokens)
            longer = f"{counted(bin.num_longer)} ({shares[0]}), {shares[1]} of the tokens" if bin.num_longer else "-"
            yield _LINE.format(f"<= {bin.last}", bin.num_rows, bar, longer)


def _bins(lengths: np.ndarray, limit: int) -> Iterator[Bin]:
    """Up to powers of two, and up to the limit."""
    edges = [16]
    while edges[-1] < lengths[-1]:
        edges.append(2 * edges[-1])
    if limit < edges[-1]:
        edges.append(limit)
    edges = [0, *sorted({*edges})]
    ends = np.searchsorted(lengths, edges, side="right").tolist()
    for (before, edge), (start, stop) in zip(pairwise(edges), pairwise(ends), strict=True):
        yield Bin(before + 1, edge, stop - start, len(lengths) - stop, int(lengths[stop:].sum()))
