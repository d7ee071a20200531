from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_samples import make_rows, make_state, on_ranks

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.config.schema import EvalConfig
from mlx_distributed.data.batch import by_length
from mlx_distributed.testing import run_ranks
from mlx_distributed.tracking import Trackers
from mlx_distributed.train.checkpoint import Checkpointer, CheckpointMeta, locate
from mlx_distributed.train.evaluation import Sample, evaluate_loss, score_samples
from mlx_distributed.train.hooks import Answering, Evaluate, Save, every
from mlx_distributed.train.private import hand_out
from mlx_distributed.train.setup import gradient_layout
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.step_info import StepInfo


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(1, [3, 4, 5, 6, 7, 8, 9]), (3, [3, 6, 9]), (9, [9]), (10, []), (None, [])]
)
def test_a_hook_runs_when_it_is_due_wherever_the_run_began(num_steps: int | None, expected: list[int]) -> None:
    seen: list[tuple[TrainState, StepInfo]] = []
    hook, state = every(num_steps, lambda state, info: seen.append((state, info))), make_state()
    infos = {step: StepInfo(step, 1.0, 1, 1e-3, 1.0, 0.1, 0.0, 0.0, 0, False) for step in range(3, 10)}
    for info in infos.values():
        hook(state, info)
    assert seen == [(state, infos[step]) for step in expected]


def describe(state: TrainState) -> CheckpointMeta:
    return CheckpointMeta(state.step, state.num_tokens, state.num_skipped, "run", None, {}, state.metrics)


def make_save(folder: Path) -> tuple[Save, list[float | None]]:
    """The hook, and a list that gets the validation loss in each checkpoint that is written."""
    losses: list[float | None] = []

    def describe_and_note(state: TrainState) -> CheckpointMeta:
        losses.append(state.metrics.get("eval/loss"))
        return describe(state)

    layout = gradient_layout(make_state().parameters)
    save = Save(Checkpointer(folder, None, True, print), LocalComm(), layout, Trackers([]), describe_and_note)
    return save, losses


def at(step: int, loss: float | None = None) -> TrainState:
    state = make_state()
    state.step, state.metrics = step, {} if loss is None else {"eval/loss": loss}
    return state


