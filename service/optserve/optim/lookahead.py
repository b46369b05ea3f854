"""Lookahead around any other optimizer of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from optserve.optim import catalogue
from optserve.optim.entry import Entry
from optserve.optim.hyperparameters import Hyper, unknown
from optserve.optim.probing import stand_in
from optserve.optim.refusals import torchs_refusals
from optserve_client.errors import Invalid

_NONNEGATIVE = {"type": "number", "minimum": 0}
#: What nearly every class keeps in its groups, for when the wrapped one is not known.
_COMMON = {
    "lr": Hyper(default=None, schema=_NONNEGATIVE),
    "weight_decay": Hyper(default=None, schema=_NONNEGATIVE),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class LookaheadEntry(Entry):
    """``{"name": "Lookahead", "optimizer": {"name": "AdamW", "lr": 0.001}, "k": 5, "alpha": 0.5}``.

    Every ``k`` steps the params go back by 1 - ``alpha`` of the way they came (Zhang et al., arXiv
    1907.08610). Its groups are those of the wrapped optimizer.
    """

    #: What it wraps, where the whole ``optimizer`` object is known.
    inner: Entry | None = None

    def wrapping(self, spec: Mapping[str, Any]) -> Entry:
        inner = _inner(spec.get("optimizer"), "optimizer.optimizer")[0]
        return replace(self, inner=inner, sparse=inner.sparse)

    @cached_property
    def impls(self) -> tuple[str, ...]:
        return self.inner.impls if self.inner else ("single",)

    @cached_property
    def hyperparameters(self) -> Mapping[str, Hyper]:
        return {
            "optimizer": Hyper(
                default=None,
                schema={
                    "type": ["object", "string"],
                    "properties": {"name": {"type": "string"}},
                    "required": ["name"],
                },
                doc="The optimizer that it wraps, written as one that stands alone",
                required=True,
            ),
            "k": Hyper(
                default=5,
                schema={"type": "integer", "minimum": 1},
                doc="Steps of the wrapped optimizer between two interpolations",
            ),
            "alpha": Hyper(
                default=0.5,
                schema={"type": "number", "minimum": 0, "exclusiveMaximum": 1},
                doc="Interpolation factor from slow weights toward fast weights",
            ),
            "pullback_momentum": Hyper(
                default="none",
                schema={"enum": ["none", "reset", "pullback"]},
                doc="What an interpolation does to the momentum of SGD and its kin",
            ),
        }

    @cached_property
    def per_group(self) -> frozenset[str]:
        return self.inner.per_group if self.inner else frozenset(_COMMON)

    @property
    def maximize(self) -> bool:
        return False

    # --- checks ----------------------------------------------------------------------------------

    def normalise(
        self,
        hyper: Mapping[str, Any],
        where: str = "optimizer",
        groups: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        known = self.hyperparameters
        for name in hyper:
            if name not in known:
                raise unknown(name, known, self.name, where)
        inner, spec = _inner(hyper.get("optimizer"), f"{where}.optimizer")
        spec = inner.normalise(spec, f"{where}.optimizer", groups)
        own = {
            name: known[name].check(value, f"{where}.{name}")
            for name, value in hyper.items()
            if name != "optimizer"
        }
        if own.get("pullback_momentum", "none") != "none" and not _keeps_momentum(inner, spec):
            raise Invalid(
                f"{where}.pullback_momentum has no effect: {inner.name} keeps no momentum_buffer "
                f"with these hyperparameters, got {own['pullback_momentum']}",
                field=f"{where}.pullback_momentum",
            )
        return {"optimizer": {"name": inner.name, **spec}, **own}

    def normalise_group(
        self, overrides: Mapping[str, Any], where: str, hyper: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        if self.inner is None:
            return self._common(overrides, where)
        spec = None if hyper is None else _inner(hyper["optimizer"], where)[1]
        return self.inner.normalise_group(overrides, where, spec)

    def normalise_change(
        self, change: Mapping[str, Any], where: str, group: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        if self.inner is None:
            return self._common(change, where)
        return self.inner.normalise_change(change, where, group)

    def _common(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        for name in given:
            if name not in _COMMON:
                raise unknown(name, _COMMON, f"a group under {self.name}", where)
        return {n: _COMMON[n].check(v, f"{where}.{n}") for n, v in given.items()}

    # --- building --------------------------------------------------------------------------------

    def pick_impl(self, impl: str, device: str, dtype: str, sparse: bool) -> str:
        """Return the implementation of the wrapped optimizer; its own pick where none is known."""
        if self.inner is not None:
            return self.inner.pick_impl(impl, device, dtype, sparse)
        return "default" if impl == "auto" else super().pick_impl(impl, device, dtype, sparse)

    def build(
        self, param_groups: list[dict[str, Any]], hyper: Mapping[str, Any], impl: str
    ) -> torch.optim.Optimizer:
        inner, spec = _inner(hyper["optimizer"], "optimizer.optimizer")
        wrapped = inner.build(param_groups, spec, _known_impl(inner, impl))
        own = {name: value for name, value in hyper.items() if name != "optimizer"}
        with torchs_refusals():
            made: torch.optim.Optimizer = self.cls(wrapped, **own)  # type: ignore[arg-type]
        return made

    def torch_line(self, hyper: Mapping[str, Any], impl: str) -> str:
        inner, spec = _inner(hyper["optimizer"], "optimizer.optimizer")
        own = {name: value for name, value in hyper.items() if name != "optimizer"}
        words = [inner.torch_line(spec, _known_impl(inner, impl))]
        return f"{self.source}({', '.join([*words, *(f'{k}={v!r}' for k, v in own.items())])})"


def _inner(spec: Any, where: str) -> tuple[Entry, dict[str, Any]]:
    given = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise Invalid(
            f"{where} must be the optimizer that Lookahead wraps: a name or an object with a name",
            field=where,
        )
    inner = catalogue.find(given["name"], f"{where}.name")
    if inner.needs_loss or inner.eval_weights or isinstance(inner, LookaheadEntry):
        raise Invalid(f"{where}: Lookahead does not wrap {inner.name}", field=where)
    return inner, {name: value for name, value in given.items() if name != "name"}


def _known_impl(inner: Entry, impl: str) -> str:
    """``single`` of an entry that did not know what it wraps is the class's own pick."""
    return impl if impl in inner.impls else "default"


def _keeps_momentum(inner: Entry, spec: Mapping[str, Any]) -> bool:
    parameter = stand_in()
    made = inner.build([{"params": [parameter]}], spec, "default")
    made.step()
    return isinstance(made.state[parameter].get("momentum_buffer"), torch.Tensor)


LOOKAHEAD = LookaheadEntry(
    name="Lookahead",
    source="pytorch_optimizer.Lookahead",
    meaning="Another optimizer whose params are pulled back toward slow weights every k steps",
    example={"optimizer": {"name": "AdamW"}},
)
