"""gzip and zstd, piece by piece: what is decompressed, how much of it, and what is refused."""

from __future__ import annotations

import gzip
import zlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optserve.api import coded
from optserve.api.codings import (
    CODINGS,
    Coding,
    Decoding,
    answer_coding,
    encoding,
    request_coding,
    zstd,
)
from optserve_client.errors import Malformed, TooLarge, UnsupportedMediaType

WHOLE = 10**9
both = pytest.mark.parametrize("coding", CODINGS)


def compressed(coding: str, data: bytes) -> bytes:
    """Return ``data`` as other programs compress it."""
    if coding == "gzip":
        return gzip.compress(data, 6)
    checked = {zstd.CompressionParameter.checksum_flag: 1}
    return zstd.compress(data, options=checked)


def decoded(decoding: Decoding, *chunks: bytes, most: int = 1000) -> bytes:
    out = b""
    for chunk in chunks:
        decoding.give(chunk)
        while not decoding.idle:
            piece = decoding.take(most)
            assert len(piece) <= most
            out += piece
    decoding.finish()
    return out


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in pairwise(edges)]


# --- what comes in -------------------------------------------------------------------------------


@both
@settings(max_examples=100, deadline=None)
@given(
    members=st.lists(st.binary(max_size=300) | st.just(b"a" * 5000), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 1000), max_size=8),
    most=st.integers(1, 6000),
)
def test_any_split_of_one_or_more_members_gives_what_was_compressed(
    coding: Coding, members: list[bytes], cuts: list[int], most: int
) -> None:
    body = b"".join(compressed(coding, member) for member in members)
    whole = b"".join(members)
    assert decoded(Decoding(coding, len(whole)), *split(body, cuts), most=most) == whole


@both
def test_a_body_may_come_byte_by_byte(coding: Coding) -> None:
    body = compressed(coding, b"gradients " * 1000)
    chunks = [body[i : i + 1] for i in range(len(body))]
    assert decoded(Decoding(coding, WHOLE), *chunks) == b"gradients " * 1000


@both
@pytest.mark.parametrize("size", [1, 1000, 1_000_000])
def test_the_limit_is_exact(coding: Coding, size: int) -> None:
    body = compressed(coding, b"x" * size)
    assert len(decoded(Decoding(coding, size), body, most=WHOLE)) == size
    decoding = Decoding(coding, size - 1)
    sentence = f"the body, decompressed, has more than {size - 1} bytes, which is the limit"
    with pytest.raises(TooLarge, match=sentence) as refused:
        decoded(decoding, body, most=WHOLE)
    assert refused.value.extra == {"limit": size - 1}


@both
def test_a_bomb_is_told_from_one_byte_above_the_limit(coding: Coding) -> None:
    bomb = compressed(coding, bytes(50_000_000))
    assert len(bomb) < 50_000
    decoding = Decoding(coding, 1_000_000)
    decoding.give(bomb)
    produced = 0
    with pytest.raises(TooLarge):
        while True:
            produced += len(decoding.take(2**16))
    assert produced <= 1_000_000
    assert decoding._produced == 1_000_001


@both
def test_one_step_does_no_more_than_one_member(coding: Coding) -> None:
    decoding = Decoding(coding, WHOLE)
    decoding.give(compressed(coding, b"") * 3000 + compressed(coding, b"end"))
    assert decoding.step(100) == b""
    assert not decoding.idle
    assert decoding.take(100) == b"end"
    assert decoding.idle
    decoding.finish()


@both
def test_a_body_that_is_cut_off_anywhere_is_refused(coding: Coding) -> None:
    body = compressed(coding, b"some gradients, some more gradients")
    for end in range(len(body)):
        where = "middle" if end else "beginning"
        with pytest.raises(Malformed, match=f"the body ended .*{where} of its {coding} stream"):
            decoded(Decoding(coding, WHOLE), body[:end])
    two = body + body
    with pytest.raises(Malformed, match="in the middle"):
        decoded(Decoding(coding, WHOLE), two[:-1])


@both
def test_every_changed_bit_of_the_content_is_found(coding: Coding) -> None:
    data = bytes(range(256)) * 2
    body = compressed(coding, data)
    # A gzip header names time and system, and its last block fills a byte; zstd has a spare bit.
    idle = {*range(3, 10), len(body) - 9} if coding == "gzip" else {4}
    for at in range(len(body)):
        changed = bytearray(body)
        changed[at] ^= 0x10
        if at in idle:
            continue
        with pytest.raises(Malformed):
            decoded(Decoding(coding, WHOLE), bytes(changed))


