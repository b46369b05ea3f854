"""A disk in memory that keeps of a power loss as little as it may.

What was written and not synced may be there or not, block by block and in any order; a name that
was made or unlinked and not synced may be there or not, each on its own; a sync of a file's bytes
does nothing for its name and the other way round; and a sync that failed has dropped what it should
have written, though reading still shows it, and the next one succeeds without it.

:class:`LossyDisk` notes every operation in a :class:`Log`. A :class:`Medium` takes them one after
the other, up to any point, and then says what may be found there.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 4096
#: What happens instead of the operation: an error number, or a write of other bytes.
Fault = int | str
#: Asked with the name of the operation and the name of the file ("" for the directory).
Faults = Callable[[str, str], Fault | None]


@dataclass(slots=True, eq=False)
class Write:
    """Bytes on their way to the medium."""

    at: int
    data: bytes
    #: A sync that should have written them failed: no later one does.
    dropped: bool = False


@dataclass(slots=True)
class Inode:
    durable: bytearray = field(default_factory=bytearray)
    pending: list[Write] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Move:
    """A name that came to mean a file, or none, and may not have got there yet."""

    inode: int | None
    dropped: bool = False


@dataclass(slots=True)
class Name:
    durable: int | None = None
    pending: list[Move] = field(default_factory=list)


Operation = tuple[Any, ...]


class Medium:
    """What is durable of one directory, and what may be."""

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        self.inodes: dict[int, Inode] = {}
        self.names: dict[str, Name] = {}
        #: What a sync that runs has to write: of a file, of the directory.
        self._file_syncs: dict[int, tuple[Inode, list[Write]]] = {}
        self._entry_syncs: dict[int, dict[str, list[Move]]] = {}
        for number, (name, data) in enumerate(sorted(contents.items()), start=-len(contents)):
            self.inodes[number] = Inode(bytearray(data))
            self.names[name] = Name(number)

    def apply(self, operation: Operation) -> None:
        kind, *rest = operation
        getattr(self, f"_{kind}")(*rest)

    def _create(self, name: str, inode: int) -> None:
        self.inodes[inode] = Inode()
        self.names.setdefault(name, Name()).pending.append(Move(inode))

    def _unlink(self, name: str) -> None:
        self.names[name].pending.append(Move(None))

    def _write(self, inode: int, at: int, data: bytes) -> None:
        self.inodes[inode].pending.append(Write(at, data))

    def _file_sync(self, token: int, inode: int) -> None:
        found = self.inodes[inode]
        self._file_syncs[token] = found, [w for w in found.pending if not w.dropped]

    def _file_synced(self, token: int, good: bool) -> None:
        inode, writes = self._file_syncs.pop(token)
        for write in writes:
            if not good:
                write.dropped = True
            elif write in inode.pending and not write.dropped:
                _put(inode.durable, write.at, write.data)
        if good:
            inode.pending = [w for w in inode.pending if w.dropped or w not in writes]

    def _entry_sync(self, token: int) -> None:
        self._entry_syncs[token] = {
            name: [move for move in found.pending if not move.dropped]
            for name, found in self.names.items()
            if found.pending
        }

    def _entry_synced(self, token: int, good: bool) -> None:
        for name, moves in self._entry_syncs.pop(token).items():
            found = self.names[name]
            for move in moves:
                if not good:
                    move.dropped = True
                elif move in found.pending and not move.dropped:
                    found.durable = move.inode
            if good:
                found.pending = [m for m in found.pending if m.dropped or m not in moves]

    def _note(self, *_: object) -> None:
        """Of whoever uses the disk."""

    def sample(self, rng: random.Random) -> dict[str, bytes]:
        """Return a directory that a power loss at this moment may leave."""
        names, data = (rng.choice(TEMPERS) for _ in range(2))
        left = {}
        for name, found in self.names.items():
            inode = found.durable
            for move in found.pending:
                if _kept(names, rng):
                    inode = move.inode
            if inode is not None:
                left[name] = self._content(self.inodes[inode], data, rng)
        return left

    def _content(self, inode: Inode, temper: str, rng: random.Random) -> bytes:
        content = bytearray(inode.durable)
        for write in inode.pending:
            if temper == "prefix":
                cut = rng.randint(0, len(write.data))
                _put(content, write.at, write.data[:cut])
                if cut < len(write.data):
                    break
            elif temper == "zeros":
                _put(content, write.at, bytes(len(write.data)))
            else:
                for at, block in _blocks(write):
                    if _kept(temper, rng):
                        _put(content, at, block)
        return bytes(content)


#: All of what is not durable got there, none, some, some from the front, the length only.
TEMPERS = ("all", "none", "some", "some", "prefix", "zeros")


def _kept(temper: str, rng: random.Random) -> bool:
    return temper == "all" or (temper != "none" and rng.random() < 0.5)


def _blocks(write: Write) -> Iterator[tuple[int, bytes]]:
    """Cut a write where the blocks of the file begin."""
    at, end = write.at, write.at + len(write.data)
    while at < end:
        upto = min((at // BLOCK + 1) * BLOCK, end)
        yield at, write.data[at - write.at : upto - write.at]
        at = upto


def _put(content: bytearray, at: int, data: bytes) -> None:
    if len(content) < at:
        content.extend(bytes(at - len(content)))
    content[at : at + len(data)] = data


class Log:
    """Operations and notes of all threads, in the order in which they happened."""

    def __init__(self) -> None:
        #: Reentrant: a finalizer may end a file while its thread is in here.
        self.lock = threading.RLock()
        self.operations: list[Operation] = []

    def add(self, *operation: object) -> int:
        """Append an operation and return its place, which no other has."""
        with self.lock:
            self.operations.append(operation)
            return len(self.operations) - 1

    def note(self, *what: object) -> int:
        """Append something that is not the disk's."""
        return self.add("note", *what)


