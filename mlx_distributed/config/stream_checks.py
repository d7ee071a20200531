"""The rules of streaming."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_distributed.config.problem import Problem
from mlx_distributed.config.schema import Config, DataConfig


def check_stream(config: Config) -> Iterator[Problem]:
    """Those that `config` breaks."""
    data, key = config.data, ("data.streaming",)
    if not data.streaming:
        for name in ("shuffle_buffer", "cache_dir"):
            if getattr(data, name) != getattr(DataConfig(), name):
                yield Problem(
                    f"data.{name}", "only means something with data.streaming=true; set that or remove it", key
                )
        return
    if config.train.max_steps is None:
        rule = "must be set with data.streaming, since nobody knows how many rows there are; say how long to train"
        yield Problem("train.max_steps", rule, key)
    if data.val_fraction:
        rule = "cannot be taken from a stream; give rows of their own in data.validation"
        yield Problem("data.val_fraction", rule, key)
    if data.shuffle_buffer < config.train.global_batch_size:
        rule = f"must hold the rows of a step, train.global_batch_size={config.train.global_batch_size}, at least"
        yield Problem("data.shuffle_buffer", rule, ("train.global_batch_size",))
    total = sum(source.weight for source in data.train)
    for index, source in enumerate(data.train):
        if data.shuffle_buffer * source.weight < total:
            rule = f"is too small a share for data.shuffle_buffer={data.shuffle_buffer} to hold a row of it; raise one"
            yield Problem(f"data.train.{index}.weight", rule, ("data.shuffle_buffer",))
