"""A sharded optimizer takes the steps of a replicated one, bit for bit, with its part of the moments on each rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from train_samples import CONFIG, NUM_STEPS, TinyModel, make_trainer, on_ranks

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.buckets import BLOCK, Arrays
from mlx_distributed.config import Config
from mlx_distributed.errors import CommError
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.testing import run_ranks
from mlx_distributed.tracking import Trackers
from mlx_distributed.train.checkpoint import Checkpointer, CheckpointMeta, open_checkpoint
from mlx_distributed.train.hooks import Save
from mlx_distributed.train.private import hand_out
from mlx_distributed.train.setup import gradient_layout, init_state
from mlx_distributed.train.sharded import gather_block_sums
from mlx_distributed.train.state import TrainState, digest
from mlx_distributed.train.step_info import StepInfo

WIDTH = 11_000
SHARDED = replace(CONFIG, optimizer=replace(CONFIG.optimizer, shard=True))


class WideModel(TinyModel):
    """Has buckets that are cut, and one of a few blocks."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.up, self.down = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + self.dropout(nn.gelu(layer(hidden)))
        return self.head(self.norm(hidden + self.down(nn.relu(self.up(hidden)))))


def make_state(comm: Communicator, config: Config, dropout: float = 0.0) -> TrainState:
    mx.random.seed(0)
    state = init_state(WideModel(dropout), config, comm)
    mx.eval(state.parameters, state.optimizer)
    return state


def held(state: TrainState) -> Arrays:
    """All that this rank has of the optimizer's state."""
    return state.optimizer | {name: array for part in state.parts for name, array in part.moments.items()}


def make_save(folder: Path, comm: Communicator, state: TrainState, config: Config) -> Save:
    def describe(state: TrainState) -> CheckpointMeta:
        return CheckpointMeta(state.step, state.num_tokens, state.num_skipped, "run", None, {}, state.metrics)

    layout = gradient_layout(state.parameters, config.parallel.wire)
    return Save(Checkpointer(folder, None, True, print), comm, layout, Trackers([]), describe)


def timeless(info: StepInfo) -> StepInfo:
    return replace(info, step_s=0.0, data_s=0.0, comm_s=0.0, comm_exposed_s=0.0, sent_bytes=0)


def run(comm: Communicator, folder: Path, config: Config, dropout: float = 0.0) -> list[StepInfo]:
    """Train to the end and save."""
    state = make_state(comm, config, dropout)
    infos = list(make_trainer(config).steps(state, Mesh(comm)))
    make_save(folder, comm, state, config)(state)
    comm.barrier("the end")
    return infos


def digests(folder: Path) -> list[str]:
    return [digest(arrays) for arrays in open_checkpoint(folder / f"step-{NUM_STEPS:08d}").load()]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_steps_are_those_of_a_replicated_optimizer(tmp_path: Path, size: int) -> None:
    alone = run(LocalComm(), tmp_path / "alone", CONFIG, dropout=0.3)
    found = on_ranks(size, lambda comm: run(comm, tmp_path / "sharded", SHARDED, dropout=0.3))
    assert [[timeless(info) for info in infos] for infos in found] == [[timeless(info) for info in alone]] * size
    assert digests(tmp_path / "sharded") == digests(tmp_path / "alone")


@pytest.mark.parametrize("size", [2, 3])
def test_as_many_bytes_travel_and_every_rank_has_its_share_of_the_moments(tmp_path: Path, size: int) -> None:
    # Two micro-batches each: whole sub-trees, so that a rank has one partial sum to send.
    train = replace(CONFIG.train, global_batch_size=4 * size, micro_batch_size=2)

    def body(config: Config) -> Callable[[Communicator], tuple[int, int]]:
        def work(comm: Communicator) -> tuple[int, int]:
            state = make_state(comm, replace(config, train=train))
            infos = list(make_trainer(replace(config, train=train)).steps(state, Mesh(comm)))
            moments = sum(array.nbytes for name, array in held(state).items() if name != "step")
            return sum(info.sent_bytes for info in infos), moments

        return work

    replicated, sharded = on_ranks(size, body(CONFIG)), on_ranks(size, body(SHARDED))
    sent = [sum(sent for sent, _ in found) for found in (replicated, sharded)]
    assert sent[1] <= 1.02 * sent[0]
    (whole,) = {moments for _, moments in replicated}
    assert sum(moments for _, moments in sharded) == whole
    assert max(moments for _, moments in sharded) <= whole / size + 3 * 2 * 4 * BLOCK


