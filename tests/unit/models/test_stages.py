from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distributed.config.schema import LoraConfig, ModelConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models import (
    Method,
    build_scratch,
    checkpoint_layers,
    fingerprint,
    load,
    prepare,
    train_tokenizer,
    trainable,
    wrap_tokenizer,
)
from mlx_distributed.models.outline import describe
from mlx_distributed.models.prepare import join_fingerprints, weigh
from mlx_distributed.models.stages import Span, Stage, cut
from mlx_distributed.models.upstream import save_config
from mlx_distributed.testing import SENTENCES, tiny_model

TOKENIZER = wrap_tokenizer(train_tokenizer(SENTENCES, 300), "qwen3")
TOKENS = mx.arange(33).reshape(3, 11) * 17 % 300
LABELS = (TOKENS * 7 + 1) % 300
NUM_LAYERS = 4
ARCH: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.5,
    "logits_scaling": 8,
}
BIASES = {"attention_bias": False, "mlp_bias": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SLIDING,
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 4},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 3},
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1]},
    "olmo2": {},
    "granite": MULTIPLIERS | BIASES,
    "gpt2": {
        "n_ctx": 32,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": NUM_LAYERS,
        "n_positions": 32,
        "layer_norm_epsilon": 1e-5,
    },
}
TIED_BY_CHOICE = {"llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "olmo2", "granite"}
Build = Callable[[], nn.Module]


def build(family: str, method: Method = "full", *, tied: bool | None = None, **lora: Any) -> nn.Module:
    """A lazy model from scratch, prepared."""
    arch = {"model_type": family} | FAMILIES[family] | ({} if family == "gpt2" else ARCH)
    if family in TIED_BY_CHOICE:
        arch["tie_word_embeddings"] = bool(tied)
    model, _ = build_scratch(arch, TOKENIZER, 3, lazy=True)
    prepare(model, method, LoraConfig(rank=4, **lora), 5, lazy=True)
    return model


def stages(build: Build, *cuts: int) -> list[Stage]:
    return [cut(build(), start, stop) for start, stop in itertools.pairwise((0, *cuts, NUM_LAYERS))]


def loss_of(logits: mx.array) -> mx.array:
    return nn.losses.cross_entropy(logits.astype(mx.float32), LABELS, reduction="sum")


def backward(model: nn.Module, x: mx.array, ct: mx.array | None) -> tuple[dict[str, mx.array], mx.array]:
    """Gradients of the parameters and of the input, as the trainer takes them; a cotangent of None is for the loss."""
    parameters = model.trainable_parameters()
    if not (trainable(model) or mx.issubdtype(x.dtype, mx.floating)):
        return {}, x

    def surrogate(values: dict[str, Any], x: mx.array) -> mx.array:
        model.update(values)
        mx.random.seed(9)
        y = model(x)
        return loss_of(y) if ct is None else (y * ct).sum()

    if mx.issubdtype(x.dtype, mx.floating):
        _, (gradients, of_input) = mx.value_and_grad(surrogate, argnums=(0, 1))(parameters, x)
    else:
        _, gradients = mx.value_and_grad(surrogate)(parameters, x)
        of_input = x
    model.update(parameters)
    mx.eval(gradients, of_input)
    return dict(tree_flatten(gradients)), of_input


def forward(parts: list[Stage]) -> Iterator[mx.array]:
    """What goes into each stage, and the logits."""
    x = TOKENS
    yield x
    for stage in parts:
        mx.random.seed(9)
        x = stage(x)
        mx.eval(x)
        yield x


def with_checkpoints(build: Build) -> Build:
    def build_with() -> nn.Module:
        model = build()
        checkpoint_layers(model)
        return model

    return build_with


def check_same(build: Build, *cuts: int, checkpoint: str = "") -> None:
    """The stages of a model give the logits and the gradients of the whole, to the bit."""
    whole, parts = build(), stages(with_checkpoints(build) if checkpoint == "before" else build, *cuts)
    if checkpoint == "after":
        for stage in parts:
            checkpoint_layers(stage)
    mx.random.seed(9)
    logits = whole(TOKENS)
    expected, _ = backward(whole, TOKENS, None)
    *inputs, result = forward(parts)
    assert mx.array_equal(result, logits)
    gradients: dict[str, mx.array] = {}
    ct = None
    for stage, x in reversed(list(zip(parts, inputs, strict=True))):
        own, ct = backward(stage, x, ct)
        for name, gradient in own.items():
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert mx.array_equal(gradients[name], gradient), name
    for name, array in trainable(whole).items():
        assert all(mx.array_equal(trainable(stage)[name], array) for stage in parts if name in trainable(stage)), name


@pytest.mark.parametrize(
    ("family", "tied"),
    [(family, tied) for family in FAMILIES for tied in ((False, True) if family in TIED_BY_CHOICE else (None,))],
)
def test_stages_compute_what_the_whole_model_does(family: str, tied: bool | None) -> None:
    check_same(lambda: build(family, tied=tied), 1, 3)


@pytest.mark.parametrize("cuts", [(), (1,), (3,), (1, 2, 3)])
def test_any_cut_is_the_same(cuts: tuple[int, ...]) -> None:
    check_same(lambda: build("qwen3", tied=True), *cuts)


@pytest.mark.parametrize("checkpoint", ["", "before", "after"])
@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_adapters_begin_alike_and_dropout_draws_alike(family: str, checkpoint: str) -> None:
    check_same(lambda: build(family, "lora", dropout=0.3), 1, 3, checkpoint=checkpoint)


def test_adapters_in_some_stages_only() -> None:
    check_same(lambda: build("qwen3", "dora", num_layers=1, dropout=0.3, target_modules=("q_proj", "down_proj")), 2, 3)


def loaded(folder: Path, method: Method, dtype: Any = None) -> nn.Module:
    model, _, _ = load(ModelConfig(path=str(folder), dtype=dtype), lazy=True)
    prepare(model, method, LoraConfig(dropout=0.2), 5, lazy=True)
    return model


def test_a_quantised_base_below_adapters(tmp_path: Path) -> None:
    from mlx_lm.utils import quantize_model, save_model  # after `models.upstream`, which keeps the process as it is

    folder = tiny_model(tmp_path / "model", model_type="llama", num_layers=NUM_LAYERS)
    model, _, config = load(ModelConfig(path=str(folder)))
    model, config = quantize_model(model, config, group_size=32, bits=4)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    check_same(lambda: loaded(folder, "lora", "bfloat16"), 1, 3)


def test_gemma3_whose_folder_has_no_head(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    arch = ARCH | FAMILIES["gemma3_text"] | {"model_type": "gemma3_text"}
    model, config = build_scratch(arch, TOKENIZER, 3)
    del model["lm_head"]
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    save_config(config, folder / "config.json")
    check_same(lambda: loaded(folder, "full"), 1, 3)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in dict(tree_flatten(model.parameters())).items()}


@pytest.mark.parametrize("tied", [False, True])
def test_stages_hold_their_own_arrays_under_the_names_of_the_whole(tied: bool) -> None:
    whole = shapes(build("llama", tied=tied))
    parts = stages(lambda: build("llama", tied=tied), 1, 3)
    held = [shapes(stage) for stage in parts]
    assert dict(item for names in held for item in names.items()) == whole
    shared = {"model.embed_tokens.weight"} if tied else set()
    assert sum(map(len, held)) == len(whole) + len(shared)
    assert set(held[0]) & set(held[2]) == shared
    assert {name.split(".")[2] for name in held[1]} == {"1", "2"}
    assert [stage.span for stage in parts] == [Span(0, 1, 4), Span(1, 3, 4), Span(3, 4, 4)]
    assert [stage.span.is_first for stage in parts] == [True, False, False]
    assert [stage.span.is_last for stage in parts] == [False, False, True]
    others = ("model.layers.0", "model.layers.3", "model.embed_tokens", "model.norm", "lm_head")
    assert not [name for name in dict(tree_flatten(dict(parts[1]))) if name.startswith(others)]


def test_a_stage_is_a_module_like_any_other() -> None:
    stage = cut(build("qwen3"), 1, 3)
    before = trainable(stage)
    assert isinstance(stage, type(build("qwen3")))
    stage.freeze()
    assert not trainable(stage)
    stage.unfreeze()
    stage.eval()
    assert not stage.training
    stage.train()
    assert trainable(stage).keys() == before.keys()
    stage.update(tree_unflatten([(name, mx.zeros_like(array)) for name, array in before.items()]))
    assert not any(array.any() for array in trainable(stage).values())


def test_arrays_in_lists_go_too() -> None:
    model = build("qwen3")
    for block in model.layers:
        block.mlp.factors = [mx.ones(2), mx.ones(3)]
    held = dict(tree_flatten(cut(model, 1, 3).parameters()))
    assert [name for name in held if "factors" in name] == [
        f"model.layers.{layer}.mlp.factors.{number}" for layer in (1, 2) for number in (0, 1)
    ]


def test_what_goes_into_a_stage_stays_what_it_was() -> None:
    stage = cut(build("llama"), 1, 3)
    block = stage.layers[1]
    block.__class__ = type("InPlace", (type(block),), {"__call__": add_in_place})
    x = mx.ones((3, 11, 32))
    first, again = stage(x), stage(x)
    assert mx.array_equal(first, again)
    assert mx.array_equal(x, mx.ones((3, 11, 32)))


def add_in_place(self: nn.Module, x: mx.array, *_: Any, **__: Any) -> mx.array:
    x += 1
    return x


def test_the_fingerprint_of_the_stages_is_that_of_the_whole() -> None:
    config = {"model_type": "qwen3"}
    parts = stages(lambda: build("qwen3", tied=True), 1, 3)
    assert join_fingerprints([weigh(stage) for stage in parts], config) == fingerprint(
        build("qwen3", tied=True), config
    )


def num_bytes(model: nn.Module) -> int:
    return sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())


