"""JSON text: what is read, what is refused, and with which sentence."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optserve.api import json_text
from optserve_client.errors import Malformed

KEYS = st.sampled_from(["a", "b", '"', "\\", ':"', "é", "", '\\":', "\n"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | KEYS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_valid_json_is_read_as_the_standard_library_reads_it(
    value: Any, ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert json_text.loads(text) == json.loads(text)


@given(st.lists(KEYS, min_size=1, max_size=4, unique=True), KEYS, VALUES)
def test_a_duplicate_key_is_refused_wherever_it_stands(
    keys: list[str], key: str, outer: Any
) -> None:
    members = [f"{json.dumps(k)}: 1" for k in [key, *keys, key]]
    inner = "{" + " , ".join(members) + "}"
    for text in (inner, f"[{json.dumps(outer)}, {inner}]", f'{{"x": [1, {inner}]}}'):
        with pytest.raises(Malformed, match="twice in one object"):
            json_text.loads(text.encode())


def test_keys_that_differ_only_in_their_escapes_are_the_same_key() -> None:
    with pytest.raises(Malformed, match="the body has the key 'lr' twice in one object"):
        json_text.loads(rb'{"lr": 1, "\u006cr": 2}')


def test_the_same_key_in_two_objects_is_no_duplicate() -> None:
    text = b'{"a": {"a": 1}, "b": [{"a": 2}, {"a": 3}]}'
    assert json_text.loads(text) == {"a": {"a": 1}, "b": [{"a": 2}, {"a": 3}]}


def test_an_object_behind_a_number_in_a_list_is_still_read() -> None:
    assert json_text.loads(b'[1, {"a": 2}]') == [1, {"a": 2}]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "the body is empty, expected JSON"),
        (b" \n", "the body is empty, expected JSON"),
        (b"\xef\xbb\xbf{}", "the body begins with a byte order mark; JSON is UTF-8 without one"),
        (b'{"a": NaN}', "the body is not JSON: NaN at byte 6 is no JSON number"),
        (b'{"a": [1, -Infinity]}', "the body is not JSON: -Infinity at byte 10 is no JSON number"),
        (b'{"a":nan}', "the body is not JSON: nan at byte 5 is no JSON number"),
        ('{"é": Infinity}'.encode(), "the body is not JSON: Infinity at byte 7 is no JSON number"),
        (b'{"a": 1', "the body is not JSON: unexpected end of data at byte 7"),
        (b'{"a": 1e400}', "number is infinity when parsed as double at byte 6"),
        (b'{"a": 1} x', "unexpected content after document at byte 9"),
        (b'{"\xff": 1}', "the body is not UTF-8: invalid start byte at byte 2"),
        (b'"\\ud800"', "the body is not JSON: no low surrogate"),
        (b"[" * 65 + b"]" * 65, "the body is nested more than 64 levels deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "the body is nested more than 64 levels deep"),
        (b"[" * 100_000, "the body is not JSON: "),
    ],
)
def test_what_is_no_json_is_refused_with_a_sentence(text: bytes, sentence: str) -> None:
    with pytest.raises(Malformed) as caught:
        json_text.loads(text)
    assert sentence in caught.value.detail


@pytest.mark.parametrize(
    ("text", "got"),
    [
        (b"[1]", "a list"),
        (b'"x"', "a string"),
        (b"null", "null"),
        (b"1.5", "1.5"),
        (b"true", "true"),
    ],
)
def test_a_top_level_that_is_no_object_is_refused(text: bytes, got: str) -> None:
    with pytest.raises(Malformed) as caught:
        json_text.loads_object(text)
    assert caught.value.detail == f"the body must be a JSON object, got {got}"


def test_sixty_four_levels_are_read() -> None:
    value = json_text.loads(b"[" * 64 + b"]" * 64)
    for _ in range(63):
        (value,) = value
    assert value == []


def test_decimal_text_gives_the_nearest_double() -> None:
    assert json_text.loads(b"[0.1, -0.0, 5e-324, 1.7976931348623157e308]") == [
        0.1,
        0.0,
        5e-324,
        1.7976931348623157e308,
    ]
    assert math.copysign(1, json_text.loads(b"[-0.0]")[0]) == -1
