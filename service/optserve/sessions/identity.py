"""Who sent a request, and which of its requests it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from optserve_client import wire
from optserve_client.errors import Invalid

#: Of an Idempotency-Key, in characters.
KEY_LENGTH = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Who sent a request and which of its requests it is: worker and seq, or a key, or neither."""

    worker: str | None = None
    #: None: the worker's current one.
    epoch: int | None = None
    seq: int | None = None
    #: The Idempotency-Key header.
    key: str | None = None
    #: XXH3-128 of method, kind of path and body.
    digest: bytes = b""


class Pushed(Protocol):
    """A push into a round."""

    @property
    def worker(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def seq(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Duplicate:
    """A request that was committed before."""

    #: Version that it made; None if it made none.
    applied_version: int | None
    #: Scalars of the reply it got.
    reply: dict[str, Any]
    lsn: int


def check_identity(identity: Identity) -> None:
    """Refuse half an identity, or two of them."""
    if identity.key is not None:
        if identity.worker is not None or identity.seq is not None or identity.epoch is not None:
            raise Invalid("send worker and seq or an Idempotency-Key, not both")
        if not 1 <= len(identity.key) <= KEY_LENGTH:
            raise Invalid(
                f"Idempotency-Key must have 1 to {KEY_LENGTH} characters, got {len(identity.key)}"
            )
    elif identity.worker is None:
        for name, value in (("seq", identity.seq), ("epoch", identity.epoch)):
            if value is not None:
                raise Invalid(f"{name} {value} needs a worker", field="worker")
    else:
        wire.check_id("worker", identity.worker)
        if identity.seq is None:
            raise Invalid(f"worker {identity.worker!r} needs a seq", field="seq")
        for name, value in (("seq", identity.seq), ("epoch", identity.epoch)):
            if value is not None and value < 1:
                raise Invalid(f"{name} must be >= 1, got {value}", field=name)
