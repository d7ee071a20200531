"""The batches of a stream depend on nothing but the number of the step; chunks are built once, by real processes."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mlx_distributed.config import Config, DataConfig, SourceConfig, TrainConfig
from mlx_distributed.data.builder import Builder, Wanted, Workshop
from mlx_distributed.data.chunks import VERSION
from mlx_distributed.data.stream import StreamPlan, StreamRows, open_stream_plan
from mlx_distributed.data.streams import open_stream
from mlx_distributed.errors import StreamError

CHUNK_ROWS = 16


class Here:
    """Builds in this process, when a chunk is waited for."""

    def __init__(self, workshops: Sequence[Workshop]) -> None:
        self.workshops = workshops

    def ask(self, wanted: Wanted) -> None:
        pass

    def wait(self, wanted: Wanted) -> None:
        assert self.workshops[wanted[0]].build(wanted[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of several sizes, the rows of which say where they are from; one of them has rows that are left out."""
    folder = tmp_path_factory.mktemp("sources")
    for name, num_rows in {"a": 75, "b": 16, "c": 40}.items():
        texts = [f"{name}{number}:{'x' * (number * 7 % 23)}" for number in range(num_rows)]
        rows = [{"prompt": "Say:", "completion": "" if name == "c" and i % 13 == 5 else t} for i, t in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer()


Open = Callable[..., StreamPlan]


@pytest.fixture(scope="module")
def open_plan(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Open:
    def open_plan(cache: Path, names: str = "a", builder: Any = Here, **changes: Any) -> StreamPlan:
        sources = tuple(SourceConfig(path=str(folder / f"{name}.jsonl")) for name in names)
        data = DataConfig(train=sources, max_invalid_fraction=0.25)
        workshops = [
            Workshop(open_stream(source), source, data, tokenizer, cache, CHUNK_ROWS, retry_after_s=(0.0, 0.0))
            for source in data.train
        ]
        settings = {"shuffle_buffer": 24, "global_batch_size": 4, "micro_batch_size": 2} | changes
        return StreamPlan(StreamRows(workshops, builder(workshops)), (1.0,) * len(names), num_steps=1000, **settings)

    return open_plan


def texts(plan: StreamPlan, steps: range, tokenizer: PreTrainedTokenizerFast) -> list[list[list[str]]]:
    """What the rows of each micro-batch say."""
    return [[[said(plan, number, tokenizer) for number in rows] for rows in plan.microbatches(step)] for step in steps]


def said(plan: StreamPlan, number: int, tokenizer: PreTrainedTokenizerFast) -> str:
    row = plan.rows[number]
    start, stop = row.reference
    assert row.loss_mask[start:stop].all()
    return str(tokenizer.decode(row.tokens[start:stop])).strip()


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_batches_are_the_same_whatever_the_restart_point(
    open_plan: Open, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changes = {
        "names": data.draw(st.sampled_from(["a", "b", "ac", "cab"])),
        "shuffle_buffer": data.draw(st.sampled_from([8, 20, 33, 100])),
        "packing": data.draw(st.booleans()),
        "micro_batch_tokens": data.draw(st.sampled_from([None, 128])),
        "seed": data.draw(st.integers(0, 3)),
    }
    cache = tmp_path_factory.mktemp("cache")
    expected = texts(open_plan(cache, **changes), range(40), tokenizer)
    start = data.draw(st.integers(0, 39))
    fresh = data.draw(st.booleans())
    other = tmp_path_factory.mktemp("cache") if fresh else cache
    assert texts(open_plan(other, **changes), range(start, 40), tokenizer) == expected[start:]


def test_every_row_is_trained_on_once_before_the_source_begins_again(
    open_plan: Open, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plan = open_plan(tmp_path, "b")  # 16 rows, in blocks of 24
    assert plan.steps_per_block == 6
    batches = texts(plan, range(12), tokenizer)
    assert [len(step) for step in batches] == [2] * 12
    for block, often in ((batches[:6], {2: 8, 1: 8}), (batches[6:], {2: 8, 1: 8})):
        counts = Counter(text for step in block for rows in step for text in rows)
        assert Counter(counts.values()) == often
    assert set(Counter(text for step in batches for rows in step for text in rows).values()) == {3}
    assert batches[:6] != batches[6:]


def test_sources_are_mixed_by_weight_and_rows_left_out_make_micro_batches_smaller(
    open_plan: Open, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plan = replace(open_plan(tmp_path, "ac", shuffle_buffer=40), weights=(3.0, 1.0))
    batches = texts(plan, range(40), tokenizer)  # four blocks of 30 and 10 rows
    counts = Counter(text[0] for step in batches for rows in step for text in rows)
    assert counts == {"a": 120, "c": 37}
    assert {len(rows) for step in batches for rows in step} == {1, 2}
    assert {len(step) for step in batches} == {2}


def test_too_few_rows_to_train_on(open_plan: Open, tmp_path: Path, folder: Path) -> None:
    plan = open_plan(tmp_path, "c", global_batch_size=1, micro_batch_size=1)
    with pytest.raises(StreamError, match="of the 24 rows of steps 1 to 24 only 22 can be trained on"):
        plan.microbatches(0)


def test_rows_too_long_are_told_of(open_plan: Open, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = open_plan(tmp_path)
    limit = int(sorted(plan.rows.lengths(0, range(CHUNK_ROWS)))[9])
    workshop = plan.rows.workshops[0]
    assert replace(workshop, data=replace(workshop.data, max_seq_length=limit)).build(0)
    assert f"16 rows from row 1 on are left: rows longer than {limit} tokens, dropped: " in capfd.readouterr().out


def test_rows_near_the_restart_alone_are_tokenised(open_plan: Open, tmp_path: Path) -> None:
    plan = open_plan(tmp_path, "a", shuffle_buffer=8)
    plan.microbatches(14)  # rows 56 to 63
    assert [path.stem for path in sorted(tmp_path.glob("*/*.rows"))] == ["00000003"]
    plan.microbatches(10)
    assert [path.stem for path in sorted(tmp_path.glob("*/*.rows"))] == ["00000002", "00000003"]


def test_settings_that_change_tokens_have_a_folder_of_their_own(
    open_plan: Open, tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    workshop = open_plan(tmp_path).rows.workshops[0]
    others = [
        replace(workshop, data=replace(workshop.data, max_seq_length=7)),
        replace(workshop, data=replace(workshop.data, train_on="all")),
        replace(workshop, source=replace(workshop.source, columns={"prompt": "question"})),
        replace(workshop, tokenizer=make_tokenizer(nfc=True)),
        replace(workshop, tokenizer=make_tokenizer("{{ messages }}")),
        replace(workshop, stream=open_plan(tmp_path, "b").rows.workshops[0].stream),
        replace(workshop, chunk_rows=17),
    ]
    assert len({other.folder for other in [workshop, *others]}) == len(others) + 1
    same = replace(workshop, source=replace(workshop.source, weight=3.0, path="/elsewhere"))
    assert same.folder == workshop.folder


def test_chunks_of_other_settings_are_removed_unless_they_are_in_use(
    open_plan: Open, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def used(limit: int, own_cache: bool) -> StreamRows:
        workshop = open_plan(tmp_path).rows.workshops[0]
        changed = [replace(workshop, data=replace(workshop.data, max_seq_length=limit))]
        rows = StreamRows(changed, Here(changed), own_cache)
        assert (rows.lengths(0, range(3)) > 0).all()
        return rows

    def there(*every: StreamRows) -> list[bool]:
        return [rows.workshops[0].path(0).exists() for rows in every]

    first, second = used(100, own_cache=True), used(101, own_cache=False)
    assert there(first, second) == [True, True]
    third = used(102, own_cache=True)
    assert there(first, second, third) == [True, True, True]
    path = first.workshops[0].folder
    (tmp_path / "notes").mkdir()
    (second.workshops[0].folder / "notes").touch()
    left = [first.workshops[0].path(0), second.workshops[0].path(0)]
    del first, second
    gc.collect()
    fourth = used(103, own_cache=False)
    assert [each.exists() for each in left] == [True, True]  # The folder is meant for others too.
    fifth = used(104, own_cache=True)
    assert [each.exists() for each in left] == [False, False]
    assert not path.exists()
    assert [each.name for each in left[1].parent.iterdir()] == ["notes"]
    assert (tmp_path / "notes").exists()
    assert there(third, fourth, fifth) == [True, True, True]


@pytest.mark.parametrize("harm", ["torn", "version", "removed", "emptied"])
def test_a_chunk_that_cannot_be_used_is_named_and_built_again(
    open_plan: Open, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capfd: pytest.CaptureFixture[str], harm: str
) -> None:
    expected = texts(open_plan(tmp_path), range(12), tokenizer)
    path = next(tmp_path.glob("*/00000001.rows"))
    data = path.read_bytes()
    plan = open_plan(tmp_path)
    if harm == "torn":
        path.write_bytes(data[:-1])
    elif harm == "version":
        path.write_bytes(data.replace(b"rows %d " % VERSION, b"rows 0 ", 1))
    else:
        plan.microbatches(4)
        path.unlink() if harm == "removed" else path.write_bytes(b"")
    assert texts(plan, range(12), tokenizer) == expected
    assert path.read_bytes() == data
    words = {"torn": "is damaged", "version": "another version", "removed": "", "emptied": "is no file of rows"}[harm]
    assert words in capfd.readouterr().out


def test_a_source_that_stays_broken_ends_the_stream_in_words(
    open_plan: Open, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "a.jsonl", folder / "d.jsonl")
    plan = open_plan(tmp_path, "d")
    plan.microbatches(0)
    (folder / "d.jsonl").unlink()
    with pytest.raises(StreamError, match=r"d.jsonl cannot be read from row 33 on, and 2 more attempts within 0 s"):
        plan.microbatches(6)
    assert capfd.readouterr().out.count("another attempt in 0 s") == 2


def test_several_processes_build_each_chunk_once(
    open_plan: Open, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    expected = texts(open_plan(tmp_path / "alone"), range(18), tokenizer)
    plans = [open_plan(tmp_path / "shared", builder=Builder) for _ in range(2)]
    for plan in plans:
        plan.rows.ask(0, range(75))
    assert [texts(plan, range(18), tokenizer) for plan in plans] == [expected] * 2
    builders = [plan.rows._builder for plan in plans]
    for builder in builders:
        assert isinstance(builder, Builder)
        builder.close()
        builder.close()
    alone, shared = (next((tmp_path / name).iterdir()) for name in ("alone", "shared"))
    built = sorted(alone.glob("*.rows"))
    assert [path.stem for path in built] == [f"{number:08d}" for number in range(5)]
    assert all(path.read_bytes() == (shared / path.name).read_bytes() for path in built)
    assert not [*shared.glob("*.tmp*")]


def test_chunks_that_nobody_waits_for_do_not_hold_up_the_process_that_builds(open_plan: Open, tmp_path: Path) -> None:
    plan = open_plan(tmp_path, "b", builder=Builder)
    workshop = plan.rows.workshops[0]
    plan.rows.lengths(0, range(16))
    (workshop.folder / "notes.rows").touch()
    for number in range(1, 300):  # More answers than the line between the two holds.
        plan.rows.ask(0, range(number * CHUNK_ROWS, (number + 1) * CHUNK_ROWS))
        while not workshop.path(number).exists():
            time.sleep(0.001)


def test_the_few_rows_at_the_end_are_not_too_many_invalid_ones(open_plan: Open, folder: Path, tmp_path: Path) -> None:
    lines = (folder / "b.jsonl").read_text().split("\n")
    (folder / "f.jsonl").write_text("\n".join([*lines, "{"]))
    plan = open_plan(tmp_path, "f", builder=Here)
    assert (plan.rows.lengths(0, range(17)) > 0).tolist() == [True] * 16 + [False]


def test_rows_none_of_which_fit(open_plan: Open, tmp_path: Path) -> None:
    plan = open_plan(tmp_path, micro_batch_tokens=128)
    short = [replace(each, data=replace(each.data, max_seq_length=2)) for each in plan.rows.workshops]
    plan = replace(plan, rows=StreamRows(short, Here(short)))
    with pytest.raises(StreamError, match="of the 24 rows of steps 1 to 6 only 0 can be trained on"):
        plan.microbatches(0)


def test_a_folder_that_cannot_be_written_to(open_plan: Open, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    plan = open_plan(tmp_path / "file", builder=Builder)
    with pytest.raises(StreamError, match=r"rows cannot be kept: .* set data.cache_dir to a folder with room"):
        plan.microbatches(0)


def test_what_goes_wrong_in_the_process_that_builds(open_plan: Open, folder: Path, tmp_path: Path) -> None:
    lines = (folder / "a.jsonl").read_text().split("\n")
    (folder / "e.jsonl").write_text("\n".join([*lines[:40], *["{"] * 9, *lines[40:]]))
    plan = open_plan(tmp_path, "e", builder=Builder)
    builder = plan.rows._builder
    assert isinstance(builder, Builder)
    plan.microbatches(0)
    for _ in range(2):  # It goes on after an error, and says the same again.
        with pytest.raises(StreamError, match=r"8 of 16 rows are invalid .*e.jsonl:41: line is not valid JSON"):
            plan.microbatches(6)
    builder._running[1].kill()
    with pytest.raises(StreamError, match="the process that tokenises rows ahead has ended with status -9"):
        plan.microbatches(6)


def test_a_plan_of_a_configuration(folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    sources = tuple(SourceConfig(path=str(folder / f"{name}.jsonl"), weight=2.0) for name in "ab")
    data = DataConfig(train=sources, streaming=True, shuffle_buffer=40)
    config = Config(data=data, train=TrainConfig(max_steps=7), output_dir=tmp_path, seed=3)
    plan = open_stream_plan(config, tokenizer)
    assert (plan.num_steps, plan.num_microbatches, plan.steps_per_block, plan.seed) == (7, 2, 5, 3)
    assert plan.rows.workshops[0].cache_dir == tmp_path / "cache"
    other = open_stream_plan(replace(config, data=replace(data, shuffle_buffer=48)), tokenizer)
    assert plan.identity != other.identity
    assert plan.identity == open_stream_plan(config, tokenizer).identity
    assert not [*tmp_path.iterdir()]
