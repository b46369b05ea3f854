"""All sessions of a server, by tenant and id: create, find, list, fork, import, delete."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from optserve.optim import devices
from optserve.optim.rehearsal import rehearse
from optserve.sessions import config as configs
from optserve.sessions import describe, frames
from optserve.sessions.finite import check_finite
from optserve.sessions.ledger import Identity, Ledger
from optserve.sessions.listing import page
from optserve.sessions.operations import Import
from optserve.sessions.replay import first_state, replay, write_frame
from optserve.sessions.reply import Reply
from optserve.sessions.session import Session
from optserve.sessions.state import SessionState, read_engine
from optserve.sessions.turn import Executor, chain
from optserve.store import Event, Key, Store
from optserve_client import wire
from optserve_client.errors import Conflict, Invalid, SessionExists, SessionNotFound

Buffers = list[bytes | memoryview]
#: Create bodies of one-call steps that are known to be equal to a session's, per session.
_REMEMBERED_BODIES = 8


@dataclass(frozen=True, slots=True)
class Made:
    """A session that a request created, or found as it wanted it."""

    session: Session
    created: bool = False
    duplicate: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


def _check_origin(session: Session, origin: Mapping[str, Any]) -> None:
    if session.origin != origin:
        raise SessionExists(
            f"session {session.id!r} exists with another configuration"
            + configs.difference(session.origin, origin),
            version=session.version,
        )


def _answer(made: Made) -> Future[Reply]:
    """Answer with the session's status, read in its own turn."""
    told = {"created": made.created, "duplicate": made.duplicate, **made.extra}
    return made.session.run(
        lambda state: Reply(scalars={**describe.status(made.session.id, state), **told})
    )


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
    ) -> None:
        self.store = store
        self.device = devices.resolve(device)
        self.threads = threads or devices.thread_count()
        self._executor = Executor(executor_threads, lambda: devices.use_threads(self.threads))
        self._turn = self._executor.turn()
        self._sessions: dict[Key, Session] = {}
        #: What a create request with an Idempotency-Key made: digest and id, by tenant and key.
        self._created: dict[str, Ledger] = {}
        self._warm = False

    def warm(self) -> None:
        """Pay for torch's lazy imports now, on the threads that will step."""
        self._executor.submit(devices.warm).result()
        self._warm = True

    @property
    def ready(self) -> bool:
        return self._warm

    def close(self) -> None:
        """Finish what runs, then close the store."""
        self._executor.close()
        self.store.close()

    def get(self, tenant: str, session_id: str) -> Session:
        """Return a session, or raise SessionNotFound."""
        try:
            return self._sessions[Key(tenant, session_id)]
        except KeyError:
            raise SessionNotFound(f"no session {session_id!r:.140}") from None

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
        made = self._turn.run(
            lambda: self._create(tenant, session_id, body, params, order, identity, exist_ok)
        )
        return chain(made, _answer)

    def _create(
        self,
        tenant: str,
        session_id: str | None,
        body: Mapping[str, Any],
        params: Mapping[str, wire.Tensor],
        order: list[str] | None,
        identity: Identity,
        exist_ok: bool,
    ) -> Made:
        if (known := self._known_key(tenant, identity)) is not None:
            return Made(self.get(tenant, known), duplicate=True)
        fields = configs.CreateFields.parse(body)
        ordered = configs.order_params(params, order or fields.order)
        ordered = configs.settle_dtype(ordered, fields.dtype)
        check_finite(ordered)
        layout = configs.layout_of(ordered)
        config = configs.normalise(fields, layout, self.device, self.store.promise)
        origin = configs.origin(config, layout)
        key = Key(tenant, session_id or f"s-{secrets.token_hex(8)}")
        if (session := self._sessions.get(key)) is not None:
            if not exist_ok:
                raise SessionExists(f"session {key.session!r} exists", version=session.version)
            _check_origin(session, origin)
            return Made(session)
        rehearse(configs.recipe(config), layout)
        record = {
            "config": config,
            "origin": origin,
            "generation": secrets.token_hex(8),
            "from_frame": False,
            "keeps_ledger": False,
        }
        frame = wire.encode({f"param/{name}": tensor for name, tensor in ordered.items()})
        return Made(self._begin(key, record, frame, identity), created=True)

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
        known = self._created.setdefault(tenant, Ledger()).check(identity, time.time())
        if known is None or Key(tenant, known.reply["id"]) not in self._sessions:
            return None
        found: str = known.reply["id"]
        return found

    def _begin(
        self,
        key: Key,
        record: dict[str, Any],
        frame: Buffers,
        identity: Identity,
        version: int = 0,
        updates: int = 0,
    ) -> Session:
        """Commit the create event of a new session and start it from that event."""
        event = Event(
            key=key,
            lsn=1,
            kind="create",
            version=version,
            updates=updates,
            time=time.time(),
            worker=identity.worker,
            epoch=identity.epoch,
            seq=identity.seq,
            idempotency_key=identity.key,
            digest=identity.digest,
            record={**record, "reply": {"applied_version": version}},
            payload=write_frame(self.store, frame),
        )
        state = first_state(event)
        if identity.worker is not None or identity.key is not None:
            state.ledger.check(identity, event.time)
        [outcome] = self.store.append([event])
        if outcome.error is not None:
            raise outcome.error
        state.commit(event)
        session = Session(key, self.store, self._executor.turn(), state)
        self._sessions[key] = session
        if identity.key is not None:
            self._created.setdefault(key.tenant, Ledger()).commit(
                identity, applied_version=None, lsn=1, reply={"id": key.session}, time=event.time
            )
        return session

    # --- fork, import, delete --------------------------------------------------------------------

    def fork(
        self, tenant: str, session_id: str, body: Mapping[str, Any], identity: Identity
    ) -> Future[Reply]:
        """Copy a session, now or at an earlier version, into a new one with its own generation."""
        source = self.get(tenant, session_id)
        fields = configs.ForkFields.parse(body)
        if fields.id is not None:
            wire.check_id("session id", fields.id)

        def job(state: SessionState) -> Made:
            if (known := self._known_key(tenant, identity)) is not None:
                return Made(self.get(tenant, known), duplicate=True)
            key = Key(tenant, fields.id or f"s-{secrets.token_hex(8)}")
            if key in self._sessions:
                raise SessionExists(f"session {key.session!r} exists")
            if fields.version is not None and fields.version > state.version:
                raise Invalid(
                    f"version must be in [0, {state.version}], got {fields.version}",
                    field="version",
                )
            past = state
            if fields.version is not None and fields.version != state.version:
                past = replay(self.store, source.key, self._lsn_of(source.key, fields.version))
            given = fields.model_dump(include=fields.model_fields_set - {"id", "version"})
            config = {**past.config, **given}
            parent = {
                "id": session_id,
                "generation": past.generation,
                "version": past.version,
            }
            record = {
                "config": config,
                "origin": configs.origin(config, past.layout),
                "generation": secrets.token_hex(8),
                "from_frame": True,
                "keeps_ledger": False,
                "forked_from": parent,
            }
            made = self._begin(key, record, past.frame(), identity, past.version, past.updates)
            return Made(made, created=True, extra={"forked_from": parent})

        return chain(source.run(job), _answer)

    def _lsn_of(self, key: Key, version: int) -> int:
        """Return the lsn of the event that made ``version``."""
        for event in self.store.events(key):
            if event.version == version and event.record["reply"]["applied_version"] == version:
                snapshot = self.store.latest_snapshot(key, event.lsn)
                if snapshot is None and next(iter(self.store.events(key))).payload is None:
                    break
                return event.lsn
        raise Invalid(f"version {version} of session {key.session!r} cannot be reached any more")

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
        if (session := self._sessions.get(key)) is not None:
            return session.change(Import(data=data), identity, if_match=if_match, abandon=abandon)
        if if_match is not None:
            raise SessionNotFound(f"no session {session_id!r}")
        return chain(self._turn.run(lambda: self._import_new(key, data, identity)), _answer)

    def _import_new(
        self, key: Key, data: bytes | bytearray | memoryview, identity: Identity
    ) -> Made:
        if key in self._sessions:
            raise Conflict(f"session {key.session!r} was created meanwhile; send the import again")
        frame = frames.decode(data)
        config, _ = read_engine(frame, self.device)
        config = {**config, "durability": self.store.promise}
        record = {
            "config": config,
            "origin": configs.origin(config, frame.layout),
            "generation": secrets.token_hex(8),
            "from_frame": True,
            "keeps_ledger": True,
        }
        made = self._begin(
            key, record, [memoryview(data)], identity, frame.meta["version"], frame.meta["updates"]
        )
        return Made(made, created=True)

    def check_same(self, session: Session, body: Mapping[str, Any]) -> None:
        """Raise SessionExists if these create fields would have made another session."""
        text = json.dumps(body, default=str).encode()
        if text in session.same:
            return
        fields, shape = configs.CreateFields.parse(body), configs.origin_layout(session.origin)
        configs.check_dtype(fields.dtype)
        same_dtype = fields.dtype in (None, wire.dtype_name(shape.dtype))
        if not same_dtype or fields.order not in (None, shape.names):
            field = "order" if same_dtype else "dtype"
            raise SessionExists(
                f"session {session.id!r} exists with another {field}", version=session.version
            )
        config = configs.normalise(fields, shape, self.device, self.store.promise)
        _check_origin(session, configs.origin(config, shape))
        if len(session.same) >= _REMEMBERED_BODIES:
            session.same.clear()
        session.same.add(text)

    def withdraw(self, session: Session) -> Future[None]:
        """Forget a session whose creating request was refused, if nothing happened to it since."""

        def job(state: SessionState) -> None:
            if state.lsn == 1:
                self._forget(session)

        return session.run(job)

    def _forget(self, session: Session) -> None:
        del self._sessions[session.key]
        session.closed = True
        self.store.delete(session.key)

    def delete(self, tenant: str, session_id: str, identity: Identity) -> Future[Reply]:
        """Forget a session and its journal."""
        session = self.get(tenant, session_id)
        return session.remove(identity, lambda: self._forget(session))
