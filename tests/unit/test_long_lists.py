"""Long lists of numbers in JSON: read in pieces, with the same outcome as read at once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optserve.api import long_lists
from optserve.api.json_text import loads_object
from optserve.api.long_lists import loads_tensors
from optserve_client import wire
from optserve_client.errors import RequestError

FIELDS = ("grads", "params")


def read(parse: Callable[[bytes], dict[str, Any]], text: bytes, dtype: str) -> Any:
    """Return all that a body says: its tensors as bytes, or the sentence that refuses it."""
    try:
        body = parse(text)
        for field in FIELDS:
            tensors = body.get(field)
            if not isinstance(tensors, dict):
                continue
            for name, value in tensors.items():
                tensor = wire.tensor_from_json(value, f"{field}[{name!r}]", dtype)
                tensors[name] = tensor.shape, bytes(wire.as_bytes(tensor))
    except RequestError as exc:
        return type(exc), exc.detail
    return body


def in_pieces(text: bytes) -> dict[str, Any]:
    return loads_tensors(memoryview(text), *FIELDS)


@pytest.fixture(scope="module", autouse=True)
def short() -> Any:
    """Have lists of a few numbers taken for long ones, and cut into pieces of two or three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_lists, "LONG_BYTES", 6)
        patch.setattr(long_lists, "PIECE_BYTES", 5)
        yield


