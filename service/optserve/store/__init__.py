"""What must outlive a failure: the journal, its payloads, snapshots. Sees bytes and JSON only."""

from optserve.store.base import (
    Durability,
    Event,
    Key,
    Outcome,
    Payload,
    PayloadWriter,
    SessionRow,
    SnapshotRow,
    Store,
)
from optserve.store.memory import MemoryStore

__all__ = [
    "Durability",
    "Event",
    "Key",
    "MemoryStore",
    "Outcome",
    "Payload",
    "PayloadWriter",
    "SessionRow",
    "SnapshotRow",
    "Store",
]
