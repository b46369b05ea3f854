"""HTTP requests and answers of both clients, as values: their bytes and what they mean."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any
from urllib.parse import urlencode

import numpy as np

from optserve_client import errors, wire

JSON = "application/json"
#: Of a body, as it goes to the socket in one write.
CHUNK_BYTES = 2**20
#: Tensors below this are joined before they are written.
_SMALL_BYTES = 2**16


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One HTTP request, ready to be sent, any number of times."""

    method: str
    #: Path and query.
    target: str
    headers: Mapping[str, str]
    pieces: tuple[bytes | memoryview, ...] = ()

    @property
    def length(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    def parts(self, head: bytes = b"") -> Iterator[bytes | memoryview]:
        """Yield ``head`` and the body: large pieces as they are, those between them joined."""
        small, size = [head], len(head)
        for piece in self.pieces:
            if len(piece) < _SMALL_BYTES:
                small.append(bytes(piece))
                size += len(piece)
                if size < CHUNK_BYTES:
                    continue
            if size:
                yield b"".join(small)
                small, size = [], 0
            if len(piece) >= _SMALL_BYTES:
                yield piece
        if size:
            yield b"".join(small)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the body in about ``CHUNK_BYTES`` at a time; large pieces are not copied."""
        for part in self.parts():
            view = memoryview(part)
            for at in range(0, len(view), CHUNK_BYTES):
                yield view[at : at + CHUNK_BYTES]

    def kept(self) -> Request:
        """Return a copy that does not change when the caller's arrays do."""
        pieces = tuple(bytes(piece) for piece in self.pieces)
        return Request(method=self.method, target=self.target, headers=self.headers, pieces=pieces)

    def same_as(self, other: object) -> bool:
        if not isinstance(other, Request):
            return False
        return (self.method, self.target, *self.pieces) == (
            other.method,
            other.target,
            *other.pieces,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A request before it is known who sends it."""

    method: str
    path: str
    query: tuple[tuple[str, str], ...] = ()
    #: Everything that is not a tensor; None: the body, if any, has no such part.
    fields: Mapping[str, Any] | None = None
    #: Tensors by their names in the frame (``grad/w``); with them the body is a frame, else JSON.
    tensors: Mapping[str, wire.Tensor] | None = None
    #: A whole frame, or JSON text, as it is.
    frame: memoryview | None = None
    text: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    accept: str = JSON
    #: Whether the request takes the field ``generation``.
    guarded: bool = False

    def request(self, stamp: Mapping[str, Any] | None = None) -> Request:
        """Return the request with ``stamp`` (worker, epoch, seq) in its fields, else its query."""
        query, fields, stamp = self.query, self.fields, dict(stamp or {})
        if fields is None:
            query = (*query, *((key, str(value)) for key, value in stamp.items()))
        else:
            fields = {**fields, **stamp}
        pieces: tuple[bytes | memoryview, ...] = ()
        kind = None
        if self.frame is not None:
            pieces, kind = (self.frame,), wire.SAFETENSORS
        elif self.text is not None:
            pieces, kind = (self.text.encode(),), JSON
        elif self.tensors is not None:
            metadata = {wire.META_KEY: to_json(fields or {})}
            pieces, kind = tuple(wire.encode(self.tensors, metadata)), wire.SAFETENSORS
        elif fields is not None:
            pieces, kind = (to_json(fields).encode(),), JSON
        headers = {"Accept": self.accept, **self.headers}
        if kind is not None:
            headers |= {"Content-Type": kind, "Content-Length": str(sum(map(len, pieces)))}
        target = self.path + ("?" + urlencode(query) if query else "")
        return Request(method=self.method, target=target, headers=headers, pieces=pieces)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A complete HTTP answer."""

    status: int
    #: Names in lower case.
    headers: Mapping[str, str]
    body: memoryview
    #: Whether an earlier copy of the request may have been carried out.
    doubtful: bool = False

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300 or self.status == 304

    @cached_property
    def _parts(self) -> tuple[Any, dict[str, wire.Tensor]]:
        """Parsed JSON and tensors by their names in the frame."""
        try:
            if self.headers.get("content-type", "").startswith(wire.SAFETENSORS):
                tensors, metadata = wire.decode(self.body)
                return json.loads(metadata.get(wire.META_KEY, "{}")), tensors
            return json.loads(bytes(self.body) or b"{}"), {}
        except (errors.RequestError, ValueError, RecursionError) as exc:
            raise errors.ServerError(f"the answer cannot be read: {exc}") from exc

    def fault(self) -> errors.ServerError | None:
        """Return what is wrong with an answer that should be a success; None if it is whole."""
        try:
            whole = isinstance(self.scalars, dict)
        except errors.ServerError as exc:
            return exc
        return None if whole else errors.ServerError("the answer cannot be read: it is no object")

    @property
    def scalars(self) -> Any:
        """Everything in the answer that is not a tensor, as parsed JSON."""
        return self._parts[0]

    @property
    def params(self) -> dict[str, wire.Tensor]:
        """The params in a binary answer, by name; views of the body."""
        prefix = "param/"
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self._parts[1].items()
            if name.startswith(prefix)
        }

    def error(self) -> errors.OptserveError:
        """Return the error that the answer stands for."""
        try:
            problem = json.loads(bytes(self.body))
        except ValueError:
            problem = None
        if not isinstance(problem, dict):
            text = bytes(self.body[:200]).decode("utf-8", "replace").strip()
            problem = {"detail": f"HTTP {self.status}" + (f": {text}" if text else "")}
        return errors.from_problem(self.status, problem)

    def retry_after_s(self) -> float:
        """Return how long the server asks to wait; 0 if it does not say."""
        value = self.headers.get("retry-after", "")
        try:
            return max(0.0, float(value))
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except (TypeError, ValueError):
            return 0.0


def to_json(value: Any, what: str = "") -> str:
    """Return JSON text of ``value``; numpy scalars and arrays are taken as numbers and lists.

    A refusal names the place below ``what``: ``scheduler.lr_lambda``.
    """
    try:
        return _ENCODER.encode(value)
    except ValueError as exc:
        raise errors.Invalid(_fault(value, what, ()) or f"no JSON: {exc}") from exc


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise ValueError(f"{type(value).__name__} cannot be sent as JSON: {value!r:.80}")


#: Made once, because that takes longer than most of what it encodes.
_ENCODER = json.JSONEncoder(
    allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_plain
)


def _fault(value: Any, where: str, above: tuple[int, ...]) -> str | None:
    """Say where in ``value`` there is something that JSON cannot say, and what to do."""
    if id(value) in above:
        return f"{where or 'a field'} contains itself"
    if isinstance(value, (str, int, type(None))):
        return None
    if isinstance(value, float):
        name = where or "a field"
        return None if math.isfinite(value) else f"{name} is {float(value)!r}, which JSON has not"
    if isinstance(value, Mapping):
        parts = [(f"{where}.{key}" if where else str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [(f"{where}[{i}]", item) for i, item in enumerate(value)]
    elif isinstance(value, (np.generic, np.ndarray)):
        return _fault(value.tolist(), where, above)
    elif callable(value):
        return (
            f"{where or 'a field'} is a Python function, which cannot be sent: write it as an "
            'expression in epoch, such as "0.95 ** epoch", or as a table: {"table": [1.0, 0.5]}'
        )
    else:
        kind = type(value).__name__
        return f"{where or 'a field'}: {kind} cannot be sent as JSON: {value!r:.80}"
    faults = (_fault(item, name, (*above, id(value))) for name, item in parts)
    return next((fault for fault in faults if fault), None)
