"""What this project uses of mlx-lm, imported without the side effects of that import.

mlx-lm enters the process here and nowhere else, because (mlx-lm 0.32.2)

- `mlx_lm.utils` sets the open-file limit of the process to (2048, 4096): a hard limit cannot be raised again, and where
  it was below 4096 the import raises ValueError;
- `mlx_lm.tuner` imports wandb where it is installed: 1.2 s, 22 MB and hooks on the console in every worker;
- transformers (5.23), which it imports, looks line by line through its 1640 files of models, and then does so again, as
  the cache between has room for 128 of their 550 folders: 0.5 s of the 1.6 s that a worker takes to start.
"""

from __future__ import annotations

import functools
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def _without_side_effects() -> Iterator[None]:
    setrlimit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    hide_wandb = "wandb" not in sys.modules
    if hide_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # an import then raises ImportError, which mlx-lm expects
    lru_cache = functools.lru_cache
    functools.lru_cache = _looking_once(lru_cache)
    try:
        yield
    finally:
        functools.lru_cache = lru_cache
        resource.setrlimit = setrlimit
        if hide_wandb:
            del sys.modules["wandb"]


def _looking_once(lru_cache: Any) -> Any:
    """`lru_cache`, but with room for all folders of transformers, whose files are looked through from the end."""

    def decorate(maxsize: Any = 128, typed: bool = False) -> Any:
        name, names = getattr(maxsize, "__name__", ""), getattr(maxsize, "__globals__", {})
        if name != "create_import_structure_from_path" or "fetch__all__" not in names:  # another version: as it is
            return lru_cache(maxsize, typed)
        names_of = names["fetch__all__"]  # of a text: it goes through the lines for the last `__all__`
        names["fetch__all__"] = lambda text: names_of(text[max(text.rfind("\n__all__"), 0) :])
        return functools.cache(maxsize)

    return decorate


with _without_side_effects():
    import mlx_lm.models
    from mlx_lm.gguf import permute_weights, prepare_metadata, translate_weight_names
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.tokenizer_utils import load as load_tokenizer
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
    from mlx_lm.utils import (
        DEFAULT_ALLOW_PATTERNS,
        MODEL_REMAPPING,
        dequantize_model,
        get_total_parameters,
        load_config,
        make_shards,
        save_config,
    )
    from mlx_lm.utils import load as load_folder

ARCHITECTURES_FOLDER: str = next(iter(mlx_lm.models.__path__))
"""Where mlx-lm keeps one file per `model_type`."""

__all__ = [
    "ARCHITECTURES_FOLDER",
    "DEFAULT_ALLOW_PATTERNS",
    "MODEL_REMAPPING",
    "QuantizedSwitchLinear",
    "SwitchLinear",
    "TokenizerWrapper",
    "dequantize_model",
    "get_total_parameters",
    "linear_to_lora_layers",
    "load_adapters",
    "load_config",
    "load_folder",
    "load_tokenizer",
    "make_shards",
    "permute_weights",
    "prepare_metadata",
    "save_config",
    "translate_weight_names",
]
