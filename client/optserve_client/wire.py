"""Named tensors <-> bytes: the safetensors format, and the forms of a tensor inside JSON.

Our own codec, because the ``safetensors`` package copies, re-sorts and wants ``bytes``. A frame is
8 bytes (the header's length, little-endian), the header (JSON, padded with spaces to 8 bytes) and
the tensors, packed without holes. Nothing here trusts its input.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from json.decoder import scanstring  # type: ignore[attr-defined]
from json.encoder import encode_basestring as _quoted
from typing import Any

from optserve_client._json_tensors import tensor_from_json, tensor_to_json
from optserve_client._tensors import (
    MAX_RANK,
    Array,
    Bits,
    BytesLike,
    Tensor,
    as_bytes,
    check_id,
    check_param_name,
    dtype_name,
    dtype_of,
    dtype_tag,
    from_bytes,
    itemsize,
    narrow,
    nbytes,
    numpy_dtype,
    text_fault,
    widen,
)
from optserve_client.errors import Invalid, Malformed

__all__ = [
    "HEADER_LIMIT",
    "MAX_RANK",
    "META_KEY",
    "SAFETENSORS",
    "Array",
    "Bits",
    "BytesLike",
    "Header",
    "Tensor",
    "TensorInfo",
    "as_bytes",
    "check_id",
    "check_param_name",
    "decode",
    "dtype_name",
    "dtype_of",
    "dtype_tag",
    "encode",
    "encode_header",
    "from_bytes",
    "header_length",
    "itemsize",
    "narrow",
    "nbytes",
    "numpy_dtype",
    "parse_header",
    "tensor_from_json",
    "tensor_to_json",
    "widen",
]

SAFETENSORS = "application/vnd.safetensors"
#: ``__metadata__["optserve"]`` holds all fields that are not tensors, as one JSON string.
META_KEY = "optserve"
#: Bytes of the header's JSON; also what a server buffers before it knows a body's layout.
HEADER_LIMIT = 16 * 2**20

_METADATA = "__metadata__"
_ENTRY = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a frame: bytes ``[begin, end)`` of its data part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame holds and where."""

    #: In the order of their bytes.
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    #: Where the data part begins, from the start of the frame.
    data_start: int
    data_bytes: int

    @property
    def frame_bytes(self) -> int:
        return self.data_start + self.data_bytes


def header_length(first8: BytesLike) -> int:
    """Return the length of the header that follows the first 8 bytes of a frame."""
    prefix = bytes(memoryview(first8)[:8])
    if len(prefix) < 8:
        raise Malformed(f"a safetensors frame has at least 8 bytes, got {len(prefix)}")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= HEADER_LIMIT:
        raise Malformed(f"the header length must be in [2, {HEADER_LIMIT}], got {length}")
    return length


def parse_header(header_json: BytesLike) -> Header:
    """Read a frame's header, which follows its first 8 bytes; refuse whatever does not add up."""
    raw = bytes(header_json)
    said, rest = _split(raw)
    if said is not None and (infos := _SEEN.get(rest)) is not None:
        metadata = _check_metadata({META_KEY: said})
    else:
        root = _load(raw)
        metadata = _check_metadata(root.pop(_METADATA, {}))
        infos = _in_order(root)
        if said is not None and len(rest) <= _SEEN_LENGTH:
            while len(_SEEN) >= _SEEN_LIMIT:
                _SEEN.pop(next(iter(_SEEN)), None)
            _SEEN[rest] = infos
    return Header(infos, metadata, 8 + len(raw), infos[-1].end if infos else 0)


#: Tensors by the text that stood behind the metadata of a header: from step to step only the
#: metadata differs, and the tensors of a large model take a millisecond to read.
_SEEN: dict[str, tuple[TensorInfo, ...]] = {}
_SEEN_LIMIT = 64
_SEEN_LENGTH = 2**18
_BEGIN = f'{{"{_METADATA}":{{"{META_KEY}":"'


def _split(raw: bytes) -> tuple[str | None, str]:
    """Return our metadata and the text behind it, if a header begins with it as ours do."""
    if not raw.startswith(_BEGIN.encode()):
        return None, ""
    try:
        text = raw.decode()
        said, end = scanstring(text, len(_BEGIN))
    except ValueError:
        return None, ""
    rest = text[end:].rstrip(" ")
    # Else there is more metadata, which is nobody's but this header's.
    return (said, rest) if rest.startswith(("},", "}}")) else (None, "")


