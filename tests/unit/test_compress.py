"""What the client sends of a gradient, and what it keeps: together they are the gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optserve_client import Half, Int8, TopK, compress, errors, wire
from optserve_client.compress import Compressor, Encoded
from optserve_client.wire import Bits

COMPRESSORS: list[Compressor] = [
    TopK(0.1),
    TopK(0.5, dtype="bfloat16"),
    TopK(0.3, dtype="float16"),
    Int8(),
    Int8(block=5),
    Half(),
    Half("float16"),
]
OWN = ["F32", "F64", "F16", "BF16"]


@st.composite
def ordinary(draw: st.DrawFn) -> np.ndarray:
    """Not so large that 16 bits overflow, nor so small that a scale is no normal number."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size, spread = draw(st.integers(0, 700)), draw(st.floats(0, 10))
    values = rng.normal(size=size) * 2 ** np.clip(rng.normal(0, spread, size=size), -50, 12)
    values[rng.random(size) < draw(st.sampled_from([0, 0, 0.5, 0.99]))] = 0
    return values.astype(np.float32)


def wide(tensor: wire.Tensor) -> Any:
    return tensor.to_float32() if isinstance(tensor, Bits) else tensor


def decoded(encoded: Encoded, size: int, dtype: str = "F32") -> Any:
    """Return what a session of ``dtype`` makes of the tensors, flat; by numpy alone."""
    tensors: dict[str, Any] = encoded.tensors
    kind = float if dtype == "F64" else np.float32
    if "grad/w" in tensors:
        made = wide(tensors["grad/w"]).reshape(-1).astype(kind)
    elif "topk/w/indices" in tensors:
        indices = tensors["topk/w/indices"]
        assert (np.diff(indices) > 0).all()
        made = np.zeros(size, kind)
        made[indices] = wide(tensors["topk/w/values"])
    else:
        block = encoded.fields.get("int8_block", 256)
        scales = np.repeat(tensors["int8/w/scales"].astype(kind), block)[:size]
        made = tensors["int8/w/values"].reshape(-1).astype(kind) * scales
    return wide(wire.narrow(made, dtype)) if dtype == "BF16" else made


def nbytes(encoded: Encoded) -> int:
    return sum(wire.as_bytes(tensor).nbytes for tensor in encoded.tensors.values())


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("own", OWN)
@settings(max_examples=40, deadline=None)
@given(values=ordinary(), seed=st.integers(0, 99))
def test_what_is_sent_and_what_is_kept_are_the_gradient_and_what_was_kept_before(
    compressor: Compressor, own: str, values: np.ndarray, seed: int
) -> None:
    gradient = wire.narrow(values.astype(np.float64) if own == "F64" else values, own)
    dtype = "F32" if own == "F16" else own
    before = np.random.default_rng(seed).integers(-99, 100, values.size) / 8
    before = before.astype(np.float64 if own == "F64" else np.float32)
    encoded = compressor.encode("w", gradient, before.copy())
    assert encoded.unsent is not None
    assert encoded.unsent.dtype == before.dtype
    total = wide(gradient).astype(before.dtype) + before
    sent = decoded(encoded, values.size, dtype)
    # What is sent of an element is as large as it, more or less, so the difference is exact; in a
    # block of int8 it may be larger than the smallest ones.
    largest = np.abs(total).max(initial=0)
    np.testing.assert_allclose(
        sent.astype(np.float64) + encoded.unsent, total, rtol=0, atol=largest * 2.0**-23
    )
    if isinstance(compressor, TopK) and compressor.dtype == "float32":
        np.testing.assert_array_equal(sent + encoded.unsent, total)


@pytest.mark.parametrize("own", ["F32", "F64"])
@settings(max_examples=100, deadline=None)
@given(values=ordinary())
def test_int8_is_within_half_a_scale(own: str, values: np.ndarray) -> None:
    gradient = wire.narrow(values.astype(np.float64), own)
    encoded = Int8(block=7).encode("w", gradient)
    if "grad/w" in encoded.tensors:
        return
    scales: Any = encoded.tensors["int8/w/scales"]
    half = np.repeat(scales.astype(np.float64), 7)[: values.size] / 2
    assert (np.abs(encoded.unsent) <= half * (1 + 1e-4)).all()
    largest = [np.abs(values[at : at + 7]).max() for at in range(0, values.size, 7)]
    np.testing.assert_array_equal(scales, (np.array(largest) / 127).astype(np.float32))
    sent: Any = encoded.tensors["int8/w/values"]
    assert sent.min(initial=0) >= -127


