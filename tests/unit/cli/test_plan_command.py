from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import yaml
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distributed.cli.distributed import main
from mlx_distributed.cli.plan.graph import Phase, trace
from mlx_distributed.cli.plan.machine import measure_flops, memory_bytes
from mlx_distributed.cli.plan.options import parse_flops, parse_link, parse_memory, parse_speeds
from mlx_distributed.cli.plan.table import format_bytes
from mlx_distributed.cli.plan.work import Model, Shape, largest
from mlx_distributed.config.schema import LoraConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models import (
    Method,
    build_scratch,
    checkpoint_layers,
    prepare,
    train_tokenizer,
    trainable,
    wrap_tokenizer,
)
from mlx_distributed.models.stages import cut
from mlx_distributed.testing import SENTENCES, tiny_model
from mlx_distributed.train.loss import summed_loss
from mlx_distributed.train.outer import twin

TOKENIZER = wrap_tokenizer(train_tokenizer(SENTENCES, 300), "llama")
ARCH = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
SHAPE = Shape(num_rows=2, length=96, keep=False, checkpointed=False)


def build(method: Method, model_type: str = "llama", **arch: int) -> nn.Module:
    model, _ = build_scratch(ARCH | arch | {"model_type": model_type}, TOKENIZER, 0, lazy=True)
    prepare(model, method, LoraConfig(), 0, lazy=True)
    return model


def test_what_a_graph_holds_and_computes() -> None:
    def run(x: mx.array, w: mx.array) -> list[list[mx.array]]:
        y = mx.exp(x @ w)  # In place of the product.
        z = y.T.reshape(-1) * 2  # A view, a copy, in place of the copy.
        return [[y], [z.sum()]]

    phases = trace(run, [mx.zeros((32, 16)), mx.zeros((16, 64))])
    size = 4 * 32 * 64
    assert phases == (Phase(2 * 32 * 16 * 64, size, size), Phase(0.0, 2 * size + 4, size + 4))


def test_what_nobody_else_holds_is_freed() -> None:
    def run(_: mx.array, first: mx.array, second: mx.array) -> list[list[mx.array]]:
        return [[first + 1], [mx.concatenate([second, second])]]

    own = [mx.zeros((32, 64)), mx.zeros((32, 64))]
    size = own[0].nbytes  # In place of the first; the second is freed when it is copied.
    assert trace(run, [mx.zeros(1)], own) == (Phase(0.0, 2 * size, 2 * size), Phase(0.0, 4 * size, 3 * size))


def test_a_graph_that_cannot_be_shown() -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    with pytest.raises(ConfigError, match=r"cannot be foretold.*mixture of experts"):
        Model(build("full", "mixtral", **experts)).work(0, 4, SHAPE)


def test_packed_rows_take_less_than_one_long_row() -> None:
    model = Model(build("lora"))
    long = Shape(1, 512, keep=False, checkpointed=False, order="buckets")
    packed = replace(long, groups=((128, 128), (256,)))
    side_by_side = replace(long, num_rows=4, length=128)
    assert packed.num_scores == 2 * 128**2 + 256**2
    sizes = [model.work(0, 4, shape).working_bytes for shape in (side_by_side, packed, long)]
    assert sizes == sorted(sizes)
    assert sizes[1] < 0.7 * sizes[2]


def test_which_micro_batches_may_take_most() -> None:
    tokens, scores, both, neither = (
        Shape(num_rows, length, keep=False, checkpointed=False)
        for num_rows, length in ((16, 64), (1, 512), (3, 280), (1, 64))
    )
    assert largest([neither, scores, tokens, both]) == (tokens, both, scores)
    assert largest([neither]) == (neither,)
    assert largest([]) == ()


