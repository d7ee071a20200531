"""Whatever happens to whom at which point of a step, the run ends with the bits of one that nothing happened to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from train_samples import CONFIG, make_plan, make_rows

from mlx_distributed.elastic import membership, recovery, snapshots, state, transition
from mlx_distributed.testing.elastic import FACTS, Played, play
from mlx_distributed.testing.faults import (
    COORDINATOR,
    At,
    Corrupt,
    Deserted,
    Fault,
    FaultScript,
    Go,
    Hold,
    Join,
    Jump,
    Kill,
    Leave,
    Missed,
    Part,
    Point,
    Poison,
    Start,
    Stop,
    Taken,
    Tear,
    Together,
    together,
)
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.setup import make_optimizer
from mlx_distributed.train.state import TrainState

NUM_STEPS = 4
TWO, THREE = ("w0", "w1"), ("w0", "w1", "w2")
FOUR = (*THREE, "w3")
Chain = Sequence[Fault]


class Model(nn.Module):
    """Large enough for reductions in two hops."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, 64)
        self.layer = nn.Linear(64, 64)
        self.head = nn.Linear(64, 512, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.head(nn.gelu(self.layer(self.embed(tokens))))


def make() -> tuple[Phases, TrainState]:
    rows = make_rows(29)
    mx.random.seed(0)
    state = TrainState(Model(), {})
    state.optimizer = make_optimizer(CONFIG).init(state.parameters)
    mx.eval(state.parameters, state.optimizer)
    return Phases(CONFIG, make_plan(rows, num_steps=NUM_STEPS), rows), state


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, object]:
    """The state after a run of one worker that nothing happened to."""
    return play(FaultScript(["w0"]), make, tmp_path_factory.mktemp("undisturbed") / "journal").states["w0"]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there is a midst of a transfer."""
    monkeypatch.setattr(snapshots, "SLICE_BYTES", 16 << 10)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is silent is soon given up."""
    monkeypatch.setattr(membership, "HEARTBEAT_S", 0.1)
    for module in (state, transition):
        monkeypatch.setattr(module, "SILENCE_S", 0.7)
    monkeypatch.setattr(transition, "APART_S", 0.7)
    monkeypatch.setattr(state, "BARRED_S", 0.5)
    monkeypatch.setattr(recovery, "STALL_S", 1.0)


def held_for(*names: str, step: int = NUM_STEPS) -> Chain:
    """Worker 0 takes long over a step, so that all of these have come by then."""
    return [Hold("w0", At("w0", Point.FORWARD, step)), Go("w0", together(*names))]


def check(played: Played, undisturbed: Mapping[str, object], hosts: Sequence[str]) -> None:
    """Every step was taken once, and these hosts, no others, have come to the end with the same state."""
    assert played.commits == list(range(1, NUM_STEPS + 1))
    assert played.states == dict.fromkeys(hosts, undisturbed), (played.errors, played.epochs)


@dataclass(frozen=True)
class Row:
    """Of the matrix."""

    what: str
    chains: Sequence[Chain]
    workers: Sequence[str] = THREE
    ends: Sequence[str] = THREE
    """Hosts that are there at the end of the run."""


W1, MIDST = "w1", Point.REDUCING
IN_A_STEP = [
    Point.IDLE,
    Point.FORWARD,
    Point.REDUCING,
    Point.GATHERING,
    Point.REDUCED,
    Point.VOTED,
    Point.COMMITTED,
    Point.SAVING,
]
BUT_1 = ("w0", "w2")


def at(point: Point, who: str = W1, step: int = 2) -> At:
    return At(who, point, step)


def joins(*faults: Fault, chain: Chain = ()) -> list[Chain]:
    """Worker 3 joins while worker 0 computes, and something happens then, after which worker 0 goes on."""
    return [[Hold("w0", at(Point.FORWARD, "w0", 2)), Start("w3"), *faults], chain]


