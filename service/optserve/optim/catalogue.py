"""The optimizers by name: torch's own, three friendly names, two of ours, pytorch_optimizer's.

Of pytorch_optimizer there are those that conform. It takes most of a second to import; it is
imported when one of its classes is used or described.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any

from optserve.optim.entry import Entry
from optserve.optim.expressions import shown
from optserve.optim.state import eval_params, read_extra, read_state, write_extra, write_state
from optserve_client.errors import Invalid

__all__ = [
    "Entry",
    "find",
    "parse",
    "entries",
    "describe",
    "read_state",
    "write_state",
    "read_extra",
    "write_extra",
    "eval_params",
]

_LONGEST_NAME = 128


def _key(name: str) -> str:
    return "".join(c for c in name[:_LONGEST_NAME].lower() if c not in "_- ")


@cache
def _by_key() -> dict[str, Entry]:
    from optserve.optim.fedopt import FEDOPT
    from optserve.optim.lookahead import LOOKAHEAD  # it looks up what it wraps here
    from optserve.optim.third_party import THIRD_PARTY
    from optserve.optim.torch_classes import FRIENDLY, TORCH

    rows = (*TORCH, *FRIENDLY, *FEDOPT, LOOKAHEAD, *THIRD_PARTY)
    return {_key(name): entry for entry in rows for name in (entry.name, *entry.aliases)}


def find(name: Any, where: str = "optimizer.name") -> Entry:
    """Return the entry of this name, in any case or snake_case.

    A whole ``optimizer`` object may be given instead of a name: for Lookahead the entry then knows
    what it wraps. Raises Invalid with the closest names.
    """
    if isinstance(name, Mapping):
        return find(name.get("name"), where).wrapping(name)
    if not isinstance(name, str):
        raise Invalid(f"{where} must be the name of an optimizer, got {shown(name)}", field=where)
    if entry := _by_key().get(_key(name)):
        return entry
    close = difflib.get_close_matches(_key(name), _by_key(), n=3, cutoff=0.5)
    names = list(dict.fromkeys(_by_key()[key].name for key in close))
    hint = f"did you mean {' or '.join(names)}?" if names else "GET /v1/optimizers lists them"
    raise Invalid(f"{where} {shown(name)} is not an optimizer: {hint}", field=where)


def parse(spec: Any, where: str = "optimizer") -> tuple[Entry, dict[str, Any]]:
    """Return the entry and the normalised hyperparameters of an ``optimizer`` field."""
    given = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(given, Mapping):
        raise Invalid(
            f"{where} must be a name or an object with a name and hyperparameters, "
            f"got {shown(spec)}",
            field=where,
        )
    if not isinstance(given.get("name"), str):
        raise Invalid(
            f"{where}.name is missing; GET /v1/optimizers lists the names", field=f"{where}.name"
        )
    entry = find(given, f"{where}.name")
    return entry, entry.normalise({k: v for k, v in given.items() if k != "name"}, where)


def entries() -> list[Entry]:
    """Return all entries, torch's first."""
    return list(dict.fromkeys(_by_key().values()))


def describe(entry: Entry) -> dict[str, Any]:
    """Return what the catalogue route answers for one optimizer."""
    return {
        "name": entry.name,
        "source": entry.source,
        "aliases": list(entry.aliases),
        "meaning": entry.in_words,
        "impls": ["auto", *entry.impls],
        "sparse": entry.sparse,
        "groups": entry.groups,
        "needs_loss": entry.needs_loss,
        "eval_weights": entry.eval_weights,
        "maximize": entry.maximize,
        "sets": dict(entry.fixed),
        "example": {"name": entry.name, **entry.example},
        "schema": entry.schema(),
    }
