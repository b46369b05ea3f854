"""Frames against the ``safetensors`` package, in both directions."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optserve_client import errors, wire

TAGS = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8"]
TAGS += ["U64", "U32", "U16", "U8", "BOOL", "F8_E4M3", "F8_E5M2"]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def tensors(draw: st.DrawFn) -> wire.Tensor:
    """Any bits at all, NaNs of every kind included, in any dtype and shape."""
    tag, shape = draw(st.sampled_from(TAGS)), draw(SHAPES)
    size = wire.nbytes(tag, shape)
    seed = draw(st.integers(0, 2**32 - 1))
    raw = np.random.default_rng(seed).bytes(size)
    if tag == "BOOL":
        raw = bytes(byte & 1 for byte in raw)
    return wire.from_bytes(tag, shape, raw)


FRAMES = st.dictionaries(NAMES, tensors(), max_size=6)
METADATA = st.dictionaries(st.text(max_size=10), st.text(max_size=30), max_size=3)


def facts(t: wire.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    return wire.dtype_of(t), t.shape, bytes(wire.as_bytes(t))


@settings(deadline=None)
@given(FRAMES, METADATA)
@example({}, {})
def test_the_safetensors_package_reads_what_we_write(
    named: dict[str, wire.Tensor], metadata: dict[str, str]
) -> None:
    frame = b"".join(wire.encode(named, metadata))
    theirs = {
        name: (view["dtype"], tuple(view["shape"]), bytes(view["data"]))
        for name, view in safetensors.deserialize(frame)
    }
    assert theirs == {name: facts(t) for name, t in named.items()}


@settings(deadline=None)
@given(FRAMES, METADATA)
@example({}, {})
def test_we_read_what_the_safetensors_package_writes(
    named: dict[str, wire.Tensor], metadata: dict[str, str]
) -> None:
    buffers = {name: np.frombuffer(wire.as_bytes(t), np.uint8) for name, t in named.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=wire.dtype_name(wire.dtype_of(t)),
            shape=list(t.shape),
            data_ptr=buffers[name].ctypes.data,
            data_len=buffers[name].nbytes,
        )
        for name, t in named.items()
    }
    frame = bytes(safetensors.serialize(specs, metadata or None))
    back, meta = wire.decode(frame)
    assert {name: facts(t) for name, t in back.items()} == {n: facts(t) for n, t in named.items()}
    assert meta == metadata


@settings(deadline=None)
@given(FRAMES, METADATA)
def test_a_frame_comes_back_as_it_went_in_the_same_order(
    named: dict[str, wire.Tensor], metadata: dict[str, str]
) -> None:
    frame = b"".join(wire.encode(named, metadata))
    back, meta = wire.decode(frame)
    # Empty tensors share a place with their neighbour, so only the others have an order.
    full = [name for name, t in named.items() if wire.as_bytes(t).nbytes]
    assert [name for name in back if name in full] == full
    assert {name: facts(t) for name, t in back.items()} == {n: facts(t) for n, t in named.items()}
    assert meta == metadata
    header = wire.parse_header(frame[8 : 8 + wire.header_length(frame)])
    assert header.frame_bytes == len(frame)
    assert header.data_start % 8 == 0


def check_read_or_refused(frame: bytes) -> None:
    with suppress(errors.Malformed):
        named, metadata = wire.decode(frame)
        # What was read accounts for every byte.
        again, _ = wire.decode(b"".join(wire.encode(named, metadata)))
        assert {n: facts(t) for n, t in again.items()} == {n: facts(t) for n, t in named.items()}


@settings(deadline=None)
@given(st.binary(max_size=200))
@example(b"\x02" + bytes(7) + b"{}")
def test_random_bytes_are_read_or_refused_as_malformed(junk: bytes) -> None:
    framed = len(junk).to_bytes(8, "little") + junk
    for frame in (junk, framed):
        check_read_or_refused(frame)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_frame_is_read_or_refused_as_malformed(data: st.DataObject) -> None:
    frame = bytearray(b"".join(wire.encode({"a": np.zeros((2, 3)), "b": np.zeros(1)}, {"k": "v"})))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] = data.draw(st.integers(0, 255))
    check_read_or_refused(bytes(frame))


def test_encode_copies_nothing_and_decode_copies_nothing() -> None:
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    _, view = wire.encode({"a": a})
    assert np.shares_memory(np.frombuffer(view, np.float32), a)
    frame = bytearray(b"".join(wire.encode({"a": a})))
    back, _ = wire.decode(frame)
    assert isinstance(back["a"], np.ndarray)
    assert np.shares_memory(back["a"], np.frombuffer(frame, np.uint8))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::3],
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    ],
    ids=["big-endian", "strided", "fortran"],
)
def test_an_array_of_any_layout_is_sent_as_its_values(array: Any) -> None:
    back, _ = wire.decode(b"".join(wire.encode({"a": array})))
    assert isinstance(back["a"], np.ndarray)
    np.testing.assert_array_equal(back["a"], array)


def test_the_header_ends_on_a_multiple_of_8_and_the_tensors_keep_the_mapping_order() -> None:
    frame = wire.encode({"z": np.ones(1, np.int8), "a": np.ones(1)})
    header = wire.parse_header(memoryview(frame[0])[8:])
    assert [info.name for info in header.tensors] == ["z", "a"]
    assert (header.tensors[1].begin, header.data_bytes, header.data_start % 8) == (1, 9, 0)


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("", "tensor name '' is empty"),
        ("__metadata__", "tensor name '__metadata__' is used twice or reserved"),
        ("a\x07", "tensor name 'a\\x07' holds the control character U+0007"),
        ("\ud800", "tensor name '\\ud800' is not UTF-8: it holds the lone surrogate U+D800"),
    ],
)
def test_a_frame_with_an_unusable_name_is_not_written(name: str, sentence: str) -> None:
    with pytest.raises(errors.Invalid) as caught:
        wire.encode({name: np.zeros(1)})
    assert caught.value.detail == sentence


def test_a_header_above_the_limit_is_not_written() -> None:
    with pytest.raises(errors.Invalid, match=r"the header has \d+ bytes, the limit is 16777216"):
        wire.encode({}, {"k": "x" * wire.HEADER_LIMIT})


def test_a_header_that_is_like_the_last_one_brings_its_own_metadata() -> None:
    for said in ("1", 'a "quoted" \\ text', "", "\u00e9"):
        for more in ({}, {"other": said + "!"}):
            metadata = {wire.META_KEY: said, **more}
            header = wire.encode_header([("a", "F32", (2, 3))], metadata)
            parsed = wire.parse_header(header[8:])
            assert parsed.metadata == metadata
            assert parsed.tensors == (wire.TensorInfo("a", "F32", (2, 3), 0, 24),)
            assert parsed.frame_bytes == len(header) + 24


def test_a_header_is_refused_for_the_same_reasons_after_a_good_one() -> None:
    good = '{"__metadata__":{"optserve":"1"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    assert wire.parse_header(good.encode()).data_bytes == 4
    for bad in (
        good.replace('"1"', '"\\ud800"'),  # no UTF-8
        good.replace("optserve", "optserve\\"),
        good[:-1] + "x}",
        good[:-1],
        good + "]",
    ):
        with pytest.raises(errors.Malformed):
            wire.parse_header(bad.encode())