KILLED = [
    *(Row(f"a worker dies {point.name}", [[Kill(W1, at(point))]], ends=BUT_1) for point in IN_A_STEP),
    *(
        Row(f"worker 0 dies {point.name}", [[Kill("w0", at(point, "w0"))]], ends=("w1", "w2"))
        for point in (Point.FORWARD, Point.GATHERING, Point.SAVING)
    ),
    Row("one of two dies", [[Kill(W1, at(Point.FORWARD))]], TWO, ["w0"]),
    Row("two of four die", [[Kill(W1, at(MIDST))], [Kill("w2", at(MIDST, "w2"))]], FOUR, ("w0", "w3")),
    Row(
        "it dies when it has voted, and others have not",
        [[Kill(W1, at(Point.VOTED))], [Hold("w0", at(Point.REDUCED, "w0")), Go("w0", together(*BUT_1))]],
        ends=BUT_1,
    ),
    Row("it dies when all have voted", [[Kill(W1, At(COORDINATOR, Point.WRITING, 2))]], ends=BUT_1),
    Row("it dies in the last step", [[Kill(W1, at(Point.COMMITTED, step=NUM_STEPS))]], ends=BUT_1),
    Row("it dies after the last step", [[Kill(W1, at(Point.SAVING, step=NUM_STEPS))]], ends=BUT_1),
    Row(
        "it dies and comes back",
        [[Kill(W1, at(MIDST)), Start("again", name=W1)], held_for(*THREE)],
        ends=("w0", "again", "w2"),
    ),
]
JOINS = [
    Row(
        "one joins at the start",
        [[Hold("w0", at(Point.IDLE, "w0", 1)), Start("w3"), Go("w0", together(*FOUR))]],
        ends=FOUR,
    ),
    Row("one joins in a step", joins(Go("w0", together(*FOUR))), ends=FOUR),
    Row("two join at once", joins(Start("w4"), Go("w0", together(*FOUR, "w4"))), ends=(*FOUR, "w4")),
    Row("a newcomer dies in the midst of a transfer", joins(Kill("w3", At("w3", Point.FETCHING)), Go("w0"))),
    Row(
        "a source dies in the midst of a transfer",
        joins(Kill(W1, At(W1, Point.SERVING)), Go("w0", together("w0", "w2", "w3"))),
        ends=("w0", "w2", "w3"),
    ),
    Row(
        "the coordinator dies in the midst of a transfer",
        joins(Kill(COORDINATOR, At("w3", Point.FETCHING)), Start(COORDINATOR), Go("w0", together(*FOUR))),
        ends=FOUR,
    ),
    Row(
        "a newcomer is slower than training",
        joins(Stop("w3", At("w3", Point.FETCHING)), Go("w0"), Go("w3", Taken(3)), chain=held_for(*FOUR)),
        ends=FOUR,
    ),
    Row(
        "one comes and goes",
        joins(
            Kill("w3", together(*FOUR)),
            Start("second", together(*THREE), name="w3"),
            Kill("second", together(*FOUR)),
            Start("third", together(*THREE), name="w3"),
            Go("w0", together(*FOUR)),
        ),
        ends=(*THREE, "third"),
    ),
    Row("one leaves", [[Leave(W1, at(Point.FORWARD))]], ends=BUT_1),
    Row("all but one leave", [[Leave(W1, at(Point.FORWARD))], [Leave("w2", at(Point.VOTED, "w2"))]], ends=["w0"]),
]
COORDINATOR_LOST = [
    *(
        Row(f"the coordinator dies, a worker is {point.name}", [[Kill(COORDINATOR, at(point)), Start(COORDINATOR)]])
        for point in IN_A_STEP
    ),
    *(
        Row(f"the coordinator dies {point.name}", [[Kill(COORDINATOR, at(point, COORDINATOR)), Start(COORDINATOR)]])
        for point in (Point.WRITING, Point.WRITTEN)
    ),
    Row(
        "the coordinator dies when the last commit is written",
        [[Kill(COORDINATOR, at(Point.WRITTEN, COORDINATOR, NUM_STEPS)), Start(COORDINATOR)]],
    ),
    Row("the coordinator dies in writing", [[Tear(COORDINATOR, at(Point.WRITING, COORDINATOR)), Start(COORDINATOR)]]),
    *(
        Row(
            f"coordinator and worker die, {occasion.who} {occasion.point.name}",
            [[Kill(COORDINATOR, occasion), Kill(W1), Start(COORDINATOR)]],
            ends=BUT_1,
        )
        for occasion in (at(MIDST), at(Point.VOTED), at(Point.WRITING, COORDINATOR), at(Point.WRITTEN, COORDINATOR))
    ),
    Row(
        "coordinator and worker die and come back",
        [[Kill(COORDINATOR, at(MIDST)), Kill(W1), Start(COORDINATOR), Start("again", name=W1)], held_for(*THREE)],
        ends=("w0", "again", "w2"),
    ),
    Row(
        "the coordinator dies twice",
        [
            [
                Kill(COORDINATOR, at(MIDST)),
                Start(COORDINATOR),
                Kill(COORDINATOR, at(Point.VOTED, step=3)),
                Start(COORDINATOR),
            ]
        ],
    ),
]


