"""Several workers on one session: the create body's ``workers``, and what it cannot go with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from optserve.optim.catalogue import Entry
from optserve.sentences import shown
from optserve.sessions.fields import Fields
from optserve_client.errors import Invalid, OptserveError

#: Workers whose pushes one round takes.
MAX_COUNT = 1_000
#: Longest that a round stays open, and that a request waits for one.
MAX_WAIT_S = 3600.0
#: Tensors of a push are called ``grad/<name>`` or ``delta/<name>``; in JSON they are in ``grads``
#: or ``deltas``.
KINDS: Mapping[str, str] = {"gradients": "grad", "deltas": "delta"}

Push = Literal["gradients", "deltas"]


class SyncWorkers(Fields):
    """Rounds: the pushes of several workers make one update."""

    mode: Literal["sync"]
    #: Pushes that close a round.
    count: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    reduce: Literal["mean", "sum", "weighted_mean", "median", "trimmed_mean"] = "mean"
    #: Share of the values that trimmed_mean leaves out at either end; 0.1 if left out.
    trim: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    #: Pushes that are enough at the deadline; ``count`` if left out.
    quorum: Annotated[int, Field(ge=1)] | None = None
    #: From the first push of a round to its end.
    deadline_s: Annotated[float, Field(gt=0, le=MAX_WAIT_S)] = 30.0
    push: Push = "gradients"


class AsyncWorkers(Fields):
    """Each push is an update, however old the params are that it was computed on."""

    mode: Literal["async"]
    #: A push is stale when the session is more versions ahead; None: none is.
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    #: ``damp``: a stale push has the weight 1 / (1 + staleness). ``reject`` if left out; None where
    #: none is stale.
    on_stale: Literal["reject", "damp"] | None = None
    push: Push = "gradients"


def normal(spec: Any) -> dict[str, Any] | None:
    """Return the field ``workers``, checked and complete; Invalid if it cannot be used."""
    if spec is None:
        return None
    mode = spec.get("mode") if isinstance(spec, Mapping) else None
    if mode == "sync":
        return _complete_sync(SyncWorkers.parse(spec, "workers"))
    if mode == "async":
        return _complete_async(AsyncWorkers.parse(spec, "workers"))
    if isinstance(spec, Mapping):
        got = shown(mode) if "mode" in spec else "none"
        raise Invalid(f"workers.mode must be 'sync' or 'async', got {got}", field="workers.mode")
    raise Invalid(f"workers must be an object or null, got {shown(spec)}", field="workers")


def _complete_sync(fields: SyncWorkers) -> dict[str, Any]:
    quorum = fields.count if fields.quorum is None else fields.quorum
    if quorum > fields.count:
        raise Invalid(
            f"workers.quorum must be in [1, {fields.count}], got {quorum}", field="workers.quorum"
        )
    complete = {**fields.model_dump(exclude={"trim"}), "quorum": quorum}
    if fields.reduce == "trimmed_mean":
        return {**complete, "trim": 0.1 if fields.trim is None else fields.trim}
    if fields.trim is not None:
        raise Invalid(
            f"workers.trim has no effect with reduce {fields.reduce!r}", field="workers.trim"
        )
    return complete


def _complete_async(fields: AsyncWorkers) -> dict[str, Any]:
    if fields.max_staleness is None and fields.on_stale is not None:
        raise Invalid(
            "workers.on_stale has no effect without max_staleness", field="workers.on_stale"
        )
    if fields.max_staleness is None:
        return fields.model_dump()
    return {**fields.model_dump(), "on_stale": fields.on_stale or "reject"}


def _checked(spec: Any) -> Any:
    try:
        return normal(spec)
    except OptserveError as exc:
        raise PydanticCustomError("ours", "{text}", {"text": exc.detail}) from exc


#: The field of a request model.
Workers = Annotated[Any, AfterValidator(_checked)]


def check_fit(config: Mapping[str, Any], entry: Entry) -> None:
    """Refuse ``workers`` beside what has no meaning together with them."""
    workers = config.get("workers")
    if workers is None:
        return
    if entry.needs_loss:
        raise Invalid(f"workers cannot be used with {entry.name}", field="workers")
    if config["accumulate"]["steps"] > 1:
        if workers["mode"] == "sync":
            raise Invalid(
                "accumulate cannot be used with rounds: workers.count says how many pushes make "
                "an update",
                field="accumulate",
            )
        if workers["on_stale"] == "damp":
            raise Invalid("accumulate cannot be used with on_stale 'damp'", field="accumulate")
    if config["sparse"] and workers.get("reduce") in ("median", "trimmed_mean"):
        raise Invalid(
            f"workers.reduce {workers['reduce']!r} cannot be used with sparse gradients",
            field="workers.reduce",
        )


def rounds(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return ``workers`` of a session that collects pushes in rounds, else None."""
    workers: Mapping[str, Any] | None = config.get("workers")
    return workers if workers is not None and workers["mode"] == "sync" else None


def kind(config: Mapping[str, Any]) -> str:
    """Return what the tensors of a push are called: ``grad`` or ``delta``."""
    workers = config.get("workers")
    return "grad" if workers is None else KINDS[workers["push"]]


def weight_of(staleness: int, workers: Mapping[str, Any]) -> float:
    """Return what an asynchronous push is multiplied by."""
    most = workers["max_staleness"]
    stale = most is not None and staleness > most
    return 1.0 / (1 + staleness) if stale and workers["on_stale"] == "damp" else 1.0


def trimmed(workers: Mapping[str, Any], count: int) -> int:
    """Return how many of ``count`` values trimmed_mean leaves out at either end."""
    share: float = workers["trim"]
    return math.floor(share * count)
