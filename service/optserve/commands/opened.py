"""The store that a command works on while no server does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from optserve.commands.options import fail
from optserve.settings import StoreSettings
from optserve_client.errors import OptserveError

if TYPE_CHECKING:
    from optserve.store import Store

DATABASE = "optserve.db"


@contextmanager
def opened(settings: StoreSettings, status: int, hint: str) -> Iterator[Store]:
    """Open the store of ``settings`` for the block; exits with ``status`` if that cannot be.

    ``hint``: what to do where a server has it.
    """
    if (sentence := _nothing_there(settings)) is not None:
        fail(sentence, status)
    from optserve.store.opening import CannotOpen, Locked, open_store

    try:
        store = open_store(url=settings.store, data_dir=settings.directory, files=settings.files)
    except Locked as exc:
        fail(f"{exc}; {hint}", status, exc)
    except (CannotOpen, OptserveError) as exc:
        fail(str(exc), status, exc)
    try:
        yield store
    finally:
        store.close()


def _nothing_there(settings: StoreSettings) -> str | None:
    """Say why there is nothing to open: to look at sessions must not make a database."""
    if settings.store == "memory":
        return "--store memory keeps nothing to look at, expected a database"
    url = settings.store or ""
    if settings.store is None:
        path = settings.directory / DATABASE
    elif url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///"))
    else:
        return None
    return None if path.exists() else f"there is no database at {path}; see --data-dir and --store"
