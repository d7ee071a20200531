"""`mlx-distributed doctor` as its user has it: a configuration in, findings, figures and an exit status out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from mlx_distributed.cli.distributed import main
from mlx_distributed.cli.doctor.case import look
from mlx_distributed.cli.doctor.estimate import estimate
from mlx_distributed.cli.doctor.report import Report, examine, show
from mlx_distributed.config import load_config
from mlx_distributed.testing import tiny_model

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
THINKING = """\
{%- for m in messages -%}
  {{- '<|im_start|>' ~ m.role ~ '\n' -}}
  {{- m.content if loop.last else m.content.split('</think>')[-1].strip() -}}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
"""
SHORT_ONLY = "{% if messages | length > 2 %}{{ raise_exception('two messages at most') }}{% endif %}" + CHATML


def talk(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": turn} for at, turn in enumerate(turns)]}


def sums(count: int) -> list[dict[str, Any]]:
    return [talk(f"How much is {number} + {number}?", f"{2 * number}.") for number in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("doctor") / "model")


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    """A run in which all is well: forty rows, four of them for validation."""
    write(tmp_path / "rows.jsonl", sums(40))
    write(tmp_path / "held_out.jsonl", [talk(f"How much is {number} less 1?", f"{number - 1}.") for number in range(4)])
    values = {
        "model": {"path": str(model)},
        "data": {"train": "rows.jsonl", "validation": "held_out.jsonl", "max_seq_length": 64},
        "train": {"global_batch_size": 8, "micro_batch_size": 4, "device": "cpu"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return tmp_path / "config.yaml"


def write(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def template(text: str) -> str:
    """As an override."""
    return f"data.chat_template={json.dumps(text)}"


def examined(config: Path, *overrides: str) -> Report:
    """All but memory and time, for which this machine is measured."""
    return examine(look(load_config(config, overrides)), "")


def said(report: Report, status: str) -> str:
    """All findings of a status, one a line."""
    return "\n".join(f"{found.check}: {found.text}" for found in report.findings if found.status == status)


def test_all_is_well(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--config", str(config)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.endswith("nothing stands in the way of training; 0 warnings\n")
    assert "\x1b" not in out
    assert "ok       rows             44 read = 40 to train on + 4 for validation\n" in out
    assert re.search(r"^ +<= \d+ +\d+  #+ +-$", out, re.MULTILINE)
    assert all(len(line) <= 110 for line in out.splitlines())
    assert sum(line.startswith("ok ") for line in out.splitlines()) == 12
    assert "not checked" not in out


def test_figures(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--config", str(config), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exit_status"] == 0
    assert report["not_checked"] == []
    assert report["rows"]["num_read"] == 44
    assert 0 < report["labels"]["num_labels"] < report["labels"]["num_tokens"]
    lengths = report["lengths"]
    assert sum(part["num_rows"] for part in lengths["bins"]) == lengths["num_rows"] == 44
    assert lengths["bins"][-1]["num_longer"] == 0
    assert 0 <= report["padding"]["side_by_side"] < 0.1
    assert report["estimate"]["steps_per_epoch"] == report["estimate"]["num_steps"] == 5
    assert report["estimate"]["step_s"] > 0
    assert 0 < report["estimate"]["worker_bytes"][0] < report["estimate"]["memory_bytes"]


def test_the_quick_start() -> None:
    report = examined(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
    assert {finding.status for finding in report.findings} == {"ok"}


def test_colours_are_for_terminals(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show(examined(config))
    assert "\x1b[32mok\x1b[0m" in capsys.readouterr().out


WORDS = "word " * 100
NARRATED = {"messages": [{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "y"}]}
TEXTS = [{"text": f"Plain text {number}."} for number in range(40)]
THOUGHTS = [talk("Why?", f"<think>\n{number}\n</think>\n\nSo.", "And?", "Also.") for number in range(40)]

TRUNCATE = "data.overlong=truncate"
HARMLESS: dict[str, tuple[list[Any], list[str], str]] = {
    # Rows behind the forty, overrides, and what is told.
    "role": ([NARRATED], [], r"^unknown roles: 1 row skipped for the role narrator; the first is .*rows\.jsonl:41$"),
    "invalid": ([{"messages": []}], [], "^invalid rows: 1 row skipped, no assistant turn after a user turn; the first"),
    "long": ([talk("How long?", WORDS)], [], r"^long rows: 1 row longer than data\.max_seq_length=64 tokens, dropped$"),
    "cut": ([talk("How long?", WORDS)], [TRUNCATE], "^long rows: 1 row .*, cut at the end, with the stop token$"),
    "masked": ([talk(WORDS, "Yes.")], [TRUNCATE], "^masked rows: 1 row .*; the first is .*jsonl:41$"),
    "twice": ([talk("How much is  3 + 3?", "6.")], [], "^duplicates: 1 row to train on more than once: .* as line 4$"),
    "leaked": ([talk("How much is 3 less 1?", "2.")], [], "^duplicates: 1 row for validation in training too: .*:41$"),
    "prompt": ([talk("How much is 3 less 1?", "Two.")], [], "^duplicates: 1 row for validation with a prompt that"),
    "special": ([talk("What is <|im_end|>?", "An end.")], [], r"^special tokens: <\|im_end\|> in a message, .*:41$"),
    "raises": ([talk("1", "2", "3", "4")], [template(SHORT_ONLY)], r"^chat template: it refuses 1 of 45 .*:41 \(two"),
    "eos": ([], ["data.train_on_eos=false"], "^stop token: data.train_on_eos=false: the model does not learn to end"),
    "high": ([], ["optimizer.learning_rate=0.1"], r"^learning rate: .*=0\.1 is unusually high for method lora$"),
    "low": ([], ["optimizer.learning_rate=1e-8", "method=full"], "^learning rate: .*=1e-08 is unusually low for"),
    "no validation": ([], ["data.validation=[]"], "^validation: there are no validation rows"),
    "nothing": ([], ["data.validation=[]", "eval.steps=5"], r"^validation: eval\.steps=5 evaluates nothing"),
    "positions": ([], ["data.max_seq_length=40000"], "^positions: .* the 32768 positions of the model, though no row"),
    "batch": ([], ["train.global_batch_size=48"], r"^batch size: train\.global_batch_size=48 is more than the 40 rows"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_told_and_does_no_harm(config: Path, name: str) -> None:
    rows, overrides, found = HARMLESS[name]
    write(config.with_name("rows.jsonl"), [*sums(40), *rows])
    report = examined(config, *overrides)
    assert report.exit_status == 0
    warnings = said(report, "warning").splitlines()
    assert re.search(found, warnings[-1])
    assert len(warnings) == (2 if name == "raises" else 1)  # Such a row is an invalid one too.


def test_thinking_that_is_stripped(config: Path) -> None:
    assert re.search(
        "it would strip the reasoning from earlier turns", said(examined(config, template(THINKING)), "ok")
    )
    write(config.with_name("rows.jsonl"), THOUGHTS)
    report = examined(config, template(THINKING))
    assert report.exit_status == 0
    assert re.search(
        r"^chat template: present; not prefix-preserving: .* in 40 of 44 conversations looked at, first .*\.jsonl:1\. "
        "Turns are found by marks in their place, so the labels of every row were decoded and are its assistant turns$",
        said(report, "warning"),
    )


def test_plain_text_for_a_chat_model(config: Path) -> None:
    write(config.with_name("rows.jsonl"), TEXTS)
    report = examined(config)
    assert report.exit_status == 0
    assert "chat template: the model has one, and plain text goes past it: 40 rows" in said(report, "warning")


BUDGET = ["train.micro_batch_tokens=2048", "data.packing=true", "parallel.nproc=4"]
TOO_SHORT = "data.max_seq_length=8"
NEVER = template("{{ raise_exception('never') }}")
REFUSED: dict[str, tuple[list[Any], list[str], str, str]] = {
    # All rows, overrides, what is wrong, and the first of what cannot be checked then.
    "roles": ([NARRATED] * 3, [], r"^data: 3 of 7 rows are invalid \(3 unknown role;", "labels"),
    "empty": ([], [], "^data: .* holds no rows", "rows"),
    "columns": ([{"a": 1}], [], "^data: .* has the columns a, which fits no known", "rows"),
    "all long": (sums(9), [TOO_SHORT], "^data: none of the 9 training rows is left", "duplicates"),
    "all masked": (sums(9), [TOO_SHORT, TRUNCATE], "^data: none of the 9 training rows", "duplicates"),
    "long": (sums(9), [TOO_SHORT, "data.overlong=error"], r"^data: .*:1: the row has \d+ tokens", "duplicates"),
    "raises": (sums(9), [NEVER], r"^chat template: it refuses 13 of 13 rows; .*:1 \(never\)$", "duplicates"),
    "not Jinja": (sums(9), [template("{% for %}")], "^tokenizer: .* is not valid Jinja", "chat template"),
    "no model": (sums(9), ["model.path=no/model"], "^tokenizer: .* is no local folder, and as a", "chat template"),
    "workers": (sums(9), BUDGET, "^batches: parallel.nproc=4: a step of .* has at most 1", "memory and time"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_run_would_be_refused_for(config: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    rows, overrides, found, not_checked = REFUSED[name]
    write(config.with_name("rows.jsonl"), rows)
    report = examined(config, *overrides)
    assert report.exit_status == 2
    assert re.search(found, said(report, "problem"), re.MULTILINE)
    assert report.not_checked[0] == not_checked
    show(report)
    out = capsys.readouterr().out
    assert "not checked, for what is said above: " in out
    assert out.endswith("to mend before training\n")


def test_all_rows_of_a_new_model_are_unusable(config: Path) -> None:
    """There is nothing to train its tokenizer from."""
    write(config.with_name("rows.jsonl"), [{"messages": [{"role": "x", "content": "y"}]}])
    new = ["model.path=null", "model.scratch={model_type: llama, vocab_size: 300}", "method=full"]
    report = examined(config, *new, "data.validation=[]")
    assert report.exit_status == 2
    assert report.rows is not None
    assert report.rows.unknown_roles == {"x": 1}
    assert "chat template" in report.not_checked


def copied(model: Path, folder: Path, **tokenizer: str | None) -> Path:
    """A model folder whose tokenizer_config.json is changed."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | tokenizer), encoding="utf-8")
    return folder


