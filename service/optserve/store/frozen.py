"""Events on their way into a store: nobody can change them any more."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from optserve.store.base import Event, record_text
from optserve_client.errors import Internal


@dataclass(slots=True)
class Frozen:
    """An event whose record and row in the list are text; raises Internal where they are not."""

    event: Event
    record: str
    #: None: as it was.
    about: str | None

    @classmethod
    def of(cls, event: Event) -> Frozen:
        return cls(event, record_text(event), about_text(event))

    def thaw(self, payloads: bool = True) -> Event:
        # What is not kept with an event does not come back with it.
        return replace(
            self.event,
            record=json.loads(self.record),
            about=None,
            durability="always",
            payload=self.event.payload if payloads else None,
        )

    def values(self) -> dict[str, Any]:
        """Return what the event's own columns hold, but for the payload."""
        event = self.event
        return {
            "tenant": event.key.tenant,
            "session": event.key.session,
            "lsn": event.lsn,
            "kind": event.kind,
            "version": event.version,
            "updates": event.updates,
            "time": event.time,
            "owner_epoch": event.owner_epoch,
            "worker": event.worker,
            "epoch": event.epoch,
            "seq": event.seq,
            "idempotency_key": event.idempotency_key,
            "digest": event.digest,
            "record": self.record,
            "loss": event.loss,
            "grad_norm": event.grad_norm,
            "payload_bytes": None,
            "payload_digest": None,
            "payload_file": None,
        }


def about_text(event: Event) -> str | None:
    """Return ``event.about`` as JSON text; Internal if it has none."""
    if event.about is None:
        return None
    try:
        return json.dumps(dict(event.about), allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as exc:
        where = f"event {event.lsn} of session {event.key.session!r}"
        raise Internal(f"{where}: about is not strict JSON: {exc}") from exc
