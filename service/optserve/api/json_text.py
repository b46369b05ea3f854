"""JSON text to Python values: strict where the standard is, and stricter about duplicate keys.

orjson parses; it keeps the last of two equal keys without a word, so the keys in the text are
counted and compared with the keys that arrived. Only when the counts differ is the text read again,
slowly, to name the duplicate.
"""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

from optserve_client.errors import Malformed
from optserve_client.wire import BytesLike

#: A tensor may have 32 dimensions; nothing else nests deeply.
MAX_DEPTH = 64

# Every string of the text in turn, so that none is entered in its middle; a colon follows a key.
# Possessive: the text is known to be valid JSON, so nothing is ever given back.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"(\s*+:)?', re.DOTALL)
_KEY_END = re.compile(rb'"\s*+:')
_CONSTANT = re.compile(rb"-?(?:NaN|Infinity|nan|inf)\b")


def loads(text: BytesLike, what: str = "the body") -> Any:
    """Parse ``text``; raise Malformed where it is no JSON, repeats a key or nests too deeply."""
    if isinstance(text, memoryview):
        text = bytes(text)  # which can be searched
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise Malformed(_explain(exc, bytes(text), what)) from exc
    if isinstance(value, dict | list):
        keys = _count_keys(value, what)
        if not _has_keys(text, keys):
            _find_duplicate(bytes(text), what)
    return value


def loads_object(text: BytesLike, what: str = "the body") -> dict[str, Any]:
    """Parse ``text``, whose top level must be an object."""
    value = loads(text, what)
    if not isinstance(value, dict):
        raise Malformed(f"{what} must be a JSON object, got {_word(value)}")
    return value


def _has_keys(text: bytes | bytearray, keys: int) -> bool:
    """Say whether no more than ``keys`` keys stand in valid JSON ``text``."""
    if text.count(b'"') == 2 * keys:  # no string is anything but one of them
        return True
    # Without escapes a quote and a colon end a key, or a string begins with a colon: never too few.
    if b"\\" not in text and len(_KEY_END.findall(text)) == keys:
        return True
    return sum(map(bool, _STRING.findall(text))) == keys


def _count_keys(root: Any, what: str) -> int:
    """Return the number of keys in ``root``, level by level; refuse what is nested too deeply.

    Lists that begin with a number are taken for tensor rows and not searched. If one hides an
    object after all, the count is too low and the slow reading decides.
    """
    keys, depth, level = 0, 0, [root]
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise Malformed(f"{what} is nested more than {MAX_DEPTH} levels deep")
        below: list[Any] = []
        for node in level:
            if type(node) is dict:
                keys += len(node)
                below += [v for v in node.values() if type(v) is dict or type(v) is list]
            elif node and type(node[0]) not in (float, int):
                below += [v for v in node if type(v) is dict or type(v) is list]
        level = below
    return keys


def _find_duplicate(text: bytes, what: str) -> None:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise Malformed(f"{what} has the key {key[:80]!r} twice in one object")
            out[key] = value
        return out

    try:
        json.loads(text, object_pairs_hook=unique)
    except RecursionError as exc:
        raise Malformed(f"{what} is nested more than {MAX_DEPTH} levels deep") from exc


def _explain(exc: orjson.JSONDecodeError, text: bytes, what: str) -> str:
    if not text.strip():
        return f"{what} is empty, expected JSON"
    if text.startswith(b"\xef\xbb\xbf"):
        return f"{what} begins with a byte order mark; JSON is UTF-8 without one"
    try:
        text.decode()
    except UnicodeDecodeError as fault:
        return f"{what} is not UTF-8: {fault.reason} at byte {fault.start}"
    # orjson counts characters, the caller looks at bytes; they agree unless text is not ASCII.
    at = len(exc.doc[: exc.pos].encode()) if isinstance(exc.doc, str) else exc.pos
    for start in (max(at - 1, 0), at):  # orjson points behind the minus
        if found := _CONSTANT.match(text, start):
            spelled = found[0].decode()
            return (
                f"{what} is not JSON: {spelled} at byte {start} is no JSON number; in a list write "
                '"NaN", "Infinity" or "-Infinity" as a string'
            )
    return f"{what} is not JSON: {exc.msg} at byte {at}"


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return "a string"
    return "null" if value is None else json.dumps(value)
