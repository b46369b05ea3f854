"""What ``torch.py`` has to know of the server's optimizers; needs no torch."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from optserve_client import errors, wire
from optserve_client._values import Json
from optserve_client.client import Client

#: What ``session`` may hold.
SESSION_FIELDS = {
    name
    for name, one in inspect.signature(Client.create).parameters.items()
    if one.kind is one.KEYWORD_ONLY and name not in {"id", "groups", "sparse"}
}


def described(client: Client, spec: Mapping[str, Any]) -> tuple[set[str], Json, bool]:
    """Return an optimizer's hyperparameters, their defaults, and whether it needs a closure."""
    try:
        entry = client.optimizer(str(spec.get("name") or None))
    except errors.NotFound as exc:  # the name is a field here, as in Client.create
        raise errors.Invalid(exc.detail, **exc.extra) from exc
    properties = {k: v for k, v in entry["schema"]["properties"].items() if k != "name"}
    defaults = {
        key: tuple(one["default"]) if isinstance(one["default"], list) else one["default"]
        for key, one in properties.items()
        if "default" in one
    }
    known = set(properties)
    if isinstance(inner := spec.get("optimizer"), Mapping):  # a wrapper such as Lookahead
        inside, inner_defaults, _ = described(client, inner)
        known, defaults = known - {"optimizer"} | inside, defaults | inner_defaults
    chosen = {k: v for k, v in spec.items() if k in known}
    return known, defaults | chosen, bool(entry.get("needs_loss", False))


def check_client(client: Any) -> None:
    if not isinstance(client, Client):
        raise TypeError(
            f"client must be an optserve_client.Client, such as Client(url), got {client!r:.80}"
        )


def checked_state(
    frame: memoryview,
    saved: Sequence[Mapping[str, Any]],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    groups: Sequence[Mapping[str, Any]],
    own: str,
) -> dict[str, wire.Tensor]:
    """Return the params in a state file; ValueError if it is not of this optimizer.

    ``saved``: the param_groups beside it; ``own``: which optimizer this is.
    """
    tensors, metadata = wire.decode(frame)
    values = {
        name.removeprefix("param/"): value
        for name, value in tensors.items()
        if name.startswith("param/")
    }
    if shapes.keys() != values.keys():
        odd = sorted(shapes.keys() ^ values.keys())
        raise ValueError(f"the state_dict has other parameters: {odd[0]!r} is not in both")
    for name, shape in shapes.items():
        if values[name].shape != shape:
            there, here = list(values[name].shape), list(shape)
            raise ValueError(
                f"the state_dict has {name!r} in the shape {there}, the optimizer in {here}"
            )
    name = named_in(json.loads(metadata.get(wire.META_KEY, "{}")), own)
    if name != own:
        raise ValueError(f"the state_dict is of {name}, this optimizer is {own}")
    sizes = [len(group["params"]) for group in saved]
    if sizes != (count := [len(group["params"]) for group in groups]):
        raise ValueError(
            f"the state_dict has groups of {sizes} parameters, the optimizer of {count}"
        )
    return values


def named_in(config: Mapping[str, Any], default: str) -> str:
    """Return which optimizer a session or its state file has, a wrapped one in brackets."""
    spec = config.get("config", {}).get("optimizer", {})
    name = str(spec.get("name", default))
    inner = spec.get("optimizer")
    return f"{name}({inner['name']})" if isinstance(inner, Mapping) else name


def sparse_names(optimizer: str, sparse: Iterable[str] | None) -> list[str] | None:
    if sparse is None:
        return ["*"] if optimizer.lower().replace("_", "") == "sparseadam" else None
    return list(sparse)


def copied(value: wire.Tensor) -> wire.Tensor:
    if isinstance(value, wire.Bits):
        return wire.Bits(value.array.copy(), value.dtype)
    return value.copy()


def same_bits(a: wire.Tensor, b: wire.Tensor) -> bool:
    """Compare bit for bit: a NaN equals itself, and 0.0 is not -0.0."""
    one = a.array if isinstance(a, wire.Bits) else a
    other = b.array if isinstance(b, wire.Bits) else b
    bits = np.dtype(f"u{one.dtype.itemsize}")
    return one.dtype == other.dtype and np.array_equal(one.view(bits), other.view(bits))