@pytest.mark.parametrize("row", KILLED + JOINS + COORDINATOR_LOST, ids=lambda row: row.what)
def test_who_is_lost_or_joins_changes_no_bit(row: Row, undisturbed: Mapping[str, object], tmp_path: Path) -> None:
    check(play(FaultScript(row.workers, row.chains), make, tmp_path / "journal"), undisturbed, row.ends)


@pytest.mark.parametrize("point", IN_A_STEP)
def test_a_hiccup_costs_nobody_its_place(point: Point, undisturbed: Mapping[str, object], tmp_path: Path) -> None:
    script = FaultScript(THREE, [[Stop(W1, at(point)), Go(W1, Missed(W1))]])
    played = play(script, make, tmp_path / "journal")
    check(played, undisturbed, THREE)
    assert played.epochs == ["w0 w1 w2"]


def parted(*pairs: tuple[str, str], until: Together) -> list[Chain]:
    """Nothing passes between these for a while; in the end all three are there."""
    cut = [Part(one, None if index else at(MIDST), other) for index, (one, other) in enumerate(pairs)]
    mended = [Join(one, None if index else until, other) for index, (one, other) in enumerate(pairs)]
    return [[*cut, *mended], held_for(*THREE)]


GIVEN_UP = [
    *(
        Row(f"a worker stops {point.name}", [[Stop(W1, at(point)), Go(W1, together(*BUT_1))], held_for(*THREE)])
        for point in (Point.FORWARD, Point.GATHERING, Point.VOTED, Point.SAVING)
    ),
    Row("one does not reach the coordinator", parted((W1, COORDINATOR), until=together(*BUT_1))),
    Row("one reaches nobody", parted((W1, COORDINATOR), (W1, "w0"), (W1, "w2"), until=together(*BUT_1))),
    Row(
        "two do not reach the coordinator's side",
        parted((W1, COORDINATOR), ("w2", COORDINATOR), (W1, "w0"), ("w2", "w0"), until=together("w0")),
    ),
    Row("two do not reach each other", parted(("w0", "w2"), until=together(*TWO))),
    Row(
        "the former bearer of a name comes back",
        [
            [
                Stop(W1, at(MIDST)),
                Start("again", together(*BUT_1), name=W1),
                Go(W1, together(*THREE)),
            ],
            held_for(*THREE),
        ],
        ends=("w0", "again", "w2"),
    ),
]


@pytest.mark.parametrize("row", GIVEN_UP, ids=lambda row: row.what)
@pytest.mark.usefixtures("impatient")
def test_who_was_given_up_comes_back(row: Row, undisturbed: Mapping[str, object], tmp_path: Path) -> None:
    check(play(FaultScript(row.workers, row.chains), make, tmp_path / "journal"), undisturbed, row.ends)


