"""What the clients take and return. Import these from :mod:`optserve_client`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from optserve_client.wire import Array, Tensor

#: A JSON object.
Json: TypeAlias = dict[str, Any]
#: Which params are pulled.
Weights: TypeAlias = Literal["live", "eval", "ema", "best"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sparse:
    """A sparse COO gradient; the parameter must be declared in ``sparse`` at creation."""

    #: int64, ``[n, entries]`` for the first ``n`` dimensions; duplicates are summed.
    indices: Array
    #: ``[entries, *shape[n:]]``, in the session's dtype.
    values: Tensor
    #: Of the dense tensor.
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepResult:
    """What one step did. Fields are those of the reply, in torch's words."""

    #: The session, and the generation of its history.
    id: str
    generation: str
    #: Version of the params in this reply.
    version: int
    #: Version that this request made, or its round; None while its window or round is open, or if
    #: it was skipped.
    applied_version: int | None
    #: Optimizer updates so far, torch's ``step``.
    updates: int
    #: Whether this request changed the params, alone or with the others of its round.
    applied: bool
    #: Gradients in the open accumulation window.
    accumulated: int | None
    #: True if this request had been committed before: it was not applied again.
    duplicate: bool
    #: Why the step was skipped, or None.
    skipped: str | None
    #: Effective hyperparameters of each group, as used in this update.
    groups: list[Json]
    #: ``advance``, ``last_epoch`` and ``next_lr``; None without a scheduler.
    scheduler: Json | None
    #: Total norm over all groups before clipping, and what clip_grad_norm multiplied by.
    grad_norm: float | None
    clip_coef: float | None
    #: Of a push into a round: ``number``, ``base_version``, and at its end which ``workers`` were
    #: in, how many are ``missing``, ``closed_by`` ``count`` or ``deadline``, and the ``weight`` of
    #: this push; while it is open who has ``contributed`` of ``count``, and ``deadline_at``.
    round: Json | None
    #: How many versions the session was ahead of ``base_version``, where workers are asynchronous.
    staleness: int | None
    #: ``evaluate``: LBFGS wants loss and gradient at :attr:`params`, in a further step.
    need: str | None
    #: What :attr:`params` holds: ``params``, or ``delta``: new minus previous; None: nothing. Look
    #: at it after asking for a delta, because a repeated step is answered with params.
    returned: str | None
    #: Writable arrays that share one buffer, or None for ``returns="none"`` and in an open round.
    params: dict[str, Tensor] | None
    #: All scalars of the reply.
    raw: Json = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Params(Mapping[str, Tensor]):
    """Weights of one version: a mapping from names to arrays, in the session's order."""

    version: int
    generation: str
    #: ``live``, ``eval``, ``ema`` or ``best``.
    weights: str
    etag: str
    #: Writable arrays that share one buffer.
    arrays: dict[str, Tensor] = field(repr=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Some of the sessions on a server."""

    #: Status of each.
    sessions: list[Json]
    #: Where the next page begins; None on the last.
    next_cursor: str | None
