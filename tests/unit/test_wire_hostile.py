"""Frames made to do harm: each is refused with a sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from optserve_client import errors, wire


def framed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(data: bytes = bytes(4), **fields: Any) -> bytes:
    return framed(json.dumps({"w": entry(**fields)}).encode(), data)


def two(first: Any, second: Any, data: bytes) -> bytes:
    return framed(
        json.dumps({"a": entry(offsets=first), "b": entry(offsets=second)}).encode(), data
    )


SHAPE = "tensor 'w': shape must be a list of at most 32 integers >= 0"
OFFSETS = "tensor 'w': data_offsets must be two integers >= 0"
KEYS = "tensor 'w' must have exactly dtype, shape and data_offsets"
GOOD = '"dtype":"F32","shape":[1],"data_offsets":[0,4]'

HOSTILE = {
    # lengths
    "nothing": (b"", "a safetensors frame has at least 8 bytes, got 0"),
    "half a length": (b"\x02\0\0", "a safetensors frame has at least 8 bytes, got 3"),
    "no header": (framed(b""), "the header length must be in [2, 16777216], got 0"),
    "huge header": (framed(b"{}", b"", 2**63), f"[2, 16777216], got {2**63}"),
    "header above the limit": (framed(b"{}", b"", 2**24 + 1), "[2, 16777216], got 16777217"),
    "header past the end": (framed(b"{}", b"", 9), "the header ends at byte 17, the frame has 10"),
    "trailing bytes": (
        framed(b"{}", b"x"),
        "the header describes 10 bytes, the frame has 11: trailing bytes",
    ),
    "cut off": (one(bytes(3)), "the header describes 73 bytes, the frame has 72: it is cut off"),
    # JSON
    "not UTF-8": (framed(b'{"\xff":1}'), "the header is not UTF-8: invalid start byte at byte 2"),
    "not JSON": (framed(b"{a}"), "the header is not JSON: "),
    "two documents": (framed(b"{}{}"), "the header is not JSON: Extra data"),
    "leading space": (framed(b" {}"), "the header must begin with '{', got b' '"),
    "a list": (framed(b"[]"), "the header must begin with '{', got b'['"),
    "deep": (framed(b'{"a":' * 100_000), "the header is nested too deeply"),
    "NaN": (framed(b'{"w":NaN}'), "the header is not JSON: NaN is not a JSON number"),
    "endless number": (framed(b'{"w":' + b"9" * 5000 + b"}"), "the header is not JSON: "),
    # duplicates
    "a tensor twice": (
        framed(f'{{"w":{{{GOOD}}},"w":{{{GOOD}}}}}'.encode(), bytes(4)),
        "the header has the key 'w' twice",
    ),
    "a tensor twice, once escaped": (
        framed(f'{{"w":{{{GOOD}}},"\\u0077":{{{GOOD}}}}}'.encode(), bytes(4)),
        "the header has the key 'w' twice",
    ),
    "a key of an entry twice": (
        framed(f'{{"w":{{{GOOD},"shape":[1]}}}}'.encode(), bytes(4)),
        "the header has the key 'shape' twice",
    ),
    "metadata twice": (
        framed(b'{"__metadata__":{},"__metadata__":{}}'),
        "the header has the key '__metadata__' twice",
    ),
    "a key of the metadata twice": (
        framed(b'{"__metadata__":{"a":"","a":""}}'),
        "the header has the key 'a' twice",
    ),
    # metadata
    "metadata a list": (
        framed(b'{"__metadata__":[]}'),
        "__metadata__ must be an object, got list",
    ),
    "metadata null": (
        framed(b'{"__metadata__":null}'),
        "__metadata__ must be an object, got NoneType",
    ),
    "metadata of numbers": (
        framed(b'{"__metadata__":{"a":1}}'),
        "__metadata__['a'] must be a string, got int",
    ),
    "metadata with a lone surrogate": (
        framed(b'{"__metadata__":{"a":"\\ud800"}}'),
        "__metadata__['a'] is not UTF-8",
    ),
    # names
    "empty name": (framed(f'{{"":{{{GOOD}}}}}'.encode(), bytes(4)), "tensor name '' is empty"),
    "control character": (
        framed(f'{{"a\\u0000":{{{GOOD}}}}}'.encode(), bytes(4)),
        "tensor name 'a\\x00' holds the control character U+0000",
    ),
    "lone surrogate": (
        framed(f'{{"\\udfff":{{{GOOD}}}}}'.encode(), bytes(4)),
        "tensor name '\\udfff' is not UTF-8: it holds the lone surrogate U+DFFF",
    ),
    # entries
    "entry a list": (framed(b'{"w":[]}'), KEYS),
    "entry null": (framed(b'{"w":null}'), KEYS),
    "key missing": (framed(b'{"w":{"dtype":"F32","shape":[]}}'), KEYS),
    "key too many": (framed(f'{{"w":{{{GOOD},"x":1}}}}'.encode(), bytes(4)), KEYS),
    "unknown dtype": (one(dtype="F31"), "tensor 'w': dtype must be one of float64, float32"),
    "dtype in lower case": (one(dtype="f32"), "bool, float8_e4m3fn, float8_e5m2, got 'f32'"),
    "dtype by its JSON name": (one(dtype="float32"), "float8_e5m2, got 'float32'"),
    "dtype a number": (one(dtype=32), "tensor 'w': dtype must be one of float64, float32"),
    "dtype a list": (one(dtype=["F32"]), "tensor 'w': dtype must be one of float64, float32"),
    # shapes
    "shape a number": (one(shape=1), SHAPE),
    "shape negative": (one(shape=[-1]), SHAPE),
    "shape a float": (one(shape=[1.0]), SHAPE),
    "shape a bool": (one(shape=[True]), SHAPE),
    "shape a string": (one(shape=["1"]), SHAPE),
    "shape null": (one(shape=None), SHAPE),
    "dimension above 63 bits": (one(shape=[2**63]), SHAPE),
    "rank 33": (one(shape=[1] * 33), SHAPE),
    "product above 63 bits": (
        one(shape=[2**31, 2**31, 2**31]),
        "tensor 'w': shape [2147483648, 2147483648, 2147483648] of F32 has more than",
    ),
    "product that wraps to 4 bytes": (
        one(shape=[2**32 + 1, 2**32 + 1]),
        "tensor 'w': shape [4294967297, 4294967297] of F32 has more than",
    ),
    "empty but beyond numpy": (
        one(b"", shape=[0, 2**40, 2**40], offsets=[0, 0]),
        "tensor 'w': shape [0, 1099511627776, 1099511627776] of F32 has more than",
    ),
    # offsets
    "offsets a bool": (one(b"", shape=[0], offsets=[False, False]), OFFSETS),
    "offsets floats": (one(offsets=[0.0, 4.0]), OFFSETS),
    "offsets negative": (one(offsets=[-4, 0]), OFFSETS),
    "offsets three": (one(offsets=[0, 4, 8]), OFFSETS),
    "offsets a string": (one(offsets="04"), OFFSETS),
    "offsets above 63 bits": (one(offsets=[0, 2**64]), OFFSETS),
    "offsets backwards": (
        one(offsets=[4, 0]),
        "tensor 'w': offsets [4, 0) do not match shape [1] of F32 (4 bytes)",
    ),
    "offsets too wide": (
        one(bytes(12), shape=[2, 2], offsets=[0, 12]),
        "tensor 'w': offsets [0, 12) do not match shape [2, 2] of F32 (16 bytes)",
    ),
    "hole at the start": (
        one(bytes(8), offsets=[4, 8]),
        "tensor 'w' begins at 4, not 0: it leaves a hole before it",
    ),
    "hole": (
        two([0, 4], [8, 12], bytes(12)),
        "tensor 'b' begins at 8, not 4: it leaves a hole before it",
    ),
    "overlap": (
        two([0, 4], [2, 6], bytes(6)),
        "tensor 'b' begins at 2, not 4: it overlaps the one before",
    ),
    "the same bytes twice": (
        two([0, 4], [0, 4], bytes(4)),
        "tensor 'b' begins at 0, not 4: it overlaps the one before",
    ),
    "out of range": (
        one(bytes(4), shape=[2**40], offsets=[0, 2**42]),
        "4398046511197 bytes, the frame has 97: it is cut off",
    ),
    # data
    "a bool that is neither": (
        one(b"\x02", dtype="BOOL", offsets=[0, 1]),
        "a BOOL tensor holds bytes other than 0 and 1",
    ),
}


@pytest.mark.parametrize("frame, sentence", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_frame_is_refused_with_a_sentence(frame: bytes, sentence: str) -> None:
    with pytest.raises(errors.Malformed) as caught:
        wire.decode(frame)
    assert sentence in caught.value.detail
    assert len(caught.value.detail) < 500


@pytest.mark.parametrize("frame", [b"", b"1234567"])
def test_a_short_prefix_has_no_header_length(frame: bytes) -> None:
    with pytest.raises(errors.Malformed, match=f"at least 8 bytes, got {len(frame)}"):
        wire.header_length(frame)


def test_an_empty_tensor_between_two_others_is_no_overlap() -> None:
    header = {"a": entry(), "e": entry(shape=[0], offsets=[4, 4]), "b": entry(offsets=[4, 8])}
    parsed = wire.parse_header(json.dumps(header).encode())
    assert [info.name for info in parsed.tensors] == ["a", "e", "b"]
