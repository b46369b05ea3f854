"""Replies as bytes: media types, JSON that loses no value, frames that any reader takes."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optserve.api import replies, waiting
from optserve.api.negotiation import matching, negotiate
from optserve.api.replies import JSON, dump, finite, json_tensors, tensor_frame
from optserve.api.streams import pieces
from optserve.optim.layout import Layout
from optserve.sessions.lending import PIECE_BYTES, Loan
from optserve.sessions.published import Published
from optserve_client import wire
from optserve_client.errors import NotAcceptable
from optserve_client.wire import SAFETENSORS

BOTH = (JSON, SAFETENSORS)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        ("application/json", JSON),
        ("Application/JSON; charset=utf-8", JSON),
        (SAFETENSORS, SAFETENSORS),
        (f"{SAFETENSORS}, application/json", JSON),
        (f"application/json;q=0.5, {SAFETENSORS}", SAFETENSORS),
        (f"{SAFETENSORS}, */*;q=0.1", SAFETENSORS),
        ("text/html, application/xhtml+xml, */*;q=0.8", JSON),
        (f"*/*;q=0.2, {SAFETENSORS};q=0.1", JSON),
        ("application/json;q=0, */*", SAFETENSORS),
        (f"{SAFETENSORS};q=oops, application/json;q=0.1", JSON),
    ],
)
def test_accept_chooses_the_media_type(accept: str | None, chosen: str) -> None:
    assert negotiate(accept, BOTH) == chosen


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0", "image/*", "x", ","])
def test_accept_without_one_of_ours_is_refused(accept: str) -> None:
    with pytest.raises(NotAcceptable) as caught:
        negotiate(accept, BOTH)
    assert caught.value.detail == f"Accept must allow {JSON} or {SAFETENSORS}, got {accept!r}"


@pytest.mark.parametrize(
    ("condition", "hit"),
    [
        ('"a.1"', True),
        ('W/"a.1"', True),
        ("*", True),
        (' "b" , "a.1"', True),
        ('"b","c"', False),
        ("a.1", False),
        ("", False),
        ('"a.1', False),
        ('"x, "a.1", y"', False),
        ('"x,y", "a.1"', True),
    ],
)
def test_if_none_match_takes_lists_stars_and_weak_tags(condition: str, hit: bool) -> None:
    assert (matching('"a.1"', condition) is not None) is hit


def published(dtype: str, tensors: dict[str, wire.Tensor]) -> Published:
    layout = Layout.pack(dtype, ((name, tuple(t.shape)) for name, t in tensors.items()))
    data = np.frombuffer(b"".join(wire.as_bytes(t) for t in tensors.values()), np.uint8)
    loan = Loan.of_copy(data.copy())
    return Published(generation="g", version=3, weights="live", layout=layout, loan=loan)


def whole(parts: Sequence[Any]) -> bytes:
    return b"".join(p if isinstance(p, bytes) else b"".join(pieces(p)) for p in parts)


def read_back(text: bytes, name: str, tag: str, shape: tuple[int, ...]) -> wire.Tensor:
    document = json.loads(text, parse_constant=pytest.fail)
    return wire.tensor_from_json(document[name], name, tag, shape)


SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@given(
    array=st.sampled_from(["<f4", "<f8"]).flatmap(lambda d: hnp.arrays(d, SHAPES)),
    encoding=st.sampled_from(["list", "base64"]),
)
def test_json_gives_back_every_bit_but_those_inside_a_nan(array: Any, encoding: Any) -> None:
    tag = wire.dtype_of(array)
    text = dump(json_tensors(published(tag, {"w": array}), encoding, None))
    back = read_back(text, "w", tag, array.shape)
    np.testing.assert_array_equal(np.asarray(back), array)
    assert (np.signbit(back) == np.signbit(array))[~np.isnan(array)].all()


@given(bits=hnp.arrays("<u2", SHAPES), encoding=st.sampled_from(["list", "base64"]))
def test_bfloat16_goes_through_json_exactly(bits: Any, encoding: Any) -> None:
    tensor = wire.Bits(bits, "BF16")
    text = dump(json_tensors(published("BF16", {"w": tensor}), encoding, None))
    back = read_back(text, "w", "BF16", bits.shape)
    assert isinstance(back, wire.Bits)
    np.testing.assert_array_equal(back.to_float32(), tensor.to_float32())


def test_a_float32_is_written_as_short_as_it_can_be() -> None:
    text = dump(json_tensors(published("F32", {"w": np.array([0.1, 1e30], "<f4")}), "list", None))
    assert text == b'{"w":[0.1,1e+30]}'


@pytest.mark.parametrize("encoding", ["list", "base64"])
def test_a_large_reply_is_the_same_text_although_it_is_written_in_pieces(
    encoding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = [(7,), (), (5, 3), (0, 2), (2, 3, 4), (1, 9)]
    rng = np.random.default_rng(0)
    arrays = {f'w"{i}': rng.standard_normal(s, np.float32) for i, s in enumerate(shapes)}
    arrays["nan"] = np.full((4, 4), np.nan, np.float32)
    params, fields = published("F32", arrays), {"id": "a", "loss": 0.5}
    whole_text = dump({**fields, "params": json_tensors(params, encoding, None)})
    monkeypatch.setattr(replies, "LISTED_BYTES", 16)
    parts = replies._json_parts(fields, params, encoding, None)
    assert b"".join(parts) == whole_text + b"\n"
    assert len(parts) > len(arrays)
    if encoding == "list":
        assert max(map(len, parts)) < len(whole_text) / 3


def test_rounding_for_the_reply_that_overflows_is_infinity_not_null() -> None:
    text = dump(json_tensors(published("F32", {"w": np.array([1e30, -1.0], "<f4")}), "list", "F16"))
    assert text == b'{"w":["Infinity",-1.0]}'


def test_scalars_that_are_not_finite_become_strings_at_any_depth() -> None:
    value = {"grad_norm": math.inf, "groups": [{"lr": math.nan, "betas": (0.9, -math.inf)}]}
    assert finite(value) == {
        "grad_norm": "Infinity",
        "groups": [{"lr": "NaN", "betas": [0.9, "-Infinity"]}],
    }


@pytest.mark.parametrize("dtype", [None, "F32", "F16", "F64"])
def test_a_frame_is_what_the_safetensors_package_reads(dtype: str | None) -> None:
    tensors: dict[str, wire.Tensor] = {
        "b": np.array([1.5, np.nan], "<f4"),
        "a": np.array(0.25, "<f4"),
        "empty": np.empty((0, 3), "<f4"),
    }
    frame = whole(tensor_frame(published("F32", tensors), dtype, {"version": 3, "x": "Infinity"}))
    loaded = safetensors.numpy.load(frame)
    assert set(loaded) == {"param/b", "param/a", "param/empty"}
    for name, array in tensors.items():
        want = np.asarray(array).astype(wire.numpy_dtype(dtype or "F32"))
        np.testing.assert_array_equal(loaded[f"param/{name}"], want)
    _, metadata = wire.decode(frame)
    assert json.loads(metadata["optserve"]) == {"version": 3, "x": "Infinity"}


def test_the_frame_of_a_reply_is_not_copied() -> None:
    source = published("F32", {"w": np.arange(6, dtype="<f4")})
    _, data = tensor_frame(source, None, {})
    assert data is source.loan


def test_behind_another_server_a_large_frame_is_sent_in_pieces() -> None:
    data = np.arange(2_500_000, dtype=np.uint8)
    response = replies.PartsResponse([b"head", Loan.of_copy(data), b""])
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("a reply reads nothing")

    asyncio.run(response({"type": "http", "headers": []}, receive, send))
    headers = dict(sent[0]["headers"])
    bodies = [message["body"] for message in sent[1:]]
    assert headers[b"content-length"] == b"2500004"
    assert b"".join(bodies) == b"head" + data.tobytes()
    assert max(map(len, bodies)) == PIECE_BYTES
    assert [message["more_body"] for message in sent[1:]] == [True] * 5 + [False]


def test_small_work_stays_on_the_loop_and_large_work_leaves_it() -> None:
    async def where(nbytes: int) -> bool:
        return await waiting.off_loop(nbytes, threading.current_thread) is threading.main_thread()

    assert asyncio.run(where(waiting.OFF_LOOP_BYTES))
    assert not asyncio.run(where(waiting.OFF_LOOP_BYTES + 1))
