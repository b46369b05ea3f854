"""The error tree crosses the wire whole: class, sentence and members."""

from __future__ import annotations

import json
import re

import pytest

from optserve_client import errors

CLASSES = list(errors.tree())
ROOTS = {errors.OptserveError, errors.RequestError, errors.ServerError, errors.TransportError}
CROSSING = [
    cls for cls in CLASSES if cls not in ROOTS and not issubclass(cls, errors.TransportError)
]


def test_no_two_errors_share_a_code() -> None:
    codes = [cls.code for cls in CLASSES if cls not in ROOTS]
    assert len(codes) == len(set(codes))


def test_the_picture_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"── (\w+)(?: +(\d{3}) (\w+))?", errors.__doc__ or "")
    assert {name for name, _, _ in drawn} == {c.__name__ for c in CLASSES} - {"OptserveError"}
    for name, status, code in drawn:
        if status:
            cls = getattr(errors, name)
            assert (str(cls.status), cls.code) == (status, code)


@pytest.mark.parametrize("cls", CROSSING, ids=lambda cls: cls.__name__)
def test_an_error_comes_back_as_it_was_raised(cls: type[errors.OptserveError]) -> None:
    raised = cls("version is 3, expected 5", version=3, last_seq=7)
    document = json.loads(json.dumps(raised.problem()))
    back = errors.from_problem(cls.status, document)
    assert type(back) is cls
    assert (back.detail, back.extra) == (raised.detail, {"version": 3, "last_seq": 7})
    assert back.problem() == raised.problem()
    assert str(back) == "version is 3, expected 5"


@pytest.mark.parametrize("cls", CROSSING, ids=lambda cls: cls.__name__)
def test_without_a_sentence_the_first_line_of_the_docstring_is_it(
    cls: type[errors.OptserveError],
) -> None:
    first = (cls.__doc__ or "").strip().splitlines()[0]
    assert cls().detail == cls().problem()["title"] == first


@pytest.mark.parametrize("cls", CROSSING, ids=lambda cls: cls.__name__)
def test_a_refusal_has_a_status_below_500_and_a_failure_one_above(
    cls: type[errors.OptserveError],
) -> None:
    assert (cls.status < 500) == issubclass(cls, errors.RequestError)


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, errors.RequestError),
        (401, errors.RequestError),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (422, errors.Invalid),
        (429, errors.RequestError),
        (500, errors.ServerError),
        (502, errors.ServerError),
        (503, errors.Unavailable),
        (507, errors.OutOfSpace),
    ],
)
def test_an_unknown_code_becomes_an_error_of_its_status(
    status: int, kind: type[errors.OptserveError]
) -> None:
    back = errors.from_problem(status, {"code": "new_in_a_later_version", "detail": "why"})
    assert type(back) is kind
    assert back.detail == "why"
    assert errors.from_problem(status, {}).detail == f"HTTP {status}"
