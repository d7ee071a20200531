"""What `mlx-distributed launch` begins where the run is not elastic: a group that is all there from the beginning."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from functools import reduce

import yaml

from mlx_distributed.cli.elastic.hostfile import Host
from mlx_distributed.cli.elastic.ssh import listen_towards
from mlx_distributed.config import Config, load_config
from mlx_distributed.config.load import read_mapping
from mlx_distributed.config.nodes import construct
from mlx_distributed.errors import ConfigError

NPROC, NUM_WORKERS, LISTEN = "parallel.nproc", "parallel.num_workers", "parallel.listen"
NUM_STAGES = "parallel.pipeline.num_stages"


def is_fixed(args: argparse.Namespace) -> bool:
    """Whether a configuration asks for such a group: by a pipeline, or by `parallel.num_workers`.

    Raises:
        ConfigError: the file cannot be read.
    """
    return _given(args, NUM_WORKERS) is not None or _given(args, NUM_STAGES) not in (None, 1)


def read_fixed(args: argparse.Namespace, ssh: Sequence[str], hosts: Sequence[Host]) -> Config:
    """The configuration of such a run. Where it does not say so, hosts bring one worker each, and this machine listens
    on the interface by which they are reached.

    Args:
        args: of the command line.
        ssh: the client.
        hosts: that take part besides this machine.

    Raises:
        ConfigError: it was refused.
    """
    if args.nproc == "0":
        raise ConfigError("--nproc 0: rank 0 of a run that is not elastic is on this machine; leave it out")
    overrides = list(args.overrides)
    if args.output_dir is not None:
        overrides.append(f"output_dir={args.output_dir}")
    if args.nproc is not None:
        overrides.append(f"{NPROC}={args.nproc}")
    num_here = args.nproc or str(_given(args, NPROC) or 1)
    if _given(args, NUM_WORKERS) is None and num_here.isdecimal():
        overrides.append(f"{NUM_WORKERS}={int(num_here) + len(hosts)}")
    if _given(args, LISTEN) is None:
        overrides.append(f"{LISTEN}={listen_towards(ssh, hosts, LISTEN)}")
    config = load_config(args.config, overrides)
    num_others = config.parallel.size - config.parallel.nproc
    if num_others < len(hosts) or num_others % len(hosts):
        fitting = config.parallel.nproc + max(num_others // len(hosts), 1) * len(hosts)
        raise ConfigError(
            f"{NUM_WORKERS}={config.parallel.size} leaves {num_others} for {len(hosts)} hosts, which bring as many "
            f"each; use {fitting}, or leave it out for one each"
        )
    return config


def _given(args: argparse.Namespace, key: str) -> object:
    """A value as it was written, before the configuration is read as a whole: that would be refused without the number
    of workers. What is no YAML is refused then."""
    plain = read_mapping(args.config)
    with contextlib.suppress(yaml.YAMLError):
        for override in reversed(args.overrides):
            name, _, value = override.partition("=")
            if name == key:
                return yaml.safe_load(value)
        return reduce(_inner, key.split("."), construct(plain))
    return None


def _inner(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None
