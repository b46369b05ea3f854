"""What a session answers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

from optserve.sessions.fields import StepFields
from optserve.sessions.published import Published
from optserve.sessions.state import SessionState
from optserve.sessions.weights import subtract
from optserve_client import wire
from optserve_client.errors import OptserveError

#: Params as somebody wanted them: by ``params`` or ``delta`` and the dtype.
Forms: TypeAlias = dict[tuple[str, str | None], Published]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """What is still to come of a push into an open round."""

    #: The reply at the end of the round; cancel it if nobody wants it any more.
    future: Future[Reply]
    #: How long the request wants to wait for it.
    wait_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """Scalars for everybody, params for those who asked for them."""

    #: As strict JSON.
    scalars: dict[str, Any]
    params: Published | None = None
    #: ``params`` or ``delta``: what ``params`` holds; None without params.
    returned: str | None = None
    #: How the request wanted params: ``list`` or ``base64``, and a dtype; None: the defaults.
    encoding: str | None = None
    dtype: str | None = None
    #: Why the request was refused, where params come with that; ``scalars`` are empty then.
    refusal: OptserveError | None = None
    #: The push is committed, and this is what is known of it so far.
    pending: Pending | None = None


def counters(session_id: str, state: SessionState, made: int | None) -> dict[str, Any]:
    """Return what every reply to a change says; ``made``: the version that the request made."""
    return {
        "id": session_id,
        "generation": state.generation,
        "version": state.version,
        "applied_version": made,
        "updates": state.updates,
        "duplicate": False,
        "durability": state.config["durability"],
    }


def step_reply(
    fields: StepFields,
    scalars: dict[str, Any],
    current: Callable[[], Published],
    before: Published | None = None,
    made: Forms | None = None,
) -> Reply:
    """Return the reply to a step: ``current`` params, or what they are more than ``before``.

    ``made``: forms of the same that others got, to which what is made here is added.
    """
    wanted = fields.return_
    if wanted == "none":
        return Reply(scalars=scalars)
    delta = before is not None and scalars["applied_version"] is not None
    returned, made = "delta" if delta else "params", {} if made is None else made
    params = made.get(form := (returned, fields.return_dtype))
    if params is None:
        params = made[form] = _formed(current(), before if delta else None, fields.return_dtype)
    if wanted != returned:
        scalars = {**scalars, "returned": returned}
    return Reply(
        scalars=scalars,
        params=params,
        returned=returned,
        encoding=fields.return_encoding,
        dtype=fields.return_dtype,
    )


def _formed(params: Published, before: Published | None, dtype: str | None) -> Published:
    if before is not None:
        params = subtract(params, before)
    return params if dtype is None else params.narrowed(wire.dtype_tag(dtype))