@pytest.mark.parametrize(
    ("coding", "body", "sentence"),
    [
        ("gzip", b"{}", "the body is no gzip stream: incorrect header check"),
        ("gzip", zlib.compress(b"x"), "the body is no gzip stream: incorrect header check"),
        ("zstd", b'{"grads": 1}', "the body is no zstd stream: .*Unknown frame descriptor"),
        ("gzip", compressed("zstd", b"x"), "the body is no gzip stream"),
        ("gzip", gzip.compress(b"x")[:-1] + b"\1", "incorrect length check"),
        ("zstd", compressed("zstd", b"x" * 99)[:-1] + b"\0", "doesn't match checksum"),
        (
            "gzip",
            gzip.compress(b"x") + b"\0\0\0",
            "after the end of its gzip stream the body goes on with something else: incorrect",
        ),
        (
            "zstd",
            compressed("zstd", b"x") + b"garbage!!",
            "after the end of its zstd stream the body goes on with something else: .*Unknown",
        ),
    ],
)
def test_what_is_no_stream_is_refused_with_the_reason(
    coding: Coding, body: bytes, sentence: str
) -> None:
    with pytest.raises(Malformed, match=sentence):
        decoded(Decoding(coding, WHOLE), body)


def test_a_frame_that_needs_much_memory_to_be_read_is_refused() -> None:
    wide = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    body = wide.compress(bytes(2**20)) + wide.flush()
    with pytest.raises(Malformed, match="requires too much memory"):
        decoded(Decoding("zstd", WHOLE), body)


def test_frames_that_are_to_be_skipped_are_skipped() -> None:
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"xxxxx"
    body = skipped + compressed("zstd", b"data") + skipped
    assert decoded(Decoding("zstd", 4), body) == b"data"


# --- what goes out -------------------------------------------------------------------------------


@both
def test_other_programs_read_what_we_compress(coding: Coding) -> None:
    data = bytes(range(256)) * 1000
    made = encoding(coding, len(data))
    body = b"".join([made.compress(data[:1000]), made.compress(data[1000:]), made.flush()])
    read: Any = gzip.decompress if coding == "gzip" else zstd.decompress
    assert read(body) == data
    if coding == "zstd":  # its reader knows how much memory that takes
        assert zstd.get_frame_info(body).decompressed_size == len(data)


@both
def test_what_does_not_shrink_is_not_worth_it(coding: Coding) -> None:
    random = np.random.default_rng(0).bytes(10_000)
    assert coded.shrunk(coding, [random]) is None
    assert coded.shrunk(coding, [bytes(5000), random[:100]]) is not None


# --- what is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "coding"),
    [
        (None, None),
        ("", None),
        ("identity", None),
        ("IDENTITY", None),
        ("gzip", "gzip"),
        (" GZip ", "gzip"),
        ("x-gzip", "gzip"),
        ("zstd", "zstd"),
    ],
)
def test_content_encoding_names_a_coding(said: str | None, coding: str | None) -> None:
    assert request_coding(said) == coding


@pytest.mark.parametrize(
    "said", ["br", "deflate", "gzip, gzip", "x-zstd", "identity, gzip", "a" * 99]
)
def test_an_unknown_coding_is_refused_with_those_that_there_are(said: str) -> None:
    with pytest.raises(
        UnsupportedMediaType, match="must be zstd, gzip or identity, got"
    ) as refused:
        request_coding(said)
    assert refused.value.extra == {"accept_encoding": ["zstd", "gzip", "identity"]}
    assert len(refused.value.detail) < 150


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"),
        ("zstd", "zstd"),
        ("gzip, deflate", "gzip"),
        ("gzip, deflate, br, zstd", "zstd"),
        ("gzip;q=1.0, zstd;q=0.5", "gzip"),
        ("gzip;q=0.5, zstd;q=0.5", "zstd"),
        ("x-gzip", "gzip"),
        ("*", "zstd"),
        ("zstd;q=0, *", "gzip"),
        ("*;q=0.1", "zstd"),
        ("identity", None),
        ("identity;q=0.5, gzip", "gzip"),
        ("identity, gzip;q=0.5", None),
        ("identity;q=1, gzip;q=1", "gzip"),
        ("gzip;q=0", None),
        ("*;q=0", None),
        ("br", None),
        ("", None),
        (",,", None),
        ("gzip;q=nan", None),
        ("gzip;q=x", None),
        ("gzip;q=-1", None),
        ("gzip;q=2", None),
        (" GZIP ; Q = 0.3 ", "gzip"),
    ],
)
def test_accept_encoding_is_read_with_its_weights(accepted: str, coding: str | None) -> None:
    assert answer_coding(accepted) == coding
