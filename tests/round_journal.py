"""What the journal of a session with rounds must say, and an oracle of its numbers.

Nothing of the service computes here: rows and payloads come from the store, frames are read by the
safetensors package, the update is torch's own. Payloads below the older of two snapshots are gone;
what was sent is known from the workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from optserve.store.base import Event, Key, Store
from tests.crew import digest

Arrays = dict[str, np.ndarray]
#: A push: worker, epoch, seq.
Push = tuple[str, int, int]


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a worker sent as one of its pushes."""

    #: The version that the gradient was computed on, and on which of the worker's batches.
    base: int
    number: int
    digest: str


def arrays(event: Event, kind: str) -> Arrays:
    """Return the tensors ``kind/<name>`` in the payload of an event, by name."""
    assert event.payload is not None, f"the payload of event {event.lsn} is gone"
    tensors = safetensors.numpy.load(event.payload.read())
    prefix = f"{kind}/"
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A round, as its rows have it."""

    number: int
    #: Its pushes, and its close or fail.
    pushes: Mapping[Push, Event]
    end: Event

    @property
    def closed(self) -> bool:
        return self.end.kind == "close"

    @property
    def order(self) -> list[Push]:
        """Its pushes in the order in which they combine."""
        return sorted(self.pushes, key=lambda push: push[0].encode())

    @property
    def opened_at(self) -> float:
        return min(event.time for event in self.pushes.values())


class Journal:
    """The rows of one session, put into rounds; whatever does not fit together is refused."""

    def __init__(self, store: Store, session: str) -> None:
        self.events = list(store.events(Key("default", session)))
        assert [event.lsn for event in self.events] == list(range(1, len(self.events) + 1))
        self.rounds: list[Ended] = []
        #: The round that is open at the end.
        self.open: dict[Push, Event] = {}
        for event in self.events[1:]:
            self._take(event)

    def _take(self, event: Event) -> None:
        request = event.record.get("request", {})
        if event.kind == "contribution":
            assert request["round"] == len(self.rounds) + 1
            push = (event.worker or "", request["epoch"], event.seq or 0)
            assert push[0] not in [worker for worker, _, _ in self.open], f"{push} is the second"
            self.open[push] = event
        elif event.kind in ("close", "fail"):
            assert request["round"] == len(self.rounds) + 1
            assert self.open, f"event {event.lsn} ends a round that nobody opened"
            self.rounds.append(Ended(number=request["round"], pushes=self.open, end=event))
            self.open = {}

    @property
    def closes(self) -> list[Ended]:
        return [ended for ended in self.rounds if ended.closed]

    def check_counted(self, sent: Mapping[Push, Sent]) -> None:
        """Each round made the next version of exactly the pushes that it had, in the order of their
        names; none of them counts twice, and each is as it was sent, as far as it is kept."""
        counted: Counter[Push] = Counter()
        for version, ended in enumerate(self.closes, 1):
            assert ended.end.version == version
            listed = [tuple(push) for push in ended.end.record["request"]["pushes"]]
            assert listed == ended.order
            counted.update(listed)
            assert all(sent[push].base == version - 1 for push in listed)
            for push, event in ended.pushes.items():
                if event.payload is not None:
                    assert digest(arrays(event, "grad")) == sent[push].digest, f"{push} is another"
        assert [push for push, times in counted.items() if times > 1] == []

    def check_acknowledged(self, told: Iterable[Mapping[str, Any]]) -> int:
        """What workers were told of their pushes is what the rows say; return how many there were.

        ``told``: ``push``, the version that it ``made``, and the number of its ``round``.
        """
        by_version = {ended.end.version: ended for ended in self.closes}
        checked = 0
        for one in told:
            ended = by_version[one["made"]]
            push = tuple(one["push"])
            assert push in ended.pushes, f"{push} is not in version {one['made']}"
            assert ended.number == one["round"]
            checked += 1
        return checked

    def overdue(self, deadline_s: float, outages: Sequence[tuple[float, float]]) -> list[float]:
        """Return by how much each round ended after its deadline, or after the end of an outage in
        which that was; seconds."""
        found = []
        for ended in self.rounds:
            due = ended.opened_at + deadline_s
            for began, over in outages:
                if began <= due and ended.opened_at <= over:
                    due = max(due, over)
            found.append(ended.end.time - due)
        return found

    def spanning(self, outages: Sequence[tuple[float, float]]) -> int:
        """Return how many closed rounds had a push before an outage and ended after it."""
        return sum(
            ended.opened_at < began and over < ended.end.time
            for ended in self.closes
            for began, over in outages
        )

    def replayed(
        self,
        first: Arrays,
        compute: Callable[[Push, Arrays], Arrays],
        build: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
    ) -> Arrays:
        """Return the params that the closed rounds make of ``first``, by numpy and torch.

        ``compute`` returns the gradient of a push at the params that it was computed on, ``build``
        an optimizer.
        """
        leaves = {name: torch.tensor(value) for name, value in first.items()}
        params = {name: leaf.numpy() for name, leaf in leaves.items()}  # views: they move along
        optimizer = build(list(leaves.values()))
        for ended in self.closes:
            made = [compute(push, params) for push in ended.order]
            for name, leaf in leaves.items():
                total = made[0][name].copy()
                for one in made[1:]:
                    total += one[name]
                leaf.grad = torch.from_numpy(total / np.float32(len(made)))
            optimizer.step()
        return params
