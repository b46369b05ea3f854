"""Compressed gradients of a binary step: what their tensors must be.

``topk/<name>/indices`` and ``topk/<name>/values`` are the elements that are not zero.
``int8/<name>/values`` are whole numbers, of which each block of ``int8_block`` elements is
multiplied by its own of ``int8/<name>/scales``. The journal keeps them as they came; the update
gets the dense gradient that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from optserve.sentences import shown
from optserve.sessions.fields import StepFields
from optserve.sessions.step import Expected, no_int8
from optserve_client import wire
from optserve_client.errors import Invalid

if TYPE_CHECKING:
    from optserve.optim.arena import GradientBuffer

#: The two tensors of each kind.
HALVES = {"topk": ("indices", "values"), "int8": ("values", "scales")}
#: Elements that share a scale, unless the step says otherwise.
INT8_BLOCK = 256

#: Checks shape and dtype of a tensor of numbers, which a sentence calls by the last argument.
CheckTensor = Callable[[wire.TensorInfo, tuple[int, ...], str], None]


def split(full_name: str) -> tuple[str, str, str] | None:
    """Return kind, parameter and half of a compressed gradient's tensor; None for any other."""
    kind, _, rest = full_name.partition("/")
    if kind not in HALVES:
        return None
    name, _, half = rest.rpartition("/")
    return (kind, name, half) if name and half in HALVES[kind] else None


def check(
    infos: Iterable[wire.TensorInfo],
    dense: Iterable[str],
    expected: Expected,
    fields: StepFields,
    check_tensor: CheckTensor,
) -> set[str]:
    """Refuse compressed gradients that the session cannot take; return their parameters.

    ``infos``: their tensors; ``dense``: parameters that have a gradient already.
    """
    pairs: dict[tuple[str, str], dict[str, wire.TensorInfo]] = {}
    first = {name: f"{expected.kind}/{name}" for name in dense}
    for info in infos:
        kind, name, half = split(info.name) or ("", "", "")
        expected.check_compressed(name, shown(info.name))
        pair = pairs.setdefault((kind, name), {})
        if not pair and first.setdefault(name, info.name) != info.name:
            raise Invalid(
                f"parameter {shown(name)} has two gradients: "
                f"{shown(first[name])} and {shown(info.name)}"
            )
        pair[half] = info
    for (kind, name), pair in pairs.items():
        for half in HALVES[kind]:
            if half not in pair:
                lacks = shown(f"{kind}/{name}/{half}")
                raise Invalid(f"the compressed gradient of {shown(name)} lacks {lacks}")
        slot = expected.layout.by_name[name]
        if kind == "topk":
            _check_topk(pair["indices"], pair["values"], name, slot.numel, check_tensor)
        else:
            block = fields.int8_block or INT8_BLOCK
            _check_int8(pair["values"], pair["scales"], slot.shape, slot.numel, block)
    if fields.int8_block is not None and not any(kind == "int8" for kind, _ in pairs):
        raise no_int8(fields.int8_block)
    return {name for _, name in pairs}


def _check_topk(
    indices: wire.TensorInfo,
    values: wire.TensorInfo,
    name: str,
    numel: int,
    check_tensor: CheckTensor,
) -> None:
    what = shown(indices.name)
    if indices.dtype not in ("I32", "I64"):
        raise Invalid(f"{what} is {wire.dtype_name(indices.dtype)}, expected int32 or int64")
    if len(indices.shape) != 1:
        raise Invalid(f"{what} has shape {list(indices.shape)}, expected [k]")
    if indices.shape[0] > numel:
        raise Invalid(f"{what} has {indices.shape[0]} entries, {shown(name)} has {numel} elements")
    check_tensor(values, indices.shape, shown(values.name))


def _check_int8(
    values: wire.TensorInfo,
    scales: wire.TensorInfo,
    shape: tuple[int, ...],
    numel: int,
    block: int,
) -> None:
    count = -(-numel // block)
    for info, dtype, dims in ((values, "I8", shape), (scales, "F32", (count,))):
        what = shown(info.name)
        if info.dtype != dtype:
            have, want = wire.dtype_name(info.dtype), wire.dtype_name(dtype)
            raise Invalid(f"{what} is {have}, expected {want}")
        if info.shape != dims:
            why = f", one for each int8_block of {block}" if info is scales else ""
            raise Invalid(f"{what} has shape {list(info.shape)}, expected {list(dims)}{why}")


def unpack(
    staged: Mapping[str, wire.Tensor],
    expected: Expected,
    fields: StepFields,
    buffer: GradientBuffer,
) -> None:
    """Check the content of the compressed gradients in ``staged``, which their headers passed, and
    tell ``buffer`` what it has to make of them."""
    for full_name, tensor in staged.items():
        kind, name, half = split(full_name) or ("", "", "")
        if kind == "topk" and half == "values":
            what = f"topk/{name}/indices"
            indices = staged[what]
            assert isinstance(indices, np.ndarray)
            check_increasing(indices, expected.layout.by_name[name].numel, what)
            values = wire.widen(tensor, expected.layout.dtype, full_name)
            buffer.scatter(name, indices, values)
        elif kind == "int8":
            assert isinstance(tensor, np.ndarray)
            check_scales(tensor, full_name)
            buffer.scale(name, tensor, fields.int8_block or INT8_BLOCK)


def check_increasing(indices: np.ndarray, numel: int, what: str) -> None:
    """Refuse indices that are not strictly increasing, or outside ``[0, numel)``."""
    if not len(indices):
        return
    falls = indices[1:] <= indices[:-1]
    if falls.any():
        at = int(falls.argmax())
        raise Invalid(
            f"{what}[{at + 1}] must be > {what}[{at}], which is {indices[at]}, "
            f"got {indices[at + 1]}"
        )
    at = 0 if indices[0] < 0 else int(np.searchsorted(indices, numel))
    if at < len(indices):
        raise Invalid(f"{what}[{at}] must be in [0, {numel}), got {indices[at]}")


def check_scales(scales: np.ndarray, what: str) -> None:
    """Refuse a scale that is negative, NaN or infinite."""
    good = (scales >= 0) & (scales < np.inf)
    if not good.all():
        at = int(good.argmin())
        raise Invalid(f"{what}[{at}] must be finite and >= 0, got {scales[at]}")