def test_what_is_new_is_saved_once(tmp_path: Path) -> None:
    save, losses = make_save(tmp_path)
    for state in (at(0), at(1), at(1), at(1, 5.0), at(1, 5.0), at(2)):
        save(state)
    assert losses == [None, 5.0, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_what_was_just_restored_is_not_saved_again(tmp_path: Path) -> None:
    save, losses = make_save(tmp_path)
    save.mark(at(3, 5.0))
    save(at(3, 5.0))
    assert losses == []
    save(at(4))
    assert losses == [None]


def test_who_is_left_alone_with_a_state_of_others_saves_it_once(tmp_path: Path) -> None:
    save, losses = make_save(tmp_path)
    save.mark(at(3))
    save.alone(at(3))
    save.alone(at(3))
    assert losses == [None]
    save.mark(at(3))
    save.alone(at(3))
    assert losses == [None]


def test_the_best_is_that_of_all_runs_in_the_folder(tmp_path: Path) -> None:
    save, _ = make_save(tmp_path)
    assert save.is_best(at(1, 1e9))
    save(at(1, 5.0))
    for hook in (save, make_save(tmp_path)[0]):
        assert [hook.is_best(at(2, loss)) for loss in (6.0, 5.0, 4.0, None)] == [False, False, True, False]


def test_rank_0_saves_for_all_with_what_only_they_have(tmp_path: Path) -> None:
    def work(comm: Communicator) -> dict[str, list[float]]:
        state = at(1)
        layout = gradient_layout(state.parameters, "int8")
        for index, bucket in enumerate(layout):
            state.feedback.residual[index] = np.full(bucket.size, comm.rank + 1, np.float32)
        Save(Checkpointer(tmp_path, None, True, print), comm, layout, Trackers([]), describe)(state)
        comm.barrier("the checkpoint")
        checkpoint = locate(tmp_path, print)
        restored, alone = at(1), at(1)
        hand_out(restored, layout, checkpoint if comm.rank == 0 else None, comm)
        hand_out(alone, layout, checkpoint, LocalComm())
        return {
            "restored": [float(values.mean()) for values in restored.feedback.residual.values()],
            "alone": [float(values.mean()) for values in alone.feedback.residual.values()],
        }

    for rank, found in enumerate(run_ranks(3, work)):
        assert set(found["restored"]) == {rank + 1.0}
        assert set(found["alone"]) == {1.0 + 2.0 + 3.0}


@pytest.mark.parametrize("keep_best", [True, False])
def test_an_evaluation_is_kept_with_the_state_and_the_best_is_saved(tmp_path: Path, keep_best: bool) -> None:
    save, losses = make_save(tmp_path)
    rows, state = make_rows(5), at(1)
    evaluate = Evaluate(by_length(rows, 2), LocalComm(), Trackers([]), save if keep_best else None)
    evaluate(state)
    assert state.metrics == evaluate_loss(state.model, by_length(rows, 2), LocalComm())
    best = state.metrics["eval/loss"]
    state.step = 2
    evaluate(state)  # as good, and no better
    assert losses == ([best] if keep_best else [])


def test_without_rows_there_is_nothing_to_evaluate(tmp_path: Path) -> None:
    save, losses = make_save(tmp_path)
    state = at(1)
    Evaluate([], LocalComm(), Trackers([]), save)(state)
    assert (state.metrics, losses) == ({}, [])


class Told:
    """What a tracker was told."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.messages: list[str] = []
        self.answers: list[tuple[int, list[str]]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics.append((step, dict(metrics)))

    def samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        self.answers.append((step, [record["generated"] for record in records]))

    def message(self, text: str) -> None:
        self.messages.append(text)

    def rewind(self, step: int) -> None:
        raise AssertionError

    def inputs(self, data: Mapping[str, Any]) -> None:
        raise AssertionError

    def checkpoint(self, folder: Path, step: int, aliases: Sequence[str]) -> None:
        raise AssertionError

    def final(self, folder: Path, step: int, metrics: Mapping[str, float]) -> None:
        raise AssertionError

    def finish(self, exit_status: int) -> None:
        raise AssertionError


def answering(generated: list[str]) -> Answering:
    """Every answer is to be `nine`."""
    settings = EvalConfig(metrics=("chrf", "exact_match"))
    return Answering(
        lambda model: [Sample("Write 9.", text, "nine") for text in generated],
        lambda samples: score_samples(samples, settings),
    )


def test_answers_are_scored_once_for_all_ranks_and_told_by_the_first() -> None:
    def work(comm: Communicator) -> tuple[Told, TrainState]:
        told, state = Told(), at(4)
        evaluate = Evaluate(
            by_length(make_rows(5), 2),
            comm,
            told,
            None,
            answering=answering(["nine", "ten"]),
            metric="eval/exact_match",
        )
        for state.step in (4, 6):
            evaluate(state)
        return told, state

    (first, state), *others = on_ranks(3, work)
    for told, other in others:
        assert (other.metrics, other.evaluations) == (state.metrics, state.evaluations)
        assert (told.metrics, told.answers, told.messages) == (first.metrics, [], [])
    assert first.metrics == [(4, state.metrics), (6, state.metrics)]
    assert state.evaluations == {4: 0.5, 6: 0.5}
    assert first.answers == [(4, ["nine", "ten"]), (6, ["nine", "ten"])]
    [signature] = first.messages
    assert signature.startswith("eval/chrf: nrefs:1|")


def test_the_best_is_the_highest_of_other_metrics(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, 1, True, print, "eval/chrf")
    layout = gradient_layout(make_state().parameters)
    save = Save(checkpointer, LocalComm(), layout, Trackers([]), describe)
    for step, texts in enumerate((["six"], ["nine"], ["ten"]), 1):
        state = at(step)
        Evaluate(by_length(make_rows(5), 2), LocalComm(), Trackers([]), save, answering=answering(texts))(state)
        save(state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    best = checkpointer.find("best")
    assert best is not None
    assert (best.meta.step, checkpointer.best_metric()) == (2, 100.0)
