"""Compressed gradients on their way in: top-k and int8 become the dense gradient they stand for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from optserve.optim import compressed as numbers
from optserve.optim.arena import GradientPool
from optserve.optim.layout import Layout
from optserve.sessions.intake import Step, StepIntake
from optserve.sessions.step import Expected
from optserve_client import wire
from optserve_client.errors import Invalid, MissingGradient, OptserveError

SHAPES: dict[str, tuple[int, ...]] = {"w": (2, 3), "b": (), "none": (0, 4), "emb": (5, 2)}
DTYPES = ["F32", "F64", "BF16"]
Named = dict[str, wire.Tensor]


def i8(*values: int) -> np.ndarray:
    return np.array(values, np.int8)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def take(named: Named, *, dtype: str = "F32", shapes: Any = None, **fields: Any) -> Step:
    """Return the step in a frame, in a session of the shapes above; ``emb`` is sparse there."""
    layout = Layout.pack(dtype, (shapes or SHAPES).items())
    sparse = frozenset({"emb"} & layout.by_name.keys())
    dense = layout.subset(name for name in layout.names if name not in sparse)
    made = StepIntake(
        expected=Expected(layout=layout, sparse=sparse),
        lease=GradientPool(dense).lease,
        writer=None,
    )
    body = b"".join(wire.encode(named, {wire.META_KEY: json.dumps(fields)}))
    for at in range(0, len(body), 1000):
        made.feed(body[at : at + 1000])
    return made.finish()


def gradient(step: Step, name: str) -> Any:
    """Return what the update reads."""
    step.buffer.widen()
    got = step.buffer.array(name)
    return got.to_float32() if isinstance(got, wire.Bits) else got


def rounded(values: Any, dtype: str) -> Any:
    """Return float32 or float64 values as a session of ``dtype`` holds them."""
    if dtype == "BF16":
        return wire.Bits.bfloat16(np.asarray(values, np.float32)).to_float32()
    return np.asarray(values).astype(wire.numpy_dtype(dtype))


def complete(**more: wire.Tensor) -> Named:
    """A complete step, part of it compressed."""
    named: Named = {
        "topk/w/indices": i64(1, 5),
        "topk/w/values": f32(-2.5, 4),
        "int8/b/values": np.array(-127, np.int8),
        "int8/b/scales": f32(0.5),
        "topk/none/indices": i64(),
        "topk/none/values": f32(),
        "sparse/emb/indices": np.array([[4, 0, 4]]),
        "sparse/emb/values": np.ones((3, 2), np.float32),
    }
    return named | more


# --- what they stand for -------------------------------------------------------------------------


def test_each_kind_becomes_the_dense_gradient_that_it_stands_for() -> None:
    step = take(complete())
    np.testing.assert_array_equal(gradient(step, "w"), [[0, -2.5, 0], [0, 0, 4]])
    assert gradient(step, "b") == np.float32(-63.5)
    assert gradient(step, "none").shape == (0, 4)
    assert (step.none, list(step.sparse)) == (frozenset(), ["emb"])


@pytest.mark.parametrize("indices", ["I32", "I64"])
@pytest.mark.parametrize("sent", ["F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_any_dtype_that_the_session_holds_exactly(
    dtype: str, sent: str, indices: str
) -> None:
    named: Named = {
        "topk/w/indices": np.array([0, 2, 6], wire.numpy_dtype(indices)),
        "topk/w/values": wire.narrow(f32(1.5, -3, 0.1), sent),
    }
    exact = {("F16", "F32"), ("BF16", "F32"), ("F16", "F64"), ("BF16", "F64"), ("F32", "F64")}
    if sent != dtype and (sent, dtype) not in exact:
        with pytest.raises(Invalid, match=r"'topk/w/values' is .*: that would round"):
            take(named, dtype=dtype, shapes={"w": (7,)})
        return
    step = take(named, dtype=dtype, shapes={"w": (7,)})
    want = np.zeros(7)
    want[[0, 2, 6]] = rounded(f32(1.5, -3, 0.1), sent)
    np.testing.assert_array_equal(gradient(step, "w"), want)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(
    values=arrays.arrays(np.int8, st.integers(0, 70)),
    block=st.integers(1, 80),
    seed=st.integers(0, 2**32 - 1),
)
def test_int8_is_the_product_with_the_scale_of_its_block(
    dtype: str, values: np.ndarray, block: int, seed: int
) -> None:
    count = -(-len(values) // block)
    scales = np.random.default_rng(seed).exponential(size=count).astype(np.float32)
    named: Named = {"int8/w/values": values, "int8/w/scales": scales}
    step = take(named, dtype=dtype, shapes={"w": values.shape}, int8_block=block)
    wide = np.float64 if dtype == "F64" else np.float32
    products = values.astype(wide) * np.repeat(scales, block)[: len(values)].astype(wide)
    np.testing.assert_array_equal(gradient(step, "w"), rounded(products, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [700, 2**12, 2**20])
@pytest.mark.parametrize("block", [1, 256, 1000, 150_077, 10**9])
def test_large_int8_tensors_are_scaled_where_they_lie(
    dtype: str, block: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numbers, "_PIECE", piece)
    size = 150_077
    rng = np.random.default_rng(0)
    values = rng.integers(-128, 128, size, dtype=np.int8)
    scales = rng.exponential(size=-(-size // block)).astype(np.float32)
    named: Named = {
        "grad/before": wire.narrow(f32(7, 7), dtype),
        "int8/w/values": values.reshape(1, size),
        "int8/w/scales": scales,
        "grad/after": wire.narrow(f32(7), dtype),
    }
    shapes = {"before": (2,), "w": (1, size), "after": (1,)}
    step = take(named, dtype=dtype, shapes=shapes, int8_block=block)
    wide = np.float64 if dtype == "F64" else np.float32
    products = values.astype(wide) * np.repeat(scales, min(block, size))[:size].astype(wide)
    np.testing.assert_array_equal(gradient(step, "w")[0], rounded(products, dtype))
    assert gradient(step, "before").tolist() == [7, 7]
    assert gradient(step, "after").tolist() == [7]


def test_no_entries_are_a_gradient_of_zeros_whatever_the_buffer_held() -> None:
    layout = Layout.pack("F32", [("w", (4,))])
    pool = GradientPool(layout)
    used = pool.lease()
    used.arena.flat.fill_(9.0)
    used.release()
    made = StepIntake(
        expected=Expected(layout=layout, sparse=frozenset()), lease=pool.lease, writer=None
    )
    for piece in wire.encode({"topk/w/indices": i64(), "topk/w/values": f32()}):
        made.feed(piece)
    step = made.finish()
    assert step.buffer is used
    assert gradient(step, "w").tolist() == [0, 0, 0, 0]


def test_a_buffer_that_was_given_back_makes_nothing_of_an_older_gradient() -> None:
    step = take(complete())
    step.buffer.release()
    step.buffer.arena.flat.fill_(9.0)
    step.buffer.widen()
    assert set(step.buffer.arena.flat.tolist()) == {9.0}


def test_the_same_header_with_another_block_is_judged_anew() -> None:
    layout = Layout.pack("F32", [("w", (6,))])
    expected, pool = Expected(layout=layout, sparse=frozenset()), GradientPool(layout)

    def send(**fields: Any) -> Step:
        made = StepIntake(expected=expected, lease=pool.lease, writer=None)
        named: Named = {"int8/w/values": i8(*range(6)), "int8/w/scales": f32(2)}
        made.feed(b"".join(wire.encode(named, {wire.META_KEY: json.dumps(fields)})))
        return made.finish()

    for _ in range(2):
        send().buffer.release()
    with pytest.raises(Invalid, match=r"'int8/w/scales' has shape \[1\], expected \[2\]"):
        send(int8_block=3)
    send(int8_block=6).buffer.release()
    send().buffer.release()


# --- what is refused -----------------------------------------------------------------------------


def lacking(*names: str, **more: wire.Tensor) -> Named:
    return {name: t for name, t in complete().items() if name not in names} | more


TOPK = {"topk/w/indices", "topk/w/values"}
BAD: list[tuple[Named, type[OptserveError], str]] = [
    (
        complete(**{"topk/w/indices": i64(5, 1)}),
        Invalid,
        "topk/w/indices[1] must be > topk/w/indices[0], which is 5, got 1",
    ),
    (
        complete(**{"topk/w/indices": i64(3, 3)}),
        Invalid,
        "topk/w/indices[1] must be > topk/w/indices[0], which is 3, got 3",
    ),
    (
        complete(**{"topk/w/indices": i64(-1, 2)}),
        Invalid,
        "topk/w/indices[0] must be in [0, 6), got -1",
    ),
    (
        complete(**{"topk/w/indices": i64(5, 6)}),
        Invalid,
        "topk/w/indices[1] must be in [0, 6), got 6",
    ),
    (
        complete(**{"topk/w/indices": i64(6, 2**63 - 1)}),
        Invalid,
        "topk/w/indices[0] must be in [0, 6), got 6",
    ),
    (
        complete(**{"topk/w/indices": np.array([1, 2**31 - 1], np.int32)}),
        Invalid,
        "topk/w/indices[1] must be in [0, 6), got 2147483647",
    ),
    (
        complete(**{"topk/w/indices": np.array([1, 5], np.uint32)}),
        Invalid,
        "'topk/w/indices' is uint32, expected int32 or int64",
    ),
    (
        complete(**{"topk/w/indices": i64(1, 5).reshape(1, 2)}),
        Invalid,
        "'topk/w/indices' has shape [1, 2], expected [k]",
    ),
    (
        complete(**{"topk/w/indices": i64(*range(7))}),
        Invalid,
        "'topk/w/indices' has 7 entries, 'w' has 6 elements",
    ),
    (
        complete(**{"topk/w/values": f32(1, 2, 3)}),
        Invalid,
        "'topk/w/values' has shape [3], expected [2]",
    ),
    (
        complete(**{"topk/w/values": np.array([1, 2], np.int32)}),
        Invalid,
        "'topk/w/values' is int32 and the session is float32: that is no floating-point dtype",
    ),
    (
        complete(**{"topk/none/indices": i64(0), "topk/none/values": f32(1)}),
        Invalid,
        "'topk/none/indices' has 1 entries, 'none' has 0 elements",
    ),
    (
        lacking("topk/w/values"),
        Invalid,
        "the compressed gradient of 'w' lacks 'topk/w/values'",
    ),
    (
        lacking("topk/w/indices"),
        Invalid,
        "the compressed gradient of 'w' lacks 'topk/w/indices'",
    ),
    (
        lacking("int8/b/scales"),
        Invalid,
        "the compressed gradient of 'b' lacks 'int8/b/scales'",
    ),
    (
        lacking("int8/b/values"),
        Invalid,
        "the compressed gradient of 'b' lacks 'int8/b/values'",
    ),
    (
        complete(**{"int8/b/values": np.array(1, np.uint8)}),
        Invalid,
        "'int8/b/values' is uint8, expected int8",
    ),
    (
        complete(**{"int8/b/values": i8(1)}),
        Invalid,
        "'int8/b/values' has shape [1], expected []",
    ),
    (
        complete(**{"int8/b/scales": np.array([0.5])}),
        Invalid,
        "'int8/b/scales' is float64, expected float32",
    ),
    (
        complete(**{"int8/b/scales": f32(1, 2)}),
        Invalid,
        "'int8/b/scales' has shape [2], expected [1], one for each int8_block of 256",
    ),
    (
        complete(**{"int8/b/scales": np.array(0.5, np.float32)}),
        Invalid,
        "'int8/b/scales' has shape [], expected [1], one for each int8_block of 256",
    ),
    *(
        (
            complete(**{"int8/b/scales": f32(scale)}),
            Invalid,
            f"int8/b/scales[0] must be finite and >= 0, got {got}",
        )
        for scale, got in [(np.nan, "nan"), (np.inf, "inf"), (-0.5, "-0.5"), (-np.inf, "-inf")]
    ),
    (
        complete(**{"grad/w": np.zeros((2, 3), np.float32)}),
        Invalid,
        "parameter 'w' has two gradients: 'grad/w' and 'topk/w/indices'",
    ),
    (
        complete(**{"int8/w/scales": f32(1), "int8/w/values": np.zeros((2, 3), np.int8)}),
        Invalid,
        "parameter 'w' has two gradients: 'topk/w/indices' and 'int8/w/scales'",
    ),
    (
        lacking(**{"topk/emb/indices": i64(1), "topk/emb/values": f32(1)}),
        Invalid,
        "'topk/emb/indices' stands for a dense gradient, but 'emb' was declared sparse: send "
        "'sparse/emb/indices' and 'sparse/emb/values'",
    ),
    (
        lacking(**{"int8/x/values": i8(1), "int8/x/scales": f32(1)}),
        Invalid,
        "'int8/x/values': unknown parameter 'x'",
    ),
    (lacking(*TOPK), MissingGradient, "parameter 'w' has no gradient; where torch has"),
    (lacking(**{"topk/w": f32(1)}), Invalid, "tensor 'topk/w' must be called grad/<name>, param/"),
    (lacking(**{"topk/w/scales": f32(1)}), Invalid, "tensor 'topk/w/scales' must be called"),
    (lacking(**{"int8/w/indices": f32(1)}), Invalid, "tensor 'int8/w/indices' must be called"),
    (lacking(**{"topk//values": f32(1)}), Invalid, "tensor 'topk//values' must be called"),
]


@pytest.mark.parametrize("named, error, sentence", BAD, ids=range(len(BAD)))
def test_a_bad_one_is_refused_with_a_sentence(
    named: Named, error: type[OptserveError], sentence: str
) -> None:
    with pytest.raises(error) as refused:
        take(named)
    assert type(refused.value) is error
    assert sentence in refused.value.detail


def test_none_and_a_compressed_gradient_contradict_each_other() -> None:
    with pytest.raises(Invalid, match="none: parameter 'w' has a gradient too"):
        take(complete(), none=["w"])


@pytest.mark.parametrize("block", [0, -1, 1.5, 2**63, "256"])
def test_a_block_must_be_a_positive_integer(block: Any) -> None:
    with pytest.raises(Invalid, match="int8_block must be"):
        take(complete(), int8_block=block)


def test_a_block_without_int8_is_refused_because_it_would_do_nothing() -> None:
    named = lacking("int8/b/values", "int8/b/scales") | {"grad/b": np.array(1, np.float32)}
    with pytest.raises(Invalid, match="int8_block is 64, but the body has no int8/<name>/values"):
        take(named, int8_block=64)


def test_every_index_of_a_wrong_order_is_found_wherever_it_is() -> None:
    for at in range(1, 50):
        indices = np.arange(50)
        indices[at] = indices[at - 1]
        with pytest.raises(Invalid, match=rf"topk/w/indices\[{at}\] must be > "):
            take(
                {"topk/w/indices": indices, "topk/w/values": np.ones(50, np.float32)},
                shapes={"w": (100,)},
            )
