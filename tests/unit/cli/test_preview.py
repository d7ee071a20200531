from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from mlx_distributed.cli.distributed import main
from mlx_distributed.cli.parts import load_rows, make_plan
from mlx_distributed.cli.preview.html import page
from mlx_distributed.cli.preview.pieces import Piece, Section, Viewer, visible
from mlx_distributed.config import load_config

SCRATCH = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 400,
}
SAID = ("Three owls sat on a wall.", "Rice, and a little salt.", "No.")
PAIRS = "train.micro_batch_size=2"
BREAK = "\u21b5"
Preview = Callable[..., str]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run on a few rows, the third of which is longer than the others."""
    rows = [{"instruction": f"Say {number}", "output": SAID[number % len(SAID)]} for number in range(8)]
    rows[2]["output"] = "\n".join(SAID * 4)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings: dict[str, Any] = {
        "model": {"scratch": SCRATCH},
        "method": "full",
        "data": {"train": "rows.jsonl", "max_seq_length": 60, "overlong": "truncate"},
        "train": {"global_batch_size": 4, "max_steps": 3},
        "output_dir": "run",
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture
def preview(run_file: Path, capsys: pytest.CaptureFixture[str]) -> Preview:
    """What is printed; errors too, where the exit status is 2."""

    def run(*args: str, status: int = 0) -> str:
        assert main(["preview", "--config", str(run_file), *args]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


@pytest.fixture
def viewer(run_file: Path) -> Callable[..., Viewer]:
    def make(*overrides: str) -> Viewer:
        config = load_config(run_file, overrides)
        tokenizer, rows = load_rows(config)
        return Viewer(config, tokenizer, rows, make_plan(config, rows))

    return make


def text_of(pieces: tuple[Piece, ...], *, labels: bool = False) -> str:
    return "".join(piece.text for piece in pieces if piece.is_label or not labels)


# --- what is shown


def test_a_row_is_its_tokens_decoded_with_labels_and_special_tokens_apart(viewer: Callable[..., Viewer]) -> None:
    section = viewer().rows("train", 2, 1)
    (row,) = section.rows
    assert section.title == "train: row 2 of 8"
    assert (row.number, row.place.line, Path(row.place.file).name) == (2, 2, "rows.jsonl")
    assert text_of(row.pieces) == f"<|im_start|>user\nSay 1<|im_end|>\n<|im_start|>assistant\n{SAID[1]}<|im_end|>\n"
    assert text_of(row.pieces, labels=True) == f"{SAID[1]}<|im_end|>"
    assert [piece.text for piece in row.pieces if piece.is_special] == ["<|im_start|>", "<|im_end|>"] * 2
    assert row.num_labels == sum(piece.num_tokens for piece in row.pieces if piece.is_label) < row.num_tokens
    assert row.num_cut == row.num_padding == 0


def test_a_row_that_is_cut_says_how_much_of_it_is_lost(viewer: Callable[..., Viewer]) -> None:
    whole, cut = (viewer(f"data.max_seq_length={limit}").rows("train", 3, 1).rows[0] for limit in (1000, 40))
    assert cut.num_tokens == 40
    assert cut.num_cut == whole.num_tokens - 40 > 0
    assert text_of(whole.pieces).startswith(text_of(cut.pieces))


@pytest.mark.parametrize(
    "overrides",
    [(PAIRS,), (PAIRS, "data.packing=true"), ("train.micro_batch_tokens=128",)],
    ids=["rows", "packed", "tokens"],
)
def test_the_microbatches_of_a_step_hold_the_rows_of_the_plan(
    viewer: Callable[..., Viewer], overrides: tuple[str, ...]
) -> None:
    shown = viewer(*overrides)
    sections = shown.step(2)
    alone = {row.number: row for row in shown.rows("train", 1, 8).rows}
    numbers = [row.number for section in sections for row in section.rows]
    assert len(numbers) == len(set(numbers)) == 4
    for section in sections:
        size = int(re.search(r"(\d+) tokens,", section.title).group(1))  # type: ignore[union-attr]
        assert size == sum(row.num_tokens + row.num_padding for row in section.rows)
        assert section.is_packed == ("data.packing=true" in overrides)
        for row in section.rows:
            assert (row.pieces, row.place) == (alone[row.number].pieces, alone[row.number].place)
        assert f" {sum(row.num_labels for row in section.rows)} labels" in section.title


def test_white_space_before_a_piece_is_kept_where_a_tokenizer_drops_it_at_the_beginning(
    viewer: Callable[..., Viewer],
) -> None:
    """As those of sentencepiece do."""
    shown = viewer()
    inner: PreTrainedTokenizerFast = shown._tokenizer._tokenizer  # type: ignore[attr-defined]
    from tokenizers import decoders

    inner.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    (row,) = shown.rows("train", 1, 1).rows
    assert text_of(row.pieces).startswith("<|im_start|>user\nSay 0<|im_end|>\n")


def test_what_cannot_be_seen_is_written_out() -> None:
    assert visible("a\x1b[31m\u202eb\x00\r\n\t\u2028") == "a\\x1b[31m\\u202eb\\x00\\r\n\\t\\u2028"
    same = "plain \u00e9 \u4f60 \U0001f469\u200d\U0001f680 \u0627\u0644 \u00a0"
    assert visible(same) == same


# --- as text


def test_text_marks_labels_in_a_way_that_survives_a_pipe(preview: Preview) -> None:
    out = preview("--rows", "2")
    assert "\x1b" not in out
    first = out.split("-- row 1 ")[1].split("-- row 2 ")[0].splitlines()
    assert re.search(r"rows\.jsonl:1  \d+ tokens, \d+ labels$", first[0])
    assert first[1:] == [
        f"    <|im_start|>user{BREAK}",
        f"    Say 0<|im_end|>{BREAK}",
        f"    <|im_start|>assistant{BREAK}",
        f"  > {SAID[0]}<|im_end|>",
        f"    {BREAK}",
    ]
    assert out.startswith("rows read: 8 (8 to train on, 0 for validation)\n")


def test_labels_in_the_midst_of_a_line_have_a_line_of_their_own(preview: Preview) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}<|im_end|> {% endfor %}"
    lines = preview("--row", "1", f'data.chat_template="{template}"').splitlines()[-3:]
    assert lines == ["    user: Say 0<|im_end|> assistant: ", f"  > {SAID[0]}<|im_end|>", "     "]


def test_text_shows_cuts_padding_and_borders(preview: Preview) -> None:
    assert re.search(r"\[cut here: \d+ tokens more\]", preview("--row", "3"))
    assert re.search(r"\[\d+ tokens of padding\]", preview("--step", "1"))
    packed = preview(PAIRS, "data.packing=true", "--rows", "1")
    assert "== step 1, micro-batch 1 of 2: 2 rows packed into one sequence" in packed
    assert packed.count("-- border: row ") == 1
    assert preview("--step", "3", "data.packing=true", PAIRS).count("-- border: row ") == 2


def test_which_rows_are_shown(preview: Preview) -> None:
    def titles(*args: str) -> list[str]:
        return re.findall(r"^== (.*)$", preview(*args), flags=re.MULTILINE)

    assert titles() == ["train: rows 1 to 3 of 8"]
    assert titles("--row", "4") == ["train: row 4 of 8"]
    assert titles("--row", "7", "--rows", "9") == ["train: rows 7 to 8 of 8"]
    (title,) = titles("--split", "validation", "data.val_fraction=0.5", "data.packing=true")
    assert title.startswith("validation: rows 1 to ")


def test_a_terminal_gets_colours_and_rows_cannot_send_it_anything(
    run_file: Path, preview: Preview, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = {"instruction": "\x1b]0;title\x07[bold]q[/bold]", "output": "\x1b[2Jgone\u202e"}
    (run_file.parent / "rows.jsonl").write_text(json.dumps(evil))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    out = preview()
    assert "\x1b[32m\\x1b[2Jgone\\u202e" in out
    assert "[bold]q[/bold]" in out
    assert set(re.findall(r"\x1b(?!\[[0-9;]*m)", out)) == set()


# --- as a page


class Page(HTMLParser):
    """The tags of a page, and the text of each kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.labels = ""
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            self.text += data
            self.labels += data if "mark" in self.open else ""


