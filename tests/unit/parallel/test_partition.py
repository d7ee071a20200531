from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distributed.errors import ConfigError
from mlx_distributed.parallel.partition import LayerCosts, Worker, check_split, partition, partition_by

NOTHING = LayerCosts(0.0, 0)
LAYER = LayerCosts(1.0, 100, 10)


def splits(num_layers: int, num_stages: int) -> Iterator[list[int]]:
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        yield [stop - first for first, stop in pairwise([0, *cuts, num_layers])]


def taken(
    split: list[int], layers: list[LayerCosts], embedding: LayerCosts, head: LayerCosts, workers: list[Worker]
) -> tuple[list[float], list[int]]:
    """Seconds and missing bytes of each stage."""
    seconds, missing, left = [], [], list(layers)
    for stage, (number, worker) in enumerate(zip(split, workers, strict=True)):
        own, left = left[:number], left[number:]
        own = [embedding] * (stage == 0) + own + [head] * (stage == len(split) - 1)
        seconds.append(sum(layer.compute_s for layer in own) / worker.speed)
        held = sum(layer.state_bytes + layer.activation_bytes * worker.in_flight for layer in own)
        missing.append(max(0, held - worker.memory_bytes))
    return seconds, missing


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_other_cut_is_better(data: st.DataObject) -> None:
    costs = st.builds(LayerCosts, st.integers(0, 9).map(float), st.integers(0, 50), st.integers(0, 9))
    layers = data.draw(st.lists(costs, min_size=1, max_size=8))
    embedding, head = data.draw(costs), data.draw(costs)
    worker = st.builds(Worker, st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 300), st.integers(1, 4))
    workers = data.draw(st.lists(worker, min_size=1, max_size=len(layers)))
    every = {
        tuple(split): taken(split, layers, embedding, head, workers) for split in splits(len(layers), len(workers))
    }
    fitting = {split: seconds for split, (seconds, missing) in every.items() if not any(missing)}
    if not fitting:
        with pytest.raises(ConfigError, match="does not fit: worker") as refused:
            partition(layers, embedding, head, workers)
        least = min(sum(missing) for _, missing in every.values())
        nearest = [split for split, (_, missing) in every.items() if sum(missing) == least]
        assert any(f"split={list(split)} " in str(refused.value) for split in nearest)
        return
    found = partition(layers, embedding, head, workers)
    best_s = min(max(seconds) for seconds in fitting.values())
    assert max(fitting[found.split]) == best_s
    unevenness = {split: sum(s**2 for s in seconds) for split, seconds in fitting.items() if max(seconds) == best_s}
    assert unevenness[found.split] == pytest.approx(min(unevenness.values()))
    assert [stage.compute_s for stage in found.stages] == pytest.approx(fitting[found.split])
    assert partition_by(found.split, layers, embedding, head, workers) == found


def test_layers_go_by_speed() -> None:
    workers = [Worker(2.0, 10**6, 2), Worker(1.0, 10**6, 1)]
    assert partition([LAYER] * 12, NOTHING, NOTHING, workers).split == (8, 4)


def test_a_large_head_counts() -> None:
    workers = [Worker(1.0, 10**6, 2), Worker(1.0, 10**6, 1)]
    found = partition([LAYER] * 12, NOTHING, LayerCosts(4.0, 5000), workers)
    assert found.split == (8, 4)
    assert [stage.state_bytes for stage in found.stages] == [800, 5400]
    assert [stage.activation_bytes for stage in found.stages] == [160, 40]
    assert [(stage.first, stage.stop) for stage in found.stages] == [(0, 8), (8, 12)]


def test_memory_comes_before_speed() -> None:
    workers = [Worker(2.0, 500, 2), Worker(1.0, 10**6, 1)]
    assert partition([LAYER] * 12, NOTHING, NOTHING, workers).split == (4, 8)


def test_who_lacks_how_much_is_said() -> None:
    layer = LayerCosts(1.0, 10**9, 10**8)
    workers = [Worker(1.0, 2 * 10**9, 2), Worker(1.0, 16 * 10**9, 1)]
    with pytest.raises(
        ConfigError, match=r"split=\[12, 4\] .*: worker 0 lacks 12400\.0 MB for 12 layers, .* 2000\.0 MB;"
    ):
        partition_by([12, 4], [layer] * 16, NOTHING, NOTHING, workers)
    assert partition([layer] * 15, NOTHING, NOTHING, workers).split == (1, 14)
    with pytest.raises(ConfigError, match=r"split=\[2, 14\] .*: worker 0 lacks 400\.0 MB"):
        partition([layer] * 16, NOTHING, NOTHING, workers)


@pytest.mark.parametrize(
    ("split", "problem"),
    [
        ([12, 19], r"split=\[12, 19\] adds up to 31, and the model has 32 layers; .* such as \[16, 16\]"),
        ([0, 32], "leaves a stage without layers"),
        ([33, -1], "leaves a stage without layers"),
        ([32], "has 1 numbers, and there are 2 stages"),
    ],
)
def test_a_split_is_checked(split: list[int], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_split(split, 32, 2)


def test_a_good_split_passes() -> None:
    check_split([12, 20], 32, 2)


def test_more_stages_than_layers() -> None:
    with pytest.raises(ConfigError, match="3 stages for 2 layers"):
        partition([LAYER] * 2, NOTHING, NOTHING, [Worker(1.0, 10**6, 1)] * 3)
    with pytest.raises(ConfigError, match="3 stages for 2 layers"):
        check_split([1, 1, 1], 2, 3)
