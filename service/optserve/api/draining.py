"""A server that is about to stop: changes that have begun finish, no new one begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from optserve_client.errors import Unavailable

#: Methods that change nothing; they are answered to the end.
READING = frozenset({"GET", "HEAD", "OPTIONS"})


class Drain:
    """The changes under way, and who waits. Used on the event loop only."""

    def __init__(self) -> None:
        #: The server stops.
        self.begun = False
        #: Requests that may change something and are not answered yet.
        self.open = 0
        self._waiting: set[Callable[[], object]] = set()

    @property
    def busy(self) -> bool:
        """Whether anything is under way that a stop waits for."""
        return self.open > 0 or bool(self._waiting)

    def begin(self) -> None:
        """The server stops: whoever waits is told, and answers."""
        self.begun = True
        for tell in tuple(self._waiting):
            tell()

    def when_begun(self, tell: Callable[[], object]) -> Callable[[], None]:
        """Have ``tell`` called when the server begins to stop; return what takes that back."""
        self._waiting.add(tell)
        return partial(self._waiting.discard, tell)

    @contextmanager
    def change(self, method: str) -> Iterator[None]:
        """Count a request while it runs; raises Unavailable for a new change once begun."""
        if method in READING:
            yield
            return
        if self.begun:
            raise Unavailable("the server is stopping and takes no new changes", retry_after=1)
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1