def test_the_page_escapes_rows_and_runs_nothing(run_file: Path, preview: Preview, tmp_path: Path) -> None:
    output = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\n'\"</mark>"
    evil = {"instruction": "<b>hi</b>\x1b", "output": output}
    (run_file.parent / "rows.jsonl").write_text(json.dumps(evil))
    file = tmp_path / "page.html"
    assert preview("--html", str(file)) == f"written to {file}; open it in a browser\n"
    text = file.read_text(encoding="utf-8")
    found = Page(text)
    assert found.open == []
    assert found.tags.isdisjoint({"script", "img", "link", "iframe"})
    assert found.labels.replace(BREAK, "") == f"{output}<|im_end|>"
    assert "<b>hi</b>\\x1b<|im_end|>" in found.text
    assert "default-src 'none'" in text
    assert "http" not in text.replace("http-equiv", "")


def test_the_page_shows_what_the_text_shows(viewer: Callable[..., Viewer]) -> None:
    packed = viewer("data.packing=true").step(1)[0]
    cut = viewer().rows("train", 3, 1)
    text = page("a <title>", [packed, cut], ["rows read: 8"])
    assert "a &lt;title&gt;" in text
    assert text.count("<article>") == len(packed.rows) + 1
    assert "<section class=packed>" in text
    assert f"cut here: {cut.rows[0].num_cut} tokens more" in text
    assert all(f"row {row.number}<" in text for row in packed.rows)
    assert Page(page("empty", [Section("none", ())], [])).labels == ""


