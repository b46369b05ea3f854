"""HTTP/1.1 without a socket: the bytes of a request, and an answer out of the bytes that arrive.

Small and strict: what is not as RFC 9112 has it is a :class:`errors.TransportError`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from optserve_client import errors
from optserve_client._memory import Take
from optserve_client._messages import Answer, Request

#: Of an answer's status line and headers.
HEAD_LIMIT = 2**16
#: Of the line before each chunk.
_LINE_LIMIT = 2**12

_STATUS = re.compile(r"HTTP/1\.([01]) ([1-9]\d\d)(?: .*)?", re.ASCII)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


class Heads:
    """The heads of requests to one server; what is the same in each is put together once."""

    def __init__(self, host: str, prefix: str, headers: Mapping[str, str]) -> None:
        """``host`` as in the URL, ``prefix``: its path, ``headers``: sent with every request."""
        check_headers(headers)
        self._prefix = prefix
        self._headers = {"host": f"Host: {host}"}
        self._headers |= {name.lower(): f"{name}: {value}" for name, value in headers.items()}
        self._fixed: dict[tuple[str, ...], str] = {}

    def head(self, request: Request) -> bytes:
        """Return the request line and the headers; those of ``request`` go before ours."""
        own = request.headers
        names = (*own, "Content-Length") if self._lacks_length(request) else tuple(own)
        fixed = self._fixed.get(names)
        if fixed is None:
            fixed = self._fixed[names] = self._constant(own, names)
        lines = map(": ".join, own.items())
        first = f"{request.method} {self._prefix}{request.target} HTTP/1.1"
        text = "\r\n".join((first, *lines, fixed))
        if not text.isascii() or not "".join((first, *own.values())).isprintable():
            raise errors.Invalid("a header or the path holds what is not printable ASCII")
        return text.encode()

    def _lacks_length(self, request: Request) -> bool:
        return request.method in _WITH_BODY and "Content-Length" not in request.headers

    def _constant(self, own: Mapping[str, str], names: tuple[str, ...]) -> str:
        given = {name.lower() for name in names}
        lines = [line for name, line in self._headers.items() if name not in given]
        lines += [] if len(names) == len(own) else ["Content-Length: 0"]
        return "\r\n".join((*lines, "", ""))


def check_headers(headers: Mapping[str, str]) -> None:
    """Refuse headers that would not arrive as they are. Their values may be secrets."""
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"headers must map strings to strings, got {type(value).__name__}")
        if not _TOKEN.fullmatch(name):
            raise errors.Invalid(f"{name!r:.80} is no name of a header")
        if not (value.isascii() and value.isprintable()):
            raise errors.Invalid(f"header {name} holds what is not printable ASCII")


class Incoming:
    """An answer that arrives: read into :meth:`buffer`, then say how much to :meth:`received`."""

    def __init__(self, method: str, room: memoryview, take: Take) -> None:
        """``room``: HEAD_LIMIT bytes, used again for the next answer; ``take``: for its body."""
        self._method = method
        self._room = room
        self._take = take
        self._filled = 0
        self._body: _Sized | _Chunked | _Rest | None = None
        self._headers: Mapping[str, str] = {}
        #: Of the final answer, once its head is here; else 0.
        self.status = 0
        #: Whether the answer is whole.
        self.done = False
        #: Whether the connection can take another request afterwards.
        self.keep = False

    def buffer(self) -> memoryview:
        """Return where the next bytes go."""
        if isinstance(self._body, _Sized):
            return self._body.room()
        return self._room[self._filled :]

    def received(self, count: int) -> None:
        """Take ``count`` bytes that were written to :meth:`buffer`; 0: there are no more."""
        body = self._body
        if count == 0:
            self._ended()
        elif isinstance(body, _Sized):
            body.at += count
            self.done = body.done
        elif body is not None:
            self._feed(body, self._room[:count])
        else:
            self._filled += count
            self._heads()

    def answer(self) -> Answer:
        """Return the answer, when it is whole."""
        assert self.done
        whole = self._body.whole() if self._body is not None else memoryview(bytearray())
        return Answer(status=self.status, headers=self._headers, body=whole)

    def _ended(self) -> None:
        self.keep = False
        if isinstance(self._body, _Rest):
            self.done = True
        elif not self.status and not self._filled:
            raise errors.TransportError("the server closed the connection without an answer")
        else:
            got = "its head" if self._body is None else self._body.told()
            raise errors.TransportError(f"the answer was cut short after {got}")

    def _heads(self) -> None:
        """Read the heads that are complete; those that are not final are dropped."""
        raw: bytearray = self._room.obj  # type: ignore[assignment]
        start = 0
        while not self.status:
            end = raw.find(b"\r\n\r\n", start, self._filled)
            if end < 0:
                rest = self._filled - start
                if rest == len(self._room):
                    raise errors.TransportError(f"the head has more than {HEAD_LIMIT} bytes")
                if not b"HTTP/1.".startswith(bytes(raw[start : min(self._filled, start + 7)])):
                    raise errors.TransportError(
                        f"no HTTP answer: {bytes(raw[start : min(self._filled, start + 40)])!r}"
                    )
                self._room[:rest] = self._room[start : self._filled]
                self._filled = rest
                return
            head = parse_head(bytes(self._room[start:end]))
            start = end + 4
            if head.status >= 200:
                self._begin(head)
            elif head.status == 101:
                raise errors.TransportError("the server switched protocols unasked (101)")
        surplus, self._filled = self._room[start : self._filled], 0
        if self._body is not None:
            self._feed(self._body, surplus)
        else:
            self.done, self.keep = True, self.keep and not surplus

    def _begin(self, head: Head) -> None:
        self.status, self._headers, self.keep = head.status, head.headers, head.keep
        if head.status in (204, 304) or self._method == "HEAD":
            return
        if head.chunked:
            self._body = _Chunked()
        elif head.length is not None:
            self._body = _Sized(self._take(head.length))
        else:
            self._body = _Rest()

    def _feed(self, body: _Sized | _Chunked | _Rest, data: memoryview) -> None:
        used = body.feed(data)
        self.done = body.done
        self.keep = self.keep and used == len(data)


@dataclass(frozen=True, slots=True)
class Head:
    """What the status line and the headers of an answer say."""

    status: int
    #: Names in lower case; those that came twice are joined by commas.
    headers: Mapping[str, str]
    #: Whether the server keeps the connection open.
    keep: bool
    chunked: bool
    #: Of the body in bytes, if it is said.
    length: int | None


@lru_cache(16)  # from step to step they are the same, until the second of the date changes
def parse_head(raw: bytes) -> Head:
    """Read an answer's head, without the empty line at its end."""
    text = raw.decode("latin-1")
    first, *lines = text.split("\r\n")
    found = _STATUS.fullmatch(first)
    if found is None:
        raise errors.TransportError(f"no HTTP answer: {first[:40]!r}")
    if text.count("\n") != len(lines) or text.count("\r") != len(lines) or "\0" in text:
        raise errors.TransportError("a header of the answer holds a control character")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name):
            raise errors.TransportError(f"no header of an answer: {line[:40]!r}")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    said = {one.strip() for one in headers.get("connection", "").lower().split(",")}
    keep = "close" not in said and (found[1] == "1" or "keep-alive" in said)
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None and coding.lower() != "chunked":
        raise errors.TransportError(f"the transfer coding {coding!r:.80} is not known")
    if length is not None and not _LENGTH.fullmatch(length):
        raise errors.TransportError(f"the Content-Length is {length!r:.80}")
    if coding and length:  # the length does not count, and the sender is not to be trusted
        keep, length = False, None
    return Head(int(found[2]), headers, keep, coding is not None, int(length) if length else None)