@pytest.mark.usefixtures("impatient")
def test_who_is_cut_off_until_the_others_have_ended_is_told_so(
    undisturbed: Mapping[str, object], tmp_path: Path
) -> None:
    cut = [Part(W1, at(MIDST), COORDINATOR), *(Part(W1, None, other) for other in BUT_1)]
    mended = [Join(W1, Deserted(), COORDINATOR), *(Join(W1, None, other) for other in BUT_1)]
    played = play(FaultScript(THREE, [[*cut, *mended]]), make, tmp_path / "journal")
    check(played, undisturbed, BUT_1)
    assert played.missed == {W1: "all steps are taken, and the model is in the output folder of worker w0"}
    assert played.errors == {}


def test_a_clock_that_jumps_evicts_nobody(undisturbed: Mapping[str, object], tmp_path: Path) -> None:
    played = play(FaultScript(THREE, [[Jump(COORDINATOR, at(p), 3600)] for p in IN_A_STEP]), make, tmp_path / "journal")
    check(played, undisturbed, THREE)
    assert played.epochs == ["w0 w1 w2"]


def test_sums_of_one_that_differ_are_not_taken(undisturbed: Mapping[str, object], tmp_path: Path) -> None:
    script = FaultScript(THREE, [[Corrupt(W1, at(Point.REDUCED))], held_for(*THREE)])
    played = play(script, make, tmp_path / "journal")
    check(played, undisturbed, THREE)
    assert played.epochs == ["w0 w1 w2", "w0 w2", "w0 w2 w1"]


def test_where_two_differ_they_add_up_once_more(undisturbed: Mapping[str, object], tmp_path: Path) -> None:
    played = play(FaultScript(TWO, [[Corrupt(W1, at(Point.REDUCED))]]), make, tmp_path / "journal")
    check(played, undisturbed, TWO)
    assert played.epochs == ["w0 w1"] * 2


def test_where_two_differ_again_the_run_fails_and_says_why(tmp_path: Path) -> None:
    script = FaultScript(TWO, [[Corrupt(W1, at(Point.REDUCED)), Corrupt(W1, at(Point.REDUCED))]])
    played = play(script, make, tmp_path / "journal")
    assert played.commits == [1]
    assert played.states == {}
    for error in played.errors.values():
        assert "with no majority, 2 times; the step is not taken" in error
    assert set(played.errors) == set(TWO)


@pytest.mark.parametrize("then", [(), (Kill(W1, at(Point.REDUCED)),)], ids=["", "and it dies"])
def test_a_loss_that_is_not_a_number_on_one_skips_the_step_on_all(
    then: Chain, undisturbed: Mapping[str, object], tmp_path: Path
) -> None:
    alone = play(FaultScript(["w0"], [[Poison("w0", at(Point.IDLE, "w0"))]]), make, tmp_path / "alone").states["w0"]
    assert alone["num_tokens"] < undisturbed["num_tokens"]  # type: ignore[operator]
    script = FaultScript(THREE, [[Poison("w0", at(Point.IDLE, "w0"))], then])
    check(play(script, make, tmp_path / "journal"), alone, BUT_1 if then else THREE)


STRANGERS = {
    "the token is not that of this run": Start("x1", token="a guess"),
    "x2 has run another": Start("x2", facts=FACTS._replace(run_id="another")),
    "x3 has program version 9.9.9": Start("x3", facts=FACTS._replace(program_version="9.9.9")),
    "x4 has configuration changed": Start("x4", facts=FACTS._replace(config_digest="changed")),
}


def test_strangers_disturb_nobody(undisturbed: Mapping[str, object], tmp_path: Path) -> None:
    played = play(FaultScript(THREE, [list(STRANGERS.values())]), make, tmp_path / "journal")
    check(played, undisturbed, THREE)
    assert played.epochs == ["w0 w1 w2"]
    for words, start in STRANGERS.items():
        assert words in played.errors[start.who]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Kill("w9"), "nobody is called so: Kill"),
        (Kill("w0", at(Point.IDLE, "w0", NUM_STEPS + 1)), "it has not come to"),
    ],
)
def test_a_script_that_does_not_come_true_is_refused(fault: Fault, words: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=words):
        play(FaultScript(["w0"], [[fault]]), make, tmp_path / "journal")
