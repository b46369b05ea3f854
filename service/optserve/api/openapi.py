"""The OpenAPI document: what a route's decorator says, joined with the schemas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from optserve.api import reply_schemas, schemas
from optserve.api.schemas import ref
from optserve.sessions.ledger import KEY_LENGTH
from optserve_client.errors import Damaged, OptserveError, OutOfSpace, Unavailable
from optserve_client.wire import SAFETENSORS

DESCRIPTION = """Keeps optimizer state: post gradients, get updated parameters.

Bodies and replies with tensors are JSON or safetensors, chosen by `Content-Type` and `Accept`. In a
safetensors body the tensors are called `param/<name>`, `grad/<name>`, `sparse/<name>/indices` and
`sparse/<name>/values`; all other fields are one JSON string in `__metadata__["optserve"]`. Replies
look the same.

Every request that changes a session may carry `worker`, `epoch` and `seq`, or an `Idempotency-Key`
header; a repeat is then answered, not applied twice. Every refusal is a problem document (RFC 9457)
with a stable `code`.
"""
TAGS = [
    {"name": "sessions", "description": "Create, list, read, change, copy, delete."},
    {"name": "step", "description": "Gradients in, parameters out."},
    {"name": "pushes", "description": "A step that comes tensor by tensor."},
    {"name": "params", "description": "Pull and overwrite."},
    {"name": "groups", "description": "Hyperparameters of torch's param_groups."},
    {"name": "scheduler", "description": "Learning-rate schedules."},
    {"name": "history", "description": "What happened, version by version."},
    {"name": "versions", "description": "Go back, and keep what to go back to."},
    {"name": "state", "description": "A session as one file."},
    {"name": "catalogue", "description": "Optimizers and schedulers there are."},
    {"name": "operations", "description": "For load balancers and scripts."},
]

#: A whole safetensors file, as body or reply.
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
KEY_PARAMETER: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Instead of worker and seq: a repeat with this key is not applied twice.",
    "schema": {"type": "string", "maxLength": KEY_LENGTH, "pattern": "^[\\x21-\\x7e]+$"},
}

_PROBLEM = {"application/problem+json": {"schema": ref("Problem")}}
_ETAG = {"ETag": {"schema": {"type": "string"}, "description": "Of exactly this representation."}}


def operation(
    summary: str,
    *,
    reply: str | None = None,
    binary_reply: bool = False,
    other_replies: Mapping[str, str | None] | None = None,
    status: int = 200,
    also: Mapping[int, str | None] | None = None,
    etag: bool = False,
    body: str | None = None,
    binary: Mapping[str, Any] | None = None,
    body_required: bool = True,
    parameters: Iterable[Mapping[str, Any]] = (),
    errors: Iterable[type[OptserveError]] = (),
) -> dict[str, Any]:
    """Return what a route's decorator needs to document it.

    ``reply`` and ``body`` name JSON components; ``also`` maps further statuses to theirs;
    ``errors`` are those that this route is more likely to meet than others.
    """
    responses: dict[int | str, dict[str, Any]] = {}
    for code, name in {status: reply, **(also or {})}.items():
        content = {} if name is None else {"application/json": {"schema": ref(name)}}
        if code < 300:
            content |= {media: _plain(of) for media, of in (other_replies or {}).items()}
            content |= {SAFETENSORS: dict(BINARY)} if binary_reply else {}
        responses[code] = {"content": content} if content else {}
        if etag:
            responses[code]["headers"] = _ETAG
    for code, codes in _by_status(errors).items():
        responses[code] = {"description": " or ".join(codes), "content": _PROBLEM}
    # Without one of its own, FastAPI would document the 422 that it sends itself.
    responses.setdefault(422, {"description": "invalid", "content": _PROBLEM})
    responses["default"] = {"description": "Any other refusal or failure.", "content": _PROBLEM}
    extra: dict[str, Any] = {}
    if parameters:
        extra["parameters"] = list(parameters)
    if body is not None or binary is not None:
        content = {} if body is None else {"application/json": _json_body(body)}
        content |= {} if binary is None else {SAFETENSORS: dict(binary)}
        extra["requestBody"] = {"required": body_required, "content": content}
    return {
        "summary": summary,
        "status_code": status,
        "responses": responses,
        "openapi_extra": extra,
    }


def _json_body(component: str) -> dict[str, Any]:
    """Return the media type object of a JSON body, with what the API page fills in at first."""
    example = schemas.EXAMPLES.get(component)
    return {"schema": ref(component), **({} if example is None else {"example": example})}


def _plain(component: str | None) -> dict[str, Any]:
    """Return the media type object of text: lines of a component, or anything."""
    schema: dict[str, Any] = {"type": "string"}
    if component is not None:
        schema["description"] = f"One {component} per line."
    return {"schema": schema}


def _by_status(errors: Iterable[type[OptserveError]]) -> dict[int, list[str]]:
    grouped: dict[int, list[str]] = {}
    for error in errors:
        grouped.setdefault(error.status, []).append(error.code)
    return grouped


def _add_failures(paths: Mapping[str, Mapping[str, Any]]) -> None:
    """Document what every route of sessions can meet: a stopping server, a disk that is full or
    that lost something."""
    for path, operations in paths.items():
        for method, said in operations.items():
            failures: list[type[OptserveError]] = []
            if "{session_id}" in path or path.endswith("/step"):
                failures += [Damaged]
            if method != "get" and not path.startswith("/v1/schedulers"):
                failures += [Unavailable, OutOfSpace]
            for code, codes in _by_status(failures).items():
                described = {"description": " or ".join(codes), "content": _PROBLEM}
                said["responses"].setdefault(str(code), described)


def components() -> dict[str, Any]:
    """Return all schemas by name."""
    return {
        **schemas.nested_models(),
        **schemas.TENSORS,
        **schemas.requests(),
        **reply_schemas.REPLIES,
        "Problem": reply_schemas.problem(),
    }


def install(app: FastAPI) -> None:
    """Make ``app.openapi()`` return the whole document, made once."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=app.description,
                routes=app.routes,
                tags=TAGS,
            )
            made["components"] = {"schemas": components()}
            _add_failures(made["paths"])
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