def evaluate(model: nn.Module, start: int, stop: int, shape: Shape) -> tuple[int, list[int]]:
    """Peak and what is held after each evaluation, as `train.pipeline` makes them for a micro-batch, in bytes."""
    stage = cut(model, start, stop)
    if shape.checkpointed:
        checkpoint_layers(stage)
    parameters, first, last = trainable(stage), start == 0, stop == ARCH["num_hidden_layers"]
    hidden = mx.zeros((shape.num_rows, shape.length, ARCH["hidden_size"]))
    tokens = mx.zeros((shape.num_rows, shape.length + 1), mx.int32)
    mask = mx.ones(tokens.shape, mx.bool_)
    cotangent = mx.array(1.0) if last else mx.zeros(hidden.shape)
    mx.eval(hidden, tokens, mask, cotangent, stage.state)
    before = mx.get_active_memory()

    def apply(*primals: mx.array) -> list[mx.array]:
        stage.update(tree_unflatten(list(zip(parameters, primals, strict=False))))
        inputs = tokens[:, :-1] if first else primals[-1]
        return [summed_loss(lambda _: stage(inputs), tokens, mask) if last else stage(inputs)]

    primals = [*parameters.values()] if first else [*parameters.values(), hidden]
    (result,), gradients = mx.vjp(apply, primals, [cotangent])
    stage.update(tree_unflatten(list(parameters.items())))
    of_input, gradients = gradients[len(parameters) :], gradients[: len(parameters)]
    mx.reset_peak_memory()
    held = []
    for arrays in ([result], of_input, gradients) if shape.keep else (of_input, [result, gradients]):
        mx.eval(arrays)
        held.append(mx.get_active_memory() - before)
    return mx.get_peak_memory() - before, held


@pytest.mark.parametrize(
    ("model_type", "method", "start", "stop", "shape"),
    [
        ("llama", "full", 1, 3, SHAPE),
        ("qwen3", "full", 0, 4, SHAPE),
        ("qwen3", "full", 1, 3, replace(SHAPE, keep=True)),
        ("llama", "lora", 2, 4, replace(SHAPE, keep=True)),
        ("llama", "full", 0, 4, replace(SHAPE, checkpointed=True)),
        ("qwen3", "lora", 1, 3, replace(SHAPE, checkpointed=True)),
    ],
)
def test_memory_is_what_was_foretold(model_type: str, method: Method, start: int, stop: int, shape: Shape) -> None:
    model = build(method, model_type)
    work = Model(twin(model)).work(start, stop, shape)
    peak_bytes, held_bytes = evaluate(model, start, stop, shape)
    graph_bytes = work.held_bytes - (0 if start == 0 else 4 * shape.num_rows * shape.length * ARCH["hidden_size"])
    assert work.working_bytes + graph_bytes == pytest.approx(peak_bytes, rel=0.25)
    if shape.keep:
        assert graph_bytes == pytest.approx(held_bytes.pop(0), rel=0.03)
    else:
        assert graph_bytes == 0
    assert work.residual_bytes == pytest.approx(held_bytes[0], rel=0.03, abs=4096)


