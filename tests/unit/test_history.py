"""The check of histories finds what it is there for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.history import Operation, check_order, check_versions


def op(began: float, ended: float, version: int, applied: int | None = None, **more: Any) -> Any:
    fields = {"client": "a", "kind": "step", **more}
    return Operation(began=began, ended=ended, version=version, applied=applied, **fields)


def check(*history: Operation) -> None:
    check_versions(history)
    check_order(history)


def test_what_overlaps_may_come_in_any_order() -> None:
    check(op(0, 3, 2, 2), op(1, 2, 1, 1), op(0, 4, 0), op(2.5, 2.6, 1))


@pytest.mark.parametrize(
    ("history", "fault"),
    [
        ([op(0, 1, 1, 1), op(2, 3, 3, 3)], "gaps"),
        ([op(0, 1, 1, 1), op(0, 1, 1, 1)], "made 2 times"),
        ([op(0, 1, 2, 2), op(2, 3, 2, 1)], "version 2 was told before it began, it made 1"),
        ([op(0, 1, 1, 1), op(2, 3, 0)], "version 1 was told before it began, it was told 0"),
        ([op(0, 1, 1), op(2, 3, 1, 1)], "version 1 was told before it began, it made 1"),
        ([op(0, 1, 1, 1), op(0, 1, 2)], "nobody made version 2"),
    ],
)
def test_an_impossible_history_is_refused(history: list[Operation], fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        check(*history)


def test_a_round_is_made_by_exactly_those_that_it_names() -> None:
    both = {"company": ("a", "b"), "base": 0}
    check(op(0, 2, 1, 1, **both), op(1, 2, 1, 1, **both, client="b"))
    with pytest.raises(AssertionError, match="version 1 is of"):
        check(op(0, 2, 1, 1, **both))
    with pytest.raises(AssertionError, match="version 1 was told before it began"):
        check(op(0, 2, 1, 1, **both), op(1, 3, 1, 1, **both, client="b"), op(0, 0.5, 1))