def test_a_doubled_bos(config: Path, model: Path) -> None:
    path = copied(model, config.with_name("model"), bos_token="<|endoftext|>")
    changed = f"model.path={path}"
    report = examined(config, changed, template("{{ bos_token }}{{ bos_token }}" + CHATML))
    assert report.exit_status == 2
    assert re.search(r"^BOS: <\|endoftext\|> stands twice before 44 rows; the first is .*:1$", said(report, "problem"))
    report = examined(config, changed, template("{{ bos_token }}" + CHATML))
    assert report.exit_status == 0
    assert "BOS: <|endoftext|> is never doubled" in said(report, "ok")


def test_a_stop_token_that_generation_does_not_know(config: Path, model: Path) -> None:
    path = copied(model, config.with_name("model"), eos_token="<|endoftext|>")
    architecture = path / "config.json"
    values = json.loads(architecture.read_text())
    changed = f"model.path={path}"
    assert "<|im_end|> is in the labels of every row" in said(examined(config, changed), "ok")
    architecture.write_text(json.dumps(values | {"eos_token_id": [0]}), encoding="utf-8")
    report = examined(config, changed)
    assert re.search("generation stops at <.endoftext.> alone", said(report, "warning"))


def test_turns_without_a_stop_token(config: Path) -> None:
    """Behind the last turn comes more text of the template, so nothing may be added there."""
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}The end."
    report = examined(config, template(plain))
    assert report.exit_status == 2
    assert "stop token: none in the labels of 44 of 44 rows" in said(report, "problem")


