"""Live params, lent to replies: nobody copies them unless they change while somebody reads.

A copy of the params costs as much as sending them. The caller of a step has its reply before it
sends the next gradient, as a rule: then the live memory itself can be what is sent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from optserve.optim import rounding
from optserve_client import wire

#: What is copied, or shown to a reader, in one go: others wait for no longer than that takes.
PIECE_BYTES = 2**20

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Loan:
    """Bytes at one version. They lie in live memory until :meth:`settle`, in a copy afterwards."""

    def __init__(self, live: Bytes) -> None:
        self.nbytes = live.nbytes
        #: None: it may have changed.
        self._live: Bytes | None = live
        self._copy: Bytes | None = None
        self._copied = 0
        self._lock = threading.Lock()
        self._settling = threading.Lock()

    @classmethod
    def of_copy(cls, data: Bytes) -> Loan:
        """Return a loan of bytes that nobody changes."""
        data.flags.writeable = False
        loan = cls(data)
        loan._live, loan._copy, loan._copied = None, data, data.nbytes
        return loan

    def use(self, at: int, fn: Callable[[memoryview], int]) -> int:
        """Return what ``fn`` returns for the bytes from ``at`` on: for a piece of them, of
        ``PIECE_BYTES`` at most, which nobody changes before ``fn`` returns, nor may ``fn``."""
        with self._lock:
            source, end = self._live, min(at + PIECE_BYTES, self.nbytes)
            if at < self._copied:
                source, end = self._copy, min(end, self._copied)
            assert source is not None
            return fn(source[at:end].data)

    def converted(self, have: str, want: str) -> Bytes:
        """Return a copy in another wire dtype, made in one go: nobody may change the live memory
        meanwhile."""
        source = self._live  # which a reader may settle just now
        if source is None:
            source = self._copy
        assert source is not None
        return rounding.converted(source.data, have, want)

    def settle(self) -> Bytes:
        """Return a read-only copy; from now on the live memory may change."""
        with self._settling:
            if self._live is not None:
                self._copy_live(self._live)
            assert self._copy is not None
            return self._copy

    def _copy_live(self, live: Bytes) -> None:
        copy = self._copy = np.empty(self.nbytes, np.uint8)
        for at in range(0, self.nbytes, PIECE_BYTES):
            copy[at : at + PIECE_BYTES] = live[at : at + PIECE_BYTES]
            with self._lock:
                self._copied = min(at + PIECE_BYTES, self.nbytes)
        copy.flags.writeable = False
        with self._lock:
            self._live = None


class Rounded:
    """A loan as seen in another dtype: converted piece by piece, as somebody wants it."""

    def __init__(self, loan: Loan, have: str, want: str) -> None:
        """``have`` and ``want`` are wire tags of floating-point dtypes."""
        self._loan = loan
        self._have, self._want = have, want
        self._sizes = wire.itemsize(have), wire.itemsize(want)
        self.nbytes = loan.nbytes // self._sizes[0] * self._sizes[1]
        #: The piece at ``_at``.
        self._at, self._piece = 0, memoryview(b"")

    def use(self, at: int, fn: Callable[[memoryview], int]) -> int:
        """As :meth:`Loan.use`; for one caller, who goes from the beginning to the end."""
        if at >= self._at + len(self._piece):
            have, want = self._sizes
            self._loan.use(at // want * have, self._convert)
            self._at = at
        return fn(self._piece[at - self._at :])

    def _convert(self, source: memoryview) -> int:
        self._piece = rounding.converted(source, self._have, self._want).data
        return len(source)
