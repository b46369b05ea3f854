"""Turns: one job at a time per session, in order, over few threads."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from functools import partial
from typing import Any

import pytest

from optserve.sessions.turn import Executor, Turn, Waiting
from optserve_client.errors import Unavailable


@pytest.fixture
def executor() -> Iterator[Executor]:
    made = Executor(2)
    yield made
    made.close()


class Gate:
    """A job that blocks until it is opened."""

    def __init__(self, turn: Turn) -> None:
        self.entered, self._open = threading.Event(), threading.Event()
        self.future = turn.run(self._wait)
        assert self.entered.wait(5)

    def _wait(self) -> None:
        self.entered.set()
        assert self._open.wait(5)

    def open(self) -> None:
        self._open.set()
        self.future.result(5)


def test_a_result_comes_back_in_the_future(executor: Executor) -> None:
    assert executor.turn().run(lambda: 41 + 1).result(5) == 42


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_goes_to_the_future_and_the_turn_goes_on(
    executor: Executor, kind: type[BaseException]
) -> None:
    def fail() -> None:
        raise kind("no")

    turn = executor.turn()
    failed, after = turn.run(fail), turn.run(lambda: "on")
    with pytest.raises(kind, match="no"):
        failed.result(5)
    assert after.result(5) == "on"


def test_jobs_of_one_turn_keep_their_order_and_never_overlap(executor: Executor) -> None:
    order: list[int] = []
    inside = threading.Semaphore(1)

    def job(i: int) -> Callable[[], None]:
        def run() -> None:
            assert inside.acquire(blocking=False)
            time.sleep(0 if i % 7 else 0.001)
            order.append(i)
            inside.release()

        return run

    turn = executor.turn()
    for future in [turn.run(job(i)) for i in range(300)]:
        future.result(5)
    assert order == list(range(300))


def test_jobs_of_many_threads_never_overlap(executor: Executor) -> None:
    turn, count, futures = executor.turn(), [0], []

    def bump() -> None:
        seen = count[0]
        time.sleep(0)
        count[0] = seen + 1

    def push() -> None:
        futures.extend([turn.run(bump) for _ in range(100)])

    threads = [threading.Thread(target=push) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wait(futures, 5).not_done
    assert count == [800]


def test_two_turns_run_at_the_same_time(executor: Executor) -> None:
    meet = threading.Barrier(2)
    futures = [executor.turn().run(lambda: meet.wait(5)) for _ in range(2)]
    assert sorted(future.result(5) for future in futures) == [0, 1]


def test_waiting_jobs_hold_no_thread(executor: Executor) -> None:
    blocked = executor.turn()
    gate = Gate(blocked)
    waiting = [blocked.run(lambda: None) for _ in range(10)]
    assert executor.turn().run(lambda: "free").result(5) == "free"
    gate.open()
    assert not wait(waiting, 5).not_done


def test_a_busy_turn_lets_the_others_in_after_one_job() -> None:
    executor, order = Executor(1), []
    busy, other = executor.turn(), executor.turn()
    gate = Gate(busy)
    futures = [busy.run(lambda i=i: order.append(f"busy {i}")) for i in range(3)]  # type: ignore[misc]
    futures += [other.run(lambda i=i: order.append(f"other {i}")) for i in range(3)]  # type: ignore[misc]
    gate.open()
    assert not wait(futures, 5).not_done
    assert order == ["other 0", "busy 0", "other 1", "busy 1", "other 2", "busy 2"]
    executor.close()


def test_a_future_cancelled_before_its_start_is_skipped(executor: Executor) -> None:
    turn, ran = executor.turn(), []
    gate = Gate(turn)
    futures = [turn.run(lambda i=i: ran.append(i)) for i in range(5)]  # type: ignore[misc]
    assert futures[1].cancel()
    assert futures[4].cancel()
    gate.open()
    futures[3].result(5)
    assert turn.run(lambda: "after").result(5) == "after"
    assert ran == [0, 2, 3]
    with pytest.raises(CancelledError):
        futures[1].result(0)


def test_a_running_job_cannot_be_cancelled(executor: Executor) -> None:
    gate = Gate(executor.turn())
    assert not gate.future.cancel()
    gate.open()


def test_a_job_may_queue_another_one_of_its_own_turn(executor: Executor) -> None:
    turn = executor.turn()
    inner: Future[str] = turn.run(lambda: turn.run(lambda: "inner")).result(5)
    assert inner.result(5) == "inner"


def test_depth_and_busy_tell_what_is_going_on(executor: Executor) -> None:
    turn = executor.turn()
    assert (turn.busy, turn.depth) == (False, 0)
    gate = Gate(turn)
    last = [turn.run(lambda: None) for _ in range(3)][-1]
    assert (turn.busy, turn.depth) == (True, 3)
    seen: list[bool] = []
    last.add_done_callback(lambda _: seen.append(turn.busy))
    gate.open()
    last.result(5)
    assert turn.run(lambda: turn.busy).result(5) is True
    assert (turn.busy, turn.depth) == (False, 0)
    assert seen == [False]


def test_too_many_waiting_jobs_are_refused_with_both_numbers(executor: Executor) -> None:
    turn = executor.turn(limit=3)
    gate = Gate(turn)
    futures = [turn.run(lambda: None) for _ in range(3)]
    with pytest.raises(Unavailable) as refused:
        turn.run(lambda: None)
    assert refused.value.detail == "3 requests wait for this session, the limit is 3"
    assert refused.value.extra == {"retry_after": 1}
    gate.open()
    assert not wait(futures, 5).not_done
    assert turn.run(lambda: "again").result(5) == "again"


def test_each_thread_calls_the_initializer_once() -> None:
    called: list[str] = []
    executor = Executor(2, lambda: called.append(threading.current_thread().name))
    meet = threading.Barrier(2)
    for future in [executor.submit(lambda: meet.wait(5)) for _ in range(2)]:
        future.result(5)
    for _ in range(20):
        executor.submit(lambda: None).result(5)
    executor.close()
    assert len(called) == len(set(called)) == 2


def test_a_closed_executor_refuses_jobs() -> None:
    executor = Executor(1)
    turn = executor.turn()
    executor.close()
    for run in (turn.run, executor.submit):
        with pytest.raises(Unavailable) as refused:
            run(lambda: None)
        assert refused.value.extra == {"retry_after": 1}
    assert not turn.busy


def test_closing_ends_the_running_job_and_fails_those_that_wait() -> None:
    executor = Executor(1)
    turn = executor.turn()
    gate = Gate(turn)
    waiting, cancelled = turn.run(lambda: "never"), turn.run(lambda: "never")
    cancelled.cancel()
    closing = threading.Thread(target=executor.close)
    closing.start()
    while not executor._pool._shutdown:
        time.sleep(0.001)
    gate.open()
    closing.join(5)
    with pytest.raises(Unavailable, match="no more jobs are run"):
        waiting.result(5)
    assert cancelled.cancelled()
    assert not turn.busy


def test_a_number_of_threads_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="threads must be >= 1, got 0"):
        Executor(0)


def test_a_failed_job_keeps_nothing_alive(executor: Executor) -> None:
    class Tensor:
        pass

    def fail(tensor: Tensor) -> None:
        raise ValueError("no")

    turn, tensor = executor.turn(), Tensor()
    alive = weakref.ref(tensor)
    gc.disable()
    try:
        future = turn.run(lambda kept=tensor: fail(kept))  # type: ignore[misc]
        assert isinstance(future.exception(5), ValueError)
        del future, tensor
        deadline = time.monotonic() + 5
        while alive() is not None and time.monotonic() < deadline:
            turn.run(lambda: None).result(5)
        assert alive() is None
    finally:
        gc.enable()


# --- jobs that wait ------------------------------------------------------------------------------


def test_a_job_that_waits_holds_its_turn_and_no_thread(executor: Executor) -> None:
    waited: list[Future[int]] = [Future(), Future(), Future()]
    turns = [executor.turn() for _ in waited]

    def job(i: int) -> Waiting[int]:
        return (yield waited[i]) + 1

    begun = [turn.run(partial(job, i)) for i, turn in enumerate(turns)]
    after = turns[0].run(lambda: "after")
    assert executor.turn().run(lambda: "free").result(5) == "free"  # three wait, two threads
    assert turns[0].busy
    assert not after.done()
    for future in waited:
        future.set_result(41)
    assert [future.result(5) for future in begun] == [42, 42, 42]
    assert after.result(5) == "after"


def test_a_job_is_told_what_it_waited_for_failed_with(executor: Executor) -> None:
    waited: Future[int] = Future()

    def job() -> Waiting[str]:
        try:
            yield waited
        except OSError as exc:
            return f"caught {exc}"
        return "nothing"

    future = executor.turn().run(job)
    waited.set_exception(OSError("no"))
    assert future.result(5) == "caught no"


def test_a_job_does_not_wait_for_what_has_ended(executor: Executor) -> None:
    ended: Future[int] = Future()
    ended.set_result(1)
    threads: list[int] = []

    def job() -> Waiting[None]:
        for _ in range(3):
            threads.append(threading.get_ident())
            yield ended

    executor.turn().run(job).result(5)
    assert len(set(threads)) == 1


def test_a_job_that_fails_after_a_wait_fails_its_future_and_the_turn_goes_on(
    executor: Executor,
) -> None:
    waited: Future[None] = Future()

    def job() -> Waiting[None]:
        yield waited
        raise ValueError("no")

    turn = executor.turn()
    failed, after = turn.run(job), turn.run(lambda: "on")
    waited.set_result(None)
    with pytest.raises(ValueError, match="no"):
        failed.result(5)
    assert after.result(5) == "on"


def test_close_lets_a_waiting_job_end() -> None:
    executor, waited = Executor(1), Future[str]()
    entered = threading.Event()

    def job() -> Waiting[str]:
        entered.set()
        return (yield waited)

    turn = executor.turn()
    future = turn.run(job)
    assert entered.wait(5)
    closing = threading.Thread(target=executor.close)
    closing.start()
    waited.set_result("committed")
    assert future.result(5) == "committed"
    closing.join(5)
    assert not closing.is_alive()
    with pytest.raises(Unavailable):
        turn.run(lambda: None)


def test_run_if_idle_runs_here_or_not_at_all(executor: Executor) -> None:
    turn, ran = executor.turn(), []
    assert turn.run_if_idle(lambda: ran.append(threading.get_ident()))
    assert ran == [threading.get_ident()]
    gate = Gate(turn)
    assert not turn.run_if_idle(lambda: ran.append(0))
    gate.open()
    assert turn.run(lambda: "on").result(5) == "on"
    assert len(ran) == 1


def test_jobs_that_came_during_run_if_idle_run_after_it(executor: Executor) -> None:
    turn, order = executor.turn(), []

    def here() -> None:
        later = turn.run(lambda: order.append("later"))
        assert not later.done()
        order.append("here")

    with pytest.raises(KeyError):
        turn.run_if_idle(lambda: {}["no"])
    turn.run_if_idle(here)
    turn.run(lambda: None).result(5)
    assert order == ["here", "later"]


def test_a_job_that_waited_keeps_nothing_alive(executor: Executor) -> None:
    class Reply:
        pass

    waited: Future[None] = Future()

    def job() -> Waiting[Reply]:
        yield waited
        return Reply()

    gc.disable()
    try:
        future = executor.turn().run(job)
        waited.set_result(None)
        alive = weakref.ref(future.result(5))
        del future, job  # whoever ended ``waited`` may keep it
        deadline = time.monotonic() + 5
        while alive() is not None and time.monotonic() < deadline:
            executor.turn().run(lambda: None).result(5)
        assert alive() is None
    finally:
        gc.enable()


def here(turn: Turn, job: Callable[[], Waiting[object]], calls: list[Callable[[], object]]) -> Any:
    """Run ``job`` on this thread; what comes back to it later is appended to ``calls``."""
    return turn.run_here(job, calls.append)


def test_a_job_that_needs_not_wait_runs_here_at_once(executor: Executor) -> None:
    turn, calls = executor.turn(), list[Callable[[], object]]()

    def job() -> Waiting[int]:
        done: Future[int] = Future()
        done.set_result(7)
        assert (yield done) == 7
        return threading.get_ident()

    future = here(turn, job, calls)
    assert future.result(0) == threading.get_ident()
    assert not calls
    assert turn.run(lambda: "next").result(5) == "next"


def test_a_job_here_goes_on_where_it_is_called_back(executor: Executor) -> None:
    turn, calls = executor.turn(), list[Callable[[], object]]()
    waited: Future[str] = Future()

    def job() -> Waiting[tuple[str, int]]:
        return (yield waited), threading.get_ident()

    future = here(turn, job, calls)
    after = turn.run(lambda: "after")
    waited.set_result("committed")
    assert not future.done()
    assert not after.done()
    [go_on] = calls
    go_on()
    assert future.result(0) == ("committed", threading.get_ident())
    assert after.result(5) == "after"


def test_a_job_does_not_run_here_while_the_turn_is_taken(executor: Executor) -> None:
    turn = executor.turn()
    gate = Gate(turn)

    def never() -> Waiting[None]:
        raise AssertionError
        yield

    assert here(turn, never, []) is None
    gate.open()
    turn.run(lambda: None).result(5)


def test_a_job_that_fails_here_leaves_the_turn_free(executor: Executor) -> None:
    turn = executor.turn()

    def job() -> Waiting[None]:
        raise KeyError("no")
        yield

    assert isinstance(here(turn, job, []).exception(0), KeyError)
    assert turn.run(lambda: "on").result(5) == "on"


def test_a_job_is_ended_although_the_thread_it_came_from_is_gone(executor: Executor) -> None:
    turn = executor.turn()
    waited: Future[None] = Future()

    def job() -> Waiting[str]:
        yield waited
        return "ended"

    def gone(_: Callable[[], object]) -> None:
        raise RuntimeError("Event loop is closed")

    future = turn.run_here(job, gone)
    assert future is not None
    waited.set_result(None)
    assert future.result(5) == "ended"


def test_a_thread_that_runs_jobs_here_is_initialized_once() -> None:
    started: list[int] = []
    executor = Executor(1, lambda: started.append(threading.get_ident()))

    def job() -> Waiting[None]:
        return
        yield

    for _ in range(3):
        here(executor.turn(), job, [])
    assert started == [threading.get_ident()]
    executor.close()
