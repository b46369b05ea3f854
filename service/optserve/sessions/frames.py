"""The state file: everything of a session as one safetensors frame.

Tensors are ``param/<name>``, ``state/<name>/<torch's key>``, ``ema/``, ``best/`` and so on; the
rest is JSON with a ``format`` number under the metadata key ``optserve``. The ledger, which grows
with the requests that it remembers, is JSON in a tensor of bytes, since a header has a limit. The
same frame is a snapshot, the payload of a fork's create event, and what export and import speak.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from optserve.optim import devices
from optserve.optim.layout import Layout
from optserve.sentences import shown
from optserve.sessions.fields import load_object
from optserve_client import wire
from optserve_client.errors import Invalid, Malformed

FORMAT = 1
#: The tensor, of U8, that holds the ledger's JSON.
LEDGER = "ledger"


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """A decoded state file."""

    meta: Mapping[str, Any]
    tensors: Mapping[str, wire.Tensor]

    @property
    def layout(self) -> Layout:
        shapes = ((name, tuple(shape)) for name, shape in self.meta["shapes"])
        return Layout.pack(wire.dtype_tag(self.meta["dtype"]), shapes)


def encode(meta: Mapping[str, Any], tensors: Mapping[str, wire.Tensor]) -> list[bytes | memoryview]:
    """Return the frame's buffers; tensor bytes are views of ``tensors``."""
    rest = {name: value for name, value in meta.items() if name != LEDGER}
    text, ledger = _text({"format": FORMAT, **rest}), _text(meta[LEDGER])
    tensors = {**tensors, LEDGER: np.frombuffer(ledger.encode(), np.uint8)}
    return wire.encode(tensors, {wire.META_KEY: text})


def inexact(frame: Frame) -> str | None:
    """Return why the numbers in a state file may differ in their last bits from those answered."""
    reason = frame.meta.get("inexact")
    return reason if isinstance(reason, str) else None


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def decode(frame: bytes | bytearray | memoryview) -> Frame:
    """Return what ``frame`` holds, or raise Malformed or Invalid; tensors are views of it."""
    tensors, metadata = wire.decode(frame)
    if wire.META_KEY not in metadata:
        raise Malformed(f"this is no state file: __metadata__ has no {wire.META_KEY!r}")
    meta = load_object(metadata[wire.META_KEY], "the state file's metadata", limit=None)
    if type(meta.get("format")) is not int:
        raise Malformed("the state file's metadata has no format number")
    if meta["format"] != FORMAT:
        raise Invalid(f"the state file has format {meta['format']}, this server reads {FORMAT}")
    ledger = _read_ledger(tensors.pop(LEDGER, None))
    decoded = Frame(meta={**meta, LEDGER: ledger}, tensors=tensors)
    _check_params(decoded)
    return decoded


def _read_ledger(tensor: wire.Tensor | None) -> dict[str, Any]:
    if tensor is None:
        raise Malformed(f"the state file lacks the tensor {LEDGER!r}")
    if wire.dtype_of(tensor) != "U8":
        raise Malformed(f"{LEDGER!r} must be uint8, got {wire.dtype_name(wire.dtype_of(tensor))}")
    try:
        text = bytes(wire.as_bytes(tensor)).decode()
    except UnicodeDecodeError as exc:
        raise Malformed(f"{LEDGER!r} is not UTF-8: {exc.reason} at byte {exc.start}") from exc
    return load_object(text, "the state file's ledger", limit=None)


def _check_params(frame: Frame) -> None:
    """The params must be those that the metadata announces: names, shapes and dtype."""
    shapes, dtype = frame.meta.get("shapes"), frame.meta.get("dtype")
    if not isinstance(shapes, list) or not shapes or not all(map(_is_shape, shapes)):
        raise Malformed(f"shapes must be a list of [name, dimensions], got {shown(shapes)}")
    if dtype not in devices.DTYPES:
        raise Malformed(f"dtype must be one of {', '.join(devices.DTYPES)}, got {shown(dtype)}")
    layout = frame.layout
    for slot in layout.slots:
        wire.check_param_name(slot.name)
        if layout.by_name[slot.name] is not slot:
            raise Malformed(f"shapes has the name {shown(slot.name)} twice")
        tensor = frame.tensors.get(f"param/{slot.name}")
        if tensor is None:
            raise Invalid(f"the state file lacks the tensor 'param/{slot.name}'")
        if tuple(tensor.shape) != slot.shape or wire.dtype_of(tensor) != layout.dtype:
            raise Invalid(
                f"'param/{slot.name}' is {wire.dtype_name(wire.dtype_of(tensor))} "
                f"{list(tensor.shape)}, its metadata says {frame.meta['dtype']} {list(slot.shape)}"
            )


def _is_shape(row: Any) -> bool:
    """Say whether ``row`` is ``["w", [2, 3]]``."""
    if not isinstance(row, list) or len(row) != 2 or not isinstance(row[0], str):
        return False
    return isinstance(row[1], list) and all(type(n) is int and n >= 0 for n in row[1])