@pytest.mark.parametrize("size", [1, 3])
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(size: int) -> None:
    def body(comm: Communicator) -> list[tuple[str | None, bool]]:
        state, found = make_state(comm, SHARDED), []
        weight = state.model.embed.weight
        state.model.embed.weight = mx.concatenate([weight[:-1], mx.full((1, 8), math.nan)])
        before = state.digest(), digest(held(state))
        for info in make_trainer(SHARDED).steps(state, Mesh(comm)):
            after = state.digest(), digest(held(state))
            found.append((info.skipped, after == before))
            before = after
        return found

    first, *others = on_ranks(size, body)
    assert others == [first] * (size - 1)
    assert 0 < sum(skipped is not None for skipped, _ in first) < NUM_STEPS
    assert all(unchanged == (skipped is not None) for skipped, unchanged in first)


@pytest.mark.parametrize("operation", ["reduce_scatter", "all_gather_slices"])
def test_a_peer_that_is_lost_leaves_the_last_commit(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    def body(comm: Communicator) -> tuple[CommError, bool]:
        state = make_state(comm, SHARDED)
        trainer = make_trainer(SHARDED)
        trainer.train_step(state, Mesh(comm))
        comm.barrier("a step")
        before = state.digest(), digest(held(state)), state.step
        if comm.rank == 1:

            def leave(*_: object) -> None:
                raise KeyboardInterrupt("gone")

            monkeypatch.setattr(comm, operation, leave)
        with pytest.raises(CommError) as caught:
            trainer.train_step(state, Mesh(comm))
        return caught.value, (state.digest(), digest(held(state)), state.step) == before

    lost, left = run_ranks(2, body)
    assert isinstance(left, KeyboardInterrupt)
    assert not isinstance(lost, BaseException)
    assert lost[0].peer == 1
    assert lost[1]


def test_sums_of_squares_that_do_not_fit_are_refused() -> None:
    def body(comm: Communicator) -> None:
        state = make_state(comm, SHARDED)
        layout = gradient_layout(state.parameters)
        if comm.rank == 1:
            comm.all_gather(mx.zeros(1), "a test")
            comm.barrier("the end")
        own = [mx.zeros(owned[0][1] - owned[0][0]) for owned in comm.slices(layout)]
        gather_block_sums(layout, own, "a test", comm)

    refused, _ = run_ranks(2, body)
    assert isinstance(refused, CommError)
    assert refused.peer == 1
    assert "sums of squares were due" in refused.reason


def save_at(folder: Path, config: Config, step: int) -> Callable[[Communicator], None]:
    """Train up to a step and save."""

    def body(comm: Communicator) -> None:
        state = make_state(comm, config)
        for info in make_trainer(config).steps(state, Mesh(comm)):
            if info.step == step:
                break
        make_save(folder, comm, state, config)(state)
        comm.barrier("the end")

    return body


def go_on_from(folder: Path, config: Config, step: int) -> Callable[[Communicator], list[StepInfo]]:
    """Train from what was saved at a step to the end and save."""

    def body(comm: Communicator) -> list[StepInfo]:
        checkpoint = open_checkpoint(folder / f"step-{step:08d}")
        state, meta = make_state(comm, config), checkpoint.meta
        optimizer = state.shared if state.parts else dict(checkpoint.optimizer())
        state.restore(checkpoint.parameters(), optimizer, meta.step, meta.num_tokens, meta.num_skipped)
        layout = gradient_layout(state.parameters, config.parallel.wire)
        hand_out(state, layout, None if comm.rank else checkpoint, comm)
        infos = list(make_trainer(config).steps(state, Mesh(comm)))
        make_save(folder, comm, state, config)(state)
        comm.barrier("the end")
        return [timeless(info) for info in infos]

    return body


@pytest.mark.parametrize(("saved_by", "size"), [(3, 2), (2, 3), (1, 2), (2, 1)])
@pytest.mark.parametrize(("saved", "resumed"), [(SHARDED, SHARDED), (CONFIG, SHARDED), (SHARDED, CONFIG)])
def test_any_group_goes_on_from_what_any_group_saved(
    tmp_path: Path, saved_by: int, size: int, saved: Config, resumed: Config
) -> None:
    expected = run(LocalComm(), tmp_path / "expected", CONFIG)
    on_ranks(saved_by, save_at(tmp_path, saved, 3))
    assert on_ranks(size, go_on_from(tmp_path, resumed, 3)) == [[timeless(info) for info in expected[3:]]] * size
    assert digests(tmp_path) == digests(tmp_path / "expected")


@pytest.mark.parametrize("size", [2, 3])
def test_a_lossy_wire_is_resumed_exactly_too(tmp_path: Path, size: int) -> None:
    lossy = replace(SHARDED, parallel=replace(SHARDED.parallel, wire="int8"))
    found = on_ranks(size, lambda comm: run(comm, tmp_path / "expected", lossy))
    infos = [[timeless(info) for info in infos] for infos in found]
    assert infos == [infos[0]] * size
    on_ranks(size, save_at(tmp_path, lossy, 3))
    assert on_ranks(size, go_on_from(tmp_path, lossy, 3)) == [infos[0][3:]] * size
    assert digests(tmp_path) == digests(tmp_path / "expected")
