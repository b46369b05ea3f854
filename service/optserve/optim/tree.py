"""Optimizer and scheduler state as strict JSON plus tensors, and back, type for type.

JSON alone loses what torch's state needs: tuples become lists, the int keys of MultiStepLR's
Counter become strings (and the schedule silently never decays again), inf and nan have no spelling.
So every value that JSON does not have is written as an object with the one key ``$`` + its type:

    (0.9, 0.999)          {"$tuple": [0.9, 0.999]}
    Counter({30: 1})      {"$counter": [[30, 1]]}
    {0: "a"}              {"$dict": [[0, "a"]]}
    inf                   {"$float": "inf"}
    tensor                {"$tensor": "state/w/exp_avg"}    the name under which it is stored
    tensor not on the CPU {"$device": "state/w/exp_avg"}    it goes back to the session's device
    transposed tensor     {"$strided": [{"$tensor": ...}, [1, 0]]}    the dims, outermost first
    torch.float32         {"$dtype": "float32"}
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

Json = Any


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors anywhere in mappings and sequences."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def flatten(
    obj: Any, prefix: str = "", tensors: dict[str, torch.Tensor] | None = None
) -> tuple[Json, dict[str, torch.Tensor]]:
    """Return ``obj`` as strict JSON and the tensors that it held, named below ``prefix``.

    The tensors are not copied; they are added to ``tensors`` when that is given. Raises TypeError
    for a value of any other type, naming where it is.
    """
    found: dict[str, torch.Tensor] = {} if tensors is None else tensors
    return _flatten(obj, prefix, found), found


def _flatten(obj: Any, at: str, tensors: dict[str, torch.Tensor]) -> Json:
    match obj:
        case None | bool() | str():
            return obj
        case int():
            return int(obj)
        case float():
            return float(obj) if math.isfinite(obj) else {"$float": repr(float(obj))}
        case torch.Tensor():
            while at in tensors:  # a param name with a slash can meet another one's state
                at += "+"
            tensors[at] = obj.detach()
            saved = {"$tensor" if obj.device.type == "cpu" else "$device": at}
            # A product with a transposed matrix differs in the last bits from one with its copy.
            strides = obj.stride()
            order = sorted(range(obj.dim()), key=lambda dim: -strides[dim])
            transposed = not obj.is_contiguous() and obj.permute(order).is_contiguous()
            return {"$strided": [saved, order]} if transposed else saved
        case torch.dtype():
            return {"$dtype": str(obj).removeprefix("torch.")}
        case list():
            return [_flatten(item, f"{at}/{i}", tensors) for i, item in enumerate(obj)]
        case tuple():
            return {"$tuple": [_flatten(item, f"{at}/{i}", tensors) for i, item in enumerate(obj)]}
        case Counter():
            return {"$counter": [[key, count] for key, count in obj.items()]}
        case dict():
            plain = all(isinstance(key, str) and not key.startswith("$") for key in obj)
            if plain:
                return {key: _flatten(item, f"{at}/{key}", tensors) for key, item in obj.items()}
            return {
                "$dict": [
                    [_flatten(key, f"{at}/key", tensors), _flatten(item, f"{at}/{key}", tensors)]
                    for key, item in obj.items()
                ]
            }
        case _:
            raise TypeError(f"{at or 'state'} holds a {type(obj).__name__}, which cannot be saved")


def unflatten(
    json: Json, tensors: Mapping[str, torch.Tensor] | None = None, device: str = "cpu"
) -> Any:
    """Return what :func:`flatten` was given. Tensors are taken from ``tensors``, not copied.

    Raises KeyError for a tensor that is missing and ValueError for an unknown ``$`` type.
    """
    found: Mapping[str, torch.Tensor] = {} if tensors is None else tensors
    match json:
        case list():
            return [unflatten(item, found, device) for item in json]
        case dict() if len(json) == 1 and next(iter(json)).startswith("$"):
            return _tagged(*next(iter(json.items())), found, device)
        case dict():
            return {key: unflatten(item, found, device) for key, item in json.items()}
        case _:
            return json


def _tagged(tag: str, value: Json, tensors: Mapping[str, torch.Tensor], device: str) -> Any:
    match tag:
        case "$float":
            return float(value)
        case "$tensor":
            return tensors[value]
        case "$device":
            return tensors[value].to(device)
        case "$strided":
            saved, order = value
            inverse = [order.index(dim) for dim in range(len(order))]
            tensor: torch.Tensor = unflatten(saved, tensors, device)
            return tensor.permute(order).contiguous().permute(inverse)
        case "$dtype":
            dtype = getattr(torch, value, None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"unknown dtype {value!r} in saved state")
            return dtype
        case "$tuple":
            return tuple(unflatten(item, tensors, device) for item in value)
        case "$counter":
            return Counter(dict(value))
        case "$dict":
            return {
                unflatten(key, tensors, device): unflatten(item, tensors, device)
                for key, item in value
            }
        case _:
            raise ValueError(f"unknown type {tag!r} in saved state")
