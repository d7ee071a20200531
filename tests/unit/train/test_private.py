"""What only one rank has, in a checkpoint that anybody may have written, and after the loss of a rank."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoint_samples import arrays, checkpointer, meta
from train_samples import CONFIG, TinyModel, make_trainer, on_ranks

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.config.schema import DilocoConfig
from mlx_distributed.errors import CheckpointError
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.tracking import ConsoleTracker, Trackers
from mlx_distributed.train.checkpoint import open_checkpoint
from mlx_distributed.train.hooks import Save
from mlx_distributed.train.pending import Pending
from mlx_distributed.train.private import collect, hand_out
from mlx_distributed.train.setup import exchange_layout, gradient_layout, init_state
from mlx_distributed.train.state import TrainState, digest

SHARDED = replace(CONFIG, optimizer=replace(CONFIG.optimizer, shard=True))


def loaders(*of_ranks: Arrays) -> Sequence[Callable[[], Arrays]]:
    return [lambda own=own: own for own in of_ranks]  # type: ignore[misc]


def make_state() -> TrainState:
    return init_state(TinyModel(), SHARDED, LocalComm())


MOMENTS = {f"moments/w.{moment}@0": mx.ones(600) for moment in "mv"}
REST = {f"moments/w.{moment}@600": mx.zeros(400) for moment in "mv"}


def test_segments_of_ranks_are_loaded_whole(tmp_path: Path) -> None:
    shared = {"step": mx.array(3, mx.uint64)}
    folder = checkpointer(tmp_path).save(arrays(1)[0], shared, meta(1), loaders(MOMENTS, {}, REST))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.manifest.of_ranks == tuple(f"rank-000{rank}.safetensors" for rank in range(3))
    _, optimizer = checkpoint.load()
    assert list(optimizer) == ["step", "w.m", "w.v"]
    assert optimizer["w.m"].tolist() == [1.0] * 600 + [0.0] * 400
    assert checkpoint.feedback() == []


def test_what_one_rank_has_is_let_go_before_the_next_is_asked(tmp_path: Path) -> None:
    class Own(dict[str, mx.array]):
        """A dictionary that can be watched."""

    given: list[weakref.ref[Own]] = []

    def get() -> Arrays:
        assert all(reference() is None for reference in given)
        own = Own({"feedback/w": mx.zeros(1000)})
        given.append(weakref.ref(own))
        return own

    folder = checkpointer(tmp_path).save(*arrays(1), meta(1), [get, get, get])
    assert len(given) == len(open_checkpoint(folder).feedback()) == 3


@pytest.mark.parametrize(
    ("of_ranks", "said"),
    [
        ([MOMENTS], "the segments of w.m have 600 of 1000 elements"),
        ([MOMENTS, MOMENTS, REST], "a segment of w.m begins at 0, where one at 600 is due"),
        ([MOMENTS, REST | {"moments/x.m@0": mx.zeros(1)}], "'moments/x.m@0' is not a segment"),
        ([MOMENTS, REST, {"step": mx.zeros(1)}], "no rank can have 'step'"),
    ],
)
def test_segments_that_make_no_whole_are_refused(tmp_path: Path, of_ranks: list[Arrays], said: str) -> None:
    folder = checkpointer(tmp_path).save(arrays(1)[0], {"step": mx.array(3)}, meta(1), loaders(*of_ranks))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder).load()
    assert said in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_moment_is_whole_or_in_segments(tmp_path: Path) -> None:
    folder = checkpointer(tmp_path).save(*arrays(1), meta(1), loaders(MOMENTS, REST))
    with pytest.raises(CheckpointError, match=r"w\.m is there both whole and in segments"):
        open_checkpoint(folder).load()


def test_moments_of_other_parameters_are_refused(tmp_path: Path) -> None:
    state = make_state()
    moments = {name: array.reshape(state.parameters[name[:-2]].shape) for name, array in state.parts[0].moments.items()}
    whole = state.optimizer | moments
    for changes in (
        {"head.weight.m": None},
        {"zzz": mx.zeros(1)},
        {"step": mx.array(1)},
        {"head.weight.v": mx.zeros(16 * 8)},
        {"head.weight.v": mx.zeros((16, 8), mx.float16)},
    ):
        optimizer = {name: array for name, array in (whole | changes).items() if array is not None}
        folder = checkpointer(tmp_path).save(state.parameters, optimizer, meta(1))
        with pytest.raises(CheckpointError, match="the moments do not fit: they were saved for other parameters"):
            hand_out(make_state(), gradient_layout(state.parameters), open_checkpoint(folder), LocalComm())
    folder = checkpointer(tmp_path).save(state.parameters, whole | {"step": mx.array(7, mx.uint64)}, meta(1))
    restored = make_state()
    hand_out(restored, gradient_layout(state.parameters), open_checkpoint(folder), LocalComm())
    assert restored.optimizer["step"].item() == 7


def test_feedback_of_other_parameters_is_refused(tmp_path: Path) -> None:
    state = make_state()
    state.parts = []
    folder = checkpointer(tmp_path).save(*arrays(1), meta(1), loaders({"feedback/w": mx.zeros(1000)}))
    with pytest.raises(CheckpointError, match="what compression has left out does not fit the gradients"):
        hand_out(state, gradient_layout(state.parameters, "int8"), open_checkpoint(folder), LocalComm())


def test_both_kinds_share_a_file(tmp_path: Path) -> None:
    state, layout = make_state(), gradient_layout(make_state().parameters, "int8")
    (own,) = (get() for get in collect(state, layout, LocalComm()))
    folder = checkpointer(tmp_path).save(state.parameters, state.shared, meta(1), loaders(own))
    checkpoint = open_checkpoint(folder)
    (load,) = checkpoint.feedback()
    assert load().keys() == state.parameters.keys()
    assert dict(checkpoint.optimizer()).keys() == (state.optimizer | state.parts[0].moments).keys()


@pytest.mark.parametrize("saved", [True, False])
def test_who_is_left_alone_with_a_shard_says_where_to_go_on(tmp_path: Path, saved: bool) -> None:
    state = make_state()
    state.step = 4
    with (tmp_path / "log").open("w") as log:
        save = Save(
            checkpointer(tmp_path / "checkpoints"),
            LocalComm(),
            gradient_layout(state.parameters),
            Trackers([ConsoleTracker(9, log)]),
            lambda state: meta(state.step),
        )
        if saved:
            save(state)
            save.alone(state)  # there is nothing new to lose
        state.step = 5
        state.parts[0].shard = replace(state.parts[0].shard, slices=((0, 1),))
        save.alone(state)
    (line,) = (line for line in (tmp_path / "log").read_text().splitlines() if "step 5" in line)
    named = "step-00000004" if saved else "there is none yet"
    assert "step 5 cannot be saved, as every worker had a part of the moments" in line
    assert line.endswith(f"--resume goes on from the last whole checkpoint ({named})")
    assert "step 4 cannot" not in (tmp_path / "log").read_text()


def test_who_is_left_alone_with_everything_saves_it(tmp_path: Path) -> None:
    state = init_state(TinyModel(), CONFIG, LocalComm())
    state.step = 4
    layout = gradient_layout(state.parameters)
    Save(checkpointer(tmp_path), LocalComm(), layout, Trackers([]), lambda state: meta(state.step)).alone(state)
    assert digest(open_checkpoint(tmp_path / "step-00000004").load()[1]) == digest(state.optimizer)


def under_way(state: TrainState, *, then: bool = False) -> Pending:
    """Gradients of every parameter and a tally, as they are after a sum of `parallel.sync: delayed`."""
    mx.random.seed(9)
    sums = {name: mx.random.normal(array.shape) for name, array in state.parameters.items()}
    sums |= {
        "tally.loss": mx.ones(5),
        "tally.num_tokens": mx.array([3] * 5, mx.int64),
        "tally.stop": mx.zeros(1, mx.int64),
    }
    computed_at = {name: array + 1.0 for name, array in state.parameters.items()} if then else None
    mx.eval(sums, computed_at or {})
    return Pending(lambda: sums, computed_at)


@pytest.mark.parametrize("then", [False, True])
@pytest.mark.parametrize(("saved_by", "size"), [(1, 1), (2, 2), (2, 3), (3, 1)])
@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_sums_that_are_under_way_are_handed_to_all(
    tmp_path: Path, saved_by: int, size: int, wire: str, then: bool
) -> None:
    config = replace(CONFIG, parallel=replace(CONFIG.parallel, wire=wire))  # type: ignore[arg-type]
    states = [init_state(TinyModel(), config, LocalComm()) for _ in range(3)]
    layout = gradient_layout(states[0].parameters, wire)
    for state in states:
        mx.eval(state.parameters, state.optimizer)
    expected = under_way(states[0], then=then)

    def save(comm: Communicator) -> None:
        state = states[comm.rank]
        state.step, state.pending = 4, expected
        Save(checkpointer(tmp_path), comm, layout, Trackers([]), lambda state: meta(state.step))(state)
        comm.barrier("the end")

    def restore(comm: Communicator) -> tuple[str, str]:
        state, checkpoint = states[comm.rank], open_checkpoint(tmp_path / "step-00000004")
        state.pending = None
        hand_out(state, layout, None if comm.rank else checkpoint, comm)
        assert state.pending is not None
        return digest(state.pending.sums), digest(state.pending.computed_at or {})

    on_ranks(saved_by, save)
    assert on_ranks(size, restore) == [(digest(expected.sums), digest(expected.computed_at or {}))] * size


def test_where_nothing_is_under_way_nothing_is_handed_out(tmp_path: Path) -> None:
    state, layout = init_state(TinyModel(), CONFIG, LocalComm()), gradient_layout(make_state().parameters)
    assert collect(state, layout, LocalComm()) == []
    folder = checkpointer(tmp_path).save(state.parameters, state.shared, meta(1))
    hand_out(state, layout, open_checkpoint(folder), LocalComm())
    assert state.pending is None
    hand_out(state, layout, None, LocalComm())
    assert state.pending is None


@pytest.mark.parametrize(
    "foreign",
    [
        {"pending/sums/tail.weight": mx.zeros(1)},
        {"pending/sums/head.weight": mx.zeros((8, 16))},
        {"pending/sums/head.weight": mx.zeros(128)},
        {"pending/computed-at/norm.bias": mx.zeros(9)},
        {"pending/other/norm.bias": mx.zeros(8)},
        {"pending/norm.bias": mx.zeros(8)},
        {"pending/sums/": mx.zeros(8)},
    ],
    ids=lambda foreign: f"{next(iter(foreign))}{next(iter(foreign.values())).shape}",
)
def test_sums_of_other_parameters_are_refused(tmp_path: Path, foreign: Arrays) -> None:
    state, layout = init_state(TinyModel(), CONFIG, LocalComm()), gradient_layout(make_state().parameters)
    state.pending = under_way(state)
    (own,) = (get() for get in collect(state, layout, LocalComm()))
    folder = checkpointer(tmp_path).save(state.parameters, state.shared, meta(1), loaders(own | foreign))
    state.pending = None
    with pytest.raises(CheckpointError) as error:
        hand_out(state, layout, open_checkpoint(folder), LocalComm())
    (name,) = foreign
    assert str(error.value) == f"the sums that were under way do not fit the parameters: {name} is not one of them"
    assert state.pending is None


@pytest.mark.parametrize("missing", ["sums/head.weight", "sums/tally.loss", "computed-at/head.weight"])
def test_sums_that_are_not_all_there_are_refused(tmp_path: Path, missing: str) -> None:
    parallel = replace(CONFIG.parallel, sync="delayed", delay_compensation=0.5)
    config = replace(CONFIG, parallel=parallel)
    state = init_state(TinyModel(), config, LocalComm())
    next(iter(make_trainer(config).steps(state, Mesh(LocalComm()))))
    layout = gradient_layout(state.parameters)
    (own,) = (get() for get in collect(state, layout, LocalComm()))
    del own[f"pending/{missing}"]
    folder = checkpointer(tmp_path).save(state.parameters, state.shared, meta(1), loaders(own))
    with pytest.raises(CheckpointError, match="the sums that were under way do not fit the parameters"):
        hand_out(state, layout, open_checkpoint(folder), LocalComm())


def test_who_is_left_alone_saves_sums_that_have_come_and_no_others(tmp_path: Path) -> None:
    for step, waited in ((4, True), (5, False)):
        state = init_state(TinyModel(), CONFIG, LocalComm())
        state.step, state.pending = step, under_way(state)
        layout = gradient_layout(state.parameters)
        if waited:
            _ = state.pending.sums
        Save(checkpointer(tmp_path), LocalComm(), layout, Trackers([]), lambda state: meta(state.step)).alone(state)
        found = open_checkpoint(tmp_path / f"step-0000000{step}").manifest.of_ranks
        assert len(found) == int(waited)
        assert (state.pending is not None) == waited


def test_sums_travel_with_what_else_rank_0_has(tmp_path: Path) -> None:
    """Copies, what compression owes and what is under way, in the files of two workers."""
    diloco = DilocoConfig(sync_every=6, fragments=2, overlap_steps=2)
    parallel = replace(CONFIG.parallel, sync="diloco", wire="int8", diloco=diloco, nproc=2)
    config = replace(CONFIG, parallel=parallel, checkpoint=replace(CONFIG.checkpoint, steps=4))

    def start() -> TrainState:
        mx.random.seed(0)
        state = init_state(TinyModel(), config, LocalComm())
        assert state.inner is not None
        mx.eval(state.parameters, state.optimizer, state.inner.state.optimizer)
        return state

    layout = exchange_layout(start().parameters, config)

    def whole(comm: Communicator) -> dict[str, str]:
        state = states[comm.rank]
        save = Save(checkpointer(tmp_path), comm, layout, Trackers([]), lambda state: meta(state.step))
        for info in make_trainer(config).steps(state, Mesh(comm)):
            if info.step == 4:
                assert state.pending is not None
                save(state)
        comm.barrier("the end")
        return state.digest()

    def resumed(comm: Communicator) -> dict[str, str]:
        state, checkpoint = states[comm.rank], open_checkpoint(tmp_path / "step-00000004")
        state.restore(*checkpoint.load(), 4, checkpoint.meta.num_tokens, 0)
        hand_out(state, layout, None if comm.rank else checkpoint, comm)
        for _ in make_trainer(config).steps(state, Mesh(comm)):
            pass
        return state.digest()

    states = [start() for _ in range(2)]
    expected = on_ranks(2, whole)
    states = [start() for _ in range(2)]
    assert on_ranks(2, resumed) == expected == [expected[0]] * 2