NUMBER = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-3, 3),
    st.sampled_from([2**53 + 1, 1e39, -0.0, 0.0, 1.0, 5e-324, 10**30]),
)
ODD = st.sampled_from([True, None, "NaN", "x", "[1,2,3,4]", {}, [], {"indices": [1, 2, 3, 4]}])
SHAPES = st.sampled_from([(4,), (9,), (2, 3), (5, 1), (3, 2, 2), (2, 0), (1, 1, 8), (7, 2)])


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a body most of whose tensors are lists of numbers, nested evenly."""

    def nested(shape: tuple[int, ...]) -> Any:
        if not shape:
            return draw(ODD if draw(st.integers(0, 40)) == 40 else NUMBER)
        return [nested(shape[1:]) for _ in range(shape[0])]

    names = st.lists(st.sampled_from(["w", "b", "[1,2,3,4,5]", '"]', "\\["]), unique=True)
    named = {f: {n: nested(draw(SHAPES)) for n in draw(names)} for f in FIELDS}
    extra = {"notes": "[1, 2, 3, 4, 5]", "metrics": {"a": [1.5, 2.5, 3.5]}, "order": [1, 2, 3, 4]}
    return {**named, **({} if draw(st.booleans()) else extra)}


@settings(deadline=None, max_examples=300)
@given(bodies(), st.sampled_from(["F32", "F64", "BF16"]), st.sampled_from([None, 1]))
def test_pieces_are_read_as_the_whole_is(body: Any, dtype: str, indent: int | None) -> None:
    text = json.dumps(body, indent=indent).encode()
    assert read(in_pieces, text, dtype) == read(loads_object, text, dtype)


@settings(deadline=None, max_examples=600)
@given(bodies(), st.randoms(use_true_random=False))
def test_a_text_with_faults_is_refused_as_the_whole_is(body: Any, chance: random.Random) -> None:
    text = bytearray(json.dumps(body, separators=(",", ":")).encode())
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(text))
        put = chance.choice(
            [b"", b",", b"[", b"]", b"],[", b'"', b"\\", b" ", b"1", b"-", b"e", b"t", b"{", b":"]
        )
        text[at : at + chance.randint(0, 2)] = put
    whole = read(loads_object, bytes(text), "F32")
    assert read(in_pieces, bytes(text), "F32") == whole


@pytest.mark.parametrize(
    "text",
    [
        b'{"grads": {"w": [1.0,2.0,3.0,4.0,5.0,]}}',
        b'{"grads": {"w": [1.0,2.0,3.0,4.0,]}}',
        b'{"grads": {"w": [1.0,2.000000,]}}',  # which is cut at its last comma
        b'{"grads": {"w": [[1.0,2.0,3.0],[44.0],[5.0,6.0]]}}',
        b'{"grads": {"w": [1.0,2.0,,3.0,4.0,5.0]}}',
        b'{"grads": {"w": [1.0,2.0,3.0,4.0,true]}}',
        b'{"grads": {"w": [true,false,true,false]}}',
        b'{"grads": {"w": [1.0,2.0,3.0,4.0,1e400]}}',
        b'{"grads": {"w": [[1.0,2.0],[3.0,4.0],[5.0]]}}',
        b'{"grads": {"w": [[1.0,2.0],[3.0,4.0],5.0]}}',
        b'{"grads": {"w": [[[1.0],[2.0]],[[3.0],[4.0,5.0]]]}}',
        b'{"grads": {"w": [[[1.0],[2.0]],[[3.0,4.0],[5.0,6.0]]]}}',
        b'{"grads": {"w": [1.0,2.0,3.0],[4.0,5.0,6.0]}}',
        b'{"grads": {"w": [1.0,2.0,3.0,4.0]], "b": [[1.0,2.0,3.0,4.0]}}',
        b'{"grads": {[1.0,2.0,3.0,4.0]: 1}}',
        b'{"grads": {"w": "[1.0,2.0,3.0,4.0]"}}',
        b'{"grads": {"w": "\\[1.0,2.0,3.0,4.0]"}}',
        b'{"grads": {"w": ["x",[1.0,2.0,3.0,4.0],"y"]}}',
        b'{"grads": [1.0,2.0,3.0,4.0,5.0]}',
        b'{"grads": {"w": [1.0,2.0,3.0,4.0,5.0], "w": 1}}',
        b'{"grads": {"w": [1.0,2.0,3.0,4.0,5.0]}',
        b"[1.0,2.0,3.0,4.0,5.0]",
        b'{"grads": {"w": %s1.0,2.0,3.0%s}}' % (b"[" * 33, b"]" * 33),
        b'{"grads": {"w": %s1.0,2.0,3.0%s}}' % (b"[" * 70, b"]" * 70),
        b'{"grads": {"w": %s1.0%s}}' % (b"[" * 20_000, b"]" * 20_000),
        b'{"grads": {"w": [           ]}}',
    ],
)
def test_what_looks_like_a_long_list_is_taken_for_what_it_is(text: bytes) -> None:
    assert read(in_pieces, text, "F32") == read(loads_object, text, "F32")


@pytest.mark.parametrize("shape", [(1000,), (40, 25), (5, 10, 20), (500, 2, 1)])
def test_a_long_list_never_becomes_python_objects_all_at_once(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.random.default_rng(0).standard_normal(shape)
    text = orjson.dumps({"grads": {"w": array.tolist()}, "lr": 1})
    parsed: list[int] = []

    def counted(piece: bytes) -> Any:
        parsed.append(len(piece))
        return orjson.loads(piece)

    monkeypatch.setattr(long_lists, "PIECE_BYTES", 500)
    monkeypatch.setattr(long_lists, "orjson", type("Orjson", (), {"loads": staticmethod(counted)}))
    body = loads_tensors(text, *FIELDS)
    row = len(orjson.dumps(array[0].tolist()))
    assert max(parsed) < 500 + row + 50
    assert len(parsed) > 1
    assert body["lr"] == 1
    assert isinstance(body["grads"]["w"], np.ndarray)
    np.testing.assert_array_equal(body["grads"]["w"], array)


def test_a_text_of_many_strings_is_not_searched_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(long_lists, "MOST_STRINGS", 3)
    text = orjson.dumps({"none": list("abcdef"), "grads": {"w": [1.5] * 10}})
    assert loads_tensors(text, *FIELDS) == orjson.loads(text)
