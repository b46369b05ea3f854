"""Which sessions stay in memory, in bytes and order of use."""

from __future__ import annotations

import pytest

from optserve.sessions.residency import Residents
from optserve.store import Key
from optserve_client.errors import TooLarge, Unavailable


class Seats:
    """Sessions that are put away unless they are busy."""

    def __init__(self, budget: int | None) -> None:
        self.residents = Residents(budget)
        self.busy: set[str] = set()
        self.gone: list[str] = []

    def admit(self, name: str, nbytes: int) -> None:
        key = Key("default", name)

        def put_away() -> bool:
            if name in self.busy:
                return False
            self.gone.append(name)
            self.residents.release(key)
            return True

        self.residents.admit(key, nbytes, put_away)


def test_the_least_recently_used_make_room() -> None:
    seats = Seats(100)
    for name in "abcd":
        seats.admit(name, 25)
    seats.residents.used(Key("default", "a"))
    seats.admit("e", 50)
    assert seats.gone == ["b", "c"]
    assert seats.residents.total == 100


def test_a_busy_session_stays() -> None:
    seats = Seats(100)
    seats.admit("a", 50)
    seats.admit("b", 50)
    seats.busy = {"a"}
    seats.admit("c", 50)
    assert seats.gone == ["b"]


def test_where_all_are_busy_the_refusal_has_the_numbers_and_nothing_changes() -> None:
    seats = Seats(100)
    seats.admit("a", 60)
    seats.busy = {"a"}
    with pytest.raises(Unavailable) as caught:
        seats.admit("b", 50)
    assert caught.value.detail == (
        "session 'b' takes about 50 bytes of memory, "
        "60 of the server's memory budget of 100 are taken by sessions that are busy"
    )
    assert seats.residents.total == 60


def test_a_session_above_the_whole_budget_is_refused_with_both_numbers() -> None:
    seats = Seats(100)
    seats.admit("a", 60)
    with pytest.raises(TooLarge) as caught:
        seats.admit("b", 101)
    assert caught.value.detail == (
        "session 'b' takes about 101 bytes of memory, "
        "the server's memory budget is 100 (--memory-budget)"
    )
    assert seats.gone == []


def test_without_a_budget_nobody_goes() -> None:
    seats = Seats(None)
    for i in range(50):
        seats.admit(str(i), 2**40)
    assert seats.gone == []


def test_what_a_session_really_takes_counts() -> None:
    seats = Seats(100)
    seats.admit("a", 10)
    seats.residents.adjust(Key("default", "a"), 95)
    seats.residents.adjust(Key("default", "never"), 95)
    seats.admit("b", 10)
    assert seats.gone == ["a"]
    assert seats.residents.total == 10
