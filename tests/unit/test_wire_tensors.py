"""Dtypes, conversions, names, and the forms of a tensor inside JSON."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from optserve_client import errors, wire

W = "grads['w']"


def b64(array: Any, **change: Any) -> dict[str, Any]:
    return {**wire.tensor_to_json(np.asarray(array), "base64"), **change}


def bits_of(t: torch.Tensor) -> Any:
    return t.view(torch.int16).numpy().view(np.uint16)


@settings(deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0), elements=st.floats(width=32)))
def test_bfloat16_rounds_as_torch_does(a: Any) -> None:
    ours = wire.Bits.bfloat16(a)
    theirs = torch.from_numpy(np.atleast_1d(a).copy()).to(torch.bfloat16)
    number = ~np.isnan(np.atleast_1d(a))
    assert ours.shape == a.shape
    np.testing.assert_array_equal(np.atleast_1d(ours.array)[number], bits_of(theirs)[number])
    assert np.isnan(np.atleast_1d(ours.to_float32())[~number]).all()


@pytest.mark.parametrize(
    "tag, dtype", [("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)]
)
def test_narrowing_float64_rounds_as_torch_does(tag: str, dtype: torch.dtype) -> None:
    # 1 + 2**-9 + 2**-40 lies just above a tie of bfloat16, and on it once rounded to float32.
    values = np.concatenate(
        [np.random.default_rng(0).standard_normal(10_000), [1 + 2**-9 + 2**-40]]
    )
    ours = wire.narrow(values, tag)
    theirs = torch.from_numpy(values).to(dtype)
    if isinstance(ours, wire.Bits):
        np.testing.assert_array_equal(ours.array, bits_of(theirs))
    else:
        np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("have", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("want", ["F32", "F64"])
def test_widening_is_exact(have: str, want: str) -> None:
    source = wire.narrow(np.random.default_rng(1).standard_normal((3, 5)), have)
    wide = wire.widen(source, want, W)
    assert wire.dtype_of(wide) == want
    back = wire.narrow(wide, have)
    assert bytes(wire.as_bytes(back)) == bytes(wire.as_bytes(source))


@pytest.mark.parametrize(
    "array, dtype, sentence",
    [
        (
            np.zeros(1),
            "F32",
            f"{W} is float64 and the session is float32: that would round; "
            "convert it to float32 first",
        ),
        (np.zeros(1, np.float32), "BF16", "would round; convert it to bfloat16 first"),
        (np.zeros(1, np.float16), "BF16", "would round; convert it to bfloat16 first"),
        (np.zeros(1, np.int64), "F32", f"{W} is int64 and the session is float32: that is no "),
        (np.zeros(1, bool), "F64", f"{W} is bool and the session is float64: that is no "),
    ],
)
def test_widening_refuses_what_would_round(array: Any, dtype: str, sentence: str) -> None:
    with pytest.raises(errors.Invalid) as caught:
        wire.widen(array, dtype, W)
    assert sentence in caught.value.detail


@pytest.mark.parametrize("tag", ["F32", "BF16", "I64", "BOOL", "F8_E4M3"])
def test_a_tag_and_its_name_stand_for_each_other(tag: str) -> None:
    name = wire.dtype_name(tag)
    assert wire.dtype_tag(name) == wire.dtype_tag(tag) == wire.dtype_tag(f"torch.{name}") == tag


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: wire.dtype_tag("float31"), "got 'float31'"),
        (lambda: wire.itemsize("F31"), "got 'F31'"),
        (lambda: wire.dtype_name("F31"), "got 'F31'"),
        (lambda: wire.dtype_of(np.zeros(1, complex)), "got 'complex128'"),
        (lambda: wire.dtype_of(np.array(["x"], object)), "got 'object'"),
        (lambda: wire.narrow(np.zeros(1, np.int8), "F32"), "cannot convert int8 to float32"),
        (lambda: wire.narrow(np.zeros(1), "I8"), "cannot convert float64 to int8"),
        (lambda: wire.Bits(np.zeros(1), "BF16"), "Bits of BF16 must hold uint16, got float64"),
        (lambda: wire.Bits(np.zeros(1), "F32"), "Bits.dtype must be one of"),
        (
            lambda: wire.Bits(np.zeros(1, np.uint8), "F8_E5M2").to_float32(),
            "only BF16 converts to float32, not F8_E5M2",
        ),
    ],
)
def test_an_unusable_dtype_is_named(call: Any, sentence: str) -> None:
    with pytest.raises(errors.Invalid) as caught:
        call()
    assert sentence in caught.value.detail


def test_from_bytes_wants_the_exact_number_of_bytes() -> None:
    with pytest.raises(errors.Malformed) as caught:
        wire.from_bytes("F32", [2], bytes(7))
    assert caught.value.detail == "7 bytes do not match shape [2] of F32 (8 bytes)"


# JSON forms ---------------------------------------------------------------------------------------

READ = {
    "a scalar": (1.5, None, np.float32(1.5)),
    "an integer": (3, "F64", np.float64(3)),
    "a matrix": ([[1, 2], [3, 4.5]], None, np.array([[1, 2], [3, 4.5]], np.float32)),
    "empty": ([], None, np.empty(0, np.float32)),
    "empty rows": ([[], []], None, np.empty((2, 0), np.float32)),
    "non-finite": (["NaN", "Infinity", "-Infinity"], None, np.float32([np.nan, np.inf, -np.inf])),
    "integers": ([[1, -(2**63)]], "I64", np.array([[1, -(2**63)]])),
    "half": ([0.1], "F16", np.float16([0.1])),
    "base64": (b64(np.arange(3.0)), "F32", np.arange(3.0)),
    "base64 scalar": (b64(np.float32(2)), None, np.float32(2)),
    "base64 by tag": (b64(np.arange(3.0), dtype="F64"), None, np.arange(3.0)),
}


@pytest.mark.parametrize("value, dtype, expected", READ.values(), ids=READ.keys())
def test_a_tensor_is_read_from_json(value: Any, dtype: str | None, expected: Any) -> None:
    got = wire.tensor_from_json(json.loads(json.dumps(value)), W, dtype)
    assert isinstance(got, np.ndarray)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(got, expected)


def test_lists_become_bfloat16_by_rounding() -> None:
    got = wire.tensor_from_json([[1.1, -2.3]], W, "BF16")
    expected = bits_of(torch.tensor([[1.1, -2.3]]).to(torch.bfloat16))
    assert isinstance(got, wire.Bits)
    np.testing.assert_array_equal(got.array, expected)


def test_an_empty_list_meets_any_shape_without_elements() -> None:
    assert wire.tensor_from_json([], W, "F32", (3, 0, 2)).shape == (3, 0, 2)
    assert wire.tensor_from_json([[], [], []], W, "F32", (3, 0, 2)).shape == (3, 0, 2)
    with pytest.raises(errors.Invalid, match=r"has shape \[2, 0\], expected \[3, 0, 2\]"):
        wire.tensor_from_json([[], []], W, "F32", (3, 0, 2))
    with pytest.raises(errors.Invalid, match=r"has shape \[0\], expected \[2\]"):
        wire.tensor_from_json([], W, "F32", (2,))


REFUSED = {
    "null": (None, None, None, f"{W} must be a number, got null"),
    "true": (True, None, None, f"{W} must be a number, got true"),
    "a string": ("1.0", None, None, f"{W} must be a number, got '1.0'"),
    "null inside": ([[1, None]], None, None, f"{W}[0, 1] must be a number, got null"),
    "true inside": ([1, True], None, None, f"{W}[1] must be a number, got true"),
    "a string inside": (["nan"], None, None, f"{W}[0] must be a number, got 'nan'"),
    "an object inside": ([{}], None, None, f"{W}[0] must be a number, got an object"),
    "ragged": ([[1], [2, 3]], None, None, f"{W} is ragged: at depth 1 not all are lists"),
    "list beside number": ([1, [2]], None, None, f"{W} is ragged: at depth 1 not all are lists"),
    "too deep": (json.loads("[" * 33 + "]" * 33), None, None, f"{W} has more than 32 dimensions"),
    "wrong shape": ([1, 2, 3], None, (2, 2), f"{W} has shape [3], expected [2, 2]"),
    "wrong shape, same size": ([1, 2], None, (2, 1), f"{W} has shape [2], expected [2, 1]"),
    "scalar for a vector": (1, None, (1,), f"{W} has shape [], expected [1]"),
    "too large": ([0, 1e39], None, None, f"{W}[1] is 1e+39, too large for float32"),
    "too large for bfloat16": (3.4e38, "BF16", None, f"{W} is 3.4e+38, too large for bfloat16"),
    "huge integer": ([10**400], "F64", None, f"{W} holds an integer too large for float64"),
    "float for an integer": ([1.0], "I64", None, f"{W}[0] must be an integer, got 1.0"),
    "bool for an integer": ([False], "I64", None, f"{W}[0] must be an integer, got false"),
    "beyond int64": ([2**63], "I64", None, f"{W} holds an integer outside int64"),
    "bool tensor as list": ([True], "BOOL", None, f"{W}: bool cannot be given as lists"),
    "unknown key": (b64([1.0], x=1), None, None, "exactly the keys dtype, shape and data, got"),
    "missing key": ({"dtype": "F32"}, None, None, "dtype, shape and data, got ['dtype']"),
    "unknown dtype": (b64([1.0], dtype="f4"), None, None, f"{W}.dtype must be one of float64"),
    "dtype a number": (b64([1.0], dtype=4), None, None, f"{W}.dtype must be a string, got 4"),
    "negative shape": (b64([1.0], shape=[-1]), None, None, f"{W}.shape must be a list of at most"),
    "bool shape": (b64([1.0], shape=[True]), None, None, f"{W}.shape must be a list of at most"),
    "deep shape": (b64([1.0], shape=[1] * 33), None, None, f"{W}.shape must be a list of at most"),
    "huge shape": (b64([1.0], shape=[2**62] * 2), None, None, f"{W}: shape [46116860184273879"),
    "short data": (
        b64([1.0, 2.0], shape=[3]),
        None,
        None,
        f"{W}: 16 bytes do not match shape [3] of F64 (24 bytes)",
    ),
    "not base64": (b64([1.0], data="A-_A"), None, None, f"{W}.data is not base64: "),
    "not ASCII": (b64([1.0], data="é"), None, None, f"{W}.data is not base64: "),
    "data a list": (b64([1.0], data=[1]), None, None, f"{W}.data must be a base64 string, got a"),
    "base64 of another shape": (b64([1.0, 2.0]), None, (1,), f"{W} has shape [2], expected [1]"),
}


@pytest.mark.parametrize("value, dtype, shape, sentence", REFUSED.values(), ids=REFUSED.keys())
def test_an_unusable_tensor_is_refused_by_name(
    value: Any, dtype: str | None, shape: tuple[int, ...] | None, sentence: str
) -> None:
    with pytest.raises(errors.Invalid) as caught:
        wire.tensor_from_json(value, W, dtype, shape)
    assert sentence in caught.value.detail
    assert len(caught.value.detail) < 400


@settings(deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    )
)
def test_lists_through_json_text_are_exact(a: Any) -> None:
    text = json.dumps(wire.tensor_to_json(a, "list"), allow_nan=False)
    back = wire.tensor_from_json(json.loads(text), W, wire.dtype_of(a), a.shape)
    assert isinstance(back, np.ndarray)
    np.testing.assert_array_equal(back, a)
    assert back.dtype == a.dtype


@pytest.mark.parametrize("encoding", ["list", "base64"])
def test_bfloat16_goes_through_json(encoding: Any) -> None:
    a = wire.Bits.bfloat16(np.array([[0.1, np.inf, -3e38]]))
    text = json.dumps(wire.tensor_to_json(a, encoding), allow_nan=False)
    back = wire.tensor_from_json(json.loads(text), W, "BF16")
    assert isinstance(back, wire.Bits)
    np.testing.assert_array_equal(back.array, a.array)


def test_base64_is_little_endian_whatever_the_array_is() -> None:
    got = wire.tensor_to_json(np.array([1.0], ">f4"), "base64")
    expected = base64.b64encode(b"\0\0\x80\x3f").decode()
    assert got == {"dtype": "float32", "shape": [1], "data": expected}


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["a", "A.b-c_9", "x" * 128, "..."])
def test_an_id_of_the_allowed_characters_is_taken(value: str) -> None:
    wire.check_id("session id", value)


@pytest.mark.parametrize("value", ["", "a b", "a/b", "é", "x" * 129, "a\n", None, 3, "x" * 10**6])
def test_an_id_of_other_characters_is_refused(value: Any) -> None:
    with pytest.raises(errors.Invalid, match=r"worker must match \[A-Za-z0-9._-\]\{1,128\}, got"):
        wire.check_id("worker", value)


@pytest.mark.parametrize("value", [".", ".."])
def test_an_id_that_is_a_step_in_a_path_is_refused(value: str) -> None:
    with pytest.raises(errors.Invalid, match="session id must not be"):
        wire.check_id("session id", value)


@pytest.mark.parametrize("name", ["w", "layer.0.weight", "schicht/größe", "é" * 128, " ", "grad/x"])
def test_a_parameter_name_may_be_any_text(name: str) -> None:
    wire.check_param_name(name)


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("", "parameter name '' is empty"),
        ("é" * 129, "has 258 bytes, the limit is 256"),
        ("a\tb", "parameter name 'a\\tb' holds the control character U+0009"),
        ("a\x85", "holds the control character U+0085"),
        ("\ud800", "is not UTF-8: it holds the lone surrogate U+D800"),
        ("__metadata__", "no parameter may be called '__metadata__'"),
        (7, "a parameter name must be a string, got 7"),
    ],
)
def test_an_unusable_parameter_name_is_refused(name: Any, sentence: str) -> None:
    with pytest.raises(errors.Invalid) as caught:
        wire.check_param_name(name)
    assert sentence in caught.value.detail
