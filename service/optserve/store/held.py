"""A file in use: one descriptor at most, and an end that waits for the last user."""

from __future__ import annotations

import contextlib
import threading
import weakref
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import structlog

from optserve.store.disk import Disk

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Grip:
    """What the finalizer of a HeldFile needs to know."""

    fd: int | None = None
    doomed: bool = False


class HeldFile:
    """A payload file that something in this process refers to.

    The last reference closes it and, if it is doomed, unlinks it: who holds a payload can read it
    to its end without a descriptor of his own. That finalizer runs in any thread and inside of
    anything, so it takes no lock.
    """

    def __init__(self, disk: Disk, path: Path, born: int) -> None:
        self.path = path
        self.name = path.name
        #: How many syncs of the directory had ended before the file was made.
        self.born = born
        #: The sync: done, with what failed, or on its way; None: nobody asked.
        self.settled: Future[OSError | None] | None = None
        self._disk = disk
        self._users = 0
        # Reentrant: the garbage collector may end an abandoned reader in here.
        self._lock = threading.RLock()
        self._grip = _Grip()
        weakref.finalize(self, _let_go, disk, path, self._grip).atexit = False

    def create(self) -> None:
        """Make the file, doomed until :meth:`keep`; its descriptor is the first user's. Raises
        OSError."""
        self._grip.fd = self._disk.create(self.path)
        self._grip.doomed = True

    def hold(self) -> int:
        """Return a descriptor that is good until :meth:`release`, which is due even if this
        raises OSError."""
        with self._lock:
            self._users += 1
            if self._grip.fd is None:
                self._grip.fd = self._disk.open(self.path)
            return self._grip.fd

    def release(self) -> None:
        """Close the descriptor if nobody else holds it."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._grip.fd is not None:
                fd, self._grip.fd = self._grip.fd, None
                self._disk.close(fd)

    def keep(self) -> None:
        """Let the file outlive its holders."""
        self._grip.doomed = False

    def doom(self) -> None:
        """Let the file go with its last holder."""
        self._grip.doomed = True

    def outlive_name(self) -> None:
        """Keep the descriptor for all who hold the file, as nobody watches the name any more."""
        with contextlib.suppress(OSError):
            self.hold()
        if self._grip.doomed:
            self.keep()
            unlink(self._disk, self.path)


def _let_go(disk: Disk, path: Path, grip: _Grip) -> None:
    if grip.fd is not None:
        disk.close(grip.fd)
    if grip.doomed:
        unlink(disk, path)


def unlink(disk: Disk, path: Path) -> None:
    """Unlink ``path``; what fails is logged and left to the sweep of the next start."""
    try:
        disk.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as exc:
        log.warning("payload file not removed", name=path.name, error=str(exc))
