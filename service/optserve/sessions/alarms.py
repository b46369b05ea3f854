"""Something is to be done at a time: one thread for all sessions."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from itertools import count

import structlog

log = structlog.get_logger(__name__)


class Alarms:
    """Calls short functions, each once, not before its time. The thread begins with the first."""

    #: What time it is, Unix seconds, for whoever sets alarms.
    now = staticmethod(time.time)

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._order = count()
        self._thread: threading.Thread | None = None
        self._closed = False

    def after(self, seconds: float, fn: Callable[[], object]) -> None:
        """Have ``fn`` called in so many seconds, unless :meth:`close` comes first."""
        with self._changed:
            if self._closed:
                return
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._order), fn))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="optserve-alarms", daemon=True
                )
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Call nothing any more; return when nothing is being called."""
        with self._changed:
            self._closed = True
            self._due.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while (fn := self._next()) is not None:
            try:
                fn()
            except Exception:
                log.exception("what was due failed")
            del fn  # it may hold a session

    def _next(self) -> Callable[[], object] | None:
        with self._changed:
            while not self._closed:
                if not self._due:
                    self._changed.wait()
                elif (left_s := self._due[0][0] - time.monotonic()) > 0:
                    self._changed.wait(left_s)
                else:
                    return heapq.heappop(self._due)[2]
            return None
