"""The Store protocol: one journal per session, and what every backend promises about it.

State is the fold of the journal: a snapshot and the events after it. A store knows no numbers; it
keeps rows of JSON and payloads of bytes. ``tests/integration/test_store_contract.py`` runs the
promises below against each backend.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from optserve_client.errors import (
    Internal,
    Misdirected,
    OptserveError,
    SessionExists,
    SessionNotFound,
)

#: Event rows that stay below the older snapshot; their payloads do not.
KEPT_ROWS = 100_000
KEPT_SNAPSHOTS = 2
CHUNK_BYTES = 2**20
#: How long the key that created a session is known after the session is gone.
SPENT_S = 24 * 3600.0

#: What an acknowledged event survives: ``always`` power loss, ``os`` the death of this process,
#: ``memory`` neither; see :meth:`Store.append`.
Durability = Literal["always", "os", "memory"]
DURABILITIES: tuple[Durability, ...] = ("always", "os", "memory")

_STRICT = json.JSONEncoder(allow_nan=False, separators=(",", ":"))

BytesLike = bytes | bytearray | memoryview
#: Has a function called on the thread of the caller, a little later.
Soon: TypeAlias = Callable[[Callable[[], object]], object]


class Key(NamedTuple):
    """Whose journal. Every key in a store starts with its tenant."""

    tenant: str
    session: str


class Payload(Protocol):
    """Sealed bytes that can be read again and again, by any thread.

    Whoever holds a payload can read it to its end, also after the store let go of it.
    """

    @property
    def nbytes(self) -> int: ...

    @property
    def digest(self) -> bytes:
        """XXH3-128 of the bytes."""

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Yield the bytes in pieces of at most ``size``; a piece stays valid after the next one.

        Raises Damaged if the medium lost or changed any of them; where ``chunks`` is read to its
        end, and in ``read``, the bytes are compared with ``digest``.
        """

    def pread(self, nbytes: int, at: int) -> BytesLike:
        """Return bytes ``[at, at + nbytes)``: fewer at the end, or where the medium
        gives no more at once. They are not compared with ``digest``.

        Raises Damaged if they cannot be read.
        """

    def read(self) -> bytes:
        """Return all bytes at once; meant for small payloads."""

    def discard(self) -> None:
        """Give the bytes up; nobody may read them afterwards.

        For payloads that no event took, nor may have taken: not after an Unavailable.
        """


class PayloadWriter(Protocol):
    """Bytes on their way into a payload; for one thread at a time. Ends with seal or discard."""

    @property
    def nbytes(self) -> int: ...

    def write(self, chunk: BytesLike) -> None:
        """Append ``chunk``, which the caller may overwrite as soon as this returns.

        A large payload goes to its file without a copy in between. Raises Unavailable where the
        medium refuses; nothing of the payload can be used then.
        """

    def digest(self) -> bytes:
        """Return XXH3-128 of all bytes written so far; also after seal."""

    def seal(self) -> Payload:
        """Return the payload; no more bytes can be written."""

    def discard(self) -> None:
        """Forget the bytes. Does nothing after seal or an earlier discard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One committed change of a session."""

    key: Key
    #: Place in the journal, gapless from 1.
    lsn: int
    #: ``create``, ``step``, ``contribution``, ``evaluate``, ``skip``, ``params``, ``hyper``,
    #: ``scheduler``, ``group``, ``metrics``, ``import``, ``rollback``, ``pin``, ``rewind``. A store
    #: knows only ``create`` and ``rewind``, and has an index of ``metrics``.
    kind: str
    #: Version and number of optimizer updates after this event.
    version: int
    updates: int
    #: When it happened, Unix seconds.
    time: float
    #: Which owner of the session writes; see :meth:`Store.claim`.
    owner_epoch: int = 0
    worker: str | None = None
    epoch: int | None = None
    seq: int | None = None
    idempotency_key: str | None = None
    #: Of the request that this event answers.
    digest: bytes = b""
    #: Everything else, in strict JSON: request fields, outcome, the reply's scalars.
    record: dict[str, Any] = field(default_factory=dict)
    #: Finite, or None.
    loss: float | None = None
    grad_norm: float | None = None
    #: The tensors as they came over the wire; None also once a snapshot made them superfluous.
    payload: Payload | None = None
    #: What must hold when the event is acknowledged. Not kept with the event but, the latest one,
    #: with the session.
    durability: Durability = "always"
    #: The session's row in a list, strict JSON, kept with the session; None: as it was. Not kept
    #: with the event.
    about: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one event. A refused one left no trace; its payload is the caller's again."""

    key: Key
    lsn: int
    #: SessionExists: ``create`` of a key that is there. SessionNotFound: an event of one that is
    #: not. Misdirected: ``owner_epoch`` is not the current one. Internal: lsn is not last + 1, or
    #: the event cannot be stored. OutOfSpace: the medium is full. Unavailable: the medium failed;
    #: then, and only then, the event may be committed or not, and reading tells. None: committed.
    error: OptserveError | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRow:
    """What a store knows of a session without reading its journal."""

    key: Key
    last_lsn: int
    #: After the last event.
    version: int
    updates: int
    #: Times of the first and the last event, Unix seconds.
    created: float
    changed: float
    #: As the last event that brought one said.
    about: Mapping[str, Any]
    durability: Durability
    #: Acknowledged events may be gone: this process did not write them, their durability did not
    #: cover how the one that did has ended. The next event must be a ``rewind``.
    suspect: bool = False
    #: Idempotency key and digest of the ``create`` event.
    create_key: str | None = None
    create_digest: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpentKey:
    """The Idempotency-Key of the ``create`` event of a session that was deleted."""

    key: Key
    idempotency_key: str
    digest: bytes
    #: Of the event, Unix seconds.
    created: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotRow:
    """A kept snapshot."""

    lsn: int
    #: Of the session after event ``lsn``.
    version: int
    nbytes: int
    #: When it was taken, Unix seconds.
    time: float
    #: The name under which it is kept whatever comes; None: as long as it is among the newest two.
    pin: str | None = None


