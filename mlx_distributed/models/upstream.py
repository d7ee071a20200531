"""What this project uses of mlx-lm, imported without the side effects of that import.

mlx-lm enters the process here and nowhere else, because (mlx-lm 0.32.2)

- `mlx_lm.utils` sets the open-file limit of the process to (2048, 4096): a hard limit cannot be raised again, and where
  it was below 4096 the import raises ValueError;
- `mlx_lm.tuner` imports wandb where it is installed: 1.2 s, 22 MB and hooks on the console in every worker.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _without_side_effects() -> Iterator[None]:
    setrlimit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    hide_wandb = "wandb" not in sys.modules
    if hide_wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # an import then raises ImportError, which mlx-lm expects
    try:
        yield
    finally:
        resource.setrlimit = setrlimit
        if hide_wandb:
            del sys.modules["wandb"]


with _without_side_effects():
    import mlx_lm.models
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.tokenizer_utils import load as load_tokenizer
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, MODEL_REMAPPING, save_config, save_model
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
    "linear_to_lora_layers",
    "load_folder",
    "load_tokenizer",
    "save_config",
    "save_model",
]
