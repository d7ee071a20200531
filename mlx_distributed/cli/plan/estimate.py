"""What a run would take: memory and time of each worker, for a way to cut the model and a schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

from mlx_distributed.cli.plan.evaluation import Evaluation
from mlx_distributed.cli.plan.update import Update
from mlx_distributed.cli.plan.work import Model, Order, Shape, StageWork, Sums
from mlx_distributed.cli.stages import make_schedule
from mlx_distributed.config.schema import PipelineConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models.costs import Cost
from mlx_distributed.parallel.choose import TIE, choose, numbers_in_flight
from mlx_distributed.parallel.partition import LayerCosts, Partition, Worker, check_split, partition
from mlx_distributed.parallel.schedule import Schedule
from mlx_distributed.parallel.simulate import Costs, Simulation, StageCosts, simulate

Name = Literal["1f1b", "gpipe", "interleaved", "zb-h1"]
UNLIMITED = 1 << 62
_COUNTED = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the memory to compute a layer that are tried. Together layers take less for it than the sum of what each
takes alone, and how much less is only known when they are traced together."""
GRADIENT_BYTES = 4
"""Per value that is trained, as all that is kept of it besides: float32."""


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
    """Of gradients that are held at most in a pipeline, while micro-batches are added up."""
    shapes: tuple[Shape, ...]
    """Of micro-batches of which one takes the most memory: it must do for that."""
    num_tokens: float
    """Of a micro-batch on average, padding too: time is in proportion to them."""
    wire_bytes: int
    """Of a value that travels between stages; 0 for those that the model computes with."""
    whole: Whole | None = None
    """Of a model in one piece; None in a pipeline."""


@dataclass(frozen=True)
class Whole:
    """What a worker that has all of a model does in a step."""

    sums: Sums
    """When the last micro-batch is computed."""
    sums_before: Sums | None
    """When another one is; None where there is none."""
    update: Update
    evaluation: Evaluation


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
    """For the micro-batch that is computed; or of a model in one piece, where that is more, for an update or an
    evaluation."""
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
        self.shape = load.shapes[0]
        if len(load.shapes) > 1:
            self.shape = max(load.shapes, key=lambda shape: model.work(0, model.num_layers, shape).working_bytes)

    @property
    def mean(self) -> float:
        """Tokens of a micro-batch, as a share of those of `shape`."""
        return self.load.num_tokens / self.shape.num_tokens

    def plan(self, settings: PipelineConfig) -> Plan:
        """With the split and the schedule that are given; or where they are `auto`, with one by speed and memory, and
        the fastest, with as many in flight as that takes. It need not fit.

        Raises:
            ConfigError: the split is not one of the layers of the model.
        """
        if settings.schedule == "auto":
            least = len(self.workers.speeds) if settings.in_flight == "auto" else settings.in_flight
            plan = self.plan(replace(settings, schedule="1f1b", in_flight=least))
            comparison = self.compare(settings, plan)
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
        """A plan beside others, one for each schedule that `parallel.pipeline.schedule` can name; where the settings
        leave it open, with as many in flight as it needs. None on one worker, or where none fits: no choice."""
        num_workers, own_chunks = len(self.workers.speeds), plan.settings.chunks
        if num_workers == 1:
            return None
        plans: list[Plan] = []
        for chunks in sorted({1, 2, own_chunks} if settings.split == "auto" else {own_chunks}):
            if chunks * num_workers <= self.model.num_layers:
                names: tuple[Name, ...] = ("interleaved",) if chunks > 1 else ("1f1b", "zb-h1", "gpipe")
                changed = [replace(settings, schedule=name, chunks=chunks) for name in names]
                split = plan.split if chunks == own_chunks else self.plan(changed[0]).split
                plans += [self._filled(split, each) for each in changed]
        if settings.schedule != "auto" and all(other.schedule != plan.schedule for other in plans):
            plans.insert(0, plan)
        fitting = [plan for plan in plans if plan.fits]
        if not fitting:
            return None
        costs = {plan.schedule.num_chunks: self._costs(self._works(plan.split), plan.split) for plan in fitting}
        choice = choose([plan.schedule for plan in fitting], costs, [UNLIMITED] * num_workers)
        best = next(plan for plan in fitting if plan.schedule is choice.schedule)
        return Comparison(tuple(plans), best, choice.reason)

    def _filled(self, split: Sequence[int], settings: PipelineConfig) -> Plan:
        """Where the settings leave it open, with as many in flight as links need and memory allows: the usual number
        where that is as fast."""
        plan = self._of(split, settings)
        if settings.in_flight != "auto" or settings.schedule not in ("1f1b", "zb-h1"):
            return plan
        numbers = numbers_in_flight(len(self.workers.speeds), self.load.num_microbatches)
        tried = [plan, *(self._of(split, replace(settings, in_flight=number)) for number in numbers)]
        fitting = [each for each in tried if each.fits]
        fastest_s = min((each.simulation.step_s for each in fitting), default=0.0)
        fast = [each for each in fitting if each.simulation.step_s <= fastest_s * (1 + TIE)]
        return min(fast, key=lambda each: (each is not plan, max(each.simulation.peak_bytes)), default=plan)

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
        return self.model.work(index, index + 1, self.shape)

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
        size = GRADIENT_BYTES * cost.num_trainable
        num_copies = 2.0 if self.load.whole is None else self.load.whole.update.num_copies
        return round(num_copies * size), size * self.load.num_sums

    def _largest(self, whole: Whole) -> tuple[int, int]:
        """Bytes of gradients, and to compute or to update, of a model in one piece, when it takes most: with the last
        micro-batch, with another one, in the update, or in an evaluation."""
        model, update = self.model, whole.update
        size = GRADIENT_BYTES * model.cost.num_trainable
        under_way = round(update.num_under_way(model.trained) * size)
        ways = []
        for sums in [whole.sums, *([whole.sums_before] if whole.sums_before else [])]:
            order: Order = "bucket by bucket" if sums is whole.sums else "buckets"
            work = model.work(0, model.num_layers, replace(self.shape, order=order, sums=sums))
            held = sums.num_held * size
            ways.append((under_way + held, work.working_bytes - held))
        kept = round(update.num_copies * size) + size
        ways.append((size, update.peak_bytes(model.trained) - kept - size))
        ways.append((under_way, whole.evaluation.peak_bytes(model.stage())))
        return max(ways, key=sum)

    def _works(self, split: Sequence[int]) -> list[StageWork]:
        return [self.model.work(*pair, self.shape) for pair in pairwise([0, *accumulate(split)])]

    def _costs(self, works: Sequence[StageWork], split: Sequence[int]) -> Costs:
        num_workers = len(self.workers.speeds)
        rates = [self.workers.flops * speed / self.mean for speed in self.workers.speeds]
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
            num_bytes = self.model.input_bytes(start, self.shape)
            if self.load.wire_bytes:
                num_bytes = num_bytes // self.model.outline.dtypes[start].size * self.load.wire_bytes
            sizes.append(round(num_bytes * self.mean))
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
            if self.load.whole is not None:
                gradients, working_bytes = self._largest(self.load.whole)
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
