"""Lookahead around any other optimizer of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from optserve.optim import catalogue
from optserve.optim.catalogue import Entry
from optserve.optim.hyperparameters import Hyper, check_all
from optserve.optim.refusals import torchs_refusals
from optserve_client.errors import Invalid


@dataclass(frozen=True, kw_only=True, eq=False)
class LookaheadEntry(Entry):
    """``{"name": "Lookahead", "optimizer": {"name": "AdamW", "lr": 0.001}, "k": 5}``."""

    @cached_property
    def hyperparameters(self) -> Mapping[str, Hyper]:
        own = super().hyperparameters
        return {name: own[name] for name in ("k", "alpha", "pullback_momentum")}

    @property
    def maximize(self) -> bool:
        return False

    def normalise(self, hyper: Mapping[str, Any], where: str = "optimizer") -> dict[str, Any]:
        inner, spec = self._inner(hyper.get("optimizer"), f"{where}.optimizer")
        mine = {name: value for name, value in hyper.items() if name != "optimizer"}
        return {
            "optimizer": {"name": inner.name, **inner.normalise(spec, f"{where}.optimizer")},
            **check_all(mine, self.hyperparameters, where),
        }

    def _inner(self, spec: Any, where: str) -> tuple[Entry, dict[str, Any]]:
        given = {"name": spec} if isinstance(spec, str) else spec
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise Invalid(f"{where} must be a name or an object with a name, got {spec!r:.80}")
        inner = catalogue.find(given["name"])
        if inner.needs_loss or inner.eval_weights or inner.sparse == "only" or inner is self:
            raise Invalid(f"{where}: Lookahead does not wrap {inner.name}")
        return inner, {name: value for name, value in given.items() if name != "name"}

    # Which hyperparameters a group has is the wrapped class's matter, known only with the session.
    def normalise_group(self, overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
        return check_all(overrides, _COMMON, where)

    def normalise_change(self, change: Mapping[str, Any], where: str) -> dict[str, Any]:
        return check_all(change, _COMMON, where)

    def build(
        self, param_groups: list[dict[str, Any]], hyper: Mapping[str, Any], impl: str
    ) -> torch.optim.Optimizer:
        inner, spec = self._inner(hyper["optimizer"], "optimizer.optimizer")
        spec = {name: tuple(v) if isinstance(v, list) else v for name, v in spec.items()}
        wrapped = inner.build(param_groups, spec, inner.pick_impl("auto", "", "", True))
        mine = {name: value for name, value in hyper.items() if name != "optimizer"}
        with torchs_refusals():
            made: torch.optim.Optimizer = self.cls(wrapped, **mine)  # type: ignore[arg-type]
        return made

    def torch_line(self, hyper: Mapping[str, Any], impl: str) -> str:
        inner, spec = self._inner(hyper["optimizer"], "optimizer.optimizer")
        mine = {name: value for name, value in hyper.items() if name != "optimizer"}
        arguments = [inner.torch_line(spec, "default"), *(f"{k}={v!r}" for k, v in mine.items())]
        return f"{self.source}({', '.join(arguments)})"

    def schema(self) -> dict[str, Any]:
        made = super().schema()
        made["properties"]["optimizer"] = {
            "description": "the optimizer that it wraps: a name or an object as here",
            "type": ["object", "string"],
        }
        made["required"].append("optimizer")
        return made


_COMMON = {
    "lr": Hyper(kind="number", default=None, least=0.0),
    "weight_decay": Hyper(kind="number", default=None, least=0.0),
}
