"""What must outlive a failure: the journal, its payloads, snapshots. Sees bytes and JSON only."""

from optserve.store.base import Event, Key, Outcome, Payload, PayloadWriter, Store
from optserve.store.memory import MemoryStore

__all__ = ["Event", "Key", "MemoryStore", "Outcome", "Payload", "PayloadWriter", "Store"]
