from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distributed.comm.buckets import BLOCK, Arrays, make_layout
from mlx_distributed.comm.reduction import slices
from mlx_distributed.parallel.adamw import DistributedAdamW, decaying
from mlx_distributed.parallel.shard import Shard

SHAPES = {"a": (300, 200), "b": (7,), "empty": (0, 3), "c": (2, 3, 5), "d": (100, 1000), "e": (50_001,), "f": ()}


def random_arrays(seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    arrays = {name: mx.array(random.standard_normal(shape).astype(np.float32)) for name, shape in SHAPES.items()}
    mx.eval(arrays)
    return arrays


def shards(arrays: Arrays, num_ranks: int) -> tuple[list[Shard], list[list[tuple[int, int]]]]:
    """What each rank owns, and its slice of each bucket."""
    layout = make_layout(arrays, bucket_bytes=300_000)
    owned = [slices(bucket.size, [1 / num_ranks] * num_ranks, index) for index, bucket in enumerate(layout)]
    by_rank = [[bucket[rank] for bucket in owned] for rank in range(num_ranks)]
    return [Shard.of(layout, ranges) for ranges in by_rank], by_rank


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_every_element_has_one_owner(num_ranks: int) -> None:
    arrays = random_arrays(0)
    found, by_rank = shards(arrays, num_ranks)
    for name, array in arrays.items():
        pieces = sorted(
            (shard.ranges[name], np.asarray(shard.cut(arrays)[name])) for shard in found if name in shard.ranges
        )
        flat = np.concatenate([np.zeros(0, np.float32), *(piece for _, piece in pieces)])
        assert flat.tobytes() == np.asarray(array).tobytes()
    for shard, ranges in zip(found, by_rank, strict=True):
        flats = shard.join(shard.cut(arrays))
        assert [flat.size for flat in flats] == [stop - start for start, stop in ranges]
        again = shard.split(flats)
        assert again.keys() == shard.ranges.keys()
        assert all(mx.array_equal(again[name], segment) for name, segment in shard.cut(arrays).items())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3]))
def test_a_segment_is_updated_to_the_bits_of_the_whole(num_ranks: int, seed: int, decay: float) -> None:
    optimizer = DistributedAdamW(weight_decay=decay)
    whole = parameters = random_arrays(seed)
    state = optimizer.init(whole)
    found, _ = shards(whole, num_ranks)
    own = [shard.cut(parameters) for shard in found]
    states = [optimizer.init(segments) for segments in own]
    scale, decayed = mx.array(0.37), decaying(whole)
    for step in range(3):
        gradients = random_arrays(seed + 1 + step)
        for rank, shard in enumerate(found):
            groups = optimizer.update(dict(own[rank]), shard.cut(gradients), states[rank], scale, 1e-2, decayed)
            own[rank] = {name: segment for group in groups for name, segment in group.items()}
        groups = optimizer.update(dict(whole), gradients, state, scale, 1e-2, decayed)
        whole = {name: array for group in groups for name, array in group.items()}
    for rank, shard in enumerate(found):
        for name, (start, stop) in shard.ranges.items():
            for mine, theirs in (
                (own[rank][name], whole[name]),
                (states[rank][f"{name}.m"], state[f"{name}.m"]),
                (states[rank][f"{name}.v"], state[f"{name}.v"]),
            ):
                assert np.asarray(mine).tobytes() == np.asarray(theirs).reshape(-1)[start:stop].tobytes()
        assert states[rank]["step"].item() == 3


def test_a_share_of_the_moments_is_a_share_of_the_memory() -> None:
    arrays = {"w": mx.zeros(90 * BLOCK)}
    found, _ = shards(arrays, 3)
    sizes = [sum(array.nbytes for array in DistributedAdamW().init(shard.cut(arrays)).values()) for shard in found]
    assert sizes == [2 * 30 * BLOCK * 4 + 8] * 3
