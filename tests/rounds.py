"""What the journal of a session with rounds must say, and an oracle of its numbers.

Nothing of the service computes here: rows and payloads come from the store, frames are read by the
safetensors package, the update is torch's own.
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

    def check_closes(self) -> None:
        """Each round made the next version of exactly the pushes that it had, in the order of their
        names; no push and no gradient counts twice."""
        counted: Counter[Push] = Counter()
        gradients: Counter[str] = Counter()
        for version, ended in enumerate(self.closes, 1):
            assert ended.end.version == version
            listed = [tuple(push) for push in ended.end.record["request"]["pushes"]]
            assert listed == sorted(ended.pushes, key=lambda push: push[0].encode())
            counted.update(listed)
            gradients.update(digest(arrays(event, "grad")) for event in ended.pushes.values())
        assert not [push for push, times in counted.items() if times > 1]
        assert not [which for which, times in gradients.items() if times > 1]

    def check_acknowledged(self, told: Iterable[Mapping[str, Any]]) -> int:
        """What a worker was told of a push is what the rows say; return how many there were."""
        by_version = {ended.end.version: ended for ended in self.closes}
        checked = 0
        for one in told:
            ended = by_version[one["applied"]]
            push = tuple(one["pushed"])
            assert push in ended.pushes, f"{push} is not in version {one['applied']}"
            assert digest(arrays(ended.pushes[push], "grad")) == one["digest"]
            assert (ended.number, one["base"]) == (one["round"], one["applied"] - 1)
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

    def replayed(self, build: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> Arrays:
        """Return the params that the closed rounds make of the first ones, by torch and numpy."""
        leaves = {n: torch.tensor(a) for n, a in arrays(self.events[0], "param").items()}
        optimizer = build(list(leaves.values()))
        for ended in self.closes:
            order = sorted(ended.pushes, key=lambda push: push[0].encode())
            made = [arrays(ended.pushes[push], "grad") for push in order]
            for name, leaf in leaves.items():
                total = made[0][name].copy()
                for one in made[1:]:
                    total += one[name]
                leaf.grad = torch.from_numpy(total / np.float32(len(made)))
            optimizer.step()
        return {name: leaf.numpy() for name, leaf in leaves.items()}
