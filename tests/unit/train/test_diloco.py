"""Workers that train by themselves and agree now and then: the steps of the plain loop, told as they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten
from train_samples import CONFIG, NUM_ROWS, TinyModel, make_plan, make_rows, on_ranks

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.config import Config
from mlx_distributed.config.schema import DilocoConfig
from mlx_distributed.data.tokenize import collate
from mlx_distributed.errors import CommError, TrainingError
from mlx_distributed.parallel.adamw import STEP, DistributedAdamW, decaying
from mlx_distributed.parallel.data import share
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.testing import run_ranks
from mlx_distributed.train.diloco import LAG, MIX, due, parts_of
from mlx_distributed.train.loss import summed_loss
from mlx_distributed.train.outer import make_fragments, momentum_name, names_of
from mlx_distributed.train.schedule import learning_rate
from mlx_distributed.train.setup import init_state
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.step_info import StepInfo
from mlx_distributed.train.trainer import Trainer

NUM_STEPS = 11
LOSSES_TAG = 2


def loosely(
    *share: float, every: int = 4, fragments: int = 1, overlap: int = 0, wire: str = "fp32", look: int | None = None
) -> Config:
    """Workers of these speeds; the state is looked at after every `look` steps."""
    diloco = DilocoConfig(sync_every=every, fragments=fragments, overlap_steps=overlap)
    parallel = replace(CONFIG.parallel, sync="diloco", share=share, nproc=len(share), diloco=diloco, wire=wire)  # type: ignore[arg-type]
    return replace(CONFIG, parallel=parallel, checkpoint=replace(CONFIG.checkpoint, steps=look))


def make_state(config: Config, dropout: float = 0.0) -> TrainState:
    mx.random.seed(0)
    state = init_state(TinyModel(dropout), config, LocalComm())
    assert state.inner is not None
    mx.eval(state.parameters, state.optimizer, state.inner.state.optimizer)
    return state


def inner_of(state: TrainState) -> TrainState:
    assert state.inner is not None
    return state.inner.state


def make_trainer(config: Config, stop_requested: Callable[[], bool] = lambda: False) -> Trainer:
    rows = make_rows()
    return Trainer(config, make_plan(rows, config, NUM_STEPS), rows, stop_requested)


def timeless(info: StepInfo) -> StepInfo:
    return replace(info, step_s=0.0, comm_s=0.0, comm_exposed_s=0.0, sent_bytes=0)


def run(state: TrainState, comm: Communicator, config: Config) -> tuple[list[StepInfo], dict[str, str]]:
    infos = [timeless(info) for info in make_trainer(config).steps(state, Mesh(comm))]
    return infos, state.digest()


# --- When fragments leave, and who takes what ---


@given(st.integers(1, 60), st.data())
def test_every_fragment_leaves_once_in_every_window(sync_every: int, data: st.DataObject) -> None:
    fragments = data.draw(st.integers(1, sync_every))
    diloco = DilocoConfig(sync_every=sync_every, fragments=fragments)
    assert due(diloco, 0) is None
    windows = [[due(diloco, 1 + w * sync_every + i) for i in range(sync_every)] for w in range(3)]
    leaving = [[fragment for fragment in window if fragment is not None] for window in windows]
    assert leaving == [list(range(fragments))] * 3
    at = [step for step, fragment in enumerate(sum(windows, [])) if fragment is not None]
    assert min(b - a for a, b in zip(at, at[1:], strict=False)) >= sync_every // fragments
    assert at[0] + 1 >= sync_every // fragments


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 40))
def test_every_part_is_taken_once_and_nobody_is_left_behind(weights: list[float], num_steps: int) -> None:
    schedule = parts_of(tuple(weights), num_steps)
    assert len(schedule) == num_steps
    for step in schedule:
        assert len(step) == len(weights)
        assert sorted(part for parts in step for part in parts) == list(range(len(weights)))
    taken = [sum(len(step[rank]) for step in schedule) for rank in range(len(weights))]
    shares = [len(weights) * num_steps * weight / sum(weights) for weight in weights]
    assert all(num > share - 1 - 1e-6 for num, share in zip(taken, shares, strict=True))
    if len(weights) == 2:
        assert all(abs(num - share) < 1 + 1e-6 for num, share in zip(taken, shares, strict=True))
    # Nobody is so busy that it would be done sooner if another one took a part from it.
    busiest = max(num / weight for num, weight in zip(taken, weights, strict=True))
    assert all((num + 1) / weight >= busiest * (1 - 1e-9) for num, weight in zip(taken, weights, strict=True))


@given(st.integers(1, 9), st.integers(1, 20), st.floats(0.01, 100))
def test_workers_of_one_speed_take_one_part_each(size: int, num_steps: int, speed: float) -> None:
    assert parts_of((speed,) * size, num_steps) == [[[part] for part in range(size)]] * num_steps


# --- The textbook ---


@dataclass
class Worker:
    parameters: Arrays
    optimizer: Arrays
    num_tokens: int = 0
    exchanged_at: dict[int, int] = field(default_factory=dict)


@dataclass
class Told:
    loss: float
    num_tokens: int
    grad_norm: float


class Textbook:
    """All workers in plain loops, one after the other; what they agree on in double precision."""

    def __init__(self, config: Config) -> None:
        self.config, self.model, self.rows = config, TinyModel(), make_rows()
        self.plan, self.optimizer = make_plan(self.rows, config, NUM_STEPS), DistributedAdamW()
        start = make_state(config).parameters
        num = len(config.parallel.share)
        self.agreed = {name: np.asarray(array, np.float64) for name, array in start.items()}
        self.momentum = {name: np.zeros(array.shape) for name, array in start.items()}
        self.workers = [Worker(dict(start), self.optimizer.init(start)) for _ in range(num)]
        self.fragments = [names_of(fragment) for fragment in make_fragments(start, config)]
        self.told = [self._step(step) for step in range(NUM_STEPS)]

    def _step(self, step: int) -> Told:
        diloco, told = self.config.parallel.diloco, Told(0.0, 0, 0.0)
        microbatches = self.plan.microbatches(step)
        schedule = parts_of(tuple(self.config.parallel.share), diloco.sync_every)  # type: ignore[arg-type]
        ranges = share(len(microbatches), [1.0] * len(self.workers))
        for worker, parts in zip(self.workers, schedule[step % diloco.sync_every], strict=True):
            for start, stop in (ranges[part] for part in parts):
                if start < stop:
                    self._update(worker, step, microbatches[start:stop], told)
        told.loss /= told.num_tokens
        self._exchange(step + 1)
        return told

    def _update(self, worker: Worker, step: int, microbatches: list[tuple[int, ...]], told: Told) -> None:
        self.model.update(tree_unflatten(list(worker.parameters.items())))
        num_tokens, sums = 0, Arrays()
        for batch in microbatches:
            tokens, loss_mask = collate([self.rows[row] for row in batch])
            loss, found = nn.value_and_grad(self.model, summed_loss)(self.model, mx.array(tokens), mx.array(loss_mask))
            for name, gradient in tree_flatten(found):
                sums[name] = sums[name] + gradient if name in sums else gradient
            told.loss += loss.item()
            num_tokens += int(loss_mask[:, 1:].sum())
        norm = math.sqrt(sum(mx.square(gradient).sum().item() for gradient in sums.values())) / num_tokens
        told.grad_norm = max(told.grad_norm, norm)
        told.num_tokens += num_tokens
        worker.num_tokens += num_tokens
        assert self.config.train.max_grad_norm is not None
        scale = mx.array(min(1.0, self.config.train.max_grad_norm / norm) / num_tokens)
        rate = learning_rate(self.config.scheduler, self.config.optimizer.learning_rate, step, NUM_STEPS)
        decayed, old = decaying(worker.parameters), dict(worker.parameters)
        for group in self.optimizer.update(old, sums, worker.optimizer, scale, rate, decayed):
            worker.parameters |= group
        mx.eval(worker.parameters, worker.optimizer)

    def _exchange(self, num_steps: int) -> None:
        """With a single sum under way at a time, which was computed when it left."""
        diloco = self.config.parallel.diloco
        last = num_steps == NUM_STEPS
        late = diloco.overlap_steps
        rule = diloco.outer_learning_rate, diloco.outer_momentum
        for fragment in range(diloco.fragments):
            offset = (fragment + 1) * diloco.sync_every // diloco.fragments
            leaves = [n for n in range(offset, NUM_STEPS + 1, diloco.sync_every)]
            for left in leaves:
                if late and (num_steps == left + late or (last and left < num_steps < left + late)):
                    self._move(fragment, self.under_way, *rule, mix=0.0 if last else MIX)
        for fragment in range(diloco.fragments):
            offset = (fragment + 1) * diloco.sync_every // diloco.fragments
            if num_steps >= offset and (num_steps - offset) % diloco.sync_every == 0:
                self.under_way = self._mean_difference(fragment)
                if not late or last:
                    self._move(fragment, self.under_way, *rule, mix=0.0)
        if last:
            for fragment in range(diloco.fragments):
                self._move(fragment, self._mean_difference(fragment), 1.0, 0.0, mix=0.0, keep=False)

    def _mean_difference(self, fragment: int) -> dict[str, np.ndarray]:
        since = [worker.num_tokens - worker.exchanged_at.get(fragment, 0) for worker in self.workers]
        for worker in self.workers:
            worker.exchanged_at[fragment] = worker.num_tokens
        names = self.fragments[fragment]
        return {
            name: sum(
                num * (self.agreed[name] - np.asarray(worker.parameters[name], np.float64)) / max(sum(since), 1)
                for num, worker in zip(since, self.workers, strict=True)
            )
            for name in names
        }  # type: ignore[return-value]  # a sum of arrays

    def _move(
        self, fragment: int, mean: dict[str, np.ndarray], rate: float, decay: float, *, mix: float, keep: bool = True
    ) -> None:
        for name in self.fragments[fragment]:
            velocity = decay * self.momentum[name] + mean[name]
            if keep:
                self.momentum[name] = velocity
            self.agreed[name] = self.agreed[name] - rate * (mean[name] + decay * velocity)
            for worker in self.workers:
                own = mix * np.asarray(worker.parameters[name], np.float64) + (1 - mix) * self.agreed[name]
                worker.parameters[name] = mx.array(own, mx.float32)


@dataclass
class End:
    """What a rank has at the end."""

    infos: list[StepInfo]
    digest: dict[str, str]
    parameters: dict[str, np.ndarray]
    momentum: dict[str, np.ndarray]
    own: dict[str, np.ndarray]
    num_tokens: int


def train(config: Config, dropout: float = 0.0) -> list[End]:
    size = len(config.parallel.share)
    states = [make_state(config, dropout) for _ in range(size)]

    def body(comm: Communicator) -> End:
        state = states[comm.rank]
        infos, digest = run(state, comm, config)
        assert state.pending is None
        arrays = ({n: np.array(a) for n, a in x.items()} for x in
                  (state.parameters, state.optimizer, inner_of(state).parameters))  # fmt: skip
        return End(infos, digest, *arrays, state.num_tokens)

    return on_ranks(size, body)


@pytest.mark.parametrize("share", [(1.0,), (1.0, 1.0), (2.0, 1.0), (1.0, 1.0, 1.0)], ids=str)
@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("overlap", [0, 1])
def test_steps_are_those_of_the_textbook(share: tuple[float, ...], fragments: int, overlap: int) -> None:
    config = loosely(*share, fragments=fragments, overlap=overlap)
    expected, found = Textbook(config), train(config)
    first = found[0]
    for end in found:
        assert (end.infos, end.digest, end.num_tokens) == (first.infos, first.digest, first.num_tokens)
        assert all(end.own[name].tobytes() == array.tobytes() for name, array in end.parameters.items())
    assert [info.step for info in first.infos] == list(range(1, NUM_STEPS + 1))
    assert [info.num_tokens for info in first.infos] == [told.num_tokens for told in expected.told]
    assert first.num_tokens == sum(told.num_tokens for told in expected.told)
    assert [info.loss for info in first.infos] == pytest.approx([told.loss for told in expected.told], rel=1e-5)
    norms = [told.grad_norm for told in expected.told]
    assert [info.grad_norm for info in first.infos] == pytest.approx(norms, rel=1e-4)
    rates = [learning_rate(config.scheduler, 1e-2, step, NUM_STEPS) for step in range(NUM_STEPS)]
    assert [info.learning_rate for info in first.infos] == rates
    assert not any(info.stop_requested or info.skipped for info in first.infos)
    for name, array in first.parameters.items():
        np.testing.assert_allclose(array, expected.agreed[name], rtol=0, atol=1e-5)
        np.testing.assert_allclose(first.momentum[momentum_name(name)], expected.momentum[name], rtol=0, atol=1e-5)


def test_the_outer_step_matters() -> None:
    """What the comparison with the textbook can tell apart."""
    config = loosely(1.0, 1.0, fragments=2, overlap=1)
    diloco = config.parallel.diloco
    found = []
    for changes in ({}, {"outer_learning_rate": 0.6}, {"outer_momentum": 0.8}, {"overlap_steps": 0}, {"fragments": 1}):
        parallel = replace(config.parallel, diloco=replace(diloco, **changes))  # type: ignore[arg-type]
        found.append(Textbook(replace(config, parallel=parallel)).agreed)
    for other in found[1:]:
        assert max(np.abs(other[name] - found[0][name]).max() for name in other) > 1e-4


# --- What is told, and when ---


@pytest.mark.parametrize("share", [(1.0,), (2.0, 1.0), (1.0, 1.0, 1.0)], ids=str)
@pytest.mark.parametrize("look", [None, 5, 1])
def test_who_looks_at_the_state_is_told_of_it_and_changes_nothing(share: tuple[float, ...], look: int | None) -> None:
    config = loosely(*share, every=6, fragments=2, overlap=2, look=look)
    states = [make_state(config, 0.3) for _ in share]
    looked_at = {step for step in range(1, NUM_STEPS + 1) if step == NUM_STEPS or (look and step % look == 0)}

    def body(comm: Communicator) -> tuple[list[StepInfo], dict[str, str]]:
        state, infos = states[comm.rank], []
        for info in make_trainer(config).steps(state, Mesh(comm)):
            assert info.step <= state.step <= info.step + LAG
            assert (info.step == state.step) == (info.step in looked_at)
            if info.step in looked_at:
                assert state.pending is None or state.pending.here
                assert state.num_tokens == sum(info.num_tokens for info in infos) + info.num_tokens
            assert info.step_s >= info.comm_exposed_s >= 0
            infos.append(timeless(info))
        return infos, state.digest()

    expected = train(replace(config, checkpoint=replace(config.checkpoint, steps=None)), 0.3)[0]
    assert on_ranks(len(share), body) == [(expected.infos, expected.digest)] * len(share)


@pytest.mark.parametrize("share", [(1.0,), (2.0, 1.0), (1.0, 1.0, 1.0)], ids=str)
@pytest.mark.parametrize(("wanted_at", "under_way"), [(1, True), (2, True), (3, False), (4, True), (9, False)])
def test_a_stop_wanted_by_one_rank_stops_all_after_the_same_step(
    share: tuple[float, ...], wanted_at: int, under_way: bool
) -> None:
    config = loosely(*share, every=6, fragments=2, overlap=2)
    states = [make_state(config, 0.3) for _ in share]
    last = min(wanted_at + LAG, NUM_STEPS)

    def body(comm: Communicator) -> tuple[list[bool], bool, list[StepInfo], dict[str, str], bool]:
        state = states[comm.rank]
        wanted = lambda: comm.rank == comm.size - 1 and state.step + 1 == wanted_at  # noqa: E731
        infos = list(make_trainer(config, wanted).steps(state, Mesh(comm)))
        assert [info.step for info in infos] == list(range(1, last + 1))
        assert state.step == last <= wanted_at + LAG + 1
        assert state.num_tokens == sum(info.num_tokens for info in infos)
        pending = state.pending is not None and state.pending.here
        infos, digest = run(state, comm, config)
        same = state.digest()["params"] == inner_of(state).digest()["params"]
        return [info.stop_requested for info in infos], pending, infos, digest, same

    expected = train(config, 0.3)[0]
    rest = [False] * (NUM_STEPS - last), under_way, expected.infos[last:], expected.digest, True
    assert on_ranks(len(share), body) == [rest] * len(share)


def test_the_last_step_before_a_stop_says_so() -> None:
    config = loosely(1.0, 1.0, look=5)
    states = [make_state(config) for _ in range(2)]

    def body(comm: Communicator) -> list[list[bool]]:
        found = []
        for _ in range(3):
            state = states[comm.rank]
            wanted_at = state.step + 2
            wanted = lambda state=state, at=wanted_at: comm.rank == 0 and state.step + 1 == at  # noqa: E731
            infos = list(make_trainer(config, wanted).steps(state, Mesh(comm)))
            found.append([info.stop_requested for info in infos])
        return found

    # Wanted in steps 2, 6 and 9; where the state is looked at all hear of it earlier, and at the end too.
    said = [[False, False, False, True], [False, False, False, True], [False, False, True]]
    assert on_ranks(2, body) == [said] * 2


# --- What goes wrong ---


@pytest.mark.parametrize("share", [(1.0,), (1.0, 1.0), (2.0, 1.0), (1.0, 1.0, 1.0)], ids=str)
def test_a_loss_that_is_not_finite_is_named_and_skipped_by_who_had_it(share: tuple[float, ...]) -> None:
    config = loosely(*share, fragments=2, overlap=1)
    states, plan = [make_state(config) for _ in share], make_plan(make_rows(), config, NUM_STEPS)
    for state in states:
        for model in (state.model, inner_of(state).model):
            model.embed.weight = mx.concatenate([model.embed.weight[:-1], mx.full((1, 8), math.nan)])
        mx.eval(state.parameters, inner_of(state).parameters)
    bad = {step: index for step in range(NUM_STEPS) for index, batch in enumerate(plan.microbatches(step))
           if NUM_ROWS - 1 in batch}  # fmt: skip
    assert 0 < len(bad) < NUM_STEPS

    def body(comm: Communicator) -> list[tuple[str | None, int]]:
        found = []
        for info in make_trainer(config).steps(states[comm.rank], Mesh(comm)):
            assert math.isnan(info.loss) == (info.skipped is not None)
            found.append((info.skipped, states[comm.rank].num_skipped))
        return found

    expected: list[tuple[str | None, int]] = []
    for step in range(NUM_STEPS):
        said = f"step {step + 1}: the loss of micro-batch {bad[step]} is nan" if step in bad else None
        expected.append((said, (expected[-1][1] + 1 if expected else 1) if said else 0))
    assert on_ranks(len(share), body) == [expected] * len(share)
    schedule = parts_of(share, config.parallel.diloco.sync_every)
    for rank, state in enumerate(states):
        num_updates = 0
        for step in range(NUM_STEPS):
            ranges = share_of(plan.microbatches(step), len(share))
            taken = [ranges[part] for part in schedule[step % len(schedule)][rank]]
            num_updates += sum(start < stop and not start <= bad.get(step, -1) < stop for start, stop in taken)
        assert inner_of(state).optimizer[STEP].item() == num_updates


def share_of(microbatches: list[tuple[int, ...]], size: int) -> list[tuple[int, int]]:
    return share(len(microbatches), [1.0] * size)


def test_a_fragment_whose_sum_is_not_finite_stays_and_the_others_move() -> None:
    config = loosely(1.0, 1.0, fragments=2)
    states = [make_state(config) for _ in range(2)]
    mine = inner_of(states[1]).model
    mine.head.weight = mx.concatenate([mine.head.weight[:-1], mx.full((1, 8), math.inf)])  # never a target
    mx.eval(mine.parameters())
    before = {name: np.array(array) for name, array in states[0].parameters.items()}
    fragments = [names_of(fragment) for fragment in make_fragments(states[0].parameters, config)]
    (spoilt,) = (fragment for fragment in fragments if "head.weight" in fragment)

    def body(comm: Communicator) -> tuple[dict[str, str], bool, bool]:
        state = states[comm.rank]
        for info in make_trainer(replace(config, checkpoint=replace(config.checkpoint, steps=4))).steps(
            state, Mesh(comm)
        ):
            if info.step == 4:
                break
        now = state.parameters
        stayed = all(np.array_equal(np.asarray(now[name]), before[name]) for name in spoilt)
        moved = all(not np.array_equal(np.asarray(now[n]), before[n]) for n in before if n not in spoilt)
        return state.digest(), stayed, moved

    first, second = on_ranks(2, body)
    assert first == second
    assert first[1:] == (True, True)


@pytest.mark.parametrize("size", [1, 3])
def test_the_third_skip_in_a_row_ends_the_run(size: int) -> None:
    config = loosely(*[1.0] * size)
    states = [make_state(config) for _ in range(size)]
    for state in states:
        state.model.norm.weight = inner_of(state).model.norm.weight = mx.full((8,), math.inf)
        mx.eval(state.model.parameters())

    def body(comm: Communicator) -> tuple[str, int, int]:
        state = states[comm.rank]
        with pytest.raises(TrainingError) as caught:
            list(make_trainer(config).steps(state, Mesh(comm)))
        assert inner_of(state).optimizer[STEP].item() == 0
        return str(caught.value), state.num_tokens, state.num_skipped

    found = on_ranks(size, body)
    assert found == [found[0]] * size
    assert found[0][0].startswith("step 3: the loss of micro-batch 0 is nan. That was the 3rd step in a row")
    assert found[0][1:] == (0, 3)


def test_a_peer_that_is_lost_is_named() -> None:
    config = loosely(1.0, 1.0)
    states = [make_state(config) for _ in range(2)]

    def body(comm: Communicator) -> None:
        def leave() -> bool:
            if comm.rank == 1 and states[1].step == 4:
                raise KeyboardInterrupt("gone")
            return False

        list(make_trainer(config, leave).steps(states[comm.rank], Mesh(comm)))

    lost, left = run_ranks(2, body)
    assert isinstance(left, KeyboardInterrupt)
    assert isinstance(lost, CommError)
    assert lost.peer == 1


NUM = 5
"""Micro-batches of the first step."""
GOOD = [*[2.0] * NUM, *[3.0] * NUM, 0.0, 1.0]


def said(num: float) -> list[float]:
    """What a peer says of its losses, with another count of label tokens."""
    return [*GOOD[:NUM], num, *GOOD[NUM + 1 :]]


@pytest.mark.parametrize(
    "array",
    [
        mx.array(GOOD[:-1]),
        mx.array([*GOOD, 0.0]),
        mx.zeros(0),
        mx.array(1.0),
        mx.array([GOOD]),
        mx.array(GOOD).astype(mx.int32),
        mx.array(GOOD).astype(mx.float16),
        mx.array(GOOD).astype(mx.bfloat16),
        mx.array(GOOD).astype(mx.complex64),
        mx.array(said(-1.0)),
        mx.array(said(math.nan)),
        mx.array(said(math.inf)),
        mx.array(said(2.0**24)),
        mx.array(said(1e30)),
    ],
    ids=lambda array: f"{array.dtype}{tuple(array.shape)}{array.reshape(-1)[NUM : NUM + 1].tolist()}",
)
def test_losses_that_nobody_can_have_are_refused(array: mx.array) -> None:
    config = loosely(1.0, 1.0)
    state = make_state(config)
    mx.eval(array)

    def body(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.send(array, 0, LOSSES_TAG, "the losses")
            comm.barrier("the end")
        list(make_trainer(config).steps(state, Mesh(comm)))

    refused, _ = run_ranks(2, body)
    assert isinstance(refused, CommError)
    assert (refused.op, refused.peer) == ("recv of the losses of step 1", 1)
    assert f"where {NUM} losses and counts were due" in refused.reason


def test_a_step_without_a_label_token_is_refused() -> None:
    config = loosely(1.0, 3.0)  # by which the first step is all that of the other one
    state = make_state(config)
    assert parts_of((1.0, 3.0), 1) == [[[], [0, 1]]]

    def body(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.send(mx.zeros(2 * NUM + 2), 0, LOSSES_TAG, "the losses")
            comm.barrier("the end")
        list(make_trainer(config).steps(state, Mesh(comm)))

    refused, _ = run_ranks(2, body)
    assert isinstance(refused, CommError)
    assert refused.peer == 1


# --- Lossy wires ---


@pytest.mark.parametrize("wire", ["bf16", "fp16", "int8", "int4"])
@pytest.mark.parametrize("share", [(1.0, 1.0), (2.0, 1.0), (1.0, 1.0, 1.0)], ids=str)
def test_ranks_agree_though_less_travels(share: tuple[float, ...], wire: str) -> None:
    whole = train(loosely(*share, fragments=2, overlap=1))[0]
    found = train(loosely(*share, fragments=2, overlap=1, wire=wire))
    assert [(end.infos, end.digest) for end in found] == [(found[0].infos, found[0].digest)] * len(share)
    assert found[0].digest != whole.digest
    moved = max(np.abs(array - found[0].parameters[name]).max() for name, array in whole.parameters.items())
    assert moved < (0.02 if wire == "int4" else 0.004)


def residuals(state: TrainState) -> dict[int, bytes]:
    return {index: array.tobytes() for index, array in state.feedback.residual.items()}


def changed_by(config: Config) -> Iterator[tuple[int, list[set[int]]]]:
    """By step, of which buckets each rank owes something else than before."""
    size = len(config.parallel.share)
    states = [make_state(config) for _ in range(size)]

    def body(comm: Communicator) -> list[set[int]]:
        state, found = states[comm.rank], []
        before: dict[int, bytes] = {}
        for _ in make_trainer(config).steps(state, Mesh(comm)):
            after = residuals(state)
            found.append({index for index in after if after[index] != before.get(index)})
            before = after
        return found

    yield from enumerate(zip(*on_ranks(size, body), strict=True), start=1)  # type: ignore[misc]


@pytest.mark.parametrize("wire", ["int8", "int4"])
@pytest.mark.parametrize("overlap", [0, 1])
def test_what_one_fragment_owes_is_not_paid_with_another(wire: str, overlap: int) -> None:
    config = loosely(1.0, 1.0, every=6, fragments=3, overlap=overlap, wire=wire, look=1)
    fragments = make_fragments(make_state(config).parameters, config)
    assert [len(fragment) for fragment in fragments] == [1, 1, 1]  # so that a bucket has the number of its fragment
    for step, changed in changed_by(config):
        if step < NUM_STEPS:
            fragment = due(config.parallel.diloco, step)  # somebody looks, so nobody waits for it later
            assert changed == ((set(),) * 2 if fragment is None else ({fragment},) * 2)
        else:
            assert changed == ({0, 1, 2},) * 2