def test_operations_are_counted() -> None:
    model = Model(build("full"))
    num_tokens, heads = SHAPE.num_rows * SHAPE.length, ARCH["num_attention_heads"]
    linear = 2 * num_tokens * (model.costs.layers[1].num_trainable - 2 * ARCH["hidden_size"])
    scores = 4 * num_tokens * SHAPE.length * heads * (ARCH["hidden_size"] // heads)
    work = model.work(1, 3, SHAPE)
    assert work.forward_flops == pytest.approx(2 * (linear + scores), rel=0.01)  # Two layers.
    assert work.flops == pytest.approx(4 * work.forward_flops, rel=0.05)  # Again, and twice as much for gradients.
    assert model.work(1, 3, replace(SHAPE, keep=True)).flops == pytest.approx(3 * work.forward_flops, rel=0.05)


def test_nothing_is_read_and_nothing_computed() -> None:
    model = build("full", hidden_size=1536, intermediate_size=4096)
    num_bytes = sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    Model(model).work(0, 4, replace(SHAPE, num_rows=64, length=2048))
    assert mx.get_peak_memory() - before < num_bytes / 50


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model of four layers, with twelve rows."""
    folder = tmp_path_factory.mktemp("plan")
    tiny_model(folder / "model", tied=False, hidden_size=64, num_layers=4)
    rows = "".join(f'{{"text": "{SENTENCES[index % 5]}"}}\n' for index in range(12))
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    values = {
        "model": {"path": "model"},
        "method": "full",
        "data": {"train": "rows.jsonl"},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 3, "device": "cpu"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "config.yaml"


STAGES = ["parallel.pipeline.num_stages=2", "parallel.nproc=2"]


def plan(config: Path, capsys: pytest.CaptureFixture[str], *arguments: str, flops: str = "1G") -> tuple[int, str, str]:
    status = main(["plan", "--flops", flops, "--config", str(config), *arguments])
    out, err = capsys.readouterr()
    assert all(len(line) <= 100 for line in out.splitlines())
    return status, out, err


def test_one_worker(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = plan(config, capsys)
    assert (status, err) == (0, "")
    assert out.startswith(
        "4 layers, 187 K parameters, 187 K trained (full)\n1 copy of the model, each on 1 worker: 4 m"
    )
    assert re.search(r"^     0 +0-3 +187 K +187 K +[\d.]+ KiB +1.42 MiB +1.42 MiB +0 B ", out, re.MULTILINE)
    assert "schedule" not in out
    assert "note: " not in out


def test_two_stages(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = plan(config, capsys, *STAGES)
    assert status == 0
    assert re.search(r"^ +0 +0-1 ", out, re.MULTILINE)
    assert re.search(r"^ +1 +2-3 ", out, re.MULTILINE)
    assert re.search(r"^ +1f1b .* configured$", out, re.MULTILINE)
    assert "to have it, set parallel.pipeline.schedule=zb-h1\n" in out
    assert "training would cut" not in out


def test_a_faster_worker_gets_more_layers(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = plan(config, capsys, *STAGES, "--speeds", "4,1")
    assert "training would cut [2,2]" in out
    assert "parallel.pipeline.split=[3,1]" in " ".join(out.split())
    _, out, _ = plan(config, capsys, *STAGES, "parallel.pipeline.split=[3,1]", "--speeds", "4,1")
    assert "training would cut" not in out


def test_how_many_are_in_flight(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as slow links need, as fit, and as the user says."""
    slow = ["--link", "1Mbit", *STAGES, "parallel.pipeline.activations=keep", "train.global_batch_size=16"]
    _, out, _ = plan(config, capsys, *slow)
    (number,) = re.findall(
        r"; (\d+) micro-batches in flight on the first worker: 2 would take \d+%", " ".join(out.split())
    )
    assert int(number) > 2
    (name,) = re.findall(rf"^ +(1f1b|zb-h1) +{number} .* best$", out, re.MULTILINE)
    assert f"to have it, set parallel.pipeline.schedule={name} parallel.pipeline.in_flight={number}\n" in out
    auto = [*slow, "parallel.pipeline.schedule=auto"]
    _, out, _ = plan(config, capsys, *auto)
    assert "to have it" not in out
    _, least, _ = plan(config, capsys, *auto, "parallel.pipeline.in_flight=2")
    assert re.search(r"^ +(1f1b|zb-h1) +2 .* best$", least, re.MULTILINE)
    assert "in flight on the first worker" not in " ".join(least.split())
    status, tight, _ = plan(config, capsys, "--memory", f"{max(total_bytes(least)) * 1.02:.3f}MiB", *auto)
    assert status == 0
    assert "; 2 micro-batches in flight on the first worker: no other number that fits" in " ".join(tight.split())


def test_several_chunks_and_copies(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chunks = [
        "parallel.pipeline.schedule=interleaved",
        "parallel.pipeline.chunks=2",
        "parallel.pipeline.wire_dtype=bf16",
    ]
    _, out, _ = plan(config, capsys, STAGES[0], "parallel.nproc=4", *chunks, "--speeds", "1,1,2,2")
    assert "2 copies of the model, each on 2 workers: 2 micro-batches a step" in out
    assert re.search(r"^ +0 +0,2 ", out, re.MULTILINE)
    assert re.search(r"^interleaved .* 2 chunks a worker, configured", out, re.MULTILINE)
    assert "for the gradients, of which a worker sends" in out


def total_bytes(out: str) -> list[float]:
    """Of each worker, in MiB."""
    return [float(size) for size in re.findall(r"^ +\d+ +([\d.]+) MiB +[\d.]+ [MG]iB ", out, re.MULTILINE)]


def test_memory_moves_layers(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = plan(config, capsys, *STAGES)
    least = total_bytes(out)[1]
    _, out, _ = plan(config, capsys, *STAGES, "--memory", f"1GB,{least * 0.8:.3f}MiB")
    assert "training would cut [2,2]" in out
    assert re.search(r"^ +1 +3 ", out, re.MULTILINE)
    assert re.search(r"^interleaved .* does not fit$", out, re.MULTILINE)
    status, _, err = plan(config, capsys, *STAGES, "--memory", f"{least * 0.8:.3f}MiB")
    assert status == 2
    assert "what would fit: 4 workers with" in err


def test_what_does_not_fit_is_refused_with_a_way_out(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = plan(config, capsys, *STAGES, "parallel.pipeline.activations=keep")
    memory = f"{max(total_bytes(out)) * 0.8:.3f}MiB"
    status, out, err = plan(config, capsys, *STAGES, "parallel.pipeline.activations=keep", "--memory", memory)
    assert (status, out) == (2, "")
    assert err.startswith("error: the run does not fit: worker 0 lacks ")
    assert err.count("\n") == 1
    assert re.search(r"worker 0 lacks [\d.]+ KiB \(\d+ bytes\): it has", err)
    (way,) = re.findall(r"train\.micro_batch_size=1", err)
    status, _, _ = plan(config, capsys, *STAGES, "parallel.pipeline.activations=keep", way, "--memory", memory)
    assert status == 0


def test_a_split_that_does_not_fit(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = plan(config, capsys, *STAGES)
    uneven = [*STAGES, "parallel.pipeline.split=[1,3]"]
    status, _, err = plan(config, capsys, *uneven, "--memory", f"{max(total_bytes(out)) * 1.02:.3f}MiB")
    assert status == 2
    assert "worker 0 lacks" not in err
    assert "what would fit: parallel.pipeline.split=[2,2]" in err
    status, _, err = plan(config, capsys, *STAGES, "parallel.pipeline.split=[1,2]")
    assert status == 2
    assert "adds up to 3" in err


def test_data_that_cannot_be_read(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"nothing": 1}\n', encoding="utf-8")
    rows = [f"data.train={tmp_path / 'rows.jsonl'}", "data.max_seq_length=32"]
    _, out, _ = plan(config, capsys, *rows)
    assert "at most 2 x 31 tokens" in out
    assert "note: the data cannot be read" in out


def test_sums_that_come_late_are_held(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outs = [plan(config, capsys, "parallel.nproc=2", f"parallel.sync={sync}")[1] for sync in ("step", "delayed")]
    together, late = (total_bytes(out)[0] for out in outs)
    assert late - together == pytest.approx(4 * 187e3 / 2**20, rel=0.1)


def test_the_quick_start(capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
    status, out, _ = plan(quickstart, capsys)
    assert status == 0
    assert out.startswith("2 layers, 119 K parameters")


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("16GB", 16e9), ("1.5GiB", 1.5 * 2**30), ("8g", 8e9), ("512 MiB", 2**29), ("100", 100)]
)
def test_memory_is_read(text: str, num_bytes: float) -> None:
    assert parse_memory(text, 2, 1) == (num_bytes, num_bytes)


def test_the_other_options_are_read() -> None:
    assert parse_memory(None, 2, 7) == (7, 7)
    assert parse_speeds("2,1.5", 2) == (2, 1.5)
    assert parse_speeds(None, 3) == (1, 1, 1)
    assert parse_flops("3.5T") == 3.5e12
    assert parse_flops("2e9") == 2e9
    assert parse_link("10Gbit/s") == 1.25e9


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--memory", "16QB"], "--memory 16QB: must be above 0 and written as in --memory 16GB,8GB"),
        (["--speeds", "1,0"], "--speeds 0: must be"),
        (["--speeds", "1,2,3"], "--speeds 1,2,3: has 3 values, and there are 2 workers"),
        (["--link", "1GB"], "--link 1GB: must be"),
        (["--flops", "fast"], "--flops fast: must be"),
    ],
)
def test_bad_options(arguments: Sequence[str], wrong: str) -> None:
    parse = {
        "--memory": lambda text: parse_memory(text, 2, 1),
        "--speeds": lambda text: parse_speeds(text, 2),
        "--link": parse_link,
        "--flops": parse_flops,
    }
    with pytest.raises(ConfigError, match=re.escape(wrong)):
        parse[arguments[0]](arguments[1])


def test_this_machine() -> None:
    assert memory_bytes() > 1 << 28
    assert 1e8 < measure_flops(mx.float32) < 1e15


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1 << 20, "1 MiB"), (1023 << 20, "1023 MiB")]
)
def test_sizes_are_written(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "\n  mlx-distributed plan --config configs/quickstart.yaml\n" in capsys.readouterr().out
