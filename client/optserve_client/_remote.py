"""What ``torch.py`` has to know of the server's optimizers; needs no torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from optserve_client import errors
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