IO = Path("/proc/self/io")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """19 MB, and as much again in bfloat16 and in 8 bits."""
    from mlx_lm.utils import quantize_model, save_model

    folder = tmp_path_factory.mktemp("stages")
    tiny_model(folder / "fp32", hidden_size=256, num_layers=8, tied=False)
    for name in ("bf16", "int8"):
        shutil.copytree(folder / "fp32", folder / name)
        model, _, config = load(ModelConfig(path=str(folder / "fp32"), dtype="bfloat16"))
        if name == "int8":
            model, config = quantize_model(model, config, group_size=64, bits=8)
        save_model(folder / name, model)
        save_config(config, folder / name / "config.json")
    return folder


@pytest.mark.skipif(not IO.exists(), reason="counts what Linux says was read")
@pytest.mark.parametrize(("stored", "method"), [("fp32", "full"), ("bf16", "full"), ("bf16", "lora"), ("int8", "lora")])
def test_a_stage_reads_and_holds_its_share(large: Path, tiny: Path, stored: str, method: Method) -> None:
    cut(loaded(tiny, method), 0, 2)  # so that everything is imported
    mx.clear_cache()
    active, read = mx.get_active_memory(), bytes_read()
    mx.reset_peak_memory()
    stage = cut(loaded(large / stored, method), 3, 5)
    read, peak = bytes_read() - read, mx.get_peak_memory() - active
    stored_model, _, _ = load(ModelConfig(path=str(large / stored)), lazy=True)
    share = sum(num_bytes(stored_model.layers[number]) for number in (3, 4))
    assert share <= read <= 1.05 * share
    assert peak <= num_bytes(stage) + num_bytes(stage.layers[3])


