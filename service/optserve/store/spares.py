"""Payload files that no row names any more, kept to be written over.

What is written over has its place on the medium and, for the most part, its pages in memory: the
payload of a large step costs a half to a tenth of what it costs in a new file.
"""

from __future__ import annotations

import threading

#: Smaller files are not worth it.
LEAST_BYTES = 8 * 2**20
#: All of them together.
MOST_BYTES = 2 * 2**30


class Spares:
    """Names of files, by length. Any thread may call."""

    def __init__(self, least_bytes: int = LEAST_BYTES) -> None:
        self._least = least_bytes
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}

    def put(self, name: str, nbytes: int) -> bool:
        """Keep a file; False: it is not wanted."""
        with self._lock:
            if nbytes < max(self._least, 1) or sum(self._files.values()) + nbytes > MOST_BYTES:
                return False
            self._files[name] = nbytes
            return True

    def take(self, nbytes: int) -> str | None:
        """Return a file of exactly so many bytes, as the steps of a session are; it is the
        caller's then."""
        with self._lock:
            fitting = (n for n, length in self._files.items() if length == nbytes)
            if (name := next(fitting, None)) is not None:
                del self._files[name]
            return name

    def clear(self) -> list[str]:
        """Return all of them; they are the caller's then."""
        with self._lock:
            names, self._files = list(self._files), {}
            return names

    def __contains__(self, name: str) -> bool:
        return name in self._files
