"""JSON Schemas of replies, as components of the OpenAPI document."""

from __future__ import annotations

from optserve.api.schemas import (
    BOOLEAN,
    COUNT,
    HYPER,
    NUMBER,
    STRING,
    Schema,
    a_list,
    an_object,
    by_name,
    nullable,
    ref,
)
from optserve_client.errors import RequestError, ServerError, tree

Members = dict[str, Schema]

DURABILITY: Schema = {
    "enum": ["always", "os", "memory"],
    "description": "What an answered change survives: always, a power loss; os, a kill of the "
    "server; memory, neither.",
}
_TIME: Schema = {"type": "number", "description": "Unix seconds."}

_COUNTERS: Members = {
    "id": STRING,
    "generation": STRING,
    "version": {**COUNT, "description": "Of the params in this reply."},
    "applied_version": {
        **nullable(COUNT),
        "description": "What this request made; null if it made no version.",
    },
    "updates": COUNT,
    "duplicate": BOOLEAN,
    "durability": DURABILITY,
}
_SUMMARY: Members = {
    "id": STRING,
    "name": nullable(STRING),
    "tags": by_name(STRING),
    "optimizer": STRING,
    "generation": STRING,
    "version": COUNT,
    "updates": COUNT,
    "numel": COUNT,
    "dtype": STRING,
    "durability": DURABILITY,
    "created_at": _TIME,
    "updated_at": _TIME,
}
_SCHEDULER_LINE: Members = {
    "advance": {"enum": ["manual", "step"]},
    "last_epoch": {"type": "integer"},
    "next_lr": a_list(NUMBER),
}
_RECOVERY: Schema = an_object(
    {"bit_exact": BOOLEAN, "reason": nullable(STRING)},
    ["bit_exact", "reason"],
    "Whether the state is bit for bit what it was before the server restarted; if not, why.",
)
_STATUS: Members = {
    **_SUMMARY,
    "notes": nullable(STRING),
    "ttl_s": {
        **nullable({"type": "number", "exclusiveMinimum": 0}),
        "description": "Seconds without use after which the session is deleted.",
    },
    "recovery": _RECOVERY,
    "config": {"type": "object", "description": "Normalised."},
    "torch": {**STRING, "description": "The line of torch to compare with."},
    "impl": STRING,
    "groups": a_list(HYPER),
    "scheduler": nullable(ref("Scheduler")),
    "order": a_list(STRING),
    "params": by_name(an_object({"shape": a_list(COUNT), "dtype": STRING}, ["shape", "dtype"])),
}
_CREATED: Members = {**_STATUS, "created": BOOLEAN, "duplicate": BOOLEAN}
_ROUND: Members = {
    "number": COUNT,
    "base_version": COUNT,
    "contributed": a_list(STRING),
    "count": COUNT,
    "deadline_at": _TIME,
    "workers": {**a_list(STRING), "description": "Whose pushes made the update."},
    "missing": {**COUNT, "description": "How many more were waited for."},
    "closed_by": {"enum": ["count", "deadline"]},
    "weight": {"type": "number", "description": "Of the own push, in a weighted mean."},
}
_OPEN: Members = {
    **{name: _ROUND[name] for name in ("number", "base_version", "contributed", "count")},
    "quorum": COUNT,
    "opened_at": _TIME,
    "deadline_at": _TIME,
}
_WORKER: Members = {
    "worker": STRING,
    "epoch": COUNT,
    "last_seq": COUNT,
    "version": {**nullable(COUNT), "description": "That its last push was computed on."},
    "staleness": {**nullable(COUNT), "description": "How far the session is ahead of that."},
    "contributions": {**COUNT, "description": "Its pushes that were committed."},
    "last_seen": _TIME,
}
_STEP: Members = {
    **_COUNTERS,
    "applied": BOOLEAN,
    "skipped": nullable(STRING),
    "groups": a_list(HYPER),
    "scheduler": nullable(an_object(_SCHEDULER_LINE)),
    "grad_norm": nullable(NUMBER),
    "clip_coef": nullable(NUMBER),
}
_STEP_MORE: Members = {
    "accumulated": {**COUNT, "description": "Gradients in the open window."},
    "need": {"enum": ["evaluate", None], "description": "LBFGS wants loss and gradients there."},
    "returned": {"enum": ["params", "delta"], "description": "If not what was asked for."},
    "params": ref("Params"),
    "created": BOOLEAN,
    "round": {
        **an_object(_ROUND, ["number", "base_version"]),
        "description": "Of a push: who is in so far (202), or who was in (200).",
    },
    "staleness": {**COUNT, "description": "Versions that were made since the gradient's."},
    "weight": {"type": "number", "description": "What a stale gradient was multiplied by."},
}
_ROW: Members = {
    "version": COUNT,
    "updates": COUNT,
    "kind": STRING,
    "time": _TIME,
    "lr": a_list(nullable(NUMBER)),
    "loss": nullable(NUMBER),
    "grad_norm": nullable(NUMBER),
    "metrics": by_name(NUMBER),
}
_REACHABLE: Members = {
    "version": COUNT,
    "updates": nullable(COUNT),
    "kind": {**nullable(STRING), "description": "What made it, if that is still known."},
    "time": _TIME,
    "snapshot": BOOLEAN,
    "pin": {**nullable(STRING), "description": "The name under which it is kept."},
}
_PINNED: Members = {"version": COUNT, "pin": nullable(STRING)}
_ENTRY: Members = {
    "name": STRING,
    "source": STRING,
    "meaning": STRING,
    "schema": {"type": "object"},
}
_PULL: Members = {
    "id": STRING,
    "generation": STRING,
    "version": COUNT,
    "weights": {"enum": ["live", "eval", "ema", "best"]},
    "params": ref("Params"),
}
_PUSH: Members = {
    "id": STRING,
    "push": STRING,
    "expires_at": {
        "type": "number",
        "description": "Unix seconds, unless more of it comes or it is committed.",
    },
}
_MISSING: Schema = {**COUNT, "description": "Parameters without a gradient so far."}
_VERSION: Members = {
    "optserve": STRING,
    "torch": STRING,
    "python": STRING,
    "features": a_list(STRING),
    "device": STRING,
    "threads": COUNT,
    "store": {**STRING, "description": "The strongest durability that it can promise."},
}


