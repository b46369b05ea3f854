"""Which requests of whom were already committed: exactly-once bookkeeping of one session.

Pure: a fold over the session's events, so that it comes back from a snapshot and a replay. Time is
passed in and only ever forgets keys.

A worker numbers its requests to a session from 1, sends them one at a time and repeats one with
the same number until it is answered. A repeat within its last 16 is answered from here; what is
older, or skips a number, is refused, because the ledger cannot tell whether it was applied.

A worker that registers gets a new epoch, in which its numbers begin again; one that goes by the
same name with an older epoch is refused from then on, and so is every one after its removal.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any

from optserve.sessions.identity import Duplicate, Identity, Pushed, check_identity
from optserve_client import wire
from optserve_client.errors import (
    Fenced,
    Invalid,
    KeyReused,
    OutOfSequence,
    RoundFailed,
    WorkerNotFound,
)

#: Results kept per worker.
RESULTS_PER_WORKER = 16
#: Results kept per session: of all its workers together, and of keys.
RESULTS = 10_000
#: Workers whose last seq is known. Clients draw random names, so the oldest must go at some point;
#: a forgotten one that goes on is refused with out_of_sequence.
WORKERS = 100_000
KEY_LIFE_S = 24 * 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Result:
    digest: bytes
    applied_version: int | None
    lsn: int
    reply: dict[str, Any]
    #: A worker's request has a seq, one with a key the time of its event.
    seq: int = 0
    time: float = 0.0
    #: A push whose round failed: as the last one of its worker, its number may be used again.
    failed: bool = False

    def duplicate(self) -> Duplicate:
        reply = copy.deepcopy(self.reply)
        return Duplicate(applied_version=self.applied_version, reply=reply, lsn=self.lsn)

    def dump(self) -> dict[str, Any]:
        row = {name: getattr(self, name) for name in self.__slots__}
        return {**row, "digest": self.digest.hex()}

    @classmethod
    def load(cls, row: Mapping[str, Any]) -> _Result:
        result = cls(**{**row, "digest": bytes.fromhex(row["digest"])})
        for name, kinds in _KINDS.items():
            if type(value := getattr(result, name)) not in kinds:
                raise ValueError(f"{name} is a {type(value).__name__}")
        if not math.isfinite(result.time):
            raise ValueError(f"time is {result.time}")
        return result


_KINDS: Mapping[str, tuple[type, ...]] = {
    "applied_version": (int, NoneType),
    "lsn": (int,),
    "reply": (dict,),
    "seq": (int,),
    "time": (int, float),
    "failed": (bool,),
}
_WORKER_KINDS: Mapping[str, tuple[type, ...]] = {
    "removed": (bool,),
    "contributions": (int,),
    "version": (int, NoneType),
    "seen": (int, float),
}


@dataclass(slots=True)
class _Worker:
    epoch: int = 1
    last_seq: int = 0
    #: Of the seqs up to ``last_seq``, without gaps.
    results: deque[_Result] = field(default_factory=deque)
    #: Nothing is taken from it before it registers again.
    removed: bool = False
    #: Pushes that were committed, the version that the last one was computed on, and when the last
    #: request was committed, Unix seconds.
    contributions: int = 0
    version: int | None = None
    seen: float = 0.0

    def check(self) -> None:
        """Raise ValueError for what no commits can have made."""
        if type(self.epoch) is not int or type(self.last_seq) is not int:
            raise ValueError(f"epoch {self.epoch!r:.40} or last_seq {self.last_seq!r:.40}")
        for name, kinds in _WORKER_KINDS.items():
            if type(value := getattr(self, name)) not in kinds:
                raise ValueError(f"{name} {value!r:.40}")
        if not math.isfinite(self.seen) or self.contributions < 0:
            raise ValueError(f"seen {self.seen}, {self.contributions} contributions")
        first = self.last_seq - len(self.results) + 1
        if self.epoch < 1 or first < 1 or len(self.results) > RESULTS_PER_WORKER:
            raise ValueError(
                f"epoch {self.epoch}, last_seq {self.last_seq}, {len(self.results)} results"
            )
        if [result.seq for result in self.results] != list(range(first, self.last_seq + 1)):
            raise ValueError(f"the results up to seq {self.last_seq} have gaps")


class Ledger:
    """What was committed, by worker and by key."""

    def __init__(self) -> None:
        #: The one whose last commit is oldest comes first.
        self._workers: OrderedDict[str, _Worker] = OrderedDict()
        #: ``(worker, seq)`` of all results that the workers hold, oldest first.
        self._held: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._keys: OrderedDict[str, _Result] = OrderedDict()

    def workers(self) -> Iterator[dict[str, Any]]:
        """Yield what is known of each worker, by name."""
        for name in sorted(self._workers, key=str.encode):
            worker = self._workers[name]
            if not worker.removed:
                yield {
                    "worker": name,
                    "epoch": worker.epoch,
                    "last_seq": worker.last_seq,
                    "version": worker.version,
                    "contributions": worker.contributions,
                    "last_seen": worker.seen,
                }

    def position(self, worker: str) -> tuple[int, int]:
        """Return ``(epoch, last_seq)`` of a worker; ``(1, 0)`` for one that never sent anything."""
        known = self._workers.get(worker)
        return (known.epoch, known.last_seq) if known else (1, 0)

    def check(self, identity: Identity, now: float) -> Duplicate | None:
        """Return what a repeat was answered, or None if it is new; ``now`` in Unix seconds.

        Raises Invalid for half an identity or two of them, Fenced for an epoch below the worker's
        current one, OutOfSequence for a gap, a repeat older than the kept results, or an epoch that
        was never given (the worker's numbers are not this session's; both errors carry ``epoch``
        and ``last_seq``), KeyReused if the same number or key came with another payload.
        Changes nothing: only :meth:`commit` does.
        """
        check_identity(identity)
        if identity.key is not None:
            return self._check_key(identity.key, identity.digest, now)
        if identity.worker is None or identity.seq is None:
            return None
        return self._check_seq(identity.worker, identity.epoch, identity.seq, identity.digest)

    def _check_key(self, key: str, digest: bytes, now: float) -> Duplicate | None:
        known = self._keys.get(key)
        if known is None or known.time < now - KEY_LIFE_S:
            return None
        if known.digest != digest:
            raise KeyReused(f"Idempotency-Key {key!r} was used before with another payload")
        return known.duplicate()

    def _check_seq(
        self, worker: str, epoch: int | None, seq: int, digest: bytes
    ) -> Duplicate | None:
        current, last = self.position(worker)
        at = {"epoch": current, "last_seq": last}
        known = self._workers.get(worker)
        if epoch is not None and epoch < current:  # also where a newer namesake was removed
            raise Fenced(
                f"worker {worker!r} sent epoch {epoch}, the current one is {current}", **at
            )
        if known is not None and known.removed:
            raise Fenced(
                f"worker {worker!r} was removed; it has to register again", **at, removed=True
            )
        if epoch is not None and epoch > current:
            raise OutOfSequence(
                f"worker {worker!r} sent epoch {epoch}, the highest given is {current}", **at
            )
        if seq == last + 1:
            return None
        sent = f"worker {worker!r} sent seq {seq}, expected {last + 1} (last applied {last})"
        if seq > last:
            raise OutOfSequence(sent, **at)
        results = self._workers[worker].results
        if not results or seq < results[0].seq:
            raise OutOfSequence(f"{sent}; that is too long ago to tell what it did", **at)
        result = results[seq - results[0].seq]
        if result.failed and seq == last:
            return None
        if result.digest != digest:
            raise KeyReused(f"worker {worker!r} sent seq {seq} before with another payload", **at)
        if result.failed:
            raise RoundFailed(f"the round of seq {seq} of worker {worker!r} failed", **at)
        return result.duplicate()

    def commit(
        self,
        identity: Identity,
        *,
        applied_version: int | None,
        lsn: int,
        reply: dict[str, Any],
        time: float,
    ) -> None:
        """Note that event ``lsn``, of ``time``, was committed for a request that passed check.

        ``reply`` (JSON) is kept as it is, not copied: do not change it afterwards.
        """
        if identity.key is not None:
            self._commit_key(
                identity.key,
                _Result(
                    digest=identity.digest,
                    applied_version=applied_version,
                    lsn=lsn,
                    reply=reply,
                    time=time,
                ),
            )
        elif identity.worker is not None and identity.seq is not None:
            self._commit_seq(
                identity.worker,
                _Result(
                    digest=identity.digest,
                    applied_version=applied_version,
                    lsn=lsn,
                    reply=reply,
                    seq=identity.seq,
                ),
                time,
            )

    def _commit_key(self, key: str, result: _Result) -> None:
        self._keys.pop(key, None)
        self._keys[key] = result
        # By order of commit: where the clock was set back, a key lives a little longer.
        while len(self._keys) > RESULTS or _oldest(self._keys).time < result.time - KEY_LIFE_S:
            self._keys.popitem(last=False)

    def _commit_seq(self, name: str, result: _Result, time: float) -> None:
        worker = self._workers.setdefault(name, _Worker())
        self._workers.move_to_end(name)
        if result.seq == worker.last_seq and worker.results:  # of a round that failed
            worker.results.pop()
            del self._held[name, result.seq]
        worker.last_seq, worker.seen = result.seq, time
        worker.results.append(result)
        self._held[name, result.seq] = None
        if len(worker.results) > RESULTS_PER_WORKER:
            del self._held[name, worker.results.popleft().seq]
        if len(self._held) > RESULTS:
            (other, _), _ = self._held.popitem(last=False)
            self._workers[other].results.popleft()
        self._forget()

    def _forget(self) -> None:
        """Keep no more than WORKERS, those that were heard of last."""
        while len(self._workers) > WORKERS:
            name, oldest = self._workers.popitem(last=False)
            for result in oldest.results:
                del self._held[name, result.seq]

    # --- workers ---------------------------------------------------------------------------------

    def next_epoch(self, worker: str) -> int:
        """Return the epoch that ``worker`` gets if it registers now."""
        known = self._workers.get(worker)
        return known.epoch + 1 if known else 1

    def register(self, name: str, epoch: int, time: float) -> None:
        """Begin an epoch of a worker, in which its numbers start at 1."""
        known = self._workers.setdefault(name, _Worker())
        for result in known.results:
            del self._held[name, result.seq]
        fresh = _Worker(epoch=epoch, contributions=known.contributions, seen=time)
        self._workers[name] = fresh
        self._workers.move_to_end(name)
        self._forget()

    def check_known(self, name: str) -> None:
        """Raise WorkerNotFound for one that never sent anything or is removed."""
        known = self._workers.get(name)
        if known is None or known.removed:
            raise WorkerNotFound(f"no worker {name!r:.140}")

    def remove(self, name: str) -> None:
        self._workers[name].removed = True

    def pushed(self, worker: str, base_version: int | None) -> None:
        """Count one committed push of a worker."""
        known = self._workers[worker]
        known.contributions += 1
        known.version = base_version

    def resolve(self, push: Pushed, *, applied_version: int | None, reply: dict[str, Any]) -> None:
        """Note how the round ended that a push went into; ``reply`` as in :meth:`commit`."""
        self._amend(push, applied_version=applied_version, reply=reply)

    def release(self, push: Pushed) -> None:
        """Note that the round of a push failed."""
        self._amend(push, failed=True)

    def _amend(self, push: Pushed, **changes: Any) -> None:
        worker = self._workers.get(push.worker)
        if worker is None or worker.epoch != push.epoch or not worker.results:
            return
        at = push.seq - worker.results[0].seq
        if at >= 0:  # else it is forgotten
            worker.results[at] = replace(worker.results[at], **changes)

    # --- all of it -------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """Return everything as JSON values, equal for equal histories; replies are shared."""
        return {
            "workers": [
                {
                    "worker": name,
                    "epoch": worker.epoch,
                    "last_seq": worker.last_seq,
                    "results": [result.dump() for result in worker.results],
                    "removed": worker.removed,
                    "contributions": worker.contributions,
                    "version": worker.version,
                    "seen": worker.seen,
                }
                for name, worker in self._workers.items()
            ],
            "keys": [{"key": key, **result.dump()} for key, result in self._keys.items()],
        }

    @classmethod
    def load(cls, dump: Mapping[str, Any]) -> Ledger:
        """Return the ledger that :meth:`dump` was taken of; Invalid if it was not of one."""
        try:
            return cls._load(dump)
        except KeyError as exc:
            raise Invalid(f"the state file's ledger lacks {exc}") from exc
        except (TypeError, ValueError, AttributeError) as exc:
            raise Invalid(f"the state file's ledger cannot be read: {str(exc)[:200]}") from exc

    @classmethod
    def _load(cls, dump: Mapping[str, Any]) -> Ledger:
        ledger = cls()
        for row in dump["workers"]:
            wire.check_id("worker", row["worker"])
            if row["worker"] in ledger._workers:
                raise ValueError(f"worker {row['worker']!r} comes twice")
            worker = _Worker(
                row["epoch"],
                row["last_seq"],
                deque(map(_Result.load, row["results"])),
                # Files of before there were rounds have none of these.
                row.get("removed", False),
                row.get("contributions", 0),
                row.get("version"),
                row.get("seen", 0.0),
            )
            worker.check()
            ledger._workers[row["worker"]] = worker
        held = [(r.lsn, name, r.seq) for name, w in ledger._workers.items() for r in w.results]
        ledger._held.update(((name, seq), None) for _, name, seq in sorted(held))
        for row in dump["keys"]:
            if not isinstance(row["key"], str) or row["key"] in ledger._keys:
                raise ValueError(f"key {row['key']!r:.80} comes twice or is no string")
            result = {name: value for name, value in row.items() if name != "key"}
            ledger._keys[row["key"]] = _Result.load(result)
        return ledger


def _oldest(keys: OrderedDict[str, _Result]) -> _Result:
    return next(iter(keys.values()))
