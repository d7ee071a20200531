"""What a computation takes, read from its graph: MLX builds that from shapes alone, so nothing is computed or read."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_distributed.errors import ConfigError

LATE = 60
"""Primitives that MLX starts before it frees what an earlier one was the last to use, as tasks queue up. Peaks that are
measured on a CPU lie between those for 30 and for 100."""
MAX_WIDTH = 20
"""Of a level of the graph that MLX goes through breadth first (`MLX_BFS_MAX_WIDTH`)."""

_VIEWS = {
    *("AsStrided", "Broadcast", "Contiguous", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split"),
    *("Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
}
"""Primitives whose outputs are their first input, seen in another way."""
_COPIES = {"Contiguous", "Flatten", "Reshape"}
"""Of these, those that copy what was transposed."""
_PRODUCTS = {"AddMM", "GatherMM", "GatherQMM", "Matmul", "QuantizedMatmul"}
_ATTENTION = {"ScaledDotProductAttention": 4, "ScaledDotProductAttentionVJP": 10}
"""Operations per element of the scores and of the width of a head: two products, and five in the backward pass."""
_NEVER_IN_PLACE = {*_PRODUCTS, *_ATTENTION, "Concatenate", "Gather", "Scatter"}


class Phase(NamedTuple):
    """One evaluation."""

    flops: float
    """Of its products of matrices."""
    peak_bytes: int
    """The most that is held at a time, without what the computation was given."""
    held_bytes: int
    """When it is over: its results, those before it, and what later evaluations need."""


def trace(
    run: Callable[..., Sequence[Sequence[mx.array]]], arguments: Sequence[mx.array], own: Sequence[mx.array] = ()
) -> tuple[Phase, ...]:
    """The phases of a computation.

    An array lives until the last primitive that takes it has run, an elementwise primitive writes over an input of the
    same size that nobody else needs, and views take no memory.

    Args:
        run: takes the arguments and returns, by phase, what is evaluated then; all of that is held from then on.
        arguments: of which only shapes and dtypes matter. Other arrays that `run` uses, such as frozen weights, count
            as given too.
        own: further arguments, which are held from the beginning and count; nobody else holds them, so they are freed
            by the last primitive that takes them.

    Raises:
        ConfigError: MLX cannot export the graph.
    """
    sizes: list[int] = []

    def flat(*given: mx.array) -> list[mx.array]:
        phases = run(*given)
        sizes[:] = map(len, phases)
        return [array for phase in phases for array in phase]

    records: list[Mapping[str, Any]] = []
    try:
        mx.export_function(records.append, flat, *arguments, *own)
    except ValueError as error:
        if "Unable to get state for primitive" not in str(error):
            raise
        raise ConfigError(
            f"what the model takes cannot be foretold, as MLX cannot show the graph of its training ({error}), such as "
            "that of a mixture of experts; train it without train.memory_budget and parallel.pipeline"
        ) from None
    names = [name for record in records if record["type"] == "inputs" for name, *_ in record["inputs"]]
    sizes_own = dict(zip(names[len(arguments) :], (array.nbytes for array in own), strict=True))
    primitives = [_Primitive(record) for record in records if record["type"] == "primitive"]
    targets = [name for record in records if record["type"] == "outputs" for name, *_ in record["outputs"]]
    evaluation, phases, begin = _Evaluation(primitives, targets, sizes_own), [], 0
    for size in sizes:
        phases.append(evaluation.run(targets[begin : begin + size]))
        begin += size
    return tuple(phases)


class _Primitive:
    """A node of the graph."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.name: str = record["name"]
        self.inputs: list[str] = [name for name, *_ in record["inputs"]]
        self.outputs = {name: math.prod(shape) * dtype.size for name, shape, dtype in record["outputs"]}
        self.flops = 0.0
        shapes = [shape for _, shape, _ in record["inputs"]]
        if self.name in _PRODUCTS:
            self.flops = 2.0 * math.prod(record["outputs"][0][1]) * shapes[0][-1]
        elif self.name in _ATTENTION:
            self.flops = float(_ATTENTION[self.name]) * math.prod(shapes[0]) * shapes[1][-2]


class _Buffer:
    """Memory that an array and its views live in."""

    def __init__(self, num_bytes: int, num_users: int) -> None:
        self.num_bytes = num_bytes
        self.num_users = num_users
        """Primitives to come that take it, and results."""


