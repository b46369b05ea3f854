"""Where sessions are: on a running server, or in a store that no server holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from optserve_client.errors import (
    ConnectFailed,
    Damaged,
    OutOfSpace,
    SessionExists,
    SessionNotFound,
    Unavailable,
)

if TYPE_CHECKING:
    from optserve.store import Store
    from optserve.store.base import SessionRow
    from optserve_client import Client

TENANT = "default"
PAGE = 1000

Json = dict[str, Any]


class Shelf(Protocol):
    """Sessions by id. Methods raise OptserveError: SessionNotFound for an id that is not there."""

    def rows(self) -> list[Json]:
        """Return what a list says of every session, in the order of creation."""

    def show(self, session_id: str) -> Json:
        """Return what is known of one session."""

    def export(self, session_id: str) -> Iterable[bytes | memoryview]:
        """Return its state file."""

    def load(self, frame: bytes, session_id: str | None, replace: bool) -> str:
        """Create a session from a state file; return its id.

        With ``replace``, one that has this id takes everything in the file; else SessionExists.
        """

    def remove(self, session_id: str) -> None:
        """Delete a session and all that is kept of it."""


class Remote:
    """The sessions of a running server."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def rows(self) -> list[Json]:
        found: list[Json] = []
        cursor: str | None = None
        while True:
            page = self._client.list(limit=PAGE, cursor=cursor)
            found += page.sessions
            if (cursor := page.next_cursor) is None:
                return found

    def show(self, session_id: str) -> Json:
        return self._client.session(session_id).status()

    def export(self, session_id: str) -> Iterable[bytes | memoryview]:
        return [self._client.session(session_id).export_state()]

    def load(self, frame: bytes, session_id: str | None, replace: bool) -> str:
        if session_id is not None and not replace:
            _refuse_taken(session_id, self._knows(session_id))
        return self._client.import_session(frame, id=session_id).id

    def _knows(self, session_id: str) -> bool:
        try:
            self.show(session_id)
        except SessionNotFound:
            return False
        return True

    def remove(self, session_id: str) -> None:
        self._client.session(session_id).delete()


class Offline:
    """The sessions of a store that this process holds."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def rows(self) -> list[Json]:
        return [_told(row) for row in self._store.sessions() if row.key.tenant == TENANT]

    def show(self, session_id: str) -> Json:
        row = self._row(session_id)
        snapshots = [
            {
                "version": kept.version,
                "lsn": kept.lsn,
                "bytes": kept.nbytes,
                "time": kept.time,
                "pin": kept.pin,
            }
            for kept in self._store.snapshots(row.key)
        ]
        return {
            **_told(row),
            "events": row.last_lsn,
            "suspect": row.suspect,
            "snapshots": snapshots,
        }

    def export(self, session_id: str) -> Iterable[bytes | memoryview]:
        row = self._row(session_id)
        from optserve.sessions.replay import replay

        try:
            return replay(self._store, row.key, lossy=row.suspect).frame()
        except (Unavailable, OutOfSpace):
            raise
        except Exception as exc:
            why = str(exc) or repr(exc)
            cure = f"`optserve fsck --salvage {session_id}` goes back to what can be read"
            raise Damaged(f"session {session_id!r} cannot be read back: {why}; {cure}") from exc

    def load(self, frame: bytes, session_id: str | None, replace: bool) -> str:
        import secrets

        from optserve.sessions.identity import Identity
        from optserve.sessions.registry import Registry

        name = session_id or f"s-{secrets.token_hex(8)}"
        known = self._store.session(_key(name)) is not None
        if not replace:
            _refuse_taken(name, known)
        registry = Registry(self._store)  # closes the store, which may be closed twice
        try:
            registry.import_session(TENANT, name, frame, Identity()).result()
        finally:
            registry.close()
        return name

    def remove(self, session_id: str) -> None:
        self._row(session_id)
        self._store.delete(_key(session_id))

    def _row(self, session_id: str) -> SessionRow:
        row = self._store.session(_key(session_id))
        if row is None:
            raise SessionNotFound(f"no session {session_id!r}")
        return row


def _key(session_id: str) -> Any:
    from optserve.store.base import Key

    return Key(TENANT, session_id)


def _refuse_taken(session_id: str, known: bool) -> None:
    if known:
        raise SessionExists(
            f"session {session_id!r} exists; --force replaces everything in it but its counters, "
            "another --id makes a new one"
        )


def _told(row: SessionRow) -> Json:
    """Return a list row like a server's, from what the store knows without torch."""
    said = dict(row.about)
    told: Json = {
        "id": row.key.session,
        "version": row.version,
        "updates": row.updates,
        "created_at": row.created,
        "updated_at": row.changed,
    }
    return {**told, **said, "durability": row.durability}


@contextmanager
def connected(url: str) -> Iterator[Shelf]:
    """Yield the sessions of the server at ``http://...`` or ``unix:/path``."""
    import httpx

    from optserve_client import Client

    if url.startswith("unix:"):
        transport = httpx.HTTPTransport(uds=url.removeprefix("unix:"))
        client = Client("http://optserve", transport=transport, retries=2)
    else:
        client = Client(url, retries=2)
    with client:
        try:
            yield Remote(client)
        except ConnectFailed as exc:
            raise ConnectFailed(f"{exc.detail}; is there a server at {url}?") from exc
