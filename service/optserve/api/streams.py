"""What goes through a connection: where a body goes, how slow it may be, of what a reply is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Protocol

from optserve_client.errors import BodyTimeout

#: Most that one read or write of the socket moves: what was read is still in the cache when it is
#: used.
READ_BYTES = 2**20


class Sink(Protocol):
    """Where a body goes."""

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take a copy of the next bytes."""

    def room(self) -> memoryview | None:
        """Return where the next bytes go; None: feed them."""

    def filled(self, nbytes: int) -> None:
        """Take the first bytes of :meth:`room`, which are there now."""

    def behind(self, tell: Callable[[], object]) -> bool:
        """Return whether no more should come for a while; then ``tell`` is called when it may, on
        any thread."""


class Part(Protocol):
    """Bytes of an answer that lie somewhere."""

    @property
    def nbytes(self) -> int: ...

    def use(self, at: int, fn: Callable[[memoryview], int]) -> int:
        """Return what ``fn`` makes of a piece of the bytes that begins at ``at``."""


class Pace:
    """How slow a body may be: no silence of ``silence_s``, and after that many seconds of waiting
    no average below ``rate`` bytes/s."""

    def __init__(self, silence_s: float, rate: int) -> None:
        self.silence_s = silence_s
        self._rate = rate

    def check(self, received: int, waited_s: float) -> None:
        """Raise BodyTimeout if so few bytes are too few by now."""
        if received < self._rate * (waited_s - self.silence_s):
            raise BodyTimeout(
                f"{received} bytes arrived in {waited_s:.0f} s; "
                f"the least rate is {self._rate} bytes/s"
            )

    def silent(self, received: int, length: int | None) -> BodyTimeout:
        """Return what is to be raised after a silence."""
        of = "a chunked body" if length is None else length
        return BodyTimeout(
            f"nothing arrived for {self.silence_s:g} s, after {received} bytes of {of}"
        )


class Whole:
    """A part that lies in one block."""

    __slots__ = ("_view", "nbytes")

    def __init__(self, block: bytes | memoryview) -> None:
        self._view = memoryview(block).cast("B")
        self.nbytes = self._view.nbytes

    def use(self, at: int, fn: Callable[[memoryview], int]) -> int:
        return fn(self._view[at : at + READ_BYTES])


def size_of(parts: Iterable[Part | bytes]) -> int:
    """Return how many bytes ``parts`` are together."""
    return sum([len(part) if isinstance(part, bytes) else part.nbytes for part in parts])


def pieces(part: Part) -> Iterator[bytes]:
    """Yield copies of ``part``, piece by piece."""
    copies: list[bytes] = []

    def copy(piece: memoryview) -> int:
        copies.append(bytes(piece))
        return len(piece)

    at = 0
    while at < part.nbytes:
        at += part.use(at, copy)
        yield copies.pop()


def tell_loop(loop: asyncio.AbstractEventLoop, tell: Callable[[], object]) -> None:
    """Have ``tell`` called on ``loop``, unless that has ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(tell)