class Store(Protocol):
    """Journals, payloads and snapshots of many sessions. Any thread may call any method."""

    @property
    def promise(self) -> Durability:
        """The strongest durability that :meth:`append` can give; weaker ones can be asked for."""

    @property
    def name(self) -> str:
        """What the ready line calls it: ``memory``, ``sqlite`` or ``postgresql``."""

    def writer(
        self,
        size_hint: int | None = None,
        durability: Durability = "always",
        *,
        read_soon: bool = False,
    ) -> PayloadWriter:
        """Return a writer for a payload of ``size_hint`` bytes (None: unknown), for an event or
        snapshot of this durability. ``read_soon``: it pays to keep it in memory for a while."""

    def submit(self, events: Sequence[Event], soon: Soon | None = None) -> Future[list[Outcome]]:
        """Commit each event on its own, in order; the future has one outcome per event.

        It may be done where ``soon`` leads, if it waits for no disk.

        The future ends when every accepted event survives what its durability promises (``memory``:
        its ``create`` and the latest snapshot do), and every call that begins afterwards sees
        them. Calls that overlap share the work (group commit). An event is accepted if and only if

        * its kind is ``create``, its key is new and its lsn is 1; its ``owner_epoch`` becomes the
          session's current one; or
        * its key exists, its ``owner_epoch`` is the current one and its lsn is last + 1; or
        * its kind is ``rewind``, its key exists, its ``owner_epoch`` is the current one and its lsn
          is in [2, last + 1]: the events and snapshots from that lsn on are dropped with it, in one
          commit, and the session is no longer suspect;

        and its record and about are strict JSON, and its session is not suspect unless it is a
        ``rewind``. An event whose durability is not ``memory`` after some that were needs a
        snapshot of the last of them first. One refused event takes no other down, of its session or
        of another, except by the gap that it leaves. Of several racing appends of the same lsn
        exactly one is accepted. Later changes to ``record`` by the caller do not reach the store.
        """

    def append(self, events: Sequence[Event]) -> list[Outcome]:
        """Wait for :meth:`submit`."""

    def claim(self, key: Key) -> int:
        """Return an ``owner_epoch`` above every one that this store has given or accepted.

        If ``key`` exists, it is its current one from now on: an append with an older one is
        refused. A session that was never claimed has the epoch of its ``create`` (0 by default).
        """

    def events(
        self,
        key: Key,
        after_lsn: int = 0,
        upto_lsn: int | None = None,
        kinds: Collection[str] | None = None,
        *,
        payloads: bool = True,
    ) -> Iterator[Event]:
        """Yield the committed events with ``after_lsn < lsn <= upto_lsn``, by lsn.

        Those that were committed when this was called, and no later ones; nothing for a key that
        does not exist. Rows below the retained ones are missing; the payload of an event at or
        below the older of two snapshots is None, and of every event without ``payloads``. (An event
        whose durability is ``memory`` may lose its payload to the first snapshot at or above it.)
        """

    def first_at(self, key: Key, version: int) -> int | None:
        """Return the lsn of the first kept event whose version is at least ``version``, or None."""

    def snapshot(self, key: Key, lsn: int, frame: Payload, pin: str | None = None) -> None:
        """Keep ``frame`` as the state after event ``lsn``; return when it was read back and is as
        safe as ``always`` promises, whatever the durability of the events.

        The two snapshots with the highest lsn are kept, and those with a ``pin``; one of the same
        lsn is replaced, but keeps its pin if this has none. Once there are two, the payloads of all
        events at or below the older of the two are dropped, and of those events' rows all but the
        last 100,000 of the journal. Events above the older one stay whole. (A pinned one below
        them has no event payloads behind it: it stands for its own version only.)
        Raises SessionNotFound for an unknown key, ValueError for an lsn that is not committed or
        whose row is not kept, Damaged if the frame does not read back, OutOfSpace; then nothing has
        changed. After Unavailable it may have. The frame is the store's, whatever it raises.
        """

    def unpin(self, key: Key, lsn: int) -> bool:
        """Let a pinned snapshot go as any other; return whether there was one."""

    def snapshots(self, key: Key) -> list[SnapshotRow]:
        """Return the kept snapshots, by lsn."""

    def read_snapshot(self, key: Key, lsn: int) -> Payload | None:
        """Return the frame of the kept snapshot of exactly this lsn, or None."""

    def delete(self, key: Key) -> bool:
        """Forget the journal, payloads and snapshots of ``key``; return whether there were any.

        The key can then be created again, from lsn 1. The Idempotency-Key of its ``create`` event
        stays known for 24 hours from that event: see :meth:`spent_keys`.
        """

    def spent_keys(self) -> list[SpentKey]:
        """Return the Idempotency-Keys that created sessions which are gone, the oldest first."""

    def sessions(self) -> list[SessionRow]:
        """Return the rows of all sessions of all tenants, in the order of their creation."""

    def session(self, key: Key) -> SessionRow | None:
        """Return the row of one session."""

    def close(self) -> None:
        """Finish what was submitted and release everything.

        May be called twice; other calls raise Unavailable from then on.
        """