def bytes_read() -> int:
    return int(IO.read_text().split()[1])


def test_a_stage_from_scratch_draws_its_share_only() -> None:
    arch = {"model_type": "llama"} | ARCH | {"hidden_size": 256, "num_hidden_layers": 8, "tie_word_embeddings": False}
    model, _ = build_scratch(arch, TOKENIZER, 3, lazy=True)
    prepare(model, "full", LoraConfig(), 5, lazy=True)
    mx.clear_cache()
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    stage = cut(model, 6, 8)
    assert mx.get_peak_memory() - active <= num_bytes(stage) + num_bytes(stage.layers[7])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2), (0, 5), (4, 5)])
def test_layers_that_are_not_there_are_refused(start: int, stop: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"a stage of layers {start} to {stop} \(exclusive\) does not fit the 4 layers"
    ):
        cut(build("llama"), start, stop)


def test_a_stage_is_not_cut_again() -> None:
    with pytest.raises(ConfigError, match="the architecture llama cannot be cut into pipeline stages: "):
        cut(cut(build("llama"), 1, 3), 0, 1)


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", num_layers=NUM_LAYERS)
    model = loaded(folder, "full")
    (file,) = folder.glob("*.safetensors")
    with file.open("r+b") as stream:
        stream.truncate(20_000)
    with pytest.raises(ConfigError, match=r"the weights of layers 2 to 4 \(exclusive\) cannot be read: "):
        cut(model, 2, 4)


class Reading(nn.Module):
    """A model that looks at a weight of its first layer before it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.norm = nn.Embedding(8, 4), nn.RMSNorm(4)
        self.layers = [nn.Linear(4, 4) for _ in range(NUM_LAYERS)]

    def __call__(self, tokens: mx.array) -> mx.array:
        hidden = self.embed_tokens(tokens).astype(self.layers[0].weight.dtype)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.embed_tokens.as_linear(self.norm(hidden))


def test_a_head_that_is_there_but_not_used() -> None:
    """As in helium with tied embeddings."""
    model = Reading()
    model.lm_head = nn.Linear(4, 8)
    assert cut(model, 0, 4)(TOKENS % 8).shape == (3, 11, 8)
    assert describe(model).tied


def test_what_reads_weights_of_another_stage_is_refused() -> None:
    assert cut(Reading(), 0, 2)(TOKENS % 8).shape == (3, 11, 4)
    with pytest.raises(ConfigError, match=r"what layers 2 to 4 need of it is not found \(.*weight"):
        cut(Reading(), 2, 4)