class _Evaluation:
    """The arrays of a graph, as MLX evaluates it part by part."""

    def __init__(self, primitives: Sequence[_Primitive], results: Sequence[str], own: Mapping[str, int]) -> None:
        self._made_by = {name: primitive for primitive in primitives for name in primitive.outputs}
        self._num_users = Counter(name for primitive in primitives for name in primitive.inputs)
        self._num_users.update(set(results))
        self._done: set[_Primitive] = set()
        self._buffers = {name: _Buffer(num_bytes, self._num_users[name]) for name, num_bytes in own.items()}
        """By array; of those that are not given."""
        self._transposed: set[str] = set()
        self._held_bytes = sum(own.values())

    def run(self, targets: Sequence[str]) -> Phase:
        """Evaluate some arrays and what they depend on, as far as that is not there yet."""
        order = self._order(targets)
        flops, peak_bytes = 0.0, self._held_bytes
        late_bytes: deque[int] = deque(maxlen=LATE)
        for primitive in order:
            flops += primitive.flops
            if self._is_view(primitive):
                self._see(primitive)
                continue
            freed_bytes = self._make(primitive)
            peak_bytes = max(peak_bytes, self._held_bytes + freed_bytes + sum(late_bytes))
            late_bytes.append(freed_bytes)
        self._done.update(order)
        return Phase(flops, peak_bytes, self._held_bytes)

    def _order(self, targets: Sequence[str]) -> list[_Primitive]:
        """As `mx.eval` has it: from the end of the graph breadth first, but deeper where a level is too wide."""
        num_edges: Counter[_Primitive] = Counter()
        names = list(targets)
        while names:
            if (primitive := self._to_do(names.pop())) is not None:
                num_edges[primitive] += 1
                if num_edges[primitive] == 1:
                    names += primitive.inputs
        tape: list[_Primitive] = []
        inputs: Sequence[str]
        stack: list[tuple[Sequence[str], int]] = [(targets, 0)]
        position = 0
        while position < len(tape) or stack:
            if position < len(tape):
                inputs, first = tape[position].inputs, 0
                position += 1
            else:
                inputs, first = stack.pop()
            for index in range(first, len(inputs)):
                if (primitive := self._to_do(inputs[index])) is None:
                    continue
                if len(tape) - position >= MAX_WIDTH:
                    stack.append((inputs, index))
                    break
                num_edges[primitive] -= 1
                if not num_edges[primitive]:
                    tape.append(primitive)
        return tape[::-1]

    def _to_do(self, name: str) -> _Primitive | None:
        primitive = self._made_by.get(name)
        return None if primitive in self._done else primitive

    def _is_view(self, primitive: _Primitive) -> bool:
        copied = primitive.name in _COPIES and primitive.inputs[0] in self._transposed
        return primitive.name in _VIEWS and not copied

    def _see(self, primitive: _Primitive) -> None:
        """Make views."""
        source = primitive.inputs[0]
        buffer = self._buffers.get(source)
        if primitive.name == "Transpose" or source in self._transposed:
            self._transposed.update(primitive.outputs)
        if buffer is not None:
            buffer.num_users += sum(self._num_users[name] for name in primitive.outputs)
            self._buffers |= dict.fromkeys(primitive.outputs, buffer)
        self._release(primitive)

    def _make(self, primitive: _Primitive) -> int:
        """Make arrays; returns the bytes that are free afterwards."""
        for name, num_bytes in primitive.outputs.items():
            taken = (self._buffers.get(source) for source in primitive.inputs)
            last = (buffer for buffer in taken if buffer and buffer.num_users == 1 and buffer.num_bytes == num_bytes)
            buffer = None if primitive.name in _NEVER_IN_PLACE else next(last, None)
            if buffer is None:
                buffer = _Buffer(num_bytes, 0)
                self._held_bytes += num_bytes
            buffer.num_users += self._num_users[name]
            self._buffers[name] = buffer
        return self._release(primitive)

    def _release(self, primitive: _Primitive) -> int:
        freed_bytes = 0
        for name in primitive.inputs:
            buffer = self._buffers.get(name)
            if buffer is not None:
                buffer.num_users -= 1
                if not buffer.num_users:
                    freed_bytes += buffer.num_bytes
        self._held_bytes -= freed_bytes
        return freed_bytes