def test_no_template(config: Path, model: Path) -> None:
    path = copied(model, config.with_name("model"))
    (path / "chat_template.jinja").unlink()
    report = examined(config, f"model.path={path}")
    assert report.exit_status == 2
    assert "tokens: the tokenizer has no chat template" in said(report, "problem")
    rows = write(config.with_name("text.jsonl"), [{"text": f"Plain text {number}."} for number in range(9)])
    report = examined(config, f"model.path={path}", f"data.train={rows}", "data.validation=[]")
    assert report.exit_status == 0
    assert "chat template: none, and none is needed: the rows are plain text" in said(report, "ok")


def test_rows_beyond_the_positions(config: Path, model: Path) -> None:
    path = copied(model, config.with_name("model"))
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 16}), encoding="utf-8")
    report = examined(config, f"model.path={path}")
    assert report.exit_status == 2
    assert "is more than the 16 positions of the model, and rows are longer: 44" in said(report, "problem")


def test_weights_are_neither_needed_nor_read(config: Path, model: Path) -> None:
    path = copied(model, config.with_name("model"))
    (path / "model.safetensors").unlink()
    report = examined(config, f"model.path={path}")
    assert report.exit_status == 2  # A run would need them.
    assert re.search("^model: model.path=.* has no weights", said(report, "problem"))
    assert report.not_checked == ("memory and time",)