class LossyDisk:
    """A Disk with one directory, which is there from the beginning."""

    def __init__(
        self,
        contents: Mapping[str, bytes],
        log: Log,
        faults: Faults = lambda *_: None,
        lag: Callable[[], float] = lambda: 0,
    ) -> None:
        self.log = log
        self._faults = faults
        #: How many seconds the next sync takes: what does not wait for it overtakes it.
        self._lag = lag
        #: What the running system sees.
        self._inodes: dict[int, bytearray] = {}
        self._names: dict[str, int] = {}
        self._open: dict[int, tuple[int, str]] = {}
        self._next = 1
        for number, (name, data) in enumerate(sorted(contents.items()), start=-len(contents)):
            self._inodes[number] = bytearray(data)
            self._names[name] = number

    def contents(self) -> dict[str, bytes]:
        """Return what the running system sees."""
        with self.log.lock:
            return {name: bytes(self._inodes[inode]) for name, inode in self._names.items()}

    @property
    def descriptors(self) -> int:
        return len(self._open)

    def make_directory(self, path: Path) -> None:
        self._may("make_directory", "")

    def names(self, directory: Path) -> list[str]:
        with self.log.lock:
            return sorted(self._names)

    def create(self, path: Path) -> int:
        self._may("create", path.name)
        with self.log.lock:
            if path.name in self._names:
                raise _error(errno.EEXIST)
            inode = self._names[path.name] = self._next
            self._inodes[inode] = bytearray()
            self.log.add("create", path.name, inode)
            return self._descriptor(inode, path.name)

    def open(self, path: Path) -> int:
        self._may("open", path.name)
        with self.log.lock:
            return self._descriptor(self._found(path), path.name)

    def size(self, path: Path) -> int:
        with self.log.lock:
            return len(self._inodes[self._found(path)])

    def write(self, fd: int, piece: memoryview) -> int:
        inode, name = self._open[fd]
        data = bytes(piece)
        if self._may("write", name) == "rot":
            data = bytes([data[0] ^ 1]) + data[1:]
        with self.log.lock:
            at = len(self._inodes[inode])
            self._inodes[inode] += data
            self.log.add("write", inode, at, data)
        return len(data)

    def write_back(self, fd: int, begin: int, nbytes: int) -> None:
        """Promises nothing, so nothing changes."""

    def pread(self, fd: int, nbytes: int, at: int) -> bytes:
        inode, name = self._open[fd]
        self._may("pread", name)
        with self.log.lock:
            return bytes(self._inodes[inode][at : at + nbytes])

    def forget(self, fd: int, end: int = 0) -> None:
        """All reads show what was written, as a cache would."""

    def datasync(self, fd: int) -> None:
        inode, name = self._open[fd]
        self._sync("file", name, inode)

    def sync_directory(self, path: Path) -> None:
        self._sync("entry", "")

    def unlink(self, path: Path) -> None:
        self._may("unlink", path.name)
        with self.log.lock:
            self._found(path)
            del self._names[path.name]
            self.log.add("unlink", path.name)

    def close(self, fd: int) -> None:
        with self.log.lock:
            del self._open[fd]

    def _descriptor(self, inode: int, name: str) -> int:
        fd, self._next = self._next, self._next + 1
        self._open[fd] = inode, name
        return fd

    def _found(self, path: Path) -> int:
        if (inode := self._names.get(path.name)) is None:
            raise _error(errno.ENOENT)
        return inode

    def _sync(self, kind: str, name: str, *of: int) -> None:
        with self.log.lock:
            token, self._next = self._next, self._next + 1
            self.log.add(f"{kind}_sync", token, *of)
        time.sleep(self._lag())
        try:
            self._may("datasync" if kind == "file" else "sync_directory", name)
        except OSError:
            self.log.add(f"{kind}_synced", token, False)
            raise
        self.log.add(f"{kind}_synced", token, True)

    def _may(self, operation: str, name: str) -> str | None:
        """Raise the error that is due, or say what else goes wrong."""
        fault = self._faults(operation, name)
        if isinstance(fault, int):
            raise _error(fault)
        return fault


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
