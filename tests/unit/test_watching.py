"""Watching: whoever waits for a version is told once, on its own thread, and nobody is missed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from optserve.sessions.watching import UNBROKEN, Watching


class Loop:
    """Keeps what it is to call, as an event loop does."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []
        #: How often somebody else woke it.
        self.woken = 0

    def back(self, fn: Callable[[], object]) -> None:
        self.woken += not self.calls
        self.calls.append(fn)

    def turn(self) -> None:
        calls, self.calls = self.calls, []
        for fn in calls:
            fn()

    def run(self) -> None:
        while self.calls:
            self.turn()


def test_who_waits_is_told_by_that_version_or_a_later_one_and_once() -> None:
    watching, loop, told = Watching(), Loop(), list[str]()
    for name, version in (("two", 2), ("three", 3), ("two again", 2), ("nine", 9)):
        watching.add(version, lambda name=name: told.append(name), loop.back)
    watching.shown(1)
    assert not loop.calls
    watching.shown(3)
    watching.shown(4)
    loop.run()
    assert sorted(told) == ["three", "two", "two again"]
    assert watching
    watching.shown(20)
    loop.run()
    assert told[3:] == ["nine"]
    assert not watching


def test_one_version_wakes_a_loop_once_for_all_who_wait_there() -> None:
    watching, told = Watching(), list[int]()
    loops = [Loop(), Loop()]
    for i in range(3 * UNBROKEN):
        watching.add(1 + i % 3, lambda i=i: told.append(i), loops[i % 2].back)
    watching.shown(3)
    assert [len(loop.calls) for loop in loops] == [1, 1]
    for loop in loops:
        loop.run()
    assert sorted(told) == list(range(3 * UNBROKEN))


def test_what_else_a_loop_has_to_do_gets_a_look_in() -> None:
    watching, loop, told = Watching(), Loop(), list[int]()
    for i in range(3 * UNBROKEN):
        watching.add(1, lambda i=i: told.append(i), loop.back)
    watching.shown(1)
    loop.turn()
    assert len(told) == UNBROKEN
    loop.run()
    assert told == list(range(3 * UNBROKEN))


def test_who_left_is_not_told_and_nothing_of_it_is_left() -> None:
    watching, loop, told = Watching(), Loop(), list[int]()
    leave = [watching.add(v, lambda v=v: told.append(v), loop.back) for v in (1, 1, 2)]
    for end in leave[1:]:
        end()
        end()
    watching.shown(5)
    loop.run()
    assert told == [1]
    leave[0]()
    assert not watching


def test_the_end_tells_everybody() -> None:
    watching, loop, told = Watching(), Loop(), list[int]()
    watching.add(10**9, lambda: told.append(1), loop.back)
    watching.close()
    loop.run()
    assert told == [1]


def test_a_loop_that_has_ended_does_not_fail_the_commit() -> None:
    watching, loop, told = Watching(), Loop(), list[int]()

    def closed(fn: Callable[[], object]) -> None:
        raise RuntimeError("Event loop is closed")

    watching.add(1, lambda: told.append(0), closed)
    watching.add(1, lambda: told.append(1), loop.back)
    watching.shown(1)
    loop.run()
    assert told == [1]


def test_nobody_is_missed_who_comes_while_a_version_is_made() -> None:
    """Half of them look at a version that is not there yet, and are told by another thread."""
    watching, made, woken = Watching(), [0], queue.SimpleQueue[int]()
    rounds = 3000
    begin = threading.Barrier(2)

    def commit() -> None:
        for version in range(1, rounds + 1):
            begin.wait()
            made[0] = version
            watching.shown(version)

    committing = threading.Thread(target=commit)
    committing.start()
    for version in range(1, rounds + 1):
        begin.wait()
        leave = watching.add(version, lambda v=version: woken.put(v), lambda fn: fn())
        if made[0] < version:
            assert woken.get(timeout=10) == version
        leave()
    committing.join()
    assert not watching
