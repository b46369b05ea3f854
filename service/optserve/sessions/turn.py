"""Who runs when: each session has a Turn, all turns share a few threads.

Few threads, because torch's OpenMP keeps one pool of workers per thread that calls it, and because
``torch.set_num_threads`` holds only for the thread that called it: each of ours calls it first. So
no step waits for a disk on them: a job that must wait is a generator, which yields a future and
goes on with its result, on any thread, while its turn stays taken. (Creating, pinning and reading
back do wait here: they are rare.)
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeAlias, TypeVar, overload

from optserve_client.errors import OptserveError, Unavailable

A = TypeVar("A")
T = TypeVar("T")

#: A job that waits: yields futures, is sent their results, returns its own.
Waiting: TypeAlias = Generator[Future[Any], Any, T]

#: Has a function called on another thread, soon: ``loop.call_soon_threadsafe``. Raises RuntimeError
#: if that thread has ended.
Back: TypeAlias = Callable[[Callable[[], object]], object]

#: Jobs that may wait for one turn; more than that is a caller that does not wait for answers.
QUEUE_LIMIT = 1_000
RETRY_AFTER_S = 1
#: How long :meth:`Executor.close` lets jobs finish what they wait for.
CLOSE_S = 30.0


class Executor:
    """A fixed number of threads, each of which calls ``initializer`` first."""

    def __init__(self, threads: int, initializer: Callable[[], object] | None = None) -> None:
        if threads < 1:
            raise ValueError(f"threads must be >= 1, got {threads}")
        self._pool = ThreadPoolExecutor(threads, "optserve", initializer)
        self._threads = threads
        self._initializer = initializer
        #: Threads of others that run jobs: see :meth:`Turn.run_here`.
        self._adopted: set[int] = set()
        self._idle = threading.Condition()
        self._waiting = 0
        #: Jobs that run or wait for a thread.
        self._jobs = 0
        self._closed = False

    def turn(self, limit: int = QUEUE_LIMIT) -> Turn:
        """Return a new turn over these threads."""
        return Turn(self, limit)

    def submit(self, fn: Callable[[], T]) -> Future[T]:
        """Run ``fn`` in no particular order, as soon as a thread is free."""
        try:
            if self._closed:
                raise RuntimeError("the executor is closed")
            return self._submit(fn)
        except RuntimeError as exc:  # shut down, or the initializer failed
            raise Unavailable(f"no more jobs are run: {exc}", retry_after=RETRY_AFTER_S) from exc

    def _submit(self, fn: Callable[[], T]) -> Future[T]:
        future = self._pool.submit(fn)
        with self._idle:
            self._jobs += 1
        future.add_done_callback(self._done)
        return future

    def _done(self, _: Future[Any]) -> None:
        with self._idle:
            self._jobs -= 1

    @property
    def spare(self) -> bool:
        """Whether a thread is free, so that the job that asks may as well wait on its own."""
        return self._jobs < self._threads

    def adopt_thread(self) -> None:
        """Call the initializer on this thread, once."""
        if threading.get_ident() not in self._adopted:
            if self._initializer is not None:
                self._initializer()
            self._adopted.add(threading.get_ident())

    def after(
        self, waited: Future[A], fn: Callable[[Future[A]], object], back: Back | None = None
    ) -> None:
        """Run ``fn(waited)`` when ``waited`` has ended; also after :meth:`close` began.

        With ``back``, on the thread that that leads to.
        """
        # Whoever keeps ``waited``, or a cycle, must not keep a job and its reply with it.
        once = [fn]
        with self._idle:
            self._waiting += 1

        def go_on(ended: Future[A]) -> None:
            go = once.pop()
            try:
                (back or self._submit)(partial(go, ended))
            except RuntimeError:  # shut down meanwhile: what was begun is still finished
                go(ended)
            finally:
                with self._idle:
                    self._waiting -= 1
                    self._idle.notify_all()

        waited.add_done_callback(go_on)

    def close(self) -> None:
        """Wait for begun jobs; those that still wait for their turn fail with Unavailable."""
        self._closed = True
        with self._idle:
            self._idle.wait_for(lambda: not self._waiting, CLOSE_S)
        self._pool.shutdown(wait=True)


class Turn:
    """Runs jobs one at a time, in the order of :meth:`run`, on any thread of the executor.

    No thread waits for a turn: a job is given to the executor when the one before has ended, behind
    whatever the other turns have there, so that a busy session delays another by one job per
    thread at most. A job must not wait for a later job of its own turn.
    """

    def __init__(self, executor: Executor, limit: int = QUEUE_LIMIT) -> None:
        self._executor = executor
        self._limit = limit
        self._lock = threading.Lock()
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        #: The executor has, or is about to get, this turn's next job.
        self._scheduled = False
        self._running = False

    @property
    def depth(self) -> int:
        """Jobs that wait."""
        return len(self._jobs)

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits; false when the last future's callbacks are called."""
        return self._running or bool(self._jobs)

    @overload
    def run(self, fn: Callable[[], Waiting[T]]) -> Future[T]: ...

    @overload
    def run(self, fn: Callable[[], T]) -> Future[T]: ...

    def run(self, fn: Callable[[], Any]) -> Future[Any]:
        """Run ``fn`` after all jobs before it; its result or exception goes to the future.

        If ``fn`` returns a generator, that is the job. A future that is cancelled before its job
        starts is skipped. Raises Unavailable when too many jobs wait or the executor is closed.
        """
        future: Future[Any] = Future()
        with self._lock:
            if len(self._jobs) >= self._limit:
                raise Unavailable(
                    f"{len(self._jobs)} requests wait for this session, the limit is {self._limit}",
                    retry_after=RETRY_AFTER_S,
                )
            self._jobs.append((future, fn))
            if self._scheduled:
                return future
            self._scheduled = True
            try:
                self._executor.submit(self._run_one)
            except Unavailable:
                self._jobs.clear()
                self._scheduled = False
                raise
        return future

    def run_here(self, fn: Callable[[], Waiting[T]], back: Back) -> Future[T] | None:
        """Run a job that waits on this thread, now; None: the turn is taken.

        It must be short. After a wait it goes on where ``back`` leads, which is to be this thread.
        """
        with self._lock:
            if self._scheduled:
                return None
            self._scheduled = self._running = True
        self._executor.adopt_thread()
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        self._advance(future, fn(), None, back)
        return future

    def run_if_idle(self, fn: Callable[[], object]) -> bool:
        """Run ``fn`` here and now if no job runs or waits; return whether it ran."""
        with self._lock:
            if self._scheduled:
                return False
            self._scheduled = self._running = True
        try:
            fn()
        finally:
            self._running = False
            self._go_on()
        return True

    def _run_one(self) -> None:
        """Run the next job that nobody cancelled, if there is one."""
        while True:
            with self._lock:
                if not self._jobs:
                    self._scheduled = False
                    return
                self._running = True  # first, so that busy never flickers
                future, fn = self._jobs.popleft()
            if future.set_running_or_notify_cancel():
                break
            self._running = False
        try:
            result = fn()
        except BaseException as exc:  # a worker thread has nobody else to tell
            self._end(future, exc)
            # exc -> its traceback -> this frame -> future -> exc would keep fn's tensors until a gc
            del future, fn
        else:
            if isinstance(result, Generator):
                del fn
                self._advance(future, result, None)
            else:
                self._end(future, None, result)

    def _advance(
        self,
        future: Future[Any],
        job: Waiting[Any],
        waited: Future[Any] | None,
        back: Back | None = None,
    ) -> None:
        """Run a job that waits up to its next wait, or to its end."""
        error: BaseException | None
        while True:
            try:
                if waited is None:
                    waited = next(job)
                elif (error := waited.exception()) is not None:
                    waited = job.throw(error)
                else:
                    waited = job.send(waited.result())
            except StopIteration as stop:
                self._end(future, None, stop.value)
                return
            except BaseException as exc:
                error = None
                self._end(future, exc)
                del future, job
                return
            if not waited.done():
                break
        self._executor.after(waited, partial(self._advance, future, job, back=back), back)

    def _end(self, future: Future[Any], exc: BaseException | None, result: Any = None) -> None:
        self._running = False
        if exc is not None:
            if isinstance(exc, OptserveError) and exc.status != 500:  # those are logged with theirs
                forget_frames(exc)
            future.set_exception(exc)
        else:
            future.set_result(result)
        self._go_on()

    def _go_on(self) -> None:
        """Give the next job to the executor, if there is one."""
        with self._lock:
            if not self._jobs:
                self._scheduled = False
                return
            try:
                self._executor.submit(self._run_one)
                return
            except Unavailable as exc:
                error, stranded = exc, list(self._jobs)
                self._jobs.clear()
                self._scheduled = False
        for future, _ in stranded:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


def forget_frames(exc: BaseException) -> None:
    """Drop what the frames held that ``exc`` passed through, a whole body perhaps: futures among
    them hold ``exc``, so they would stay until a garbage collection, which is rare in a server."""
    waiting: list[BaseException | None] = [exc]
    while waiting:
        found = waiting.pop()
        if found is not None and found.__traceback__ is not None:
            found.__traceback__ = None
            waiting += [found.__cause__, found.__context__]


def chain(first: Future[A], then: Callable[[A], Future[T]]) -> Future[T]:
    """Return a future of what ``then`` makes of the result of ``first``; no thread waits."""
    last: Future[T] = Future()

    def follow(done: Future[A]) -> None:
        try:
            then(done.result()).add_done_callback(hand_over)
        except BaseException as exc:  # a callback has nobody else to tell
            last.set_exception(exc)

    def hand_over(done: Future[T]) -> None:
        if (exc := done.exception()) is not None:
            last.set_exception(exc)
        else:
            last.set_result(done.result())

    last.set_running_or_notify_cancel()
    first.add_done_callback(follow)
    return last