def _in_order(root: Mapping[str, Any]) -> tuple[TensorInfo, ...]:
    infos = sorted(
        (_tensor_info(name, entry) for name, entry in root.items()),
        key=lambda info: (info.begin, info.end),
    )
    at = 0
    for info in infos:
        if info.begin != at:
            kind = "overlaps the one before" if info.begin < at else "leaves a hole before it"
            raise Malformed(f"tensor {info.name!r} begins at {info.begin}, not {at}: it {kind}")
        at = info.end
    return tuple(infos)


def encode_header(
    infos: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the first bytes of a frame whose tensors (name, dtype, shape) come in this order."""
    tensors = _tensors_text(tuple((name, dtype, tuple(shape)) for name, dtype, shape in infos))
    if metadata:
        said = ",".join(f"{_quoted(key)}:{_quoted(value)}" for key, value in metadata.items())
        more = "," if len(tensors) > 2 else ""
        tensors = f'{{"{_METADATA}":{{{said}}}{more}{tensors[1:]}'
    text = tensors.encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise Invalid(f"the header has {len(text)} bytes, the limit is {HEADER_LIMIT}")
    return len(text).to_bytes(8, "little") + text


@lru_cache(64)
def _tensors_text(infos: tuple[tuple[str, str, tuple[int, ...]], ...]) -> str:
    """Return a header without metadata."""
    root: dict[str, Any] = {}
    at = 0
    for name, dtype, shape in infos:
        if why := text_fault(name):
            raise Invalid(f"tensor name {name!r} {why}")
        if name in root or name == _METADATA:
            raise Invalid(f"tensor name {name!r} is used twice or reserved")
        end = at + nbytes(dtype, shape)
        root[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return json.dumps(root, separators=(",", ":"), ensure_ascii=False)


def encode(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> list[bytes | memoryview]:
    """Return a frame in pieces: its header, then a zero-copy view of each tensor, in order."""
    infos = ((name, dtype_of(t), t.shape) for name, t in tensors.items())
    return [encode_header(infos, metadata), *(as_bytes(t) for t in tensors.values())]


def decode(frame: BytesLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a whole frame, as views of it in the order of their bytes, and its
    metadata."""
    whole = memoryview(frame).cast("B")
    start = 8 + header_length(whole)
    if start > len(whole):
        raise Malformed(f"the header ends at byte {start}, the frame has {len(whole)}")
    header = parse_header(whole[8:start])
    if header.frame_bytes != len(whole):
        kind = "trailing bytes" if header.frame_bytes < len(whole) else "it is cut off"
        raise Malformed(
            f"the header describes {header.frame_bytes} bytes, the frame has {len(whole)}: {kind}"
        )
    data = whole[start:]
    tensors = {i.name: from_bytes(i.dtype, i.shape, data[i.begin : i.end]) for i in header.tensors}
    return tensors, header.metadata


def _load(raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise Malformed(f"the header must begin with '{{', got {raw[:1]!r}")
    try:
        root = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as exc:
        raise Malformed(f"the header is not UTF-8: {exc.reason} at byte {exc.start}") from exc
    except RecursionError as exc:
        raise Malformed("the header is nested too deeply") from exc
    except ValueError as exc:
        raise Malformed(f"the header is not JSON: {exc}") from exc
    assert isinstance(root, dict)
    return root


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise Malformed(f"the header has the key {twice[:80]!r} twice")
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _check_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise Malformed(f"{_METADATA} must be an object, got {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise Malformed(
                f"{_METADATA}[{key[:80]!r}] must be a string, got {type(value).__name__}"
            )
        try:
            (key + value).encode()
        except UnicodeEncodeError as exc:
            raise Malformed(f"{_METADATA}[{key[:80]!r}] is not UTF-8") from exc
    return metadata


def _tensor_info(name: str, entry: Any) -> TensorInfo:
    if why := text_fault(name):
        raise Malformed(f"tensor name {name[:80]!r} {why}")
    what = f"tensor {name[:300]!r}"
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise Malformed(f"{what} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    try:
        itemsize(dtype if isinstance(dtype, str) else repr(dtype))
    except Invalid as exc:
        raise Malformed(f"{what}: {exc.detail}") from exc
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_natural, shape)):
        raise Malformed(
            f"{what}: shape must be a list of at most {MAX_RANK} integers >= 0, got {shape!r:.80}"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise Malformed(f"{what}: data_offsets must be two integers >= 0, got {offsets!r:.80}")
    begin, end = offsets
    try:
        want = nbytes(dtype, shape)
    except Malformed as exc:
        raise Malformed(f"{what}: {exc.detail}") from exc
    if end - begin != want:
        raise Malformed(
            f"{what}: offsets [{begin}, {end}) do not match shape {shape} of {dtype} ({want} bytes)"
        )
    return TensorInfo(name, dtype, tuple(shape), begin, end)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