# --- what is refused


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--row", "9"), "--row 9: train has 8 rows; give a number from 1 to 8"),
        (("--row", "0"), "--row 0: give a number from 1 on"),
        (("--rows", "-1"), "--rows -1: give a number from 1 on"),
        (("--step", "4"), "--step 4: the run has 3 steps; give one of 1 to 3"),
        (("--step", "1", "--row", "2"), "leave --row out"),
        (("--step", "1", "--split", "train"), "leave --split out"),
        (("--split", "validation"), "no validation rows; give it some with data.validation or data.val_fraction"),
        (("--html", "nowhere/page.html"), "--html nowhere/page.html cannot be written: No such file or directory"),
        (("data.max_seq_length=3",), "none of the 8 training rows is left"),
        (("data.chat_template=\"{{ raise_exception('no system') }}\"",), "refuses the conversation: no system"),
        (("data.chat_template='{{ 1 / 0 }}'",), "refuses the conversation: division by zero"),
        (("data.chat_template='{% if %}'",), "data.chat_template is not valid Jinja, line 1"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_paragraph(preview: Preview, args: tuple[str, ...], why: str) -> None:
    error = preview(*args, status=2)
    assert error.startswith("error: ")
    assert why in error
    assert error.count("\n") == 1


def test_steps_of_a_stream_are_not_known_before_the_run(preview: Preview) -> None:
    assert "data.streaming=true the rows of a step are read" in preview("--step", "1", "data.streaming=true", status=2)
    assert "== train: rows 1 to 3 of 8\n" in preview("data.streaming=true", "data.packing=true")


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["preview", "--help"])
    out = capsys.readouterr().out
    assert "mlx-distributed preview --config my.yaml --html preview.html" in out
    assert "exit status: 0 done; 2" in out
