"""What a session does to its numbers: the part of the create body that ``optim`` needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A normalised, JSON-able recipe; see DESIGN for the order in which its parts act."""

    #: ``{"name": "AdamW", "lr": 0.001}``: a catalogue name and hyperparameters as given.
    optimizer: Mapping[str, Any]
    #: torch's param_groups in order, ``params`` resolved to names; every name is in exactly one.
    groups: tuple[Mapping[str, Any], ...]
    #: Names whose gradients come as COO.
    sparse: frozenset[str] = frozenset()
    #: A checked scheduler spec, with ``advance`` and ``monitor`` on the outermost level.
    scheduler: Mapping[str, Any] | None = None
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    #: Gradients that make one update.
    accumulate_steps: int = 1
    accumulate_reduce: Literal["sum", "mean"] = "sum"
    ema_decay: float | None = None
    #: Name of the value that ``best`` follows: ``loss`` or a metric.
    best_monitor: str | None = None
    best_mode: Literal["min", "max"] = "min"
    #: What NaN or Infinity in a gradient does: refuse the request, or use it up without effect.
    nonfinite: Literal["reject", "skip"] = "reject"
    #: ``cpu``, ``cuda`` or ``cuda:i``; never ``auto``.
    device: str = "cpu"
    impl: str = "auto"
