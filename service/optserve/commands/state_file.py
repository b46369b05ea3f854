"""State files on disk: there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sys
from collections.abc import Iterable
from pathlib import Path


class CannotFile(Exception):
    """A file cannot be read or written; says which, why, and what to do."""


def check_target(name: str, force: bool) -> None:
    """Raise CannotFile where :func:`write` would, before anything is computed."""
    if name == "-":
        if sys.stdout.isatty():
            raise CannotFile("a state file is no text for a terminal; name a file, or use a pipe")
        return
    path = _target(name)
    if path.exists() and not path.is_file():
        raise CannotFile(f"{name} is a directory or device, expected the name of a file")
    if not path.parent.is_dir():
        raise CannotFile(f"there is no directory {path.parent}")
    if path.exists() and not force:
        raise CannotFile(f"{name} exists; --force replaces it")


def write(name: str, pieces: Iterable[bytes | memoryview], force: bool) -> int:
    """Write ``pieces`` to a file, or to stdout for ``-``; return how many bytes they are.

    The file appears under its name when it is complete and synced. Raises CannotFile.
    """
    try:
        if name == "-":
            return _pour(sys.stdout.buffer.fileno(), pieces)
        return _write(_target(name), pieces, force)
    except OSError as exc:
        raise CannotFile(f"{name} cannot be written: {exc.strerror or exc}") from exc


def _target(name: str) -> Path:
    return Path(os.path.realpath(name))  # a link stays one


def _write(path: Path, pieces: Iterable[bytes | memoryview], force: bool) -> int:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    # Like any file that the user makes, not like a secret.
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            written = _pour(fd, pieces)
            os.fsync(fd)
        finally:
            os.close(fd)
        if force:
            os.replace(part, path)
        else:
            _appear(part, path)
        return written
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def _appear(part: Path, path: Path) -> None:
    """Give the file its name, unless another has it meanwhile: FileExistsError."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links here
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.replace(part, path)


def _pour(fd: int, pieces: Iterable[bytes | memoryview]) -> int:
    written = 0
    for piece in pieces:
        left = memoryview(piece).cast("B") if len(piece) else memoryview(b"")
        while left:
            count = os.write(fd, left[: 2**24])
            left, written = left[count:], written + count
    return written


def read(name: str) -> bytes:
    """Return what the file, or stdin for ``-``, holds. Raises CannotFile."""
    try:
        if name == "-":
            return sys.stdin.buffer.read()
        return Path(name).read_bytes()
    except OSError as exc:
        raise CannotFile(f"{name} cannot be read: {exc.strerror or exc}") from exc
