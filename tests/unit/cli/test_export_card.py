"""The model card: what it says, what it never says, and that nothing in a run's folder can break out of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mlx_distributed.cli.data_report import read_data, record_data
from mlx_distributed.cli.export.card import is_export, render_card
from mlx_distributed.cli.export.facts import read_facts
from mlx_distributed.config import Config, ModelConfig, to_dict
from mlx_distributed.data.sources import DataReport
from mlx_distributed.errors import ConfigError
from mlx_distributed.train.checkpoint import CheckpointMeta

REPORT = DataReport(
    num_rows=12,
    num_train=9,
    num_validation=2,
    invalid={"no answer": 1},
    examples=("/Users/me/rows.jsonl:3: no answer",),
)


def write_run(folder: Path, **changes: object) -> Path:
    """The files that a card is made of."""
    plain = to_dict(Config()) | {"method": "lora", "output_dir": "/Users/me/runs/a"}
    plain["model"]["path"] = "/Users/me/models/base"
    plain["data"]["train"] = [{"path": "/Users/me/rows.jsonl"}, {"path": "org/rows"}]
    plain["parallel"]["listen"] = "192.168.1.20:4000"
    plain["wandb"]["entity"] = "me"
    (folder / "config.yaml").write_text(yaml.safe_dump(plain | changes))
    (folder / "run.json").write_text(json.dumps({"run_id": "secret", "versions": {"mlx": "0.32.4", "odd": 3}}))
    record_data(folder, REPORT)
    lines = [
        {"step": 0, "eval/loss": 3.0},
        {"step": 1, "train/loss": 2.5, "train/num_tokens": 100},
        {"step": 2, "train/loss": 1.5, "train/num_tokens": 1100},
        {"step": 2, "eval/loss": 1.25, "eval/exact_match": 0.5},
        {"step": 3, "eval/loss": None, "train/loss": 1.0, "train/num_tokens": 10},
        {"step": 3, "eval/loss": 1.5},
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n[1]\n{"step": 4, "train/lo')
    return folder


def card(
    folder: Path, below: ModelConfig | None = None, name: str = "me/mine", meta: CheckpointMeta | None = None
) -> str:
    return render_card(name, below, read_facts(folder, meta), [], adapter=False)


def metadata(text: str) -> dict[str, object]:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_says_how_the_model_was_made(tmp_path: Path) -> None:
    text = card(write_run(tmp_path), ModelConfig(path="org/base"))
    assert metadata(text) == {
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "mlx-distributed"],
        "base_model": "org/base",
        "datasets": ["org/rows"],
    }
    for line in (
        "# me/mine",
        "[org/base](https://huggingface.co/org/base), fine-tuned with LoRA by mlx-distributed.",
        "mlx_lm.generate --model me/mine --prompt Hello",
        "- trained for 3 steps, 1,210 label tokens",
        "- training loss: 2.500 -\\> 1.000",
        "- held-out loss: 3.000 -\\> 1.500",
        "- rows read: 12 (9 to train on, 2 for validation)",
        "- invalid rows skipped: 1 (1 no answer)",
        "- mlx 0.32.4",
        "  rank: 8",
        "  - path: rows.jsonl",
    ):
        assert f"\n{line}\n" in text, line


def test_a_card_tells_nobody_who_or_where(tmp_path: Path) -> None:
    text = card(write_run(tmp_path), ModelConfig(path="/Users/me/models/base"))
    for word in ("/Users", "192.168", "entity", "wandb", "secret", "output_dir", str(tmp_path)):
        assert word not in text, word
    assert "\nbase, fine-tuned with LoRA" in text
    assert "base_model" not in metadata(text)


def test_figures_are_those_of_what_is_exported(tmp_path: Path) -> None:
    run = write_run(tmp_path, checkpoint={"final": "best", "metric_for_best": "eval/loss"})
    assert "- held-out loss: 3.000 -\\> 1.250\n- held-out exact match: 50%\n" in card(run)
    meta = CheckpointMeta(1, 100, 0, "a", None, {}, {"eval/loss": 2.0})
    text = card(run, meta=meta)
    assert "- held-out loss: 3.000 -\\> 2.000\n" in text
    assert "- trained for 1 steps, 100 label tokens\n" in text


def test_a_run_that_has_written_nothing_down(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert "## Figures" not in text
    assert "## Data" not in text
    assert read_data(tmp_path) is None


@pytest.mark.parametrize("text", ["[", "3", "a: &a [*a]", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")])
def test_files_that_are_something_else(tmp_path: Path, text: str) -> None:
    for name in ("config.yaml", "run.json", "metrics.jsonl", "data.json"):
        (tmp_path / name).write_text(text, encoding="latin-1")
    assert card(tmp_path) == card(tmp_path / "nowhere")


def test_figures_without_end_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": NaN}\n{"step": 1, "train/loss": 1%s}' % ("0" * 400))
    assert "## Figures" not in card(run)


def test_the_command_for_an_adapter_names_both(tmp_path: Path) -> None:
    text = render_card("me/mine", ModelConfig(path="org/base"), None, [], adapter=True)
    assert "mlx_lm.generate --model org/base --adapter-path me/mine --prompt Hello" in text


NASTY = "x`]($(rm)<script>\n# head\n---\n</details> | ``` ````"


def test_nothing_breaks_out_of_the_card(tmp_path: Path) -> None:
    run = write_run(tmp_path, method=NASTY, model={"path": NASTY})
    record_data(run, DataReport(invalid={NASTY: 1}))
    (run / "run.json").write_text(json.dumps({"versions": {NASTY: NASTY}}))
    text = card(run, ModelConfig(path=f"/{NASTY}"), NASTY)
    assert metadata(text)["library_name"] == "mlx"
    outside = text.split("`````")[::2]
    assert len(outside) == 3
    assert "<script>" not in "".join(outside).replace("\\<script", "")
    assert "\n# head" not in "".join(outside)
    assert "".join(outside).count("\n---\n") == 1
    assert outside[2] == "\n\n</details>\n"


@pytest.mark.parametrize("license", ["apache-2.0", "x" * 99, "[a, b]", '"it\'s: ["'])
def test_the_license_is_that_of_the_base_where_it_says_one(tmp_path: Path, license: str) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: {license}\n---\n# base\n")
    found = metadata(render_card("a", ModelConfig(path=str(tmp_path)), None, [], adapter=False))
    assert found.get("license") == ("apache-2.0" if license == "apache-2.0" else None)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("---\ntags: [mlx-distributed]\n---\n", True),
        ("---\ntags: 3\n---\n", False),
        ("---\n[\n---\n", False),
        ("", False),
    ],
)
def test_an_export_is_known_by_its_card(tmp_path: Path, text: str, known: bool) -> None:
    assert not is_export(tmp_path)
    (tmp_path / "README.md").write_text(text)
    assert is_export(tmp_path) == known


def test_a_data_report_is_kept_without_its_rows(tmp_path: Path) -> None:
    record_data(tmp_path, REPORT)
    found = read_data(tmp_path)
    assert found is not None
    assert found.lines() == [line for line in REPORT.lines() if not line.startswith(" ")]
    with pytest.raises(ConfigError, match="cannot be written"):
        record_data(tmp_path / "nowhere", REPORT)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"odd": 1}', '{"num_rows": "<b>"}', '{"invalid": [1]}', '{"invalid": {"a": "b"}}']
)
def test_a_damaged_data_report_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.json").write_text(text)
    assert read_data(tmp_path) is None
