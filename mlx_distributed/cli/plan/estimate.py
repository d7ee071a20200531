"""What a run would take: memory and time of each worker, for a way to cut the model and a schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

from mlx_distributed.cli.plan.work import Model, Shape, StageWork
from mlx_distributed.cli.stages import make_schedule
from mlx_distributed.config.schema import PipelineConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models.costs import Cost
from mlx_distributed.parallel.choose import choose
from mlx_distributed.parallel.partition import LayerCosts, Partition, Worker, check_split, partition
from mlx_distributed.parallel.schedule import Schedule
from mlx_distributed.parallel.simulate import Costs, Simulation, StageCosts, simulate

Name = Literal["1f1b", "gpipe", "interleaved", "zb-h1"]
UNLIMITED = 1 << 62
_COUNTED = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the memory to compute a layer that are tried. Together layers take less for it than the sum of what each
takes alone, and how much less is only known when they are traced together."""
MOMENTS_BYTES, GRADIENT_BYTES = 8, 4
"""Per value that is trained: two moments, and a gradient, of float32."""


@dataclass(frozen=True)
class Workers:
    """Of one copy of the model, in the order of its stages."""

    speeds: tuple[float, ...]
    """Relative to `flops`."""
    memory_bytes: tuple[int, ...]
    flops: float
    """Per second, of a worker of speed 1."""
    link_bytes_per_s: float
    """Between neighbours, in each direction."""


@dataclass(frozen=True)
class Load:
    """What one copy of the model computes in a step."""

    num_microbatches: int
    num_sums: int
    """Of gradients that are held at most, while micro-batches are added up; of a model in one piece, while another one
    than the last is computed, whose gradient comes to them."""
    shape: Shape
    """Of the longest micro-batch: memory must do for it."""
    mean: float
    """Tokens of a micro-batch, as a share of those of the longest: time is in proportion to them."""
    wire_bytes: int
    """Of a value that travels between stages; 0 for those that the model computes with."""
    moments: float = 1.0
    """Share of the moments of its parameters that a worker has."""
    num_sums_last: int = 0
    """Of a model in one piece, gradients that are held when the last micro-batch is computed, its own among them; 0 in
    a pipeline."""


@dataclass(frozen=True)
class WorkerPlan:
    """One worker."""

    layers: tuple[tuple[int, int], ...]
    """First and last of each of its stages."""
    cost: Cost
    optimizer_bytes: int
    gradients_bytes: int
    held_bytes: int
    """For backward passes to come, of all micro-batches in flight."""
    working_bytes: int
    """For the micro-batch that is computed."""
    memory_bytes: int
    """That it has."""
    in_flight: int
    compute_s: float
    """For one micro-batch."""
    idle: float
    """Share of the step."""
    sent_bytes: int
    """In a step, to the next worker and to the one before."""

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.held_bytes + self.working_bytes

    @property
    def state_bytes(self) -> int:
        return self.cost.num_bytes + self.optimizer_bytes + self.gradients_bytes

    @property
    def lack_bytes(self) -> int:
        """Above 0 where it does not fit."""
        return self.total_bytes - self.memory_bytes


@dataclass(frozen=True)
class Plan:
    """All workers of one copy of the model."""

    settings: PipelineConfig
    split: tuple[int, ...]
    schedule: Schedule
    simulation: Simulation
    workers: tuple[WorkerPlan, ...]

    @property
    def fits(self) -> bool:
        return all(worker.lack_bytes <= 0 for worker in self.workers)


@dataclass(frozen=True)
class Comparison:
    """Of schedules."""

    plans: tuple[Plan, ...]
    best: Plan
    """Of those that fit."""
    reason: str


