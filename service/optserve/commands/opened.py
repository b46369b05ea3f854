"""From settings to an open store, for the server and for commands that work without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from optserve.commands.options import fail
from optserve.settings import StoreSettings, masked
from optserve_client.errors import OptserveError

if TYPE_CHECKING:
    from optserve.store import Store

DATABASE = "optserve.db"


def open_place(settings: StoreSettings) -> Store:
    """Open the store of ``settings``, making its directory. Raises CannotOpen."""
    from optserve.store.opening import CannotOpen, InUse, open_store

    directory = settings.directory
    try:
        url = settings.url
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else exc
        raise CannotOpen(
            f"the password in {settings.store_password_file} cannot be read: {why}"
        ) from exc
    if url is None or url.startswith("sqlite:"):
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise CannotOpen(
                f"the data directory {directory} cannot be made: {exc.strerror}; "
                "name another one with --data-dir"
            ) from exc
    try:
        return open_store(url=url, data_dir=directory, files=settings.files)
    except InUse:
        raise
    except (CannotOpen, OptserveError, ValueError) as exc:
        said = str(exc)
        raise CannotOpen(said.replace(url, masked(url)) if url else said) from exc


@contextmanager
def opened(settings: StoreSettings, status: int, hint: str = "") -> Iterator[Store]:
    """Open the store of ``settings`` for the block; exits with ``status`` if that cannot be.

    ``hint``: what else to do where a server has it.
    """
    if (sentence := _nothing_there(settings)) is not None:
        fail(sentence, status)
    from optserve.store.opening import CannotOpen, InUse

    try:
        store = open_place(settings)
    except CannotOpen as exc:
        fail(f"{exc}; {hint}" if hint and isinstance(exc, InUse) else str(exc), status, exc)
    try:
        yield store
    finally:
        store.close()


def _nothing_there(settings: StoreSettings) -> str | None:
    """Say why there is nothing to open: to look at sessions must not make a database."""
    url = settings.store
    if url == "memory":
        return "--store memory keeps nothing to look at, expected a database"
    if url is None:
        path = settings.directory / DATABASE
    elif url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///").partition("?")[0])
    else:
        return None
    return None if path.exists() else f"there is no database at {path}; see --data-dir and --store"