def refusal(
    event: Event, last_lsn: int | None, owner_epoch: int, suspect: bool = False
) -> OptserveError | None:
    """Return why ``event`` cannot follow a journal that ends at ``last_lsn`` (None: no journal)."""
    name = event.key.session
    if event.kind == "create" and last_lsn is not None:
        return SessionExists(f"session {name!r} exists")
    if event.kind != "create" and last_lsn is None:
        return SessionNotFound(f"no session {name!r}")
    if event.kind != "create" and event.owner_epoch != owner_epoch:
        return Misdirected(
            f"event of session {name!r} has owner_epoch {event.owner_epoch}, "
            f"the current one is {owner_epoch}"
        )
    last = last_lsn or 0
    if event.kind == "rewind" and 2 <= event.lsn <= last + 1:
        return None
    if suspect:
        return Internal(
            f"event {event.lsn} of session {name!r} must be a rewind: "
            "acknowledged events before it may be gone"
        )
    if event.lsn != last + 1:
        return Internal(
            f"event of session {name!r} has lsn {event.lsn}, expected {last + 1} "
            f"(last committed {last})"
        )
    return None


def record_text(event: Event) -> str:
    """Return ``event.record`` as the JSON text that a store keeps; Internal if it has none."""
    where = f"event {event.lsn} of session {event.key.session!r}"
    for name, value in (("loss", event.loss), ("grad_norm", event.grad_norm)):
        if value is not None and not math.isfinite(value):
            raise Internal(f"{where}: {name} must be finite or None, got {value!r}")
    try:
        return _STRICT.encode(event.record)
    except (TypeError, ValueError, RecursionError) as exc:
        raise Internal(f"{where}: the record is not strict JSON: {exc}") from exc
