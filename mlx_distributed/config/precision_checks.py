"""The rules of the precision, and of what is done to a model when it is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_distributed.config.problem import Problem
from mlx_distributed.config.schema import Config, QuantizeConfig


def check_precision(config: Config) -> Iterator[Problem]:
    """Those that `config` breaks."""
    precision, quantize = config.precision, config.model.quantize
    if precision != "fp32" and config.model.dtype is not None:
        rule = f"cannot stand beside precision={precision}, which says what frozen weights are held in; leave it out"
        yield Problem("model.dtype", rule, ("precision",))
    if precision == "fp16" and config.parallel.sync == "diloco":
        rule = "cannot stand beside parallel.sync=diloco: workers that train by themselves would scale their losses"
        yield Problem("precision", f"{rule} differently; use bf16", ("parallel.sync",))
    if quantize.bits is None:
        if quantize.group_size != QuantizeConfig().group_size:
            rule = "only means something with model.quantize.bits; set that, or remove it"
            yield Problem("model.quantize.group_size", rule, ("model.quantize.bits",))
    elif config.method == "full":
        rule = "needs method lora or dora, since quantised weights cannot be trained; use one of them, or leave it out"
        yield Problem("model.quantize.bits", rule, ("method",))
