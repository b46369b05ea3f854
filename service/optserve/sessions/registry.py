"""All sessions of a server, by tenant and id: create, find, list, fork, import, delete."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import structlog

from optserve.optim import devices
from optserve.sessions import config as configs
from optserve.sessions import creation, describe
from optserve.sessions.alarms import Alarms
from optserve.sessions.creation import Seed
from optserve.sessions.holding import Home
from optserve.sessions.housekeeping import Expiry
from optserve.sessions.identity import Identity
from optserve.sessions.ledger import Ledger
from optserve.sessions.listing import page
from optserve.sessions.made import Made, answer, check_same
from optserve.sessions.operations import Import
from optserve.sessions.reply import Reply
from optserve.sessions.residency import Residents
from optserve.sessions.session import Session
from optserve.sessions.state import SessionState
from optserve.sessions.turn import Executor, chain
from optserve.store.base import Key, SessionRow, Store
from optserve_client import wire
from optserve_client.errors import Conflict, Invalid, SessionExists, SessionNotFound, Unavailable

log = structlog.get_logger(__name__)

#: Of no session: what the server claims an owner epoch for, which its new sessions have.
_NOBODY = Key("", "")
#: How long a stop may take for snapshots; what has none then is replayed at the next start.
SNAPSHOTS_S = 5.0


class Registry:
    """Owns the sessions of one server, its store and its threads.

    Creations, forks and deletions of one tenant take turns, so that an id has one story.
    """

    def __init__(
        self,
        store: Store,
        *,
        device: str = "auto",
        threads: int | None = None,
        executor_threads: int = 2,
        memory_budget: int | None = None,
        session_ttl_s: float | None = None,
        alarms: Alarms | None = None,
    ) -> None:
        """``memory_budget``: bytes for all sessions in memory; ``session_ttl_s``: the default;
        ``alarms``: the clock that rounds go by."""
        self.store = store
        self.device = devices.resolve(device)
        self.threads = threads or devices.thread_count()
        self.residents = Residents(memory_budget)
        self._executor = Executor(executor_threads, lambda: devices.use_threads(self.threads))
        self._scribes = Executor(2)
        self._background = Executor(1)
        self._alarms = alarms or Alarms()
        self._home = Home(
            store=store,
            executor=self._executor,
            scribes=self._scribes,
            background=self._background,
            residents=self.residents,
            alarms=self._alarms,
        )
        self._turn = self._executor.turn()
        #: What a create request with an Idempotency-Key made: digest and id, by tenant and key.
        self._created: dict[str, Ledger] = {}
        self._owner_epoch = store.claim(_NOBODY)
        rows = store.sessions()
        rows = [replace(row, about={**describe.UNKNOWN, **row.about}) for row in rows]
        self._sessions = {row.key: Session(self._home, row) for row in rows}
        #: For what must hold between the sessions here and those of the store.
        self._lock = threading.RLock()
        self._remember_keys(rows)
        #: Of creations and deletions that may have been committed although they failed.
        self._doubtful: set[Key] = set()
        self._expiry = Expiry(lambda: list(self._sessions.values()), self._forget, session_ttl_s)
        self._warm = False
        #: The server stops: it is not ready for more.
        self.draining = False

    def warm(self) -> None:
        """Pay for torch's lazy imports now, on the threads that will step."""
        self._executor.submit(devices.warm).result()
        self._warm = True

    @property
    def ready(self) -> bool:
        return self._warm and not self.draining

    def close(self, snapshots_s: float = SNAPSHOTS_S) -> None:
        """Finish what runs, write snapshots for at most ``snapshots_s``, then close the store."""
        self._expiry.close()
        self._alarms.close()
        self._write_snapshots(time.monotonic() + snapshots_s)
        self._executor.close()
        self._scribes.close()
        self._background.close()
        self.store.close()

    def _write_snapshots(self, until: float) -> None:
        """Spare the next start a replay; sessions that keep their events in memory come first."""
        everybody = list(self._sessions.values())
        for memory in (True, False):
            if not memory and time.monotonic() >= until:
                return  # the journal has it all
            chosen = [s for s in everybody if (s.row.durability == "memory") is memory]
            written = [(session.id, session.snapshot()) for session in chosen]
            for session_id, future in written:
                try:
                    future.result(max(until - time.monotonic(), 0.1))
                except Exception as exc:
                    log.warning("no snapshot was written", session=session_id, why=repr(exc))

    def get(self, tenant: str, session_id: str) -> Session:
        """Return a session, or raise SessionNotFound."""
        key = Key(tenant, session_id)
        if key in self._doubtful:
            self._settle(key)
        try:
            return self._sessions[key]
        except KeyError:
            raise SessionNotFound(f"no session {session_id!r:.140}") from None

    def _settle(self, key: Key) -> None:
        """Learn from the store whether there is a session; raises Unavailable if it cannot tell."""
        with self._lock:
            known, row = self._sessions.get(key), self.store.session(key)
            if row is not None and known is None:
                self._keep(Session(self._home, row), row)
            elif row is None and known is not None:
                self._dismiss(known)
            self._doubtful.discard(key)

    def _find(self, key: Key) -> Session | None:
        try:
            return self.get(*key)
        except SessionNotFound:
            return None

    def page(
        self,
        tenant: str,
        *,
        cursor: str | None = None,
        limit: int = 100,
        tags: Mapping[str, str] | None = None,
        order_by: str = "created",
    ) -> dict[str, Any]:
        """Return one page of the tenant's sessions and the cursor of the next one."""
        rows = [s.summary() for key, s in list(self._sessions.items()) if key.tenant == tenant]
        return page(rows, cursor=cursor, limit=limit, tags=tags or {}, order_by=order_by)

    # --- create ----------------------------------------------------------------------------------

    def create(
        self,
        tenant: str,
        session_id: str | None,
        body: Mapping[str, Any],
        params: Mapping[str, wire.Tensor],
        order: list[str] | None,
        identity: Identity,
        *,
        exist_ok: bool,
    ) -> Future[Reply]:
        """Create a session; with ``exist_ok`` an equal one that exists is answered instead.

        Raises Invalid, Nonfinite or TorchRefused for what cannot be, SessionExists for an id with
        another configuration.
        """
        if session_id is not None:
            wire.check_id("session id", session_id)

        def make() -> Seed:
            return creation.from_params(body, params, order, self.device, self.store.promise)

        made = self._turn.run(lambda: self._create(tenant, session_id, make, identity, exist_ok))
        return chain(made, answer)

    def _create(
        self,
        tenant: str,
        session_id: str | None,
        make: Callable[[], Seed],
        identity: Identity,
        exist_ok: bool,
    ) -> Made:
        if (known := self._known_key(tenant, identity)) is not None:
            return self._repeat(Key(tenant, known))
        seed = make()
        key = Key(tenant, session_id or f"s-{secrets.token_hex(8)}")
        if (session := self._find(key)) is None:
            return Made(self._begin(key, seed, identity), created=True)
        if not exist_ok:
            raise SessionExists(f"session {session.id!r} exists", version=session.version)
        session.shared = True
        return Made(session, origin=seed.origin)

    def _known_key(self, tenant: str, identity: Identity) -> str | None:
        """Return the id that an earlier request with this Idempotency-Key created."""
        if identity.worker is not None:
            raise Invalid(
                "worker and seq number the requests to one session; "
                "what creates one takes an Idempotency-Key",
                field="worker",
            )
        if identity.key is None:
            return None
        for key in list(self._doubtful):
            self._settle(key)
        known = self._created.setdefault(tenant, Ledger()).check(identity, time.time())
        if known is None:
            return None
        found: str = known.reply["id"]
        if Key(tenant, found) not in self._sessions:  # a late repeat must not bring it back
            raise SessionNotFound(
                f"session {found!r}, which this Idempotency-Key created, was deleted"
            )
        return found

    def _repeat(self, key: Key) -> Made:
        """Answer a creation again; a fork's says whose it is."""
        first = next(iter(self.store.events(key, upto_lsn=1, payloads=False)), None)
        record = first.record if first is not None else {}
        said = {name: record[name] for name in ("forked_from",) if name in record}
        return Made(self.get(*key), duplicate=True, extra=said)

    def _again(self, tenant: str, identity: Identity, otherwise: SessionNotFound) -> Made:
        if (known := self._known_key(tenant, identity)) is None:
            raise otherwise
        return self._repeat(Key(tenant, known))

    def _begin(self, key: Key, seed: Seed, identity: Identity) -> Session:
        """Commit the create event of a new session and keep it."""
        with self._lock:  # forks run in the turns of their sources
            if key in self._sessions:
                raise SessionExists(f"session {key.session!r} exists")
            self.residents.admit(key, seed.nbytes, lambda: self._put_away(key))
            try:
                row, state = creation.begin(self.store, key, seed, identity, self._owner_epoch)
            except BaseException as exc:
                self.residents.release(key)
                if isinstance(exc, (Unavailable, SessionExists)):
                    self._doubtful.add(key)
                raise
            return self._keep(Session(self._home, row, state, self._owner_epoch), row)

    def _keep(self, session: Session, row: SessionRow) -> Session:
        self._sessions[session.key] = session
        if row.create_key is not None:
            self._remember_key(row.key, row.create_key, row.create_digest, row.created)
        return session

    def _remember_key(self, key: Key, text: str, digest: bytes, created: float) -> None:
        self._created.setdefault(key.tenant, Ledger()).commit(
            Identity(key=text, digest=digest),
            applied_version=None,
            lsn=1,
            reply={"id": key.session},
            time=created,
        )

    def _remember_keys(self, rows: list[SessionRow]) -> None:
        """Read back what created the sessions of the store, also those that are gone."""
        keys = [(s.created, s.key, s.idempotency_key, s.digest) for s in self.store.spent_keys()]
        keys += [
            (row.created, row.key, row.create_key, row.create_digest)
            for row in rows
            if row.create_key is not None
        ]
        for created, key, text, digest in sorted(keys):
            self._remember_key(key, text, digest, created)

    def _put_away(self, key: Key) -> bool:
        session = self._sessions.get(key)
        return session is not None and session.put_away()

    # --- fork, import, delete --------------------------------------------------------------------

    def fork(
        self, tenant: str, session_id: str, body: Mapping[str, Any], identity: Identity
    ) -> Future[Reply]:
        """Copy a session, now or at an earlier version, into a new one with its own generation."""
        fields = configs.ForkFields.parse(body)
        try:
            source = self.get(tenant, session_id)
        except SessionNotFound as exc:  # a repeat may come after the source was deleted
            gone = exc
            return chain(self._turn.run(lambda: self._again(tenant, identity, gone)), answer)
        if fields.id is not None:
            wire.check_id("session id", fields.id)

        def job(state: SessionState) -> Made:
            if (known := self._known_key(tenant, identity)) is not None:
                return self._repeat(Key(tenant, known))
            state.check_generation(fields.generation)
            key = Key(tenant, fields.id or f"s-{secrets.token_hex(8)}")
            if self._find(key) is not None:
                raise SessionExists(f"session {key.session!r} exists")
            past = state
            if fields.version is not None:
                past = source.state_at(fields.version, state)
            given = fields.model_dump(
                include=fields.model_fields_set - {"id", "version", "generation"}
            )
            seed = creation.from_session(session_id, past, given)
            made = self._begin(key, seed, identity)
            return Made(made, created=True, extra={"forked_from": seed.record["forked_from"]})

        return chain(source.run(job), answer)

    def import_session(
        self,
        tenant: str,
        session_id: str,
        data: bytes | bytearray | memoryview,
        identity: Identity,
        *,
        abandon: bool = False,
        if_match: str | None = None,
    ) -> Future[Reply]:
        """Replace a session by a state file, or create one from it."""
        wire.check_id("session id", session_id)
        key = Key(tenant, session_id)
        session = self._find(key)
        if session is not None and not self._was_made_by(key, identity):
            return session.change(Import(data=data), identity, if_match=if_match, abandon=abandon)
        if if_match is not None:
            raise SessionNotFound(f"no session {session_id!r}")
        return chain(self._turn.run(lambda: self._import_new(key, data, identity)), answer)

    def _import_new(
        self, key: Key, data: bytes | bytearray | memoryview, identity: Identity
    ) -> Made:
        if self._was_made_by(key, identity):
            return self._repeat(key)
        if self._find(key) is not None:
            raise Conflict(f"session {key.session!r} was created meanwhile; send the import again")
        seed = creation.from_file(data, self.device, self.store.promise)
        return Made(self._begin(key, seed, identity), created=True)

    def _was_made_by(self, key: Key, identity: Identity) -> bool:
        """Say whether the session at ``key`` was created by a request with this identity."""
        if identity.key is None or self._find(key) is None:
            return False
        known = self._created.setdefault(key.tenant, Ledger()).check(identity, time.time())
        return known is not None and known.reply["id"] == key.session

    def check_same(self, session: Session, body: Mapping[str, Any]) -> None:
        """Raise SessionExists if these create fields would have made another session.

        The session must have been loaded.
        """
        check_same(session, body, self.device, self.store.promise)

    def withdraw(self, session: Session) -> Future[None]:
        """Forget a session whose creating request was refused, if nothing happened to it since."""

        def job(state: SessionState) -> None:
            if state.lsn == 1 and not session.shared:
                self._forget(session)

        return session.run(job)

    def _forget(self, session: Session) -> None:
        try:
            with session.ending():
                self.store.delete(session.key)
        except BaseException:
            self._doubtful.add(session.key)
            raise
        self._dismiss(session)

    def _dismiss(self, session: Session) -> None:
        with self._lock:
            session.close()
            if self._sessions.get(session.key) is session:
                self.residents.release(session.key)
                del self._sessions[session.key]

    def delete(self, tenant: str, session_id: str, identity: Identity) -> Future[Reply]:
        """Forget a session and its journal."""
        session = self.get(tenant, session_id)
        return session.remove(identity, lambda: self._forget(session))
