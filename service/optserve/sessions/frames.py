"""The state file: everything of a session as one safetensors frame.

Tensors are ``param/<name>``, ``state/<name>/<torch's key>``, ``ema/``, ``best/`` and so on; the
rest is JSON with a ``format`` number under the metadata key ``optserve``. The same frame is a
snapshot, the payload of a fork's create event, and what export and import speak.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optserve.optim.layout import Layout
from optserve_client import wire
from optserve_client.errors import Invalid, Malformed

FORMAT = 1


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
    text = json.dumps({"format": FORMAT, **meta}, allow_nan=False, separators=(",", ":"))
    return wire.encode(tensors, {wire.META_KEY: text})


def decode(frame: bytes | bytearray | memoryview) -> Frame:
    """Return what ``frame`` holds, or raise Malformed or Invalid; tensors are views of it."""
    tensors, metadata = wire.decode(frame)
    if wire.META_KEY not in metadata:
        raise Malformed(f"this is no state file: __metadata__ has no {wire.META_KEY!r}")
    try:
        meta = json.loads(metadata[wire.META_KEY])
    except (ValueError, RecursionError) as exc:
        raise Malformed(f"the state file's metadata is not JSON: {exc}") from exc
    if not isinstance(meta, dict) or not isinstance(meta.get("format"), int):
        raise Malformed("the state file's metadata has no format number")
    if meta["format"] != FORMAT:
        raise Invalid(f"the state file has format {meta['format']}, this server reads {FORMAT}")
    decoded = Frame(meta=meta, tensors=tensors)
    _check_params(decoded)
    return decoded


def _check_params(frame: Frame) -> None:
    """The params must be those that the metadata announces: names, shapes and dtype."""
    try:
        layout = frame.layout
        names = [str(name) for name in layout.by_name]
    except (KeyError, TypeError, ValueError) as exc:
        raise Malformed(f"the state file's metadata has no usable shapes: {exc!r:.200}") from exc
    if not names or len(names) != len(layout.slots):
        raise Malformed("the state file names no params, or one of them twice")
    for slot in layout.slots:
        wire.check_param_name(slot.name)
        tensor = frame.tensors.get(f"param/{slot.name}")
        if tensor is None:
            raise Invalid(f"the state file lacks the tensor 'param/{slot.name}'")
        if tuple(tensor.shape) != slot.shape or wire.dtype_of(tensor) != layout.dtype:
            raise Invalid(
                f"'param/{slot.name}' is {wire.dtype_name(wire.dtype_of(tensor))} "
                f"{list(tensor.shape)}, its metadata says {frame.meta['dtype']} {list(slot.shape)}"
            )
