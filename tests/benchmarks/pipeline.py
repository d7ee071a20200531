"""Pipelines: idle time, memory, machines of different speeds, what is in flight, and the simulator itself.

Workers are processes that talk over gRPC on loopback. Except for `memory` their stages sleep in place of computing, so
that the machine gives them what as many machines would; schedules, messages and the interpreter are those of training.

idle: four workers of equal stages with F = B = W, 16 micro-batches, and links that take 0, 0.3 and 1.0 of F. Efficiency
    is the share of the time of all workers that is the work itself, without what sleeping or sending takes longer.
    `raised` is of the numbers in flight that `parallel.choose` finds best for these links. A picture of each step.
flight: the most micro-batches that each worker holds, counted in the interpreter, beside what the schedule promises.
speeds: a worker that is twice as fast as the other one; the layers are cut by speed. Throughput beside the sum of those
    of each worker with the whole model.
memory: peak of MLX's memory in full fine-tuning of 16 equal layers, on the largest of four stages beside one process,
    by what is held of a micro-batch; `by layer` is `train.gradient_checkpointing`. The same while a checkpoint and
    `final/` are written, which rank 0 does for all. The time of a step, where the stages share the processors of this
    machine, and the seconds that these work on it in all stages together.
simulator: seconds of the processor for 64 stages and 512 micro-batches.

    uv run python tests/benchmarks/pipeline.py
    uv run python tests/benchmarks/pipeline.py --modes idle --forward-ms 100 --pictures timelines
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import Table, interleave, parser, print_machine, run_group, workplace, write_config, write_rows
from pipeline_picture import draw_timelines

from mlx_distributed.cli.stages import in_flight
from mlx_distributed.config.schema import PipelineConfig
from mlx_distributed.parallel.builders import gpipe, interleaved, one_f_one_b, zb_h1, zero_bubble
from mlx_distributed.parallel.choose import choose, numbers_in_flight
from mlx_distributed.parallel.partition import LayerCosts, Worker, partition
from mlx_distributed.parallel.schedule import Schedule
from mlx_distributed.parallel.simulate import Costs, Span, StageCosts, simulate

if TYPE_CHECKING:
    from pipeline_workers import Slept, Trained

    from mlx_distributed.comm.base import Communicator

NUM_WORKERS, NUM_MICROBATCHES = 4, 16
LINKS = (0.0, 0.3, 1.0)
"""What a message takes, of F."""
GOALS = {(0.0, "zb_h1"): 0.93, (0.3, "1f1b raised"): 0.80, (1.0, "1f1b raised"): 0.72}
"""Efficiency, by link and schedule."""
SPEEDS = (2.0, 1.0)
UNLIMITED = 1 << 40

NUM_LAYERS, NUM_TOKENS, MICRO_BATCH_SIZE, NUM_STEPS = 16, 128, 2, 3
MODEL = {"model_type": "qwen3", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": NUM_LAYERS} | {
    "num_attention_heads": 4,
    "vocab_size": 512,
    "tie_word_embeddings": False,
}
"""17 M parameters, of which the two ends have 0.3 M."""


class Case(NamedTuple):
    """A schedule to run, with stages that sleep."""

    name: str
    link: float
    """Of F."""
    schedule: Schedule
    costs: Costs


def equal_costs(forward_s: float, link: float, num_chunks: int = 1) -> Costs:
    """Of stages that are alike; chunks share the work of a stage."""
    part_s = forward_s / num_chunks
    stages = (StageCosts(part_s, part_s, part_s, activation_bytes=1, residual_bytes=1),) * (NUM_WORKERS * num_chunks)
    return Costs(stages, (link * forward_s,) * NUM_WORKERS)


def raised(name: str, costs: Costs) -> Schedule:
    """The best of a kind, with as many in flight as these links need."""
    found = []
    for first in numbers_in_flight(NUM_WORKERS, NUM_MICROBATCHES):
        held = in_flight(PipelineConfig(in_flight=first), NUM_WORKERS)
        if name == "1f1b":
            found.append(one_f_one_b(NUM_WORKERS, NUM_MICROBATCHES, held))
        else:
            found.append(zero_bubble(NUM_WORKERS, NUM_MICROBATCHES, held, [first] * NUM_WORKERS))
    return choose(found, {1: costs}, [UNLIMITED] * NUM_WORKERS).schedule


def cases(forward_s: float, link: float) -> list[Case]:
    """All kinds of schedules over links that take so much of F."""
    costs, halves = equal_costs(forward_s, link), equal_costs(forward_s, link, 2)
    size = NUM_WORKERS, NUM_MICROBATCHES
    return [
        Case("gpipe", link, gpipe(*size), costs),
        Case("1f1b", link, one_f_one_b(*size), costs),
        Case("1f1b raised", link, raised("1f1b", costs), costs),
        Case("interleaved", link, interleaved(*size, 2), halves),
        Case("zb_h1", link, zb_h1(*size), costs),
        Case("zero_bubble raised", link, raised("zero_bubble", costs), costs),
    ]


def sleep_steps(comm: Communicator, *args: Any) -> list[list[Slept]]:
    """See `pipeline_workers`; to be called through `run_group`, as it uses MLX."""
    from pipeline_workers import sleep_steps

    return sleep_steps(comm, *args)


def sleep_alone(comm: Communicator, *args: Any) -> list[Slept]:
    """See `sleep_steps`."""
    from pipeline_workers import sleep_alone

    return sleep_alone(comm, *args)


def train_steps(comm: Communicator, config_file: Path) -> Trained:
    """See `sleep_steps`."""
    from pipeline_workers import train_steps

    return train_steps(comm, config_file)


def timeline(workers: Sequence[Slept]) -> list[list[Span]]:
    """Of a step, from its begin on."""
    begin_s = min(spans[0].start_s for spans, _ in workers)
    return [
        [Span(action, start_s - begin_s, end_s - begin_s) for action, start_s, end_s in spans] for spans, _ in workers
    ]


def length_s(steps: Sequence[Sequence[Span]]) -> float:
    """Of a timeline."""
    return max(spans[-1].end_s for spans in steps)


def print_idle(options: argparse.Namespace) -> None:
    """Efficiency of each schedule, measured and simulated, and the pictures."""
    every = [case for link in LINKS for case in cases(options.forward_ms / 1e3, link)]
    given = [(case.schedule, case.costs) for case in every]
    by_rank = run_group(sleep_steps, NUM_WORKERS, given, options.rounds)
    table = Table(
        "link / F",
        "schedule",
        "in flight",
        "idle",
        "simulated",
        "efficiency",
        "simulated",
        "measured / simulated",
        "goal",
    )
    for case, *ranks in zip(every, *by_rank, strict=True):
        simulation = simulate(case.schedule, case.costs)
        rounds = sorted(map(timeline, zip(*ranks, strict=True)), key=length_s)
        median = rounds[(len(rounds) - 1) // 2]
        idle = 1 - sum(span.end_s - span.start_s for spans in median for span in spans) / NUM_WORKERS / length_s(median)
        efficiency = sum(simulation.busy_s) / NUM_WORKERS / length_s(median)
        shares = idle, 1 - simulation.efficiency, efficiency, simulation.efficiency, efficiency / simulation.efficiency
        held = " ".join(map(str, case.schedule.in_flight))
        goal = GOALS.get((case.link, case.name), "")
        table.print(case.link, case.name, held, *(f"{share:.3f}" for share in shares), goal)
        title = f"{case.name}, in flight {held}; a message takes {case.link:g} of F"
        panels = {"measured": median, "simulated": simulation.timeline}
        file = options.pictures / f"{case.name.replace(' ', '-')}-{case.link:g}.svg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(draw_timelines(title, panels), encoding="utf-8")
    print(f"\ngoals: as in the table, and within 5 % of the simulator; pictures are in {options.pictures}")


def print_flight(options: argparse.Namespace) -> None:
    """What is held, counted, and promised; how long anything takes does not matter."""
    every = cases(0.002, 1.0)
    few = NUM_WORKERS, 2
    costs = equal_costs(0.002, 0.0)
    every += [Case("1f1b, 2 micro-batches", 0.0, one_f_one_b(*few), costs)]
    every += [Case("zb_h1, 2 micro-batches", 0.0, zb_h1(*few), costs)]
    every += [Case("zero_bubble, uneven", 0.0, zero_bubble(4, 16, [5, 3, 2, 1], [8, 5, 4, 4]), costs)]
    by_rank = run_group(sleep_steps, NUM_WORKERS, [(case.schedule, case.costs) for case in every], 1)
    table = Table("schedule".ljust(22), "promised by worker", "counted by worker", "as promised")
    for case, *ranks in zip(every, *by_rank, strict=True):
        counted = tuple(in_flight for [(_, in_flight)] in ranks)
        promised = case.schedule.in_flight
        as_promised = "yes" if counted == promised else "no"
        table.print(case.name, " ".join(map(str, promised)), " ".join(map(str, counted)), as_promised)


def print_speeds(options: argparse.Namespace) -> None:
    """Throughput of two workers of different speeds."""
    table = Table(
        "layers", "split", "link / F", "schedule".ljust(18), "alone, per s", "together, per s", "share of the sum"
    )
    forward_s, free = options.forward_ms / 1e3, LayerCosts(0.0, 0)
    workers = [Worker(speed, UNLIMITED, 1) for speed in SPEEDS]
    for num_layers in (12, 16):
        layer_s = forward_s * sum(SPEEDS) / num_layers  # so that a stage takes `forward_s`, where the cut is even
        whole = [StageCosts(*[num_layers * layer_s / speed] * 3) for speed in SPEEDS]
        split = partition([LayerCosts(1.0, 0)] * num_layers, free, free, workers).split
        stages = tuple(StageCosts(*[num * layer_s / speed] * 3) for num, speed in zip(split, SPEEDS, strict=True))
        alone = run_group(sleep_alone, len(SPEEDS), whole, NUM_MICROBATCHES, options.rounds)
        per_s = [NUM_MICROBATCHES / statistics.median(length_s(timeline([step])) for step in steps) for steps in alone]
        tried = [
            Case(f"{schedule.name} {schedule.in_flight}", link, schedule, costs)
            for link in LINKS[:2]
            for costs in [Costs(stages, (link * forward_s,))]
            for schedule in (one_f_one_b(2, NUM_MICROBATCHES), raised("1f1b", costs), raised("zero_bubble", costs))
        ]
        by_rank = run_group(sleep_steps, len(SPEEDS), [(case.schedule, case.costs) for case in tried], options.rounds)
        for case, *ranks in zip(tried, *by_rank, strict=True):
            step_s = statistics.median(length_s(timeline(step)) for step in zip(*ranks, strict=True))
            together = NUM_MICROBATCHES / step_s
            shown = " + ".join(f"{each:.2f}" for each in per_s)
            share = f"{together / sum(per_s):.3f}"
            table.print(num_layers, split, case.link, case.name, shown, f"{together:.2f}", share)
    print("\ngoal: 0.90 of the sum")


def train_side(
    num_stages: int, activations: str, checkpointing: bool, options: argparse.Namespace, data: Path, folder: Path
) -> list[Trained]:
    """Some steps, by stage."""
    config = {
        "model": {"scratch": MODEL},
        "method": "full",
        "data": {"train": str(data), "max_seq_length": NUM_TOKENS, "overlong": "truncate"},
        "train": {
            "global_batch_size": MICRO_BATCH_SIZE * options.microbatches,
            "micro_batch_size": MICRO_BATCH_SIZE,
            "max_steps": NUM_STEPS,
            "gradient_checkpointing": checkpointing,
        },
        "parallel": {
            "nproc": num_stages,
            "pipeline": {"num_stages": num_stages, "activations": activations, "schedule": options.schedule},
        },
        "checkpoint": {"steps": None},
    }
    return run_group(train_steps, num_stages, write_config(folder, config))


def print_memory(options: argparse.Namespace, folder: Path) -> None:
    """Peak memory and time of a step, by what is held of a micro-batch."""
    data = write_rows(folder / "rows.json", num_rows=64, num_words=(NUM_TOKENS, NUM_TOKENS))
    sides = {
        f"{name}{', by layer' if checkpointing else ''}": partial(
            train_side, num_stages, activations, checkpointing, options, data
        )
        for name, num_stages, activations in (
            ("one process", 1, "recompute"),
            ("recompute", NUM_WORKERS, "recompute"),
            ("keep", NUM_WORKERS, "keep"),
        )
        for checkpointing in (False, True)
    }
    runs = interleave(sides, options.rounds, folder)
    whole = runs["one process"][0][0]
    table = Table(
        "side".ljust(21),
        "peak by stage, MB",
        "of one process",
        "while saving, MB",
        "of one process",
        "step, s",
        "processor, s",
    )
    for name, rounds in runs.items():
        by_stage = list(zip(*rounds, strict=True))
        peaks_bytes = [max(each.peak_bytes for each in stage) for stage in by_stage]
        saving_bytes = [max(each.saving_peak_bytes for each in stage) for stage in by_stage]
        steps_s = (max(of_ranks) for ranks in rounds for of_ranks in zip(*(each.step_s for each in ranks), strict=True))
        processor_s = statistics.median(sum(each.processor_s for each in ranks) for ranks in rounds)
        table.print(
            name,
            " ".join(f"{each / 1e6:.0f}" for each in peaks_bytes),
            f"{max(peaks_bytes) / whole.peak_bytes:.2f}",
            " ".join(f"{each / 1e6:.0f}" for each in saving_bytes),
            f"{max(saving_bytes) / whole.saving_peak_bytes:.2f}",
            f"{statistics.median(steps_s):.2f}",
            f"{processor_s:.2f}",
        )
    print(f"\n{options.microbatches} micro-batches a step, {options.schedule}; goal: recompute 0.35 of one process")


def print_simulator() -> None:
    """What it takes to simulate a large pipeline."""
    size = 64, 512
    costs, halves = (Costs((StageCosts(1.0, 1.0, 1.0),) * num, (0.3,) * 64) for num in (64, 128))
    limits = [1 + 2 * (63 - worker) for worker in range(64)]
    made = {
        gpipe(*size): costs,
        one_f_one_b(*size): costs,
        one_f_one_b(*size, limits): costs,
        zb_h1(*size): costs,
        interleaved(*size, 2): halves,
    }
    table = Table("schedule".ljust(11), "stages", "micro-batches", "processor, s")
    for schedule, its_costs in made.items():
        begin_s = time.process_time()
        simulate(schedule, its_costs)
        taken_s = time.process_time() - begin_s
        table.print(schedule.name, schedule.num_stages, schedule.num_microbatches, f"{taken_s:.2f}")
    print("\ngoal: 5 s")


MODES = ("idle", "flight", "speeds", "memory", "simulator")


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    args.add_argument("--forward-ms", type=float, default=100.0, help="F of a stage that sleeps (default: 100)")
    args.add_argument("--rounds", type=int, default=3, help="of each measurement (default: 3)")
    args.add_argument("--microbatches", type=int, default=8, help="of a step of `memory` (default: 8)")
    args.add_argument("--schedule", choices=("1f1b", "gpipe", "zb-h1"), default="1f1b", help="`memory` (default: 1f1b)")
    args.add_argument(
        "--pictures", type=Path, default=Path("runs/pipeline"), metavar="DIR", help="default: runs/pipeline"
    )
    options = args.parse_args()
    with workplace(options.blas) as folder:
        print_machine()
        for mode in options.modes:
            print(f"{mode}\n")
            match mode:
                case "idle":
                    print_idle(options)
                case "flight":
                    print_flight(options)
                case "speeds":
                    print_speeds(options)
                case "memory":
                    print_memory(options, folder)
                case "simulator":
                    print_simulator()
            print()


if __name__ == "__main__":
    main()
