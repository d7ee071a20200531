"""The stages of a model generate what the whole model generates, each with keys and values of its own layers."""

from __future__ import annotations

import mlx.core as mx
import pytest
from test_stages import FAMILIES, TOKENS, build, stages

from mlx_distributed.errors import ConfigError
from mlx_distributed.models.stages import make_cache


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates(family: str) -> None:
    """Token by token, beyond the sliding windows of those that have one, with keys and values of the layers held."""
    from mlx_lm.models.cache import make_prompt_cache

    whole, parts = build(family), stages(lambda: build(family), 1, 3)
    cache, caches = make_prompt_cache(whole), [make_cache(stage) for stage in parts]
    for model in (whole, *parts):
        model.eval()
    tokens = TOKENS[:, :6]
    for _ in range(4):
        logits = whole(tokens, cache=cache)
        x = tokens
        for stage, of_stage in zip(parts, caches, strict=True):
            x = stage(x, cache=of_stage)
        assert mx.array_equal(x, logits)
        tokens = mx.argmax(logits[:, -1:], axis=-1)


def test_caches_that_are_not_those_of_layers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (stage,) = stages(lambda: build("gemma2"))
    monkeypatch.setattr(type(stage), "make_cache", lambda self: [None] * 3, raising=False)
    with pytest.raises(ConfigError, match="it has 3 caches for 4 layers"):
        make_cache(stage)
