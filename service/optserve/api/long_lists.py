"""JSON bodies with long lists of numbers, read a piece at a time.

A Python float has 24 bytes and its place in a list 8 more: a million of them made at once leave the
processor's cache for new memory, page by page, and that takes longer than reading them. Here each
long list is cut out of the text, what is left is parsed as always, and the list goes through orjson
in pieces that fit the cache, each of which is an array of numpy before the next. So no other thread
waits for long, either.

The pieces joined again are the text, so the same is accepted and it means the same. Whatever is not
as simple as expected is left to ``json_text.py``, with its sentences.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import orjson

from optserve.api.json_text import loads, loads_object
from optserve_client import wire
from optserve_client.errors import RequestError
from optserve_client.wire import Array, BytesLike

#: Of a list's text; shorter ones stay where they are.
LONG_BYTES = 2**14
#: Of the text that is parsed at once: with all that it becomes, a part of the cache.
PIECE_BYTES = 2**17
#: Strings that may come before the lists; where there are more, there is little between them.
MOST_STRINGS = 2**15
#: Begin and end of a list in the text.
Place: TypeAlias = tuple[int, int]

_QUOTE, _BRACKET = re.compile(b'"'), re.compile(rb"\[")
#: How far from the end of what is between two quotes the last bracket of a list is looked for.
_TAIL_BYTES = 2**10
# Stands as a string for a list that was cut out. Nobody can write it, because nobody knows it.
_MARK = f"list-{secrets.token_hex(16)}-"


def loads_tensors(text: BytesLike, *fields: str) -> dict[str, Any]:
    """Parse a body as :func:`loads_object` does, but for long lists of numbers that are members of
    ``fields``: they become arrays of float64, which ``wire.tensor_from_json`` takes for lists."""
    view = memoryview(text)
    lists = _long_lists(view) if len(view) >= LONG_BYTES else []
    body = _in_pieces(view, lists, fields) if lists else None
    return loads_object(text) if body is None else body


def loads_tensor(text: BytesLike, field: str) -> dict[str, Any]:
    """The same, where ``field`` is not an object of tensors but one."""
    view = memoryview(text)
    lists = _long_lists(view) if len(view) >= LONG_BYTES else []
    body = _in_pieces(view, lists, (field,), within=False) if lists else None
    return loads_object(text) if body is None else body


def _long_lists(text: memoryview) -> list[Place]:
    """Return where there may be long lists: from a bracket to a bracket without a quote between.

    All of that is inside a string, or all of it is outside.
    """
    found: list[Place] = []
    begin = 0
    for number, quote in enumerate(_QUOTE.finditer(text)):
        if number > 2 * MOST_STRINGS:
            return []
        found += _between(text, begin, quote.start())
        begin = quote.end()
    return found + _between(text, begin, len(text))


def _between(text: memoryview, begin: int, end: int) -> list[Place]:
    if end - begin < LONG_BYTES or (first := _BRACKET.search(text, begin, end)) is None:
        return []
    _, bracket, behind = bytes(text[end - _TAIL_BYTES : end]).rpartition(b"]")
    place = first.start(), end - len(behind)
    return [place] if bracket and place[1] - place[0] >= LONG_BYTES else []


def _in_pieces(
    text: memoryview, lists: list[Place], fields: Sequence[str], *, within: bool = True
) -> dict[str, Any] | None:
    """Return the body with ``lists`` read apart from the rest; None if that cannot be done.

    ``within``: they are members of ``fields``, else they are the fields themselves.
    """
    marks = {f"{_MARK}{number}": place for number, place in enumerate(lists)}
    kept: list[bytes | memoryview] = []
    at = 0
    for mark, (begin, end) in marks.items():
        kept += [text[at:begin], b'"%b"' % mark.encode()]
        at = end
    try:
        body = loads(b"".join((*kept, text[at:])))
        found = _found(body, fields, marks) if within else _found({"": body}, ("",), marks)
        if not within and any(name not in fields for _, name in found):
            return None
        # One that is a key, in a string, in a list or in another object was not found.
        if len(found) != len(lists):
            return None
        for tensors, name in found:
            tensors[name] = _numbers(text, *marks[tensors[name]])
    except (ValueError, RequestError):
        return None
    assert isinstance(body, dict)
    return body


def _found(
    body: Any, fields: Sequence[str], marks: dict[str, Place]
) -> list[tuple[dict[str, Any], str]]:
    """Return where ``marks`` stand as members of ``fields``: the objects and the names in them."""
    objects = [body.get(field) for field in fields] if isinstance(body, dict) else []
    return [
        (tensors, name)
        for tensors in objects
        if isinstance(tensors, dict)
        for name, value in tensors.items()
        if type(value) is str and value in marks
    ]


def _numbers(text: memoryview, begin: int, end: int) -> Array:
    """Return the numbers of the list ``text[begin:end]``; ValueError or RequestError if it is none.

    If brackets around each piece between two commas make it a list, and all of these hold elements
    of one shape, then the whole is the list of all these elements.
    """
    # A number and what is behind it have two bytes at least; what they do not need is not touched.
    flat = np.empty((end - begin) // 2)
    used = rows = 0
    shape: tuple[int, ...] | None = None
    for piece in _pieces(text, begin, end):
        if shape not in (None, piece.shape[1:]):
            raise ValueError("elements of two shapes")
        shape = piece.shape[1:]
        flat[used : used + piece.size] = piece.reshape(-1)
        used, rows = used + piece.size, rows + len(piece)
    return flat[:used].reshape(rows, *(shape or ()))


def _pieces(text: memoryview, begin: int, end: int) -> Iterator[Array]:
    """Yield what stands between the commas at which the list ``text[begin:end]`` is cut."""
    depth = 1
    while text[begin + depth] == ord("["):
        depth += 1
        if depth > wire.MAX_RANK:
            raise ValueError("too deep")
    separator = b"]" * (depth - 1) + b","  # between elements of the whole, as a rule
    at, last = begin + 1, end - 1
    while at <= last:
        cut = _search(text, separator, at + PIECE_BYTES, last)
        comma = last if cut < 0 else cut + depth - 1
        values = orjson.loads(b"".join((b"[", text[at:comma], b"]")))
        if not values:
            raise ValueError("nothing between two commas")
        piece = wire.tensor_from_json(values, "a piece", "F64")
        assert isinstance(piece, np.ndarray)
        yield piece
        at = comma + 1


def _search(text: memoryview, what: bytes, begin: int, end: int) -> int:
    """Return what ``bytes.find`` does, which a memoryview lacks."""
    while begin < end:
        found = bytes(text[begin : min(begin + PIECE_BYTES + len(what), end)]).find(what)
        if found >= 0:
            return begin + found
        begin += PIECE_BYTES
    return -1
