"""A session begins: from params, from another session, or from a state file."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from optserve.optim.rehearsal import rehearse
from optserve.sessions import config as configs
from optserve.sessions import describe, frames
from optserve.sessions.finite import check_finite
from optserve.sessions.identity import Identity
from optserve.sessions.operation import Buffers
from optserve.sessions.replay import first_state, write_frame
from optserve.sessions.state import SessionState, read_engine
from optserve.store.base import Event, Key, SessionRow, Store
from optserve_client import wire
from optserve_client.errors import Unavailable


@dataclass(frozen=True, kw_only=True, slots=True)
class Seed:
    """What a new session begins from."""

    #: Of its create event.
    record: dict[str, Any]
    #: The payload of that event: params, or a whole state file.
    frame: Buffers
    #: About what the session takes in memory.
    nbytes: int
    version: int = 0
    updates: int = 0

    @property
    def origin(self) -> Mapping[str, Any]:
        origin: Mapping[str, Any] = self.record["origin"]
        return origin


def _record(config: Mapping[str, Any], origin: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
    return {"config": config, "origin": origin, "generation": secrets.token_hex(8), **rest}


def from_params(
    body: Mapping[str, Any],
    params: Mapping[str, wire.Tensor],
    order: list[str] | None,
    device: str,
    promise: str,
) -> Seed:
    """Return the seed of a create body; Invalid, Nonfinite or TorchRefused for what cannot be."""
    fields = configs.CreateFields.parse(body)
    ordered = configs.order_params(params, order or fields.order)
    ordered = configs.settle_dtype(ordered, fields.dtype)
    check_finite(ordered)
    layout = configs.layout_of(ordered)
    config = configs.normalise(fields, layout, device, promise)
    return Seed(
        record=_record(
            config, configs.origin(config, layout), from_frame=False, keeps_ledger=False
        ),
        frame=wire.encode({f"param/{name}": tensor for name, tensor in ordered.items()}),
        nbytes=rehearse(configs.recipe(config), layout),
    )


def from_session(session_id: str, past: SessionState, given: Mapping[str, Any]) -> Seed:
    """Return the seed of a fork of session ``session_id`` at ``past``, with other descriptions."""
    config = {**past.config, **given}
    return Seed(
        record=_record(
            config,
            configs.origin(config, past.layout),
            from_frame=True,
            keeps_ledger=False,
            forked_from={
                "id": session_id,
                "generation": past.generation,
                "version": past.version,
            },
            inexact=past.inexact,
        ),
        frame=past.frame(),
        nbytes=past.engine.nbytes(),
        version=past.version,
        updates=past.updates,
    )


def from_file(data: bytes | bytearray | memoryview, device: str, promise: str) -> Seed:
    """Return the seed of a state file."""
    frame = frames.decode(data)
    config, engine = read_engine(frame, device)
    # What this server promises, and for how long, is not the file's to say.
    config = {**config, "durability": promise, "ttl_s": None}
    return Seed(
        record=_record(
            config,
            configs.origin(config, frame.layout),
            from_frame=True,
            keeps_ledger=True,
            inexact=frames.inexact(frame),
        ),
        frame=[memoryview(data)],
        nbytes=engine.nbytes(),
        version=frame.meta["version"],
        updates=frame.meta["updates"],
    )


def begin(
    store: Store, key: Key, seed: Seed, identity: Identity, owner_epoch: int
) -> tuple[SessionRow, SessionState]:
    """Commit the create event of a new session; return what it makes.

    Raises SessionExists; after Unavailable the session may have begun all the same.
    """
    payload = write_frame(store, seed.frame)
    try:
        event = Event(
            key=key,
            lsn=1,
            kind="create",
            version=seed.version,
            updates=seed.updates,
            time=time.time(),
            owner_epoch=owner_epoch,
            worker=identity.worker,
            epoch=identity.epoch,
            seq=identity.seq,
            idempotency_key=identity.key,
            digest=identity.digest,
            record={**seed.record, "reply": {"applied_version": seed.version}},
            payload=payload,
        )
        state = first_state(event)
        if identity.worker is not None or identity.key is not None:
            state.ledger.check(identity, event.time)
        record = {**event.record, "fingerprint": state.engine.fingerprint}
        about = describe.about(state, max(seed.nbytes, state.engine.nbytes()))
        event = replace(event, record=record, about=about)
    except BaseException:
        payload.discard()
        raise
    [outcome] = store.append([event])
    if outcome.error is not None:
        if not isinstance(outcome.error, Unavailable):  # else a committed row may name it
            payload.discard()
        raise outcome.error
    state.commit(event)
    row = SessionRow(
        key=key,
        last_lsn=1,
        version=event.version,
        updates=event.updates,
        created=event.time,
        changed=event.time,
        about=about,
        durability=state.config["durability"],
        create_key=identity.key,
        create_digest=identity.digest,
    )
    return row, state
