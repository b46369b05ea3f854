"""Sees the system calls with which a process changes files, and can let any of them fail.

The kernel asks us before each call of every thread (seccomp's user notification), so calls have one
order over all threads, and the k-th is the same one whoever makes it. strace's ``inject`` counts
per thread, and stops the process at every other call too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: Number, and whether a descriptor or a path (and where) names the file.
_X86_64 = {
    "write": (1, "fd"),
    "pwrite64": (18, "fd"),
    "writev": (20, "fd"),
    "pwritev": (296, "fd"),
    "fsync": (74, "fd"),
    "fdatasync": (75, "fd"),
    "sync_file_range": (277, "fd"),
    "ftruncate": (77, "fd"),
    "fallocate": (285, "fd"),
    "open": (2, "path"),
    "openat": (257, "at"),
    "mkdir": (83, "path"),
    "mkdirat": (258, "at"),
    "rename": (82, "path"),
    "renameat": (264, "at"),
    "renameat2": (316, "at"),
    "link": (86, "path"),
    "linkat": (265, "at"),
    "unlink": (87, "path"),
    "unlinkat": (263, "at"),
}
_AARCH64 = {
    "write": (64, "fd"),
    "pwrite64": (68, "fd"),
    "writev": (66, "fd"),
    "pwritev": (70, "fd"),
    "fsync": (82, "fd"),
    "fdatasync": (83, "fd"),
    "sync_file_range": (84, "fd"),
    "ftruncate": (46, "fd"),
    "fallocate": (47, "fd"),
    "openat": (56, "at"),
    "mkdirat": (34, "at"),
    "renameat": (38, "at"),
    "renameat2": (276, "at"),
    "linkat": (37, "at"),
    "unlinkat": (35, "at"),
}
_CALLS = {"x86_64": _X86_64, "aarch64": _AARCH64}.get(platform.machine(), {})
_NAMES = {number: (name, kind) for name, (number, kind) in _CALLS.items()}
_SECCOMP = {"x86_64": 317, "aarch64": 277}.get(platform.machine(), 0)

_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _GET_NOTIF_SIZES, _NEW_LISTENER = 1, 3, 8
_RET_ASK, _RET_ALLOW = 0x7FC00000, 0x7FFF0000
_LOAD_WORD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
#: id, pid, flags; number, architecture, instruction pointer, arguments.
_QUESTION = struct.Struct("<QII" + "iIQ6Q")
#: id, value, error, flags.
_ANSWER = struct.Struct("<QqiI")
_RECEIVE = 0xC0002100 | _QUESTION.size << 16
_SEND = 0xC0002101 | _ANSWER.size << 16
_GO_ON = 1


def unavailable() -> str | None:
    """Return why calls cannot be watched here, or None."""
    if not _CALLS:
        return f"the system calls of {platform.system()} on {platform.machine()} are not known here"
    sizes = (ctypes.c_uint16 * 3)()
    if _libc().syscall(_SECCOMP, _GET_NOTIF_SIZES, 0, sizes):
        return f"the kernel asks nobody: {os.strerror(ctypes.get_errno())}"
    if (sizes[0], sizes[1]) != (_QUESTION.size, _ANSWER.size):
        return "the kernel's questions have another form"
    return None


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def submit(parent: socket.socket) -> None:
    """Let ``parent`` answer for all calls of this process from here on; call before any thread."""
    steps = [(_LOAD_WORD, 0, 0, 0)]
    for left, number in zip(range(len(_NAMES), 0, -1), _NAMES, strict=True):
        steps.append((_JUMP_EQUAL, left, 0, number))  # to the last step
    steps += [(_RETURN, 0, 0, _RET_ALLOW), (_RETURN, 0, 0, _RET_ASK)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in steps))
    program = struct.pack("<HxxxxxxQ", len(steps), ctypes.addressof(code))
    libc = _libc()
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    listener = libc.syscall(_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, program)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    # The parent asks nobody for leave to take these: sendmsg is not one of the calls.
    socket.send_fds(parent, [b"watched"], [listener, os.pidfd_open(os.getpid())])
    os.close(listener)


@dataclass(frozen=True, slots=True)
class Call:
    """One call that would change a file."""

    name: str
    #: What the file is called; of a rename, the old name.
    path: str
    #: An open that may make the file.
    creates: bool = False

    def __str__(self) -> str:
        return f"{self.name} {Path(self.path).name}"


#: Returns None to let a call happen, "kill" to end the process instead, or an errno to answer.
Decide = Callable[[Call], int | str | None]


class Watched:
    """A process that called :func:`submit`; the parent's end of it."""

    def __init__(self, channel: socket.socket, directory: Path) -> None:
        """Only calls on files below ``directory`` are decided on; all others happen."""
        word, fds, _, _ = socket.recv_fds(channel, len(b"watched"), 2)
        assert word == b"watched", f"the process is not watched: {word!r}"
        self.listener, self.process = fds
        self._directory = str(directory)

    def answer(self, decide: Decide) -> bool:
        """Answer the question that waits at the listener; return whether there was one."""
        question = bytearray(_QUESTION.size)
        try:
            fcntl.ioctl(self.listener, _RECEIVE, question)
        except OSError as exc:
            if exc.errno in (errno.ENOENT, errno.EINTR):  # the process died meanwhile
                return False
            raise
        number, thread, _, nr, _, _, *arguments = _QUESTION.unpack(question)
        error = 0
        try:
            call = _call(thread, nr, arguments)
        except OSError:  # it died while we looked
            call = None
        if call is not None and call.path.startswith(self._directory):
            verdict = decide(call)
            if verdict == "kill":
                self.kill()
                return True
            error = verdict if isinstance(verdict, int) else 0
        answer = _ANSWER.pack(number, 0, -error, 0 if error else _GO_ON)
        try:
            fcntl.ioctl(self.listener, _SEND, bytearray(answer))
        except OSError as exc:
            if exc.errno != errno.ENOENT:
                raise
        return True

    def kill(self) -> None:
        """SIGKILL the process."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.process, signal.SIGKILL)

    def wait(self, timeout_s: float) -> None:
        """Return when the process and all it held are gone."""
        poll = select.poll()
        poll.register(self.process, select.POLLIN)
        assert poll.poll(timeout_s * 1000), "the process does not end"

    def close(self) -> None:
        os.close(self.listener)
        os.close(self.process)


def _call(thread: int, nr: int, arguments: list[int]) -> Call | None:
    name, kind = _NAMES[nr]
    if kind == "fd":
        return Call(name, os.readlink(f"/proc/{thread}/fd/{arguments[0] & 0xFFFFFFFF}"))
    at = 1 if kind == "at" else 0
    path = _text(thread, arguments[at])
    if not path.startswith("/"):
        here = ctypes.c_int32(arguments[0] & 0xFFFFFFFF).value
        base = "cwd" if at == 0 or here < 0 else f"fd/{here}"
        path = os.path.join(os.readlink(f"/proc/{thread}/{base}"), path)
    creates = name in ("open", "openat") and bool(arguments[at + 1] & os.O_CREAT)
    return Call(name, path, creates)


def _text(thread: int, address: int) -> str:
    """Read a string that ends with a zero out of the memory of another process."""
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        page = 4096 - address % 4096
        found = memory.read(page)
        if b"\0" not in found:
            found += memory.read(4096)
    return os.fsdecode(found[: found.index(b"\0")])