class Planner:
    """Plans runs of one model on the same workers."""

    def __init__(self, model: Model, workers: Workers, load: Load) -> None:
        self.model, self.workers, self.load = model, workers, load

    def plan(self, settings: PipelineConfig) -> Plan:
        """With the split and the schedule that are given; or where they are `auto`, with one by speed and memory, and
        the fastest. It need not fit.

        Raises:
            ConfigError: the split is not one of the layers of the model.
        """
        if settings.schedule == "auto":
            plan = self.plan(replace(settings, schedule="1f1b"))
            comparison = self.compare(plan.settings, plan) if plan.fits else None
            return comparison.best if comparison else plan
        num_stages = len(self.workers.speeds) * settings.chunks
        if settings.split != "auto":
            check_split(settings.split, self.model.num_layers, num_stages)
            return self._of(settings.split, settings)
        plan = self._of(self._cut(settings, None).split, settings)
        for counted in _COUNTED:
            if plan.fits:
                break
            try:
                other = self._of(self._cut(settings, counted).split, settings)
            except ConfigError:
                break  # No cut fits; with more counted none would.
            plan = other if other.fits else plan
        return plan

    def compare(self, settings: PipelineConfig, plan: Plan) -> Comparison | None:
        """A plan that fits beside others, one for each schedule that `parallel.pipeline.schedule` can name; None on one
        worker, where there is nothing to choose."""
        num_workers = len(self.workers.speeds)
        if num_workers == 1:
            return None
        plans = []
        for chunks in sorted({1, 2, settings.chunks} if settings.split == "auto" else {settings.chunks}):
            if chunks * num_workers <= self.model.num_layers:
                names: tuple[Name, ...] = ("interleaved",) if chunks > 1 else ("1f1b", "zb-h1", "gpipe")
                changed = [replace(settings, schedule=name, chunks=chunks) for name in names]
                split = plan.split if chunks == settings.chunks else self.plan(changed[0]).split
                plans += [self._of(split, each) for each in changed]
        fitting = [plan for plan in plans if plan.fits]
        costs = {plan.schedule.num_chunks: self._costs(self._works(plan.split), plan.split) for plan in fitting}
        choice = choose([plan.schedule for plan in fitting], costs, [UNLIMITED] * num_workers)
        best = next(plan for plan in fitting if plan.schedule is choice.schedule)
        return Comparison(tuple(plans), best, choice.reason)

    def _cut(self, settings: PipelineConfig, counted: float | None) -> Partition:
        """By speed, and if `counted` is given within the memory, of which so much is meant for computing."""
        workers, model = self.workers, self.model
        num_workers = len(workers.speeds)
        in_flight = make_schedule(settings, num_workers, self.load.num_microbatches).in_flight
        split = [
            Worker(
                workers.speeds[worker],
                workers.memory_bytes[worker] // settings.chunks if counted is not None else UNLIMITED,
                in_flight[worker],
            )
            for worker in [*range(num_workers)] * settings.chunks
        ]
        inner: dict[Cost, int] = {}
        for index in [*range(1, model.num_layers - 1), 0, model.num_layers - 1]:
            inner.setdefault(model.costs.layers[index], index)
        layers = [self._layer(counted or 0.0, cost, self._work(inner[cost])) for cost in model.costs.layers]
        head = model.costs.head + model.costs.embedding if model.costs.tied else model.costs.head
        ends = [
            self._layer(counted or 0.0, cost, self._work(index), self._work(inner[model.costs.layers[index]]))
            for cost, index in ((model.costs.embedding, 0), (head, model.num_layers - 1))
        ]
        return partition(layers, ends[0], ends[1], split)

    def _work(self, index: int) -> StageWork:
        """Of one layer, with what stands at its end of the model."""
        return self.model.work(index, index + 1, self.load.shape)

    def _layer(self, counted: float, cost: Cost, work: StageWork, other: StageWork | None = None) -> LayerCosts:
        """What a layer takes; or an embedding or a head, which takes what its layer takes more than another one."""
        flops, working_bytes, held_bytes = work.flops, work.working_bytes, work.held_bytes
        if other is not None:
            flops = max(flops - other.flops, 0.0)
            working_bytes, held_bytes = (
                max(working_bytes - other.working_bytes, 0),
                max(held_bytes - other.held_bytes, 0),
            )
        state_bytes = cost.num_bytes + sum(self._training_bytes(cost)) + round(counted * working_bytes)
        return LayerCosts(flops, state_bytes, held_bytes)

    def _training_bytes(self, cost: Cost) -> tuple[int, int]:
        moments = round(MOMENTS_BYTES * cost.num_trainable * self.load.moments)
        return moments, GRADIENT_BYTES * cost.num_trainable * self.load.num_sums

    def _largest(self, num_trainable: int, working_bytes: int) -> tuple[int, int]:
        """Bytes of gradients, and to compute a micro-batch, of a model in one piece, when it takes most: with the last
        micro-batch, or with another one, which takes `working_bytes`."""
        load, size = self.load, GRADIENT_BYTES * num_trainable
        last = self.model.work(0, self.model.num_layers, replace(load.shape, order="bucket by bucket"))
        ways = [(load.num_sums_last * size, last.working_bytes)]
        if load.num_microbatches > 1:
            ways.append(((load.num_sums + 1) * size, working_bytes - size))
        return max(ways, key=sum)

    def _works(self, split: Sequence[int]) -> list[StageWork]:
        return [self.model.work(*pair, self.load.shape) for pair in pairwise([0, *accumulate(split)])]

    def _costs(self, works: Sequence[StageWork], split: Sequence[int]) -> Costs:
        num_workers, load = len(self.workers.speeds), self.load
        rates = [self.workers.flops * speed / load.mean for speed in self.workers.speeds]
        stages = []
        for stage, work in enumerate(works):
            rate = rates[stage % num_workers]
            times_s = work.forward_flops / rate, work.backward_flops / rate, work.weight_flops / rate
            stages.append(StageCosts(*times_s, activation_bytes=work.held_bytes, residual_bytes=work.residual_bytes))
        link_s = max(self._message_bytes(split)) / self.workers.link_bytes_per_s
        return Costs(tuple(stages), (link_s,) * num_workers)

    def _message_bytes(self, split: Sequence[int]) -> list[int]:
        """What goes from each stage to the next, and back, for a mean micro-batch; 0 from the last one."""
        sizes = []
        for start in [*accumulate(split)][:-1]:
            num_bytes = self.model.input_bytes(start, self.load.shape)
            if self.load.wire_bytes:
                num_bytes = num_bytes // self.model.outline.dtypes[start].size * self.load.wire_bytes
            sizes.append(round(num_bytes * self.load.mean))
        return [*sizes, 0]

    def _of(self, split: Sequence[int], settings: PipelineConfig) -> Plan:
        workers, num_workers = self.workers, len(self.workers.speeds)
        schedule = make_schedule(settings, num_workers, self.load.num_microbatches)
        works, edges = self._works(split), [0, *accumulate(split)]
        costs = self._costs(works, split)
        simulation = simulate(schedule, costs)
        message_bytes = self._message_bytes(split)
        plans = []
        for index in range(num_workers):
            own = range(index, len(split), num_workers)
            cost = sum((self.model.costs.stage(edges[stage], edges[stage + 1]) for stage in own), Cost())
            optimizer, gradients = self._training_bytes(cost)
            # With several stages a worker has gradients of the later ones of a group of micro-batches before the first.
            num_waiting = min(num_workers, self.load.num_microbatches)
            later = sum(self.model.costs.stage(edges[stage], edges[stage + 1]).num_trainable for stage in own[1:])
            gradients += GRADIENT_BYTES * num_waiting * later
            sends = Counter((action.kind, action.stage) for action in schedule.actions[index])
            sent_bytes = sum(
                number * message_bytes[stage - (kind == "SEND_B")]
                for (kind, stage), number in sends.items()
                if kind in ("SEND_F", "SEND_B")
            )
            working_bytes = max(works[stage].working(schedule.split_backward) for stage in own)
            if self.load.num_sums_last:
                gradients, working_bytes = self._largest(cost.num_trainable, working_bytes)
            stages = [costs.stages[stage] for stage in own]
            plans.append(
                WorkerPlan(
                    layers=tuple((edges[stage], edges[stage + 1] - 1) for stage in own),
                    cost=cost,
                    optimizer_bytes=optimizer,
                    gradients_bytes=gradients,
                    held_bytes=simulation.peak_bytes[index],
                    working_bytes=working_bytes,
                    memory_bytes=workers.memory_bytes[index],
                    in_flight=simulation.in_flight[index],
                    compute_s=sum(stage.forward_s + stage.backward_s + stage.weight_s for stage in stages),
                    idle=simulation.idle[index],
                    sent_bytes=sent_bytes,
                )
            )
        return Plan(settings, tuple(split), schedule, simulation, tuple(plans))
