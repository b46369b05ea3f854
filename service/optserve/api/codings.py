"""Content codings of bodies and answers (RFC 9110, 8.4): gzip and zstd, piece by piece."""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, Protocol

from optserve_client.errors import Malformed, TooLarge, UnsupportedMediaType
from optserve_client.wire import BytesLike

# Python's own interface, because it can be told how much to return of what a piece becomes.
if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Coding = Literal["zstd", "gzip"]
#: The better one of two that are wanted alike comes first.
CODINGS: tuple[Coding, ...] = ("zstd", "gzip")

_ALIASES: dict[Coding, str] = {"gzip": "x-gzip"}
#: zlib's number for a gzip header and trailer.
_GZIP = 31
#: No decoder has to know more of what it has made (RFC 9659).
_WINDOW_LOG = 23
#: Its own words around the reason.
_ZLIB_ERROR = re.compile(r"Error -?\d+ while decompressing data: ")


def request_coding(content_encoding: str | None) -> Coding | None:
    """Return the coding of a body that has this Content-Encoding; None: it has none."""
    if content_encoding is None:
        return None
    name = content_encoding.strip().lower()
    if name in ("", "identity"):
        return None
    for coding in CODINGS:
        if name in (coding, _ALIASES.get(coding)):
            return coding
    raise UnsupportedMediaType(
        f"Content-Encoding must be {', '.join(CODINGS)} or identity, got {content_encoding!r:.80}",
        accept_encoding=[*CODINGS, "identity"],
    )


@lru_cache(256)
def answer_coding(accept_encoding: str) -> Coding | None:
    """Return which coding the request likes best, if it likes one no less than none."""
    weights = dict(_weighted(part) for part in accept_encoding.split(",") if part.strip())
    if "x-gzip" in weights:
        weights.setdefault("gzip", weights["x-gzip"])
    other = weights.get("*", 0.0)
    best = max(CODINGS, key=lambda coding: weights.get(coding, other))
    weight = weights.get(best, other)
    return best if weight > 0 and weight >= weights.get("identity", 0.0) else None


def _weighted(part: str) -> tuple[str, float]:
    name, *parameters = part.split(";")
    weight = 1.0
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "q":
            try:
                weight = float(value)
            except ValueError:
                weight = 0.0
    return name.strip().lower(), weight if 0 <= weight <= 1 else 0.0


# --- what comes in -------------------------------------------------------------------------------


class Decoding:
    """A compressed body on its way in: give it what arrives, and take pieces until it is idle.

    Members of gzip (RFC 1952) and frames of zstd (RFC 8878) may follow each other; their checksums
    count. Any thread may call, one at a time.
    """

    def __init__(self, coding: Coding, limit_bytes: int) -> None:
        self._coding = coding
        self._limit = limit_bytes
        self._produced = 0
        self._member = _MEMBERS[coding]()
        self._begun = self._several = False
        self._given: BytesLike = b""
        #: Whether there is nothing to take before it is given more.
        self.idle = True

    def give(self, data: BytesLike) -> None:
        """Take the next bytes of the body. It must be idle."""
        self._given, self.idle = data, not data
        self._begun = self._begun or not self.idle

    def take(self, most: int) -> bytes:
        """Return up to ``most`` bytes of what was compressed; none if it is idle by then.

        Raises Malformed, and TooLarge one byte above the limit.
        """
        piece = b""
        while not (piece or self.idle):
            piece = self.step(most)
        return piece

    def step(self, most: int) -> bytes:
        """Do the same in bounded time: it may return nothing and not be idle."""
        member = self._member
        if member.eof:
            member = self._member = _MEMBERS[self._coding]()
            self._several = True
        given, self._given = self._given, b""
        try:
            piece = member.decompress(given, min(most, self._limit + 1 - self._produced))
        except (zlib.error, zstd.ZstdError) as exc:
            raise Malformed(f"{self._told()}: {_ZLIB_ERROR.sub('', str(exc))}") from exc
        self._produced += len(piece)
        if self._produced > self._limit:
            raise TooLarge(
                f"the body, decompressed, has more than {self._limit} bytes, which is the limit",
                limit=self._limit,
            )
        if member.eof:
            self._given = member.unused_data
        self.idle = not self._given if member.eof else member.needs_input
        return piece

    def _told(self) -> str:
        if self._several:
            return (
                f"after the end of its {self._coding} stream the body goes on with something else"
            )
        return f"the body is no {self._coding} stream"

    def finish(self) -> None:
        """Check, at the end of the body, that it is complete; raise Malformed if it is not."""
        if not self._member.eof:
            where = "in the middle of" if self._begun else "before the beginning of"
            raise Malformed(f"the body ended {where} its {self._coding} stream")


class _Gzip:
    """One member, with the interface of zstd's decompressor."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(_GZIP)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: BytesLike, most: int) -> bytes:
        piece = self._inner.decompress(data or self._inner.unconsumed_tail, most)
        # With a full piece there may be more of it inside.
        self.needs_input = len(piece) < most and not self._inner.unconsumed_tail
        return piece


def _zstd() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(
        options={int(zstd.DecompressionParameter.window_log_max): _WINDOW_LOG}
    )


_MEMBERS: dict[Coding, Callable[[], _Gzip | zstd.ZstdDecompressor]] = {
    "gzip": _Gzip,
    "zstd": _zstd,
}


# --- what goes out -------------------------------------------------------------------------------


class Encoding(Protocol):
    """Compresses piece by piece; as fast as its coding can."""

    def compress(self, data: BytesLike, /) -> bytes: ...
    def flush(self) -> bytes: ...


def encoding(coding: Coding, nbytes: int) -> Encoding:
    """Return what compresses ``nbytes`` bytes."""
    if coding == "gzip":
        return zlib.compressobj(1, wbits=_GZIP)
    made = zstd.ZstdCompressor(
        options={
            int(zstd.CompressionParameter.compression_level): 1,
            int(zstd.CompressionParameter.checksum_flag): 1,
        }
    )
    made.set_pledged_input_size(nbytes)
    return made
