"""How ``torch.py`` brings gradients and hyperparameters to its session; needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optserve_client import errors, wire
from optserve_client._values import Json, Params, StepResult
from optserve_client.client import Client
from optserve_client.compress import Compressor
from optserve_client.session import Session
from optserve_client.worker import Worker


def worker_of(worker: Worker | str | None, client: Client, session_id: str | None) -> Worker | None:
    """Return who pushes: nobody in particular, one that is there, or a new one of this name."""
    if worker is None or isinstance(worker, Worker):
        if worker is not None and session_id not in (None, worker.session.id):
            raise errors.Invalid(
                f"session_id is {session_id!r}, the worker's session is {worker.session.id!r}"
            )
        return worker
    if session_id is None:
        raise errors.Invalid("worker needs session_id: all workers of a model give the same one")
    return Worker(client, session_id, worker)


class Pusher:
    """Pushes into a session, alone or as one of several workers."""

    def __init__(
        self, session: Session, worker: Worker | None, hyper: Hyper, compress: Compressor | None
    ) -> None:
        self.session, self.worker = session, worker
        self._hyper, self._compress = hyper, compress
        #: Of the last push, where there are several workers.
        self.result: StepResult | None = None
        workers = session.info["config"].get("workers")
        if workers is None and worker is not None:
            raise errors.Invalid(
                f"session {session.id!r} is not one of several workers: create it with "
                "session={'workers': {'mode': 'sync', 'count': 2}} or the like",
                field="worker",
            )
        #: Whether it takes deltas, and no gradients.
        self.deltas = workers is not None and workers["push"] == "deltas"

    def pull(self) -> Params:
        return self.session.params() if self.worker is None else self.worker.pull()

    def at_hand(self) -> Params:
        """Return the params that the next push of this worker is of."""
        assert self.worker is not None
        return self.worker.pull() if self.worker.params is None else self.worker.params

    def push(
        self,
        groups: Sequence[dict[str, Any]],
        tensors: Mapping[str, Any],
        edits: Callable[[], Mapping[str, wire.Tensor]],
        *,
        inside: bool = False,
        abandon: bool = False,
        **told: Any,
    ) -> StepResult:
        """Push ``tensors`` and what was changed in ``groups``; take over what the server has then.

        ``edits`` returns the params that were changed here; ``inside``: a line search is open, and
        nothing else goes along.
        """
        changes = None if inside else self._hyper.changes(groups)
        told["compress"] = self._compress
        if self.worker is None:
            edited = {} if inside else edits()
            result = self.session.step(
                tensors, params=edited or None, groups=changes, abandon=abandon, **told
            )
            self._hyper.sent(changes or [])
        else:
            result = self.result = self._push_as(self.worker, tensors, edits, changes, told)
            if result.groups:  # not of a push that was dropped
                self._hyper.adopt(groups, result.groups)
        if result.scheduler is not None and result.scheduler["advance"] == "step":
            self._hyper.set_lr(groups, result.scheduler["next_lr"])
        return result

    def _push_as(
        self,
        worker: Worker,
        tensors: Mapping[str, Any],
        edits: Callable[[], Mapping[str, wire.Tensor]],
        changes: list[Json] | None,
        told: dict[str, Any],
    ) -> StepResult:
        if self.deltas:
            return worker.push(deltas=tensors, groups=changes, **told)
        if edited := edits():
            raise RuntimeError(
                f"parameter {min(edited)!r} was changed between two steps, and those of several "
                "workers are the session's: pull() brings them back"
            )
        return worker.push(tensors, groups=changes, **told)


class Hyper:
    """The hyperparameters in torch's ``param_groups``, and what the server has of them."""

    def __init__(self, known: set[str]) -> None:
        self.known = known
        self._sent: list[Json] = []

    def of(self, group: Mapping[str, Any]) -> Json:
        return {key: plain(group[key]) for key in self.known & group.keys()}

    def specs(
        self,
        groups: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        defaults: Mapping[str, Any],
    ) -> list[Json] | None:
        """Return ``groups`` of the create body: what differs in each group, by exact names."""
        specs, start = [], 0
        for group in groups:
            own_names = list(names[start : start + len(group["params"])])
            start += len(own_names)
            own = {k: v for k, v in self.of(group).items() if v != plain(defaults.get(k))}
            specs.append({**own, "params": own_names})
        return specs if len(specs) > 1 or len(specs[0]) > 1 else None

    def adopt(self, groups: Sequence[dict[str, Any]], there: Sequence[Json]) -> None:
        """Take over the hyperparameters that the server has."""
        for group, theirs in zip(groups, there, strict=True):
            hyper = self.of(theirs).items()
            group.update({k: tuple(v) if isinstance(v, list) else v for k, v in hyper})
        self._sent = [self.of(group) for group in groups]

    def differ(self, groups: Sequence[Mapping[str, Any]], there: Sequence[Json]) -> None:
        """Note what the server has, which is to change to what is here."""
        pairs = zip(groups, there, strict=True)
        self._sent = [self.of(here) | self.of(theirs) for here, theirs in pairs]

    def changes(self, groups: Sequence[Mapping[str, Any]]) -> list[Json] | None:
        """Return what was changed in ``groups`` since the server last heard of it."""
        changes = [
            {key: value for key, value in self.of(group).items() if sent.get(key) != value}
            for group, sent in zip(groups, self._sent, strict=True)
        ]
        return changes if any(changes) else None

    def sent(self, changes: Sequence[Json]) -> None:
        for sent, changed in zip(self._sent, changes, strict=False):
            sent.update(changed)

    def set_lr(self, groups: Sequence[dict[str, Any]], rates: Sequence[float]) -> None:
        """Take over what the server's own scheduler set."""
        for group, sent, lr in zip(groups, self._sent, rates, strict=True):
            group["lr"] = sent["lr"] = lr


def plain(value: Any) -> Any:
    """Return a hyperparameter as JSON has it."""
    if hasattr(value, "tolist"):  # a tensor, or a number or an array of numpy
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value
