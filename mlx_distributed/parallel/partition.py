"""Which worker gets which layers of a pipeline: as even in time as their memory allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from mlx_distributed.errors import ConfigError


@dataclass(frozen=True)
class LayerCosts:
    """Of one layer. The embedding and the head are layers too, at the two ends."""

    compute_s: float
    """Of F, B and W for one micro-batch, on a worker of speed 1."""
    state_bytes: int
    """Weights, gradients and optimizer state, whether or not anything is computed."""
    activation_bytes: int = 0
    """Held for each micro-batch in flight."""


@dataclass(frozen=True)
class Worker:
    """The one that has a stage."""

    speed: float
    """How many times faster than the machine that the layers were measured on."""
    memory_bytes: int
    """That training may take."""
    in_flight: int
    """Micro-batches that its stage holds at a time, which depends on the schedule."""


@dataclass(frozen=True)
class StagePlan:
    """One stage: its part of the layers and what that takes."""

    first: int
    """Layer, without the embedding, which is part of the first stage."""
    stop: int
    """Layer after the last one. The head is part of the last stage."""
    compute_s: float
    """For one micro-batch on its worker."""
    state_bytes: int
    activation_bytes: int
    """Of all micro-batches in flight."""


@dataclass(frozen=True)
class Partition:
    """All stages, in order."""

    stages: tuple[StagePlan, ...]

    @property
    def split(self) -> tuple[int, ...]:
        """Layers of each stage, as in `parallel.pipeline.split`."""
        return tuple(stage.stop - stage.first for stage in self.stages)


def partition(
    layers: Sequence[LayerCosts], embedding: LayerCosts, head: LayerCosts, workers: Sequence[Worker]
) -> Partition:
    """The cut whose slowest stage is fastest among those that fit; of such cuts, the most even one.

    Exact, by dynamic programming over workers and places to cut: O(workers x layers^2).

    Args:
        layers: without the two at the ends.
        embedding: what the first stage has besides.
        head: what the last stage has besides: norm and head, and another copy of a tied embedding.
        workers: one per stage, in order. One with several stages is there as often, each time with a part of its
            memory.

    Raises:
        ConfigError: there are fewer layers than workers, or no cut fits; the message says which worker lacks how much.
    """
    _check_num_stages(len(layers), len(workers))
    plan = _planner(layers, embedding, head, workers)

    def lack_bytes(stage: int, first: int, stop: int) -> float:
        return max(0, _lack_bytes(plan(stage, first, stop), workers[stage]))

    def compute_s(stage: int, first: int, stop: int) -> float:
        return math.inf if lack_bytes(stage, first, stop) else plan(stage, first, stop).compute_s

    def unevenness(stage: int, first: int, stop: int) -> float:
        taken_s = compute_s(stage, first, stop)
        return math.inf if taken_s > slowest_s else taken_s**2

    size = len(layers), len(workers)
    lack, cuts = _cut(*size, lack_bytes, lambda before, own: before + own)
    if lack:
        _refuse(_stages(plan, cuts), workers)
    slowest_s, _ = _cut(*size, compute_s, max)
    _, cuts = _cut(*size, unevenness, lambda before, own: before + own)
    return Partition(_stages(plan, cuts))


def partition_by(
    split: Sequence[int],
    layers: Sequence[LayerCosts],
    embedding: LayerCosts,
    head: LayerCosts,
    workers: Sequence[Worker],
) -> Partition:
    """The cut that is given as the number of layers of each stage; other arguments as for `partition`.

    Raises:
        ConfigError: the numbers do not fit the layers or the workers, or a stage does not fit its worker.
    """
    check_split(split, len(layers), len(workers))
    stages = _stages(_planner(layers, embedding, head, workers), [0, *accumulate(split)])
    if any(_lack_bytes(stage, worker) > 0 for stage, worker in zip(stages, workers, strict=True)):
        _refuse(stages, workers)
    return Partition(stages)


def check_split(split: Sequence[int], num_layers: int, num_stages: int) -> None:
    """Check an explicit `parallel.pipeline.split`.

    Raises:
        ConfigError: not as many numbers as stages, one below 1, or another sum than there are layers.
    """
    _check_num_stages(num_layers, num_stages)
    given = f"split={list(split)}"
    example = [stop - first for first, stop in pairwise(num_layers * i // num_stages for i in range(num_stages + 1))]
    if len(split) != num_stages:
        problem = f"has {len(split)} numbers, and there are {num_stages} stages"
    elif min(split) < 1:
        problem = "leaves a stage without layers"
    elif sum(split) != num_layers:
        problem = f"adds up to {sum(split)}, and the model has {num_layers} layers"
    else:
        return
    raise ConfigError(f"{given} {problem}; write the layers of each stage, such as {example}, or auto")


def _check_num_stages(num_layers: int, num_stages: int) -> None:
    if num_stages > num_layers:
        raise ConfigError(
            f"{num_stages} stages for {num_layers} layers: a stage has one layer at least, so use at most {num_layers}"
        )


Planner = Callable[[int, int, int], StagePlan]
"""From the stage, its first layer and the one after its last."""
Cost = Callable[[int, int, int], float]


def _planner(
    layers: Sequence[LayerCosts], embedding: LayerCosts, head: LayerCosts, workers: Sequence[Worker]
) -> Planner:
    compute_s = [0.0, *accumulate(layer.compute_s for layer in layers)]
    state_bytes = [0, *accumulate(layer.state_bytes for layer in layers)]
    activation_bytes = [0, *accumulate(layer.activation_bytes for layer in layers)]

    def plan(stage: int, first: int, stop: int) -> StagePlan:
        worker = workers[stage]
        ends = [end for end, there in ((embedding, first == 0), (head, stop == len(layers))) if there]
        return StagePlan(
            first,
            stop,
            (compute_s[stop] - compute_s[first] + sum(end.compute_s for end in ends)) / worker.speed,
            state_bytes[stop] - state_bytes[first] + sum(end.state_bytes for end in ends),
            (activation_bytes[stop] - activation_bytes[first] + sum(end.activation_bytes for end in ends))
            * worker.in_flight,
        )

    return plan


def _cut(
    num_layers: int, num_stages: int, cost: Cost, combine: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """The least combined cost of the stages, and the places to cut, from 0 to `num_layers`."""
    best: list[dict[int, tuple[float, int]]] = [
        {0: (0.0, 0)}
    ]  # By stage and place reached: the cost, the place before.
    for stage in range(num_stages):
        places = range(stage + 1, num_layers - (num_stages - 1 - stage) + 1)
        if stage == num_stages - 1:
            places = range(num_layers, num_layers + 1)
        best.append(
            {
                stop: min(
                    (combine(before, cost(stage, first, stop)), first)
                    for first, (before, _) in best[stage].items()
                    if first < stop
                )
                for stop in places
            }
        )
    cuts = [num_layers]
    for stage in range(num_stages, 0, -1):
        cuts.append(best[stage][cuts[-1]][1])
    return best[num_stages][num_layers][0], cuts[::-1]


def _stages(plan: Planner, cuts: Sequence[int]) -> tuple[StagePlan, ...]:
    return tuple(plan(stage, first, stop) for stage, (first, stop) in enumerate(pairwise(cuts)))


def _lack_bytes(stage: StagePlan, worker: Worker) -> int:
    return stage.state_bytes + stage.activation_bytes - worker.memory_bytes


def _refuse(stages: Sequence[StagePlan], workers: Sequence[Worker]) -> None:
    lacking = "; ".join(
        f"worker {index} lacks {lack / 1e6:.1f} MB for {stage.stop - stage.first} layers, which take "
        f"{stage.state_bytes / 1e6:.1f} MB for weights, gradients and optimizer and {stage.activation_bytes / 1e6:.1f} "
        f"MB for {worker.in_flight} micro-batches in flight, where it has {worker.memory_bytes / 1e6:.1f} MB"
        for index, (stage, worker) in enumerate(zip(stages, workers, strict=True))
        if (lack := _lack_bytes(stage, worker)) > 0
    )
    raise ConfigError(
        f"split={[stage.stop - stage.first for stage in stages]} does not fit: {lacking}; use smaller micro-batches, "
        "LoRA, or more workers"
    )
