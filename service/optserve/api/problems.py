"""Exceptions as answers: every refusal and every failure becomes one RFC 9457 problem document."""

from __future__ import annotations

import json
import secrets
from typing import Any

import orjson
import structlog
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from optserve.api.replies import PROBLEM
from optserve_client import errors

log = structlog.get_logger(__name__)

#: Seconds after which a request may come again that could not be served now, by status. A disk is
#: not emptied in a moment.
RETRY_AFTER_S = {503: 1, 507: 5}


def problem_response(scope: Scope, exc: Exception) -> Response:
    """Return the answer to the request ``scope`` that ended in ``exc``."""
    error = as_optserve_error(scope, exc)
    headers = {}
    if (after := RETRY_AFTER_S.get(error.status)) is not None:
        headers["retry-after"] = str(error.extra.get("retry_after", after))
    if allow := error.extra.get("allow"):
        headers["allow"] = ", ".join(allow)
    if codings := error.extra.get("accept_encoding"):
        headers["accept-encoding"] = ", ".join(codings)
    return Response(_dump(error.problem()), error.status, headers, PROBLEM)


def as_optserve_error(scope: Scope, exc: Exception) -> errors.OptserveError:
    """Translate whatever came out of the app into the tree that both sides share."""
    if isinstance(exc, errors.RequestError | errors.ServerError):
        if exc.status == 500:
            log.error("request failed", path=scope["path"], detail=exc.detail, exc_info=exc)
        elif exc.status == 507:  # one after the other until somebody makes room
            log.error("no space", path=scope["path"], detail=exc.detail)
        return exc
    if isinstance(exc, RequestValidationError):
        return _invalid(exc)
    if isinstance(exc, HTTPException):
        return _from_status(scope, exc)
    if isinstance(exc, RecursionError):
        # Only what a request brought can be nested that deeply.
        return errors.Malformed("the body is nested too deeply")
    if isinstance(exc, MemoryError):
        log.error("out of memory", method=scope["method"], path=scope["path"], exc_info=exc)
        return errors.Unavailable("the server has not enough free memory for this request")
    incident = secrets.token_hex(6)
    log.error(
        "unexpected exception",
        method=scope["method"],
        path=scope["path"],
        incident=incident,
        exc_info=exc,
    )
    return errors.Internal(
        f"the server failed on this request; its log tells why under incident {incident}",
        incident=incident,
    )


def _invalid(exc: RequestValidationError) -> errors.Invalid:
    """Name the first path, query or header parameter that FastAPI found wrong."""
    first = exc.errors()[0]
    place, field = first["loc"][0], first["loc"][-1]
    message = str(first["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    got = "" if first["type"] == "missing" else f", got {_short(first.get('input'))}"
    return errors.Invalid(f"{place} parameter {field}: {message}{got}", field=str(field))


def _from_status(scope: Scope, exc: HTTPException) -> errors.OptserveError:
    if exc.status_code == 404:
        return errors.NotFound(f"there is nothing at {scope['path']!r:.200}")
    if exc.status_code == 405:
        allow = allowed_methods(scope)
        return errors.MethodNotAllowed(
            f"{scope['method']} is not possible here; allowed: {', '.join(allow)}", allow=allow
        )
    return errors.from_problem(exc.status_code, {"detail": str(exc.detail)})


def allowed_methods(scope: Scope) -> list[str]:
    """Return the methods of all routes at this path; each route by itself knows only its own."""
    methods: set[str] = set()
    for route in scope["app"].routes:
        if route.path_regex.match(scope["path"]):
            methods |= route.methods or set()
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def _dump(problem: dict[str, Any]) -> bytes:
    try:
        option = orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE
        return orjson.dumps(problem, default=str, option=option)
    except (TypeError, orjson.JSONEncodeError):  # a lone surrogate that somebody quoted
        return json.dumps(problem, default=str).encode() + b"\n"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
