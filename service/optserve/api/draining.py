"""A server that is about to stop: changes that have begun finish, no new one begins."""

from __future__ import annotations

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

    def begin(self, method: str) -> int:
        """Count a request in, and return what :meth:`end` is to count out: 1 if it may change
        something. Raises Unavailable for a new change once the stop has begun."""
        if method in READING:
            return 0
        if self.begun:
            raise Unavailable("the server is stopping and takes no new changes", retry_after=1)
        self.open += 1
        return 1

    def end(self, counted: int) -> None:
        self.open -= counted