@settings(max_examples=100, deadline=None)
@given(values=ordinary(), fraction=st.floats(0.01, 0.4))
def test_top_k_are_the_largest(values: np.ndarray, fraction: float) -> None:
    values = np.rint(values)  # so that some are equal
    encoded = TopK(fraction).encode("w", values)
    if "grad/w" in encoded.tensors:
        return
    count = int(np.ceil(fraction * values.size))
    chosen: Any = encoded.tensors["topk/w/indices"]
    left = np.delete(np.abs(values), chosen)
    assert len(chosen) == min(count, np.count_nonzero(values))
    assert left.max(initial=0) <= np.abs(values[chosen]).min(initial=np.inf)


@pytest.mark.parametrize("kind", ["normal", "one large stride", "mostly zeros", "all equal"])
def test_top_k_of_a_large_tensor_is_what_sorting_gives(kind: str) -> None:
    rng = np.random.default_rng(0)
    size, count = 700_001, 7_001
    values = rng.normal(size=size).astype(np.float32)
    if kind == "one large stride":  # of the sample: it is no sample of the rest
        values[:: size // 2**16] *= 1000
        values[:: size // 2**16][5_000:] = 0
    elif kind == "mostly zeros":
        values[rng.random(size) < 0.999] = 0
        count = min(count, np.count_nonzero(values))
    elif kind == "all equal":
        values[:] = 0.5
    chosen: Any = TopK(0.01).encode("w", values.reshape(1, -1)).tensors["topk/w/indices"]
    want = np.sort(np.abs(values))[size - count :]
    np.testing.assert_array_equal(np.sort(np.abs(values[chosen])), want)


def test_rounding_is_to_nearest_even() -> None:
    values = np.zeros(1000, np.float32)
    values[:8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 125.5]
    sent: Any = Int8(block=1000).encode("w", values).tensors["int8/w/values"]
    assert sent[:8].tolist() == [127, 0, 2, 2, 0, -2, 126, 126]


def test_a_block_of_zeros_has_scale_zero() -> None:
    values = np.zeros(600, np.float32)
    values[300] = -3
    encoded = Int8(block=200).encode("w", values)
    scales: Any = encoded.tensors["int8/w/scales"]
    assert scales.tolist() == [0, np.float32(3 / 127), 0]


@pytest.mark.parametrize("size", [np.finfo(np.float32).max, np.finfo(np.float32).smallest_normal])
def test_the_largest_and_smallest_numbers_are_survived(size: float) -> None:
    values = (np.linspace(-1, 1, 2000) * size).astype(np.float32)
    for compressor in COMPRESSORS:
        encoded = compressor.encode("w", values)
        sent = decoded(encoded, values.size)
        assert np.isfinite(sent).all()
        assert encoded.unsent is not None
        np.testing.assert_allclose(
            sent.astype(np.float64) + encoded.unsent, values, rtol=1e-6, atol=0
        )


def test_float64_that_no_float32_scale_can_say_is_sent_whole() -> None:
    values = np.linspace(-1e300, 1e300, 500)
    for compressor in (Int8(), Half(), TopK(0.1)):
        encoded = compressor.encode("w", values)
        assert np.isfinite(decoded(encoded, 500, "F64")).all()
        assert [wire.dtype_of(t) for t in encoded.tensors.values()][-1] == "F64"


# --- what is sent whole, and as it is ------------------------------------------------------------


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_is_sent_as_it_is_and_nothing_moves(
    compressor: Compressor, bad: float
) -> None:
    values = np.ones(500_000, np.float32).reshape(500, 1000)
    values[-1, -1] = bad
    encoded = compressor.encode("w", values, np.ones(500_000, np.float32))
    assert encoded.tensors == {"grad/w": values}
    assert encoded.unsent is None
    assert encoded.fields == {}


def test_numbers_that_are_no_gradient_are_for_the_server_to_refuse() -> None:
    values = np.arange(1000)
    assert TopK().encode("w", values).tensors == {"grad/w": values}


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 5)])
def test_a_small_tensor_is_not_made_larger(compressor: Compressor, shape: tuple[int, ...]) -> None:
    values = np.full(shape, 1 / 3, np.float32)
    before = np.full(values.size, 0.25, np.float32)
    encoded = compressor.encode("w", values, before)
    assert list(encoded.tensors) == ["grad/w"]
    assert encoded.tensors["grad/w"].shape == shape
    assert encoded.fields == {}
    assert nbytes(encoded) <= values.nbytes
    total = decoded(encoded, values.size) + encoded.unsent
    np.testing.assert_array_equal(total, values.reshape(-1) + before)


