"""Payloads that outlive the process: each large one in a file of its own.

A file counts only as long as a committed row names it, so nothing is ever renamed, and the order
is all there is to it: bytes and directory entry are durable before the row commits, and the file
goes after the commit that dropped the row. What a crash leaves between the two, ``sweep`` removes.
"""

from __future__ import annotations

import errno
import secrets
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path

import structlog

from optserve.store.base import CHUNK_BYTES, Durability, Payload
from optserve.store.behind import Behind, Trail
from optserve.store.disk import DirectorySync, Disk, OsDisk
from optserve.store.held import HeldFile, unlink
from optserve.store.payloads import INLINE_BYTES, BufferedWriter, Spool, checked, checked_whole
from optserve_client.errors import Damaged, OptserveError, OutOfSpace, Unavailable

__all__ = ["INLINE_BYTES", "Disk", "FilePayload", "FileWriter", "OsDisk", "PayloadFiles"]

log = structlog.get_logger(__name__)

#: Files that are synced at the same time.
SYNC_THREADS = 4
#: One write takes at most so much: whoever follows can then begin.
WRITE_BYTES = 2**20
#: What a read fails with when bytes are gone.
DAMAGE = {errno.ENOENT, errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO)}


class PayloadFiles:
    """The directory of the payload files. Any thread may call any method.

    One process at a time uses a directory; the store sees to that.
    """

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        """Make ``directory`` if it is missing. Raises OSError."""
        self.directory = directory
        self.disk = disk or OsDisk()
        self.disk.make_directory(directory)
        self._entries = DirectorySync(self.disk, directory)
        self._pool = ThreadPoolExecutor(SYNC_THREADS, thread_name_prefix="payload-sync")
        self.behind = Behind(self.disk)
        self._lock = threading.Lock()
        #: Files that somebody in this process holds.
        self._held: weakref.WeakValueDictionary[str, HeldFile] = weakref.WeakValueDictionary()
        #: Names of files that were sealed without a sync.
        self._unsynced: set[str] = set()
        #: Those of them that cannot be synced any more.
        self._lost: dict[str, HeldFile] = {}
        self._spool: Spool | None = None
        self._closed = False
        # Tells the files of this object from all others: ``sweep`` leaves them alone.
        self._prefix = secrets.token_hex(12)
        self._numbers = count()

    def writer(
        self, size_hint: int | None, durability: Durability, read_soon: bool = False
    ) -> BufferedWriter:
        """Return a writer whose ``seal`` starts the sync if ``durability`` is ``always``.

        A payload of up to 64 KiB stays in memory, and one whose durability is ``memory`` gets no
        name in the directory. ``read_soon``: it stays in the system's cache.
        """
        self._check_open()
        if durability != "memory":
            return FileWriter(self, size_hint or 0, durability, read_soon)
        with self._lock:
            self._spool = self._spool or Spool()
        return self._spool.writer(size_hint)

    def create(self) -> HeldFile:
        """Return a new file that its writer holds. Raises OSError."""
        self._check_open()
        name = f"{self._prefix}{next(self._numbers):08x}"
        file = HeldFile(self.disk, self.directory / name, self._entries.ended)
        file.create()
        with self._lock:
            self._held[name] = file
        return file

    def sealed(self, file: HeldFile, durability: Durability) -> None:
        """Take over a file that its writer has finished. Raises Unavailable after close."""
        if durability == "always":
            self._settling(file)
        else:
            self._unsynced.add(file.name)
        file.keep()

    def open(self, name: str, nbytes: int, digest: bytes) -> FilePayload:
        """Return the payload that a row names.

        Raises Damaged if the file is missing or has another length; Unavailable if it cannot be
        read now. From here on the bytes stay as
        long as the payload is held, whatever is removed. One that was removed just before this
        call is missing: read the row again before you believe it.
        """
        self._check_open()
        with self._lock:
            if (file := self._held.get(name)) is None:
                file = self._held[name] = HeldFile(self.disk, self.directory / name, born=0)
        try:
            found = self.disk.size(file.path)
        except OSError as exc:
            raise unreadable(name, exc) from exc
        if found != nbytes:
            raise damaged(name, f"has {found} bytes, expected {nbytes}")
        return FilePayload(self, file, nbytes, digest)

    def settle(self, payload: Payload) -> None:
        """Return when the bytes and the name of ``payload`` are durable: now a row may name it.

        Raises OutOfSpace or Unavailable if the medium refuses, then and each time that it is asked
        again: what could not be written once counts as lost, whatever a second sync would say.
        """
        if not isinstance(payload, FilePayload):
            return
        if error := self._settling(payload.file).result():
            raise refused(error, f"cannot sync a payload of {payload.nbytes} bytes") from error
        self._unsynced.discard(payload.name)

    def flush(self, names: Collection[str] | None = None) -> None:
        """Return when the files that were sealed without a sync are durable too; of ``names``, or
        all of them.

        Raises OutOfSpace or Unavailable; then one of them is not, and will not be.
        """
        for name in tuple(self._unsynced if names is None else self._unsynced.intersection(names)):
            with self._lock:
                if (file := self._held.get(name)) is None:
                    file = self._held[name] = HeldFile(self.disk, self.directory / name, born=0)
            error = self._settling(file).result()
            # A missing one was discarded, or reading tells.
            if error is not None and error.errno != errno.ENOENT:
                self._lost[name] = file  # which knows it, also when all others let it go
                raise refused(error, "cannot sync the payloads") from error
            self._unsynced.discard(name)

    def _settling(self, file: HeldFile) -> Future[OSError | None]:
        """Start the sync of ``file``, if nobody has."""
        with self._lock:
            self._check_open()
            if file.settled is None:
                file.settled = self._pool.submit(self._sync, file)
            return file.settled

    def _sync(self, file: HeldFile) -> OSError | None:
        """Make the bytes and the entry of ``file`` durable; return what failed."""
        try:
            try:
                self.disk.datasync(file.hold())
            finally:
                file.release()
            self._entries.sync(file.born)
        except OSError as exc:
            log.warning("payload file not synced", name=file.name, error=str(exc))
            # The traceback would keep the file beyond its last user.
            return exc.with_traceback(None)
        return None

    def verify(self, payload: Payload) -> None:
        """Read ``payload`` from the medium to its end; raises Damaged."""
        if isinstance(payload, FilePayload):
            payload.forget()
        for _ in payload.chunks():
            pass

    def remove(self, names: Iterable[str]) -> None:
        """Unlink files, after the commit that dropped their rows.

        What somebody still holds goes with its last holder. What fails is logged, and swept at the
        next start.
        """
        for name in names:
            self._forget(name)
            if (file := self._held.get(name)) is not None:
                file.doom()
            else:
                unlink(self.disk, self.directory / name)

    def abandon(self, file: HeldFile) -> None:
        """Unlink a file that no row names, after its sync; does not wait for that."""
        self._forget(file.name)
        disk, path = self.disk, file.path
        if file.settled is None:
            unlink(disk, path)
        else:
            file.settled.add_done_callback(lambda _: unlink(disk, path))

    def _forget(self, name: str) -> None:
        self._unsynced.discard(name)
        self._lost.pop(name, None)

    def sweep(self, referenced: Callable[[str], bool]) -> list[str]:
        """Remove the files that no committed row names, and return their names.

        Those that this object made are left alone: their rows may commit meanwhile.
        """
        orphans = [
            name
            for name in self.disk.names(self.directory)
            if not (name.startswith(self._prefix) or referenced(name))
        ]
        for name in orphans:
            self._forget(name)
            if (file := self._held.get(name)) is not None:
                file.doom()
            else:
                unlink(self.disk, self.directory / name)
        return orphans

    def close(self) -> None:
        """Wait for running syncs. Payloads that somebody still holds stay readable."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._pool.shutdown()
        self.behind.close()
        if self._spool is not None:
            self._spool.close()
        for file in list(self._held.values()):
            file.outlive_name()

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the store is closed")


class FilePayload:
    """A payload in a file; see :class:`optserve.store.base.Payload`."""

    __slots__ = ("_files", "digest", "file", "nbytes")

    def __init__(self, files: PayloadFiles, file: HeldFile, nbytes: int, digest: bytes) -> None:
        self._files = files
        self.file = file
        self.nbytes = nbytes
        self.digest = digest

    @property
    def name(self) -> str:
        """What a row calls the file."""
        return self.file.name

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
        try:
            self._hold()
            yield from checked(self.pread, self.nbytes, self.digest, self._damaged, size)
        finally:
            self.file.release()

    def read(self) -> bytes:
        try:
            self._hold()
            return checked_whole(self.pread, self.nbytes, self.digest, self._damaged)
        finally:
            self.file.release()

    def forget(self) -> None:
        """Let the next reads come from the medium."""
        try:
            self._files.disk.forget(self._hold())
        finally:
            self.file.release()

    def discard(self) -> None:
        self._files.abandon(self.file)

    def _damaged(self, why: str) -> Damaged:
        return damaged(self.name, why)

    def _hold(self) -> int:
        """Return the descriptor; release is due even if this raises."""
        try:
            return self.file.hold()
        except OSError as exc:
            raise unreadable(self.name, exc) from exc

    def pread(self, nbytes: int, at: int) -> bytes:
        try:
            try:
                return self._files.disk.pread(self.file.hold(), nbytes, at)
            finally:
                self.file.release()
        except OSError as exc:
            raise unreadable(self.name, exc, f" at byte {at}") from exc


class FileWriter(BufferedWriter):
    """Writes a large payload to its file as the bytes arrive."""

    _file: HeldFile
    _fd: int
    _trail: Trail

    def __init__(
        self, files: PayloadFiles, size_hint: int, durability: Durability, read_soon: bool
    ) -> None:
        super().__init__(size_hint)
        self._files = files
        self._durability = durability
        self._read_soon = read_soon

    def _begin(self) -> None:
        try:
            self._file = self._files.create()
        except OSError as exc:
            raise refused(exc, "cannot make a payload file") from exc
        self._fd = self._file.hold()
        self._trail = self._files.behind.trail(self._file, keep=self._read_soon)

    def _put(self, piece: memoryview, at: int) -> None:
        disk = self._files.disk
        try:
            while piece:
                written = disk.write(self._fd, piece[:WRITE_BYTES])
                piece, at = piece[written:], at + written
                self._trail.written(at)
        except OSError as exc:
            raise refused(exc, f"cannot write a payload beyond {at} bytes") from exc

    def _finish(self) -> FilePayload:
        file = self._file
        try:
            self._files.sealed(file, self._durability)
            self._trail.ended(self.nbytes)
            return FilePayload(self._files, file, self.nbytes, self.digest())
        finally:
            self._drop()

    def _drop(self) -> None:
        """Let go; a file that was not kept goes."""
        self._file.release()
        del self._file, self._trail


def damaged(name: str, why: str) -> Damaged:
    """Return what a reader is told; ``file`` is the name for a program."""
    return Damaged(f"payload file {name} {why}", file=name)


def unreadable(name: str, error: OSError, where: str = "") -> OptserveError:
    """Return what a reader is told when the medium does not answer: with too many open files, or a
    folder that may not be entered, nothing is lost."""
    what = f"cannot be read{where}: {error.strerror}"
    if error.errno in DAMAGE:
        return damaged(name, what)
    return Unavailable(f"payload file {name} {what}")


def refused(error: OSError, what: str) -> OptserveError:
    """Return what a caller is told when the medium refuses."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (OutOfSpace if full else Unavailable)(f"{what}: {error.strerror}")
