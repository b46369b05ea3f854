"""The seam to the file system: what payload files ask of it, and what it promises."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path
from typing import Protocol

import structlog

log = structlog.get_logger(__name__)


class Disk(Protocol):
    """Files by path, open ones by descriptor. Any thread may call; every failure is an OSError.

    Nothing survives a power loss but what :meth:`datasync` and :meth:`sync_directory` promise.
    """

    def make_directory(self, path: Path) -> None:
        """Make ``path`` and what is missing above it; return when its entry is durable."""

    def names(self, directory: Path) -> list[str]:
        """Return the names of all entries."""

    def create(self, path: Path) -> int:
        """Make a new, empty file; return a descriptor to write and read it."""

    def open(self, path: Path) -> int:
        """Return a descriptor to read the file; it stays good when the file is unlinked."""

    def size(self, path: Path) -> int:
        """Return the length of the file in bytes."""

    def write(self, fd: int, piece: memoryview) -> int:
        """Write some of ``piece`` at the end; return how many bytes."""

    def write_back(self, fd: int, begin: int, nbytes: int) -> None:
        """Start to move these bytes to the medium, which promises nothing; waits only if that has
        too much to do already."""

    def pread(self, fd: int, nbytes: int, at: int) -> bytes:
        """Return up to ``nbytes`` bytes from offset ``at``; none at the end of the file."""

    def forget(self, fd: int, end: int = 0) -> None:
        """Let the next reads up to ``end`` (0: all) come from the medium, as far as it has the
        bytes; their memory is free then."""

    def datasync(self, fd: int) -> None:
        """Return when the bytes and the length of the file are durable; not its name."""

    def sync_directory(self, path: Path) -> None:
        """Return when all names that were made or unlinked in ``path`` before are durable."""

    def unlink(self, path: Path) -> None:
        """Take the name away."""

    def close(self, fd: int) -> None:
        """Give the descriptor back."""


class OsDisk:
    """The disk of this machine."""

    def __init__(self) -> None:
        #: Linux only; elsewhere the sync simply has more to write.
        self._sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
        if self._sync_file_range is not None:
            offset = ctypes.c_int64
            self._sync_file_range.argtypes = [ctypes.c_int, offset, offset, ctypes.c_uint]

    def make_directory(self, path: Path) -> None:
        missing = [path]  # and always the last one: whoever made it may have died before its sync
        while not missing[-1].parent.exists():
            missing.append(missing[-1].parent)
        for directory in reversed(missing):
            directory.mkdir(mode=0o700, exist_ok=True)
            self.sync_directory(directory.parent)

    def names(self, directory: Path) -> list[str]:
        return os.listdir(directory)

    def create(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)

    def open(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY)

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def write(self, fd: int, piece: memoryview) -> int:
        return os.write(fd, piece)

    def write_back(self, fd: int, begin: int, nbytes: int) -> None:
        if self._sync_file_range is not None:
            # SYNC_FILE_RANGE_WRITE. An error is not lost: it is the next datasync's too.
            self._sync_file_range(fd, begin, nbytes, 2)

    def pread(self, fd: int, nbytes: int, at: int) -> bytes:
        return os.pread(fd, nbytes, at)

    def forget(self, fd: int, end: int = 0) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, end, os.POSIX_FADV_DONTNEED)

    def datasync(self, fd: int) -> None:
        getattr(os, "fdatasync", os.fsync)(fd)

    def sync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def close(self, fd: int) -> None:
        os.close(fd)


class DirectorySync:
    """Syncs of one directory. One serves all who asked before it began."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._path = path
        self._turn = threading.Condition()
        self._running = False
        #: Syncs are numbered from 1. The latest that began, that ended, that failed.
        self._begun = self._ended = self._failed = 0

    @property
    def ended(self) -> int:
        """How many have ended: what :meth:`sync` wants to know of an entry, from before it was
        made."""
        return self._ended

    def sync(self, born: int) -> None:
        """Return when every entry that is there now is durable.

        Raises OSError if that fails, or a sync has failed since ``born``: it may have lost the
        entry, and a later one would not know.
        """
        with self._turn:
            # One that runs already may have passed the entry by.
            wanted = self._begun + 1
            while self._ended < wanted:
                if self._running:
                    self._turn.wait()
                else:
                    self._run()
            if self._failed > born:
                raise OSError(errno.EIO, "a sync of the directory failed")

    def _run(self) -> None:
        """Run one; others wait, and ask, meanwhile."""
        self._begun += 1
        self._running = True
        self._turn.release()
        done = False
        try:
            self._disk.sync_directory(self._path)
            done = True
        except OSError as exc:
            log.warning("directory of the payload files not synced", error=str(exc))
        finally:
            self._turn.acquire()
            self._running = False
            self._ended = self._begun
            if not done:
                self._failed = self._begun
            self._turn.notify_all()
