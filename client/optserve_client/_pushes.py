"""A push as its sender knows it: enough to send all of it again, and to commit it under a number.

Server and network may fail at any time, and a server that was started again knows of no push. So
what was put is kept until the commit is answered. A commit sends what the server lacks, opens
another push if it has to, and goes by the same number each time: the same tensors with the same
fields are one request to the server, whatever push they came in.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from urllib.parse import quote

from optserve_client import errors, wire
from optserve_client._exchange import Retry, Steps, Trail, doubted, exchange
from optserve_client._messages import Answer, Draft
from optserve_client._values import Json

#: How often another push is opened for one that the server does not know.
TIMES = 5


@dataclass(eq=False, slots=True)
class Staged:
    """What was put, and where the server has it."""

    #: ``/v1/sessions/{id}/pushes``.
    path: str
    #: Those that open it.
    fields: Json
    #: Of each gradient its tensors as a frame has them; None: there is no gradient.
    gradients: dict[str, dict[str, wire.Tensor] | None] = field(default_factory=dict)
    #: The push on the server; None: none was opened, or it is not known there any more.
    id: str | None = None
    #: In which push each gradient has arrived.
    there: dict[str, str] = field(default_factory=dict)

    def keep(self, name: str, tensors: dict[str, wire.Tensor] | None) -> Callable[[], None]:
        """Have a gradient sent; return what undoes this, if the server refuses it."""
        known, before = name in self.gradients, self.gradients.get(name)
        there = self.there.pop(name, "")
        self.gradients[name] = tensors

        def undo() -> None:
            if known:
                self.gradients[name], self.there[name] = before, there
            else:
                del self.gradients[name]

        return undo

    def opening(self) -> Draft:
        # An answer that is lost must not leave a push behind that nobody knows.
        headers = {"Idempotency-Key": secrets.token_hex(12)}
        return Draft(method="POST", path=self.path, fields=self.fields, headers=headers)

    def putting(self, name: str, push_id: str) -> Draft:
        tensors = self.gradients[name]
        return Draft(
            method="PUT",
            path=f"{self.path}/{push_id}/{segment(name)}",
            fields={"grad": None} if tensors is None else None,
            tensors=tensors,
        )

    def committing(self, fields: Json) -> Draft:
        path = f"{self.path}/{self.id}/commit"
        return Draft(method="POST", path=path, fields=fields, accept=wire.SAFETENSORS)

    def lacking(self) -> Iterable[str]:
        """Return whose gradients the server does not have in its present push."""
        return [name for name in self.gradients if self.there.get(name) != self.id]

    def lost(self, push_id: str | None) -> None:
        """Note that the server does not know a push."""
        if self.id == push_id:
            self.id = None

    def kept(self) -> Staged:
        """Return a copy that does not change when the caller's arrays do."""
        gradients = {
            name: None if grad is None else {full: _copied(t) for full, t in grad.items()}
            for name, grad in self.gradients.items()
        }
        return replace(self, gradients=gradients, there=dict(self.there))

    def same_as(self, other: Staged) -> bool:
        if self is other:
            return True
        mine, theirs = self.gradients, other.gradients
        if (self.path, self.fields, mine.keys()) != (other.path, other.fields, theirs.keys()):
            return False
        return all(_bits(grad) == _bits(theirs[name]) for name, grad in mine.items())


@dataclass(frozen=True, slots=True)
class Commit:
    """The commit of a push before it is known who sends it."""

    staged: Staged
    fields: Json
    guarded: ClassVar[bool] = True

    def request(self, stamp: Mapping[str, Any] | None = None) -> Pushed:
        return Pushed(self.staged, {**self.fields, **(stamp or {})})


@dataclass(frozen=True, slots=True)
class Pushed:
    """A whole push as one request, which can be sent any number of times."""

    staged: Staged
    #: Of its commit.
    fields: Json

    def kept(self) -> Pushed:
        return Pushed(self.staged.kept(), self.fields)

    def same_as(self, other: object) -> bool:
        if not isinstance(other, Pushed):
            return False
        return self.fields == other.fields and self.staged.same_as(other.staged)

    def sent(self, retry: Retry, trail: Trail) -> Steps[Answer]:
        """Do what :func:`exchange` does with one request."""
        staged, answer = self.staged, None
        for _ in range(TIMES):
            doubt = trail.maybe_done
            try:
                answer = yield from _completed(staged, retry)
            except errors.OptserveError as exc:
                raise (doubted(exc) if doubt else exc) from exc.__cause__
            if answer is None:
                draft = staged.committing(self.fields)
                answer = yield from exchange(draft.request(), retry, trail)
            elif doubt:
                answer = replace(answer, doubtful=True)
            if not _lost(answer):
                trail.maybe_done = False
                return answer
            staged.lost(staged.id)
            # An earlier copy of the commit may have worked, and its answer and its push be lost.
            trail.maybe_done = answer.doubtful
        assert answer is not None
        if answer.doubtful:
            raise doubted(answer.error())
        return answer


def _completed(staged: Staged, retry: Retry) -> Steps[Answer | None]:
    """Open a push if there is none, and put what it lacks; return a refusal if there was one."""
    if staged.id is None:
        answer = yield from exchange(staged.opening().request(), retry, Trail())
        if not answer.ok:
            return answer
        staged.id = answer.scalars["push"]
    for name in staged.lacking():
        assert staged.id is not None
        answer = yield from exchange(staged.putting(name, staged.id).request(), retry, Trail())
        if not answer.ok:
            return answer
        staged.there[name] = staged.id
    return None


def _lost(answer: Answer) -> bool:
    return answer.status == 404 and isinstance(answer.error(), errors.PushNotFound)


def segment(name: str) -> str:
    """Return a parameter's name as one part of a path."""
    quoted = quote(name, safe="")
    # Dots by themselves would be taken for a way up.
    return quoted.replace(".", "%2E") if not name.strip(".") else quoted


def _copied(tensor: wire.Tensor) -> wire.Tensor:
    if isinstance(tensor, wire.Bits):
        return wire.Bits(tensor.array.copy(), tensor.dtype)
    return tensor.copy()


def _bits(tensors: dict[str, wire.Tensor] | None) -> Any:
    if tensors is None:
        return None
    return {
        name: (wire.dtype_of(t), tuple(t.shape), wire.as_bytes(t)) for name, t in tensors.items()
    }