def test_a_bos_that_the_template_forgets(config: Path, model: Path) -> None:
    path = copied(model, config.with_name("model"), bos_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    piece = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    ids = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [piece, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": ids,
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    report = examined(config, f"model.path={path}")
    assert "BOS: the tokenizer begins a text with <|endoftext|>; 44 rows without it" in said(report, "warning")


def test_what_data_say_cannot_steer_the_terminal(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steering = template("{{ raise_exception('\\x1b[2Jgone') }}")
    show(examined(config, steering))
    out = capsys.readouterr().out
    assert "?[2Jgone" in out
    assert "\x1b" not in out


def test_a_model_of_the_hub_without_its_weights(
    config: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not downloaded."""
    cached = tmp_path / "cache" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("1" * 40)
    (cached / "snapshots").mkdir()
    (copied(model, cached / "snapshots" / ("1" * 40)) / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    report = examined(config, "model.path=some/model")
    assert report.exit_status == 0
    assert "model: the weights of some/model are not on this disk" in said(report, "warning")
    assert report.not_checked == ("memory and time",)


def test_streamed_rows(config: Path) -> None:
    streamed = ["data.streaming=true", "train.max_steps=20"]
    assert "40 to train on + 4 for validation; these are the first ones" in said(examined(config, *streamed), "ok")


def test_a_run_that_does_not_fit(config: Path) -> None:
    huge = {"model_type": "llama", "vocab_size": 300, "hidden_size": 1 << 16, "intermediate_size": 1 << 19}
    huge |= {"num_attention_heads": 64, "num_hidden_layers": 2}
    new = ["model.path=null", f"model.scratch={json.dumps(huge)}", "method=full", "data.validation=[]"]
    case = look(load_config(config, new))
    report = examine(case, estimate(case))
    assert report.exit_status == 2
    assert re.search("^memory: the run does not fit: worker 0 lacks", said(report, "problem"), re.MULTILINE)


def test_a_model_that_cannot_be_cut(config: Path) -> None:
    stages = ["parallel.pipeline.num_stages=2", "parallel.nproc=2", "parallel.pipeline.split=[1,2]"]
    case = look(load_config(config, stages))
    report = examine(case, estimate(case))
    assert re.search("^memory: not estimated: .* adds up to 3", said(report, "problem"))
    assert estimate(replace(case, plan=None)) == ""


def test_packed(config: Path) -> None:
    report = examined(config, "data.packing=true")
    assert re.search(r"^padding: [\d.]+% packed; [\d.]+% without data\.packing$", said(report, "ok"), re.MULTILINE)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert "\n  mlx-distributed doctor --config configs/quickstart.yaml\n" in capsys.readouterr().out
