"""A server that is about to stop: changes that have begun finish, no new one begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from optserve_client.errors import Unavailable

#: Methods that change nothing; they are answered to the end.
READING = frozenset({"GET", "HEAD", "OPTIONS"})


class Drain:
    """The changes under way. Used on the event loop only."""

    def __init__(self) -> None:
        #: The server stops.
        self.begun = False
        #: Requests that may change something and are not answered yet.
        self.open = 0

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