def _all(members: Members) -> Schema:
    """Return the schema of an object that has all ``members``."""
    return an_object(members, members)


REPLIES: dict[str, Schema] = {
    "StepReply": an_object({**_STEP, **_STEP_MORE}, _STEP),
    "ChangeReply": an_object(
        {
            **_COUNTERS,
            "groups": a_list(HYPER),
            "scheduler": nullable(an_object(_SCHEDULER_LINE)),
            "pinned": _all(_PINNED),
        },
        _COUNTERS,
    ),
    "CreateReply": an_object(
        {
            **_CREATED,
            "forked_from": an_object({"id": STRING, "generation": STRING, "version": COUNT}),
        },
        _CREATED,
    ),
    "WorkerReply": an_object(
        {
            **_COUNTERS,
            "worker": STRING,
            "epoch": COUNT,
            "last_seq": COUNT,
            "removed": BOOLEAN,
        },
        [*_COUNTERS, "worker", "epoch", "last_seq"],
    ),
    "Workers": _all(
        {
            "id": STRING,
            "version": COUNT,
            "workers": a_list(_all(_WORKER)),
            "round": nullable(_all(_OPEN)),
        }
    ),
    "DeleteReply": _all({"id": STRING, "deleted": BOOLEAN, "version": COUNT}),
    "Session": _all(_STATUS),
    "SessionPage": _all({"sessions": a_list(_all(_SUMMARY)), "next_cursor": nullable(STRING)}),
    "ParamsReply": _all(_PULL),
    "PushOpened": _all({**_PUSH, "missing": _MISSING}),
    "PushProgress": _all({**_PUSH, "name": STRING, "missing": _MISSING}),
    "PushStatus": _all(
        {
            **_PUSH,
            "fields": {"type": "object", "description": "Those that opened it."},
            "arrived": a_list(STRING),
            "arriving": a_list(STRING),
            "none": {**a_list(STRING), "description": "Parameters whose gradient is None."},
            "missing": a_list(STRING),
        }
    ),
    "PushDeleted": _all({"id": STRING, "push": STRING, "deleted": BOOLEAN}),
    "Scheduler": _all({"spec": ref("SchedulerSpec"), **_SCHEDULER_LINE}),
    "Preview": an_object(
        {"steps": a_list(a_list(HYPER))},
        ["steps"],
        "steps[i][g] holds what the i-th update from now uses for group g.",
    ),
    "HistoryRow": _all(_ROW),
    "History": _all(
        {"id": STRING, "rows": a_list(ref("HistoryRow")), "next_after": nullable(COUNT)}
    ),
    "VersionRow": _all(_REACHABLE),
    "Versions": _all(
        {"id": STRING, "rows": a_list(ref("VersionRow")), "next_after": nullable(COUNT)}
    ),
    "OptimizerEntry": _all(_ENTRY),
    "Optimizers": _all({"optimizers": a_list(ref("OptimizerEntry"))}),
    "SchedulerEntry": _all(_ENTRY),
    "Schedulers": _all({"schedulers": a_list(ref("SchedulerEntry"))}),
    "Status": _all({"status": STRING}),
    "Version": _all(_VERSION),
}


def problem() -> Schema:
    """Return the component of every refusal and failure."""
    codes = {error.code for base in (RequestError, ServerError) for error in tree(base)}
    members: Members = {
        "type": STRING,
        "title": STRING,
        "status": {"type": "integer"},
        "code": {"enum": sorted(codes), "description": "Stable."},
        "detail": {**STRING, "description": "Names the thing, the value and the bound."},
    }
    return an_object(
        members,
        members,
        "RFC 9457. Further members, such as version, last_seq or field, depend on the code.",
    )
