from __future__ import annotations

import itertools
import re

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.train.checkpoint.segments import merge, segment_name

SHAPES = {"w.m": (3, 4), "w.v": (3, 4), "b@1.m": (), "none.m": (0, 2)}


@given(st.data())
def test_segments_in_any_order_make_the_whole(data: st.DataObject) -> None:
    wholes = {
        name: np.random.default_rng(0).standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()
    }
    segments = []
    for name, whole in wholes.items():
        edges = [0, *sorted(data.draw(st.sets(st.integers(0, whole.size)))), whole.size]
        for start, stop in itertools.pairwise(edges):
            if start < stop:
                segments.append((segment_name(name, start), mx.array(whole.reshape(-1)[start:stop])))
    merged = merge(data.draw(st.permutations(segments)), SHAPES)
    assert {name: tuple(array.shape) for name, array in merged.items()} == SHAPES
    assert all(np.asarray(merged[name]).tobytes() == whole.tobytes() for name, whole in wholes.items())


GOOD = {"moments/w.m@0": mx.zeros(5), "moments/w.m@5": mx.zeros(7)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"moments/w.m@0": None}, "a segment of w.m begins at 5, where one at 0 is due"),
        ({"moments/w.m@5": None}, "the segments of w.m have 5 of 12 elements"),
        ({"moments/w.m@0": None, "moments/w.m@5": None}, "the segments of w.m have 0 of 12 elements"),
        ({"moments/w.m@4": mx.zeros(1)}, "a segment of w.m begins at 4, where one at 5 is due"),
        ({"moments/w.m@05": mx.zeros(7)}, "a segment of w.m begins at 5, where one at 12 is due"),
        ({"moments/w.m@5": mx.zeros(8)}, "the segments of w.m have 13 of 12 elements"),
        ({"moments/w.m@12": mx.zeros(1)}, "the segments of w.m have 13 of 12 elements"),
        ({"moments/w.m@5": mx.zeros((7, 1))}, "moments/w.m@5 is mlx.core.float32(7, 1) and no flat segment"),
        ({"moments/w.m@5": mx.zeros(7, mx.bfloat16)}, "moments/w.m@5 is mlx.core.bfloat16(7,) and no flat segment"),
        ({"moments/x.m@0": mx.zeros(1)}, "'moments/x.m@0' is not a segment of a moment"),
        ({"moments/w@0": mx.zeros(12)}, "'moments/w@0' is not a segment of a moment"),
        ({"moments/w.m": mx.zeros(12)}, "'moments/w.m' is not a segment of a moment"),
        ({"moments/w.m@-1": mx.zeros(1)}, "'moments/w.m@-1' is not a segment of a moment"),
        ({f"moments/w.m@{10**19}": mx.zeros(1)}, f"'moments/w.m@{10**19}' is not a segment of a moment"),
        ({"step": mx.zeros(1)}, "'step' is not a segment of a moment"),
    ],
)
def test_what_is_no_whole_is_refused(changes: dict[str, mx.array | None], said: str) -> None:
    segments = {name: array for name, array in (GOOD | changes).items() if array is not None}
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        merge(segments.items(), {"w.m": (3, 4)})