class _Sized:
    """A body whose length is known, in one block: tensors in it are views of that."""

    def __init__(self, whole: memoryview) -> None:
        self._whole = whole
        self.at = 0

    @property
    def done(self) -> bool:
        return self.at == len(self._whole)

    def room(self) -> memoryview:
        return self._whole[self.at :]

    def feed(self, data: memoryview) -> int:
        used = min(len(data), len(self._whole) - self.at)
        self._whole[self.at : self.at + used] = data[:used]
        self.at += used
        return used

    def whole(self) -> memoryview:
        return self._whole

    def told(self) -> str:
        return f"{self.at} of {len(self._whole)} bytes"


class _Growing:
    """A body whose length shows at its end."""

    done = False

    def __init__(self) -> None:
        self._whole = bytearray()

    def whole(self) -> memoryview:
        return memoryview(self._whole)

    def told(self) -> str:
        return f"{len(self._whole)} bytes"


class _Rest(_Growing):
    """A body that ends where the connection does."""

    def feed(self, data: memoryview) -> int:
        self._whole += data
        return len(data)


class _Chunked(_Growing):
    """A body in chunks, each with its length in front; trailers are read and dropped."""

    def __init__(self) -> None:
        super().__init__()
        #: Bytes of the chunk that are still to come.
        self._left = 0
        self._line = bytearray()
        #: What the next line is: the length of a chunk, the end of one, or a trailer.
        self._next = "length"
        self._trailing = 0

    def feed(self, data: memoryview) -> int:
        at = 0
        while at < len(data) and not self.done:
            if self._left:
                piece = data[at : at + self._left]
                self._whole += piece
                self._left -= len(piece)
                at += len(piece)
            else:
                at += self._take(bytes(data[at : at + _LINE_LIMIT]))
        return at

    def _take(self, data: bytes) -> int:
        """Take what belongs to the current line and return how much that is."""
        end = data.find(b"\n") + 1
        self._line += data[:end] if end else data
        if len(self._line) > _LINE_LIMIT:
            raise errors.TransportError(f"a line between chunks has more than {_LINE_LIMIT} bytes")
        if not end:
            return len(data)
        line, self._line = bytes(self._line), bytearray()
        if self._next == "length":
            found = _CHUNK.fullmatch(line)
            if found is None:
                raise errors.TransportError(f"no length of a chunk: {line[:40]!r}")
            self._left = int(found[1], 16)
            self._next = "end" if self._left else "trailer"
        elif self._next == "end":
            if line != b"\r\n":
                raise errors.TransportError(f"a chunk is longer than its length: {line[:40]!r}")
            self._next = "length"
        else:
            self._trailing += len(line)
            if self._trailing > HEAD_LIMIT:
                raise errors.TransportError(f"the trailers have more than {HEAD_LIMIT} bytes")
            self.done = line == b"\r\n"
        return end
