from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mlx_distributed.comm.compress import CODECS, Codec, Feedback, codec_for
from mlx_distributed.comm.wire import CHUNK_BYTES

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ANY = arrays(np.float32, st.integers(0, 700), elements=FLOATS)


def round_trip(codec: Codec, values: np.ndarray) -> np.ndarray:
    payload = codec.encode(values)
    assert len(payload) == codec.num_bytes(values.size)
    decoded = codec.decode(payload, values.size)
    assert decoded.shape == values.shape
    assert decoded.dtype == values.dtype
    return decoded


@settings(deadline=None)
@given(ANY)
def test_fp32_is_exact(values: np.ndarray) -> None:
    assert round_trip(CODECS["fp32"], values).tobytes() == values.tobytes()


@settings(deadline=None)
@given(ANY)
def test_bf16_is_the_nearest(values: np.ndarray) -> None:
    """The neighbours in the upper 16 bits enclose the value, and none is nearer than what it became."""
    decoded = round_trip(CODECS["bf16"], values)
    down = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    up = ((values.view(np.uint32) & 0xFFFF0000).astype(np.uint64) + 0x10000).astype(np.uint32).view(np.float32)
    exact = values.astype(np.float64)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(up)
        error = np.abs(decoded - exact)[finite]
        assert (error <= np.abs(down - exact)[finite]).all()
        assert (error <= np.abs(up - exact)[finite]).all()


@settings(deadline=None)
@given(arrays(np.float32, st.integers(0, 700), elements=st.floats(-(2.0**127), 2.0**127, width=32)))
def test_fp16_loses_less_than_one_part_in_2048_of_all_but_the_smallest(values: np.ndarray) -> None:
    decoded = round_trip(CODECS["fp16"], values).astype(np.float64)
    largest = np.abs(values).max(initial=0)
    smallest = max(largest * 2.0**-28, 2.0**-139)  # of half precision, seen from the largest value of the chunk
    error = np.abs(decoded - values)
    assert (error <= np.maximum(np.abs(values) * 2.0**-11, smallest)).all()


@pytest.mark.parametrize(("wire", "largest"), [("int8", 127), ("int4", 7)])
@settings(deadline=None)
@given(values=ANY)
def test_an_integer_is_off_by_half_a_step_at_most(wire: str, largest: int, values: np.ndarray) -> None:
    codec = CODECS[wire]
    decoded = round_trip(codec, values).astype(np.float64)
    for start in range(0, values.size, codec.block):  # type: ignore[attr-defined]
        block = slice(start, start + codec.block)  # type: ignore[attr-defined]
        step = float(np.abs(values[block]).max()) / largest
        assert np.abs(decoded[block] - values[block]).max() <= max(step * 0.50001, 1.3e-28)


@pytest.mark.parametrize("wire", CODECS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(wire: str, bad: float) -> None:
    values = np.linspace(-1, 1, 1000, dtype=np.float32)
    values[[3, 700]] = bad
    decoded = round_trip(CODECS[wire], values)
    assert not np.isfinite(decoded[[3, 700]]).any()


def test_a_nan_of_any_bits_stays_one() -> None:
    odd = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    assert np.isnan(round_trip(CODECS["bf16"], odd)).all()


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_any_bytes_decode_and_a_chunk_fits_into_a_frame(codec: Codec) -> None:
    num_elements = codec.chunk_bytes // 4
    payload = np.random.default_rng(0).bytes(codec.num_bytes(num_elements))
    assert len(payload) <= CHUNK_BYTES
    assert codec.decode(payload, num_elements).shape == (num_elements,)


def test_only_float32_is_compressed() -> None:
    counts = np.array([1 << 40, -3])
    codec = codec_for("int4", counts.dtype)
    assert codec.exact
    assert round_trip(codec, counts).tolist() == counts.tolist()


def test_feedback_takes_effect_with_the_commit_only() -> None:
    feedback = Feedback()
    before, after = feedback.begin(0, 3)
    assert before is None
    after[:] = 1
    feedback.discard()
    assert feedback.owed(0, 3).tolist() == [0, 0, 0]
    feedback.begin(0, 3)[1][:] = 2
    feedback.commit()
    before, after = feedback.begin(0, 3)
    assert before is not None
    assert before.tolist() == after.tolist() == [2, 2, 2]


def test_a_part_of_the_feedback_counts_its_buckets_from_zero() -> None:
    feedback = Feedback()
    first, second = feedback.part(0), feedback.part(2)
    for part, values in ((first, (1, 2)), (second, (3, 4, 5))):
        for index, value in enumerate(values):
            before, after = part.begin(index, 2)
            assert before is None
            after[:] = value
    assert [feedback.owed(index, 2).tolist() for index in range(5)] == [[0, 0]] * 5
    feedback.commit()
    assert [feedback.owed(index, 2).tolist() for index in range(5)] == [[n, n] for n in (1, 2, 3, 4, 5)]
    assert [second.owed(index, 2).tolist() for index in range(3)] == [[n, n] for n in (3, 4, 5)]
    assert second.part(1).owed(0, 2).tolist() == [4, 4]


def test_what_a_part_has_noted_is_discarded_with_the_rest() -> None:
    feedback = Feedback()
    feedback.part(1).begin(0, 1)[1][:] = 7
    feedback.commit()
    before, after = feedback.part(1).begin(0, 1)
    assert before is not None
    assert before.tolist() == after.tolist() == [7]
    after[:] = 8
    feedback.discard()
    feedback.commit()
    assert feedback.owed(1, 1).tolist() == [7]
    feedback.part(1).begin(0, 1)[1][:] = 9
    feedback.part(1).commit()
    assert feedback.owed(1, 1).tolist() == [9]
