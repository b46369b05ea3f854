"""The pushes of one synchronous update, as far as the journal has them.

Pure: a fold over the session's events. A round opens with its first push and ends with a ``close``,
which lists the pushes that it combines, or with a ``fail``, which drops them. No snapshot is taken
while one is open, so what a state file says of rounds is how many there were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optserve.store.base import Event, Payload
from optserve_client.errors import Conflict


@dataclass(frozen=True, kw_only=True, slots=True)
class Contribution:
    """One push into the open round."""

    worker: str
    epoch: int
    seq: int
    #: Of its event, Unix seconds.
    time: float
    #: The tensors as they came over the wire, with all fields of the push.
    payload: Payload
    #: As the event has it: loss, metrics, groups, weight.
    request: Mapping[str, Any]

    def answer(self, reply: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``reply``, that of the round's end, as it is told to the one who sent this."""
        if (weight := self.request.get("weight")) is None:
            return dict(reply)
        return {**reply, "round": {**reply["round"], "weight": weight}}


@dataclass(kw_only=True, slots=True)
class Round:
    """The open round, or the one that the next push opens."""

    #: How many rounds have ended.
    ended: int = 0
    contributions: dict[str, Contribution] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """Counted from 1."""
        return self.ended + 1

    @property
    def open(self) -> bool:
        return bool(self.contributions)

    @property
    def opened_at(self) -> float:
        """When the first push was committed, Unix seconds."""
        return next(iter(self.contributions.values())).time

    def holds(self, worker: str | None, seq: int | None) -> bool:
        """Say whether the open round has exactly this push."""
        known = self.contributions.get(worker) if worker is not None else None
        return known is not None and known.seq == seq

    def in_order(self) -> list[Contribution]:
        """Return the pushes in byte order of their workers' names, in which they combine."""
        by_name = sorted(self.contributions.items(), key=lambda pair: pair[0].encode())
        return [contribution for _, contribution in by_name]

    def deadline(self, workers: Mapping[str, Any]) -> float:
        """Return when the open round ends at the latest, Unix seconds."""
        seconds: float = workers["deadline_s"]
        return self.opened_at + seconds

    def check_not_open(self) -> None:
        """Refuse what would take the ground from under the pushes of an open round."""
        if self.open:
            raise Conflict(
                f"round {self.number} is open, {len(self.contributions)} workers have pushed; "
                "try again when it has ended",
                round=self.number,
            )

    def note(self, event: Event) -> None:
        """Count one committed event in."""
        if event.kind == "contribution" and "round" in event.record["request"]:
            assert event.worker is not None
            assert event.seq is not None
            assert event.payload is not None
            self.contributions[event.worker] = Contribution(
                worker=event.worker,
                epoch=event.record["request"]["epoch"],
                seq=event.seq,
                time=event.time,
                payload=event.payload,
                request=event.record["request"],
            )
        elif event.kind in ("close", "fail"):
            self.ended += 1
            self.contributions = {}
