"""`mlx-distributed plan`: what a run would take, worker by worker, before anything starts."""

from __future__ import annotations

import argparse

from mlx_distributed.cli.verb import Verbs, add_config, add_verb

EPILOG = """\
examples:
  mlx-distributed plan --config configs/quickstart.yaml
  mlx-distributed plan --config my.yaml parallel.pipeline.num_stages=2 --nproc 2 --memory 16GB,8GB --speeds 2,1
  mlx-distributed plan --config my.yaml --nproc 4 parallel.pipeline.num_stages=4 --flops 3.5T --link 10Gbit

Nothing is trained, and no weights are read: memory and operations are those of the graphs that MLX builds from shapes.
Memory is that of MLX; Python and its libraries take about 0.5 GB more. Time counts products of matrices alone, at the
given rate, so that small models take longer than is predicted.

With parallel.pipeline.split=auto layers are cut by speed, and by memory where they would not fit. Training cuts in the
same way, by what its workers find: alike on one machine, as measured on several, or as parallel.pipeline.speeds says.
Where that may be another split than the one here, the plan says which one to set.

exit status: 0 it fits; 2 it does not, or the configuration, the data or an argument was refused
"""


def add_plan(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb `plan`."""
    verb = add_verb(
        verbs,
        "plan",
        _plan,
        summary="predict memory and time of a run, and whether it fits",
        description="Predict memory, step time and traffic of each worker, and name the best schedule of a pipeline.",
        epilog=EPILOG,
    )
    add_config(verb)
    verb.add_argument("--nproc", metavar="N", help="workers (parallel.nproc)")
    verb.add_argument("--speeds", metavar="A,B,...", help="of the workers, relative to --flops (default: 1)")
    verb.add_argument(
        "--memory", metavar="A,B,...", help="such as 16GB,8GB (default: train.memory_budget, or this machine's)"
    )
    verb.add_argument("--flops", metavar="N", help="operations per second, such as 3.5T (default: measured here)")
    verb.add_argument("--link", default="1Gbit", metavar="RATE", help="between neighbours, per second (1Gbit)")


def _plan(args: argparse.Namespace) -> int:
    # These import MLX and mlx-lm, which takes a second: `--help` need not wait for it.
    from mlx_distributed.cli.plan.estimate import Planner
    from mlx_distributed.cli.plan.inputs import read_run, read_workers
    from mlx_distributed.cli.plan.refusal import check_fit
    from mlx_distributed.cli.plan.table import lines
    from mlx_distributed.cli.run import choose_device
    from mlx_distributed.config import load_config

    overrides = list(args.overrides)
    if args.nproc is not None:
        overrides.append(f"parallel.nproc={args.nproc}")
    config = load_config(args.config, overrides)
    choose_device(config.train.device)
    make, notes = read_run(config)
    model, load = make(config)
    workers = read_workers(config, model.outline.dtypes[0], args.speeds, args.memory, args.flops, args.link)
    planner = Planner(model, workers, load)
    plan = planner.plan(config.parallel.pipeline)
    check_fit(planner, plan, config, make)
    print("\n".join(lines(planner, plan, config, notes)))
    return 0
