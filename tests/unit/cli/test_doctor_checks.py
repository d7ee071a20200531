"""The figures of the doctor add up, on rows of every kind, and are those of the data path."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from chat_families import FAMILIES, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distributed.cli.doctor.case import Case, Seen, look
from mlx_distributed.cli.doctor.duplicates import find_duplicates
from mlx_distributed.cli.doctor.estimate import Estimate, check_estimate
from mlx_distributed.cli.doctor.lengths import histogram, measure_lengths
from mlx_distributed.cli.doctor.report import examine
from mlx_distributed.cli.doctor.rows import Counts, count_rows
from mlx_distributed.cli.doctor.tokens import keeps_prefixes
from mlx_distributed.config import Config, load_config
from mlx_distributed.data.files import Place
from mlx_distributed.data.messages import Conversation, Message
from mlx_distributed.data.sources import read_corpus
from mlx_distributed.data.template import ChatTemplate
from mlx_distributed.data.tokenize import Outcome, tokenize_corpus
from mlx_distributed.errors import DataError
from mlx_distributed.testing import tiny_model

LIMIT = 48
CHATML = (
    "{% if 'refuse' in messages[0].content %}{{ raise_exception('as asked') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ '' if 'hide' in m.content else m.content }}<|im_end|>\n{% endfor %}"
)


def talk(question: str, answer: str, role: str = "user") -> str:
    return json.dumps({"messages": [{"role": role, "content": question}, {"role": "assistant", "content": answer}]})


KINDS = {
    "good": talk("How much is 2 + 2?", "4."),
    "long": talk("How long?", "word " * 60),
    "masked": talk("word " * 60, "Yes."),
    "unknown role": talk("What?", "That.", "narrator"),
    "empty answer": talk("What?", " "),
    "not JSON": "{",
    "no object": "[1, 2]",
    "other columns": '{"question": "What?"}',
    "refused by the template": talk("refuse this", "No."),
    "changed by the template": talk("What?", "hide this"),
    "special": talk("What is <|im_end|>?", "A token."),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checks")
    tiny_model(folder / "model")
    (folder / "template.jinja").write_text(CHATML, encoding="utf-8")
    return folder


def configured(folder: Path, kinds: list[str], **data: object) -> Config:
    """A run on rows of these kinds, and one good one, so that the format is known."""
    lines = [KINDS[kind] for kind in ["good", *kinds]]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    shared = {"train": "rows.jsonl", "max_seq_length": LIMIT, "chat_template": "template.jinja"}
    values = {"model": {"path": "model"}, "data": shared | data, "train": {"device": "cpu"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_config(folder / "config.yaml")


@settings(max_examples=25, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(sorted(KINDS)), max_size=20),
    overlong=st.sampled_from(["drop", "truncate", "error"]),
    val_fraction=st.sampled_from([0.0, 0.3]),
)
def test_counts_add_up(folder: Path, kinds: list[str], overlong: str, val_fraction: float) -> None:
    config = configured(folder, kinds, overlong=overlong, val_fraction=val_fraction)
    case = look(config)
    counts = count_rows(case)
    assert counts is not None
    used = counts.num_train + counts.num_validation
    assert counts.num_read == 1 + len(kinds)
    assert counts.num_read == used + sum(counts.invalid.values()) + counts.num_dropped + counts.num_untrainable
    truncates = overlong == "truncate"
    assert counts.num_truncated == truncates * kinds.count("long")
    assert counts.num_untrainable == truncates * kinds.count("masked")
    assert counts.num_dropped == (not truncates) * (kinds.count("long") + kinds.count("masked"))
    assert counts.unknown_roles.get("narrator", 0) == kinds.count("unknown role")
    lengths = measure_lengths(case)
    assert lengths is not None
    assert lengths.num_rows == counts.num_read - sum(counts.invalid.values())
    assert sum(part.num_rows for part in lengths.bins) == lengths.num_rows
    longer = [part.num_longer for part in lengths.bins if part.last == LIMIT]
    assert sum(longer) == kinds.count("long") + kinds.count("masked")
    _agrees_with_a_run(config, case, counts)


def _agrees_with_a_run(config: Config, case: Case, counts: Counts) -> None:
    """The doctor finds a problem where a run is refused, and otherwise the rows of the run."""
    assert case.tokenizer is not None
    refusals = []
    try:
        tokenized = tokenize_corpus(read_corpus(config.data, config.seed), case.tokenizer, config.data)
    except DataError as error:
        refusals.append(str(error))
    assert [finding.text for finding in case.findings] == refusals
    if refusals:
        assert examine(case, "").exit_status == 2
        return
    report = tokenized.report
    assert (report.num_train, report.num_validation) == (counts.num_train, counts.num_validation)
    assert (report.num_dropped, report.num_untrainable) == (counts.num_dropped, counts.num_untrainable)
    assert dict(report.invalid) == counts.invalid
    assert case.tokenized is not None
    assert case.tokenized.train_digest == tokenized.train_digest
    labels = examine(case, "").labels
    assert labels is not None
    assert labels.num_labels == sum(int(row.loss_mask.sum()) for row in tokenized.train)


def test_counts_that_do_not_add_up_are_our_mistake() -> None:
    with pytest.raises(AssertionError):
        Counts(5, 2, 1, {"empty answer": 1}, {}, 0, 0, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_in_use(folder: Path, name: str) -> None:
    family, path = FAMILIES[name], folder / name
    tokenizer = make_tokenizer(family, list(KINDS.values()), 400)
    tokenizer.save_pretrained(path)
    config = configured(folder, ["good"] * 4, chat_template=None)
    config = replace(config, model=replace(config.model, path=str(path)))
    report = examine(look(config), "")
    found = {finding.check: finding for finding in report.findings}
    assert found["model"].text.endswith("no config.json, so it is not a model folder")
    assert found["chat template"].status == found["BOS"].status == "ok"
    assert "the labels of every row were decoded and are its assistant turns" in found["chat template"].text
    assert ("it would strip the reasoning" in found["chat template"].text) == (name == "qwen3")
    assert found["stop token"].status == ("ok" if family.end is None else "warning")
    assert family.stop in found["stop token"].text


def seen(number: int, *turns: str, split: str = "train") -> Seen:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[at % 2], turn) for at, turn in enumerate(turns))  # type: ignore[arg-type]
    return Seen(split, Place("rows.json", number), Conversation(messages))  # type: ignore[arg-type]


def test_duplicates_but_for_white_space() -> None:
    found = find_duplicates(
        [
            seen(1, "a b", "c"),
            seen(2, "a  b\n", "c"),
            seen(3, "a b", "d"),
            seen(4, "a b", "c", "a b", "c"),
            seen(5, "A b", "c", split="validation"),
            seen(6, "a b ", "c", split="validation"),
            seen(7, "a b", "e", split="validation"),
            seen(8, "a b", "c", "a b", "d", split="validation"),
        ]
    )
    lines = {
        name: [(place.line, first.line) for place, first in getattr(found, name)]
        for name in ("within_train", "across", "same_prompt")
    }
    assert lines == {"within_train": [(2, 1)], "across": [(6, 1)], "same_prompt": [(7, 1), (8, 4)]}


def test_plain_text_has_no_prompt() -> None:
    said = Conversation((Message("assistant", "one"),)), Conversation((Message("assistant", "two"),))
    texts = [Seen("train", Place("a", 1), said[0]), Seen("validation", Place("a", 2), said[1])]
    assert find_duplicates(texts).same_prompt == ()


def with_lengths(folder: Path, lengths: list[int]) -> Case:
    case = Case(configured(folder, []))
    return replace(case, seen=tuple(replace(seen(1, "a", "b"), outcome=Outcome(length, None)) for length in lengths))


def test_the_histogram(folder: Path) -> None:
    lengths = measure_lengths(with_lengths(folder, [*range(20, 30), 40, 60, 100, 200]))
    assert lengths is not None
    assert lengths.percentiles == ((50, 26), (90, 100), (95, 200), (99, 200))
    assert [(part.first, part.last, part.num_rows, part.num_longer) for part in lengths.bins] == [
        (1, 16, 0, 14),
        (17, 32, 10, 4),
        (33, LIMIT, 1, 3),
        (LIMIT + 1, 64, 1, 2),
        (65, 128, 1, 1),
        (129, 256, 1, 0),
    ]
    heading, *lines = histogram(lengths)
    assert heading.endswith("longer, which a limit here drops or cuts")
    assert lines[0].split()[:4] == ["<=", "32", "10", "#" * 40]
    assert lines[0].endswith("  4 rows (28.6 %), 62.0 % of the tokens")
    assert lines[-1].split() == ["<=", "256", "1", "####", "-"]
    assert measure_lengths(with_lengths(folder, [])) is None


def test_prefixes(folder: Path) -> None:
    tokenizer = make_tokenizer(FAMILIES["chatml"], ["a"], 300)
    conversation = seen(1, "a", "b", "c", "d").conversation
    last_alone = "{% for m in messages %}{{ m.content if loop.last }};{% endfor %}"
    even_only = "{% if messages | length is odd %}{{ raise_exception('odd') }}{% endif %}" + FAMILIES["chatml"].template
    assert keeps_prefixes(ChatTemplate(tokenizer, None), conversation)
    assert keeps_prefixes(ChatTemplate(tokenizer, even_only), conversation)
    assert not keeps_prefixes(ChatTemplate(tokenizer, last_alone), conversation)


def test_what_is_estimated() -> None:
    estimate = Estimate((3 << 30, 5 << 30), 8 << 30, 2.5, 4000, 1000, "")
    memory, time = check_estimate(estimate, 1)
    assert memory.text == "about 5 GiB for a worker, and 0.5 GB for Python; it has 8 GiB"
    assert time.text.startswith(
        "a step takes 2.50 s or more, an epoch of 1000 steps 0:41:40, the run of 4000 steps 2:46:40"
    )
    (memory, _) = check_estimate(replace(estimate, refusal="the run does not fit"), 1)
    assert (memory.status, memory.text) == ("problem", "the run does not fit")
    (_, time) = check_estimate(replace(estimate, steps_per_epoch=None), 1)
    assert "epoch" not in time.text
    (memory,) = check_estimate("it cannot be cut", 1)
    assert (memory.status, memory.text) == ("warning", "not estimated: it cannot be cut")
    assert list(check_estimate("", 1)) == []
