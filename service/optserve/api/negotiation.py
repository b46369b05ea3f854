"""What the client wants to get: Accept and If-None-Match, as RFC 9110 reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from optserve.api.codings import CODINGS
from optserve_client.errors import NotAcceptable

_TAG = re.compile(r'\s*(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")\s*(?:,|$)')


@lru_cache(256)
def negotiate(accept: str | None, offers: tuple[str, ...]) -> str:
    """Return the media type of ``offers`` that ``accept`` likes best; the first of equals."""
    if accept is None or accept == "*/*":
        return offers[0]
    ranges = [_media_range(part) for part in accept.split(",") if part.strip()]
    best = max(offers, key=lambda offer: _quality(offer, ranges))
    if _quality(best, ranges) <= 0:
        raise NotAcceptable(f"Accept must allow {' or '.join(offers)}, got {accept[:120]!r}")
    return best


def _media_range(part: str) -> tuple[str, float]:
    media, *parameters = part.split(";")
    quality = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                quality = float(value)
            except ValueError:
                quality = 0.0
    return media.strip().lower(), quality


def _quality(offer: str, ranges: Sequence[tuple[str, float]]) -> float:
    """Return q of the most specific range that covers ``offer``."""
    for pattern in (offer, f"{offer.partition('/')[0]}/*", "*/*"):
        found = [quality for media, quality in ranges if media == pattern]
        if found:
            return max(found)
    return 0.0


def matching(etag: str, condition: str) -> str | None:
    """Return the tag in ``If-None-Match: condition`` that is ``etag``, or that of the same in a
    coding, by weak comparison; None if there is none."""
    if condition.strip() == "*":
        return etag
    at = 0
    while found := _TAG.match(condition, at):
        if any(found[1] == coded_etag(etag, coding) for coding in (None, *CODINGS)):
            return found[1]
        at = found.end()
    return None


def coded_etag(etag: str, coding: str | None) -> str:
    """Return the strong ETag of the answer in ``coding`` whose plain one has ``etag``."""
    return etag if coding is None else f'{etag[:-1]}-{coding}"'
