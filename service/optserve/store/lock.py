"""One server per data directory."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


class Locked(Exception):
    """Somebody else has the lock."""

    def __init__(self, pid: int | None) -> None:
        super().__init__(f"locked by process {pid}")
        #: Who, if that is known.
        self.pid = pid


class DirectoryLock:
    """``<directory>/lock``, locked until :meth:`release` or the end of the process.

    The file stays: unlinking it would let two servers lock two files of the same name.
    """

    def __init__(self, directory: Path) -> None:
        """Raises Locked, and OSError where the file cannot be made."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._fd: int | None = os.open(directory / "lock", flags, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _pid(os.pread(self._fd, 32, 0))
            self.release()
            raise Locked(pid) from None
        except BaseException:
            self.release()
            raise
        with suppress(OSError):  # a full disk must not keep a server from starting
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _pid(said: bytes) -> int | None:
    text = said.strip()
    return int(text) if text.isdigit() else None
