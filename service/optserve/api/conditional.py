"""ETags of RFC 9110: lists, ``*`` and weak comparison."""

from __future__ import annotations

import re

_TAG = re.compile(r'\s*(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")\s*(?:,|$)')


def matches(etag: str, condition: str) -> bool:
    """Say whether ``If-None-Match: condition`` names ``etag``, by weak comparison."""
    if condition.strip() == "*":
        return True
    at = 0
    while found := _TAG.match(condition, at):
        if found[1] == etag.removeprefix("W/"):
            return True
        at = found.end()
    return False
