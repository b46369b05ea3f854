"""More sessions than memory, and sessions that nobody asks for any more."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from optserve.sessions.registry import Registry
from optserve.store import MemoryStore
from optserve_client.errors import SchedulerFailed, SessionNotFound, TooLarge, Unavailable
from tests import local
from tests.local import arrays, create, exported, step

SHAPES = {"w": (100, 10)}
ADAM = {"optimizer": "Adam"}


def registry(**limits: Any) -> Registry:
    return Registry(MemoryStore(), threads=torch.get_num_threads(), **limits)


@pytest.fixture
def one_session() -> int:
    """Bytes of one session of these tests in memory."""
    made = registry()
    session = create(made, ADAM, arrays(0, SHAPES))
    step(session, arrays(1, SHAPES))
    nbytes = made.residents.total
    made.close()
    return nbytes


def test_idle_sessions_make_room_and_come_back_bit_for_bit(one_session: int) -> None:
    made, roomy = registry(memory_budget=3 * one_session), registry()
    try:
        for i in range(8):
            create(made, ADAM, arrays(i, SHAPES), f"s{i}")
            create(roomy, ADAM, arrays(i, SHAPES), f"s{i}")
        for turn in range(3):
            for i in range(8):
                replies = [
                    step(r.get("default", f"s{i}"), arrays(100 * turn + i, SHAPES))
                    for r in (made, roomy)
                ]
                got, want = (local.params_of(reply)["w"] for reply in replies)
                assert bytes(got) == bytes(want)
                assert replies[0].scalars["version"] == turn + 1
                assert made.residents.total <= 3 * one_session
        assert roomy.residents.total == 8 * one_session
    finally:
        made.close()
        roomy.close()


def test_a_session_above_the_budget_is_refused_with_both_numbers(one_session: int) -> None:
    made = registry(memory_budget=one_session - 1)
    try:
        with pytest.raises(TooLarge) as caught:
            create(made, ADAM, arrays(0, SHAPES))
        assert caught.value.detail == (
            f"session 'a' takes about {one_session} bytes of memory, "
            f"the server's memory budget is {one_session - 1} (--memory-budget)"
        )
        with pytest.raises(SessionNotFound):
            made.get("default", "a")
        create(made, {"optimizer": "SGD"}, arrays(0, SHAPES))
    finally:
        made.close()


def test_a_busy_session_is_not_put_away(one_session: int) -> None:
    made = registry(memory_budget=one_session + one_session // 2)
    try:
        busy = create(made, ADAM, arrays(0, SHAPES))

        def meanwhile(state: Any) -> None:
            with pytest.raises(Unavailable, match="of the server's memory budget of"):
                create(made, ADAM, arrays(1, SHAPES), "b")

        busy.run(meanwhile).result(30)
        create(made, ADAM, arrays(1, SHAPES), "b")
        assert exported(busy)
    finally:
        made.close()


def test_a_change_that_makes_a_session_too_large_is_refused_before_it_is_made(
    one_session: int,
) -> None:
    made = registry(memory_budget=2 * one_session)
    try:
        session = create(made, ADAM, arrays(0, SHAPES))
        step(session, arrays(1, SHAPES))
        before = exported(session), made.residents.total
        with pytest.raises(TooLarge, match="memory budget"):
            local.add_group(session, {}, arrays(0, {"v": (200, 20)})).result(30)
        assert (exported(session), made.residents.total) == before
        local.add_group(session, {}, arrays(0, {"v": (10, 10)})).result(30)
        assert made.residents.total > before[1]
    finally:
        made.close()


def test_a_session_that_failed_takes_no_memory(one_session: int) -> None:
    made = registry(memory_budget=one_session)
    try:
        failing = {
            "optimizer": "Adam",
            "scheduler": {"name": "LambdaLR", "lr_lambda": "1 / (4 - epoch)", "advance": "step"},
        }
        session = create(made, failing, arrays(0, SHAPES))
        for i in range(3):
            step(session, arrays(i, SHAPES))
        with pytest.raises(SchedulerFailed):
            step(session, arrays(1, SHAPES))
        assert made.residents.total == 0
        create(made, ADAM, arrays(1, SHAPES), "b")
    finally:
        made.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def names(made: Registry) -> list[str]:
    return sorted(row["id"] for row in made.page("default")["sessions"])


def test_a_session_that_nobody_uses_goes_after_its_time_to_live() -> None:
    made = registry()
    try:
        create(made, {**ADAM, "ttl_s": 0.05}, arrays(0), "short")
        create(made, {**ADAM, "ttl_s": 1000}, arrays(0), "long")
        create(made, ADAM, arrays(0), "forever")
        until(lambda: names(made) == ["forever", "long"])
        assert {row.key.session for row in made.store.sessions()} == {"forever", "long"}
        with pytest.raises(SessionNotFound):
            made.get("default", "short")
        local.patch(made.get("default", "long"), {"ttl_s": 0.05}).result(10)
        until(lambda: names(made) == ["forever"])
    finally:
        made.close()


def test_the_servers_time_to_live_is_for_sessions_without_one() -> None:
    made = registry(session_ttl_s=0.05)
    try:
        create(made, {**ADAM, "ttl_s": 1000}, arrays(0), "own")
        create(made, ADAM, arrays(0), "none")
        until(lambda: names(made) == ["own"])
    finally:
        made.close()