@pytest.mark.parametrize(
    ("compressor", "most"),
    [(TopK(0.01), 8_000), (TopK(0.01, "bfloat16"), 6_000), (Int8(), 102_000), (Half(), 200_000)],
)
def test_bytes_are_saved(compressor: Compressor, most: int) -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    assert nbytes(compressor.encode("w", values)) <= most


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_the_callers_arrays_stay_as_they_are_and_room_changes_nothing(
    compressor: Compressor,
) -> None:
    rng = np.random.default_rng(0)
    values, before = (rng.normal(size=1000).astype(np.float32) for _ in range(2))
    kept = values.copy(), before.copy()
    one = compressor.encode("w", values, before)
    room = np.full(1000, 9.0, np.float32)
    two = compressor.encode("w", values, before, room=room)
    assert two.unsent is room
    np.testing.assert_array_equal(values, kept[0])
    np.testing.assert_array_equal(before, kept[1])
    np.testing.assert_array_equal(two.unsent, one.unsent)
    for name, tensor in one.tensors.items():
        assert bytes(wire.as_bytes(tensor)) == bytes(wire.as_bytes(two.tensors[name]))
        assert not np.shares_memory(wide(two.tensors[name]), room)


def test_narrow_values_are_used_only_where_the_gradient_is_wider() -> None:
    values = Bits.bfloat16(np.random.default_rng(0).normal(size=1000))
    for compressor in (TopK(0.1, "float16"), TopK(0.1), TopK(0.1, "float64")):
        assert wire.dtype_of(compressor.encode("w", values).tensors["topk/w/values"]) == "BF16"
    for compressor in (Half(), Half("float16")):
        assert wire.dtype_of(compressor.encode("w", values).tensors["grad/w"]) == "BF16"


def test_many_steps_send_everything_in_the_end() -> None:
    rng = np.random.default_rng(0)
    for compressor in COMPRESSORS:
        unsent = None
        sent, total = np.zeros(2000), np.zeros(2000)
        for step in range(120):
            gradient = rng.integers(-8, 9, 2000).astype(np.float32) * (step < 100)
            total += gradient
            encoded = compressor.encode("w", gradient, unsent)
            sent += decoded(encoded, 2000)
            unsent = encoded.unsent
        np.testing.assert_allclose(sent, total, atol=1e-3)


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    for compressor in COMPRESSORS:
        whole = compressor.encode("w", values)
        with monkeypatch.context() as small:
            small.setattr(compress, "_PIECE", 37)
            pieces = compressor.encode("w", values)
        for name, tensor in whole.tensors.items():
            assert bytes(wire.as_bytes(tensor)) == bytes(wire.as_bytes(pieces.tensors[name]))
        np.testing.assert_array_equal(whole.unsent, pieces.unsent)


# --- bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TopK(0), r"fraction must be in \(0, 1\], got 0"),
        (lambda: TopK(1.5), r"fraction must be in \(0, 1\], got 1.5"),
        (lambda: TopK(float("nan")), r"fraction must be in \(0, 1\], got nan"),
        (lambda: TopK(dtype="int8"), "dtype must be a floating-point dtype, got 'int8'"),
        (lambda: Int8(0), "block must be an integer >= 1, got 0"),
        (lambda: Int8(2.5), "block must be an integer >= 1, got 2.5"),
        (lambda: Half("float32"), "dtype must be bfloat16 or float16, got 'float32'"),
        (lambda: Half("half"), "dtype must be one of float64, float32, .* got 'half'"),
    ],
)
def test_a_bad_argument_is_refused_with_a_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(errors.Invalid, match=sentence):
        make()
