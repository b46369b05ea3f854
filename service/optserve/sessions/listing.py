"""Pages of a session list, in a stable order that a cursor can go on from."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from optserve_client.errors import Invalid

#: order_by -> the field of a row.
_FIELDS = {"created": "created_at", "updated": "updated_at", "name": "name"}
ORDERS = tuple(sign + name for name in _FIELDS for sign in ("", "-"))
MAX_LIMIT = 1_000


def page(
    rows: list[dict[str, Any]],
    *,
    cursor: str | None,
    limit: int,
    tags: Mapping[str, str],
    order_by: str,
) -> dict[str, Any]:
    """Return ``{"sessions": [...], "next_cursor": ...}``; the cursor is None on the last page."""
    if order_by not in ORDERS:
        raise Invalid(f"order_by must be one of {', '.join(ORDERS)}, got {order_by!r:.80}")
    if not 1 <= limit <= MAX_LIMIT:
        raise Invalid(f"limit must be in [1, {MAX_LIMIT}], got {limit}")
    field, descending = _FIELDS[order_by.removeprefix("-")], order_by.startswith("-")

    def place(row: Mapping[str, Any]) -> list[Any]:
        value = row[field]
        return [(value or "") if field == "name" else value, row["id"]]

    found = [row for row in rows if all(row["tags"].get(k) == v for k, v in tags.items())]
    found.sort(key=place, reverse=descending)
    if cursor is not None:
        last = _read(cursor, order_by)
        found = [r for r in found if (place(r) < last if descending else place(r) > last)]
    shown = found[:limit]
    more = len(found) > limit
    return {
        "sessions": shown,
        "next_cursor": _write(order_by, place(shown[-1])) if more else None,
    }


def _write(order_by: str, place: list[Any]) -> str:
    text = json.dumps([order_by, place], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _read(cursor: str, order_by: str) -> list[Any]:
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        order, place = json.loads(base64.urlsafe_b64decode(padded.encode("ascii")))
        first, last = place
    except (binascii.Error, ValueError, TypeError, UnicodeError) as exc:
        raise Invalid(f"cursor {cursor!r:.80} is not one that this server gave") from exc
    wanted = str if order_by.endswith("name") else (int, float)
    if order != order_by or not isinstance(first, wanted) or not isinstance(last, str):
        raise Invalid(f"cursor {cursor!r:.80} belongs to another order_by than {order_by!r}")
    return [first, last]
