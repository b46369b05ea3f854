"""Who waits for a version of a session. No thread does, and nobody polls."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from optserve.sessions.turn import Back

#: Called once, without a result.
Tell = Callable[[], object]

#: So many are told in one go; what else that thread has to do gets a look in then.
UNBROKEN = 64


class Watching:
    """Those that wait for a version of one session. Any thread may call anything.

    Whoever makes a version visible calls :meth:`shown` afterwards: that is one comparison where
    nobody waits for it. Whoever waits looks at the version after :meth:`add`: so one of the two
    sees the other, without a lock.
    """

    __slots__ = ("_first", "_lock", "_waiting", "left_at")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: By version: whom to tell, and on which thread.
        self._waiting: dict[float, dict[object, tuple[Tell, Back]]] = {}
        #: Nobody waits for a version below this one.
        self._first = math.inf
        #: When somebody last stopped waiting, on the monotonic clock.
        self.left_at = -math.inf

    def __len__(self) -> int:
        """How many wait."""
        with self._lock:
            return sum(map(len, self._waiting.values()))

    def add(self, version: int, tell: Tell, back: Back) -> Callable[[], None]:
        """Have ``tell`` called once, where ``back`` leads, when this version or a later one is
        shown, or none will be any more. Return what ends the waiting, to be called in any case."""
        key = object()
        with self._lock:
            self._waiting.setdefault(version, {})[key] = (tell, back)
            self._first = min(self._first, version)
        return partial(self._remove, version, key)

    def _remove(self, version: int, key: object) -> None:
        self.left_at = time.monotonic()
        with self._lock:
            waiting = self._waiting.get(version)
            if waiting is not None and waiting.pop(key, None) is not None and not waiting:
                del self._waiting[version]

    def shown(self, version: float) -> None:
        """Tell all who wait for this version or an earlier one."""
        if version < self._first:
            return
        told: dict[Back, list[Tell]] = {}
        with self._lock:
            for due in [known for known in self._waiting if known <= version]:
                for tell, back in self._waiting.pop(due).values():
                    told.setdefault(back, []).append(tell)
            self._first = min(self._waiting, default=math.inf)
        for back, tells in told.items():
            _tell(tells, back)

    def close(self) -> None:
        """Tell everybody: there will be no more versions."""
        self.shown(math.inf)


def _tell(tells: Sequence[Tell], back: Back, at: int = 0) -> None:
    """Call ``tells`` from ``at`` on where ``back`` leads, which is woken once for all of them."""

    def some() -> None:
        for tell in tells[at : at + UNBROKEN]:
            tell()
        if at + UNBROKEN < len(tells):
            _tell(tells, back, at + UNBROKEN)

    with suppress(RuntimeError):  # that thread has ended, and whoever waited there with it
        back(some)
