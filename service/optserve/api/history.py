"""What happened, version by version: as JSON, as lines of JSON, as CSV."""

from __future__ import annotations

import asyncio
import csv
import io
from typing import Annotated, Any, Literal

from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response

from optserve.api.decode import Claim, read_request
from optserve.api.negotiation import negotiate
from optserve.api.openapi import operation
from optserve.api.replies import JSON, PartsResponse, dump, encode_reply, finite, json_response
from optserve.api.routing import Media, SessionId, router, session_of
from optserve.api.waiting import done
from optserve.sessions.fields import Fields, Metrics
from optserve.sessions.operations import PutMetrics
from optserve_client.errors import Conflict, SessionNotFound

routes = router("history")

NDJSON = "application/x-ndjson"
CSV = "text/csv"
_FORMATS = {"json": JSON, "ndjson": NDJSON, "csv": CSV}


@routes.get(
    "/v1/sessions/{session_id}/history",
    **operation(
        "Read the history",
        reply="History",
        other_replies={NDJSON: "HistoryRow", CSV: None},
        errors=[SessionNotFound],
    ),
)
async def get_history(
    session_id: SessionId,
    request: Request,
    after: Annotated[int, Query(ge=0, description="Only versions above this one.")] = 0,
    limit: Annotated[int, Query(ge=1, le=100_000, description="Rows at most.")] = 1000,
    format: Annotated[  # noqa: A002 - the query parameter's name
        Literal["json", "ndjson", "csv"] | None, Query(description="Wins over Accept.")
    ] = None,
) -> Response:
    """One row per version: its time, lr of each group, loss, grad_norm and metrics. To go on, send
    the last row's version as `after`."""
    media = (
        _FORMATS[format]
        if format
        else negotiate(request.headers.get("accept"), (JSON, NDJSON, CSV))
    )
    session = session_of(request, session_id)
    rows = await asyncio.to_thread(session.history, after, limit)
    if media == NDJSON:
        lines = b"".join(dump(finite(row)) + b"\n" for row in rows)
        return PartsResponse([lines], media_type=NDJSON)
    if media == CSV:
        return PartsResponse([table(rows).encode()], media_type=f"{CSV}; charset=utf-8")
    last = rows[-1]["version"] if len(rows) == limit else None
    return json_response({"id": session_id, "rows": rows, "next_after": last})


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as CSV (RFC 4180), with columns such as ``lr.0`` and ``metrics.acc``."""
    flat = [_flatten(row) for row in rows]
    columns = list(dict.fromkeys(column for row in flat for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flatten(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": v for name, v in value.items()}
        elif isinstance(value, list):
            flat |= {f"{key}.{i}": v for i, v in enumerate(value)}
        else:
            flat[key] = "" if value is None else value
    return flat


class MetricsBody(Fields):
    """Values of a version that were measured after its step."""

    version: int
    metrics: Metrics


@routes.put(
    "/v1/sessions/{session_id}/metrics",
    **operation(
        "Add metrics to a version",
        body="MetricsBody",
        reply="ChangeReply",
        binary_reply=True,
        errors=[SessionNotFound, Conflict],
    ),
)
async def put_metrics(
    session_id: SessionId, request: Request, media: Media, claim: Claim
) -> Response:
    """Named values that came later, such as the accuracy on held-out data."""
    session = session_of(request, session_id)
    incoming = await read_request(request, claim, "metrics")
    body = MetricsBody.parse(incoming.fields)
    change = PutMetrics(version=body.version, metrics=body.metrics)
    return await encode_reply(media, await done(session.change(change, incoming.identity)))
