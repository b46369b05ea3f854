"""The optimizers by name: what each takes, how it is built, and what it keeps per parameter."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal

import torch

from optserve.optim.hyperparameters import Hyper, check_all, derive
from optserve.optim.refusals import torchs_refusals
from optserve_client.errors import Invalid

#: What the state of a parameter is laid out by: a change would break it at the next step.
_FIXED_AT_CREATION = frozenset(
    {"amsgrad", "ams_bound", "centered", "initial_accumulator_value", "pullback_momentum"}
)
#: Where the state is laid out by these too.
_FIXED_MOMENTUM = frozenset({"RMSprop"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One optimizer of the catalogue."""

    name: str
    #: The class that computes: ``torch.optim.AdamW``.
    source: str
    aliases: tuple[str, ...] = ()
    #: One line; for a friendly alias what it stands for.
    meaning: str = ""
    #: Hyperparameters that the name itself decides, and defaults that it replaces.
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sparse: Literal["never", "allowed", "only"] = "never"
    #: Steps by loss and gradients at several params: LBFGS.
    needs_loss: bool = False
    #: Takes several param_groups.
    groups: bool = True
    #: Evaluates with other weights than it trains: ScheduleFree.
    eval_weights: bool = False

    @cached_property
    def cls(self) -> type[torch.optim.Optimizer]:
        module, _, name = self.source.rpartition(".")
        found: type[torch.optim.Optimizer] = getattr(importlib.import_module(module), name)
        return found

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.cls).parameters)

    @property
    def torchs(self) -> bool:
        """Whether torch.optim has the class."""
        return self.source.startswith("torch.")

    @cached_property
    def impls(self) -> tuple[str, ...]:
        """The implementations that can be asked for, of ``single``, ``foreach``, ``fused``."""
        flags = ("foreach", "fused") if self.torchs else ("foreach",)
        return ("single", *(flag for flag in flags if flag in self._arguments))

    @cached_property
    def hyperparameters(self) -> Mapping[str, Hyper]:
        found = derive(self.cls, self.defaults)
        return {name: hyper for name, hyper in found.items() if name not in self.fixed}

    @property
    def maximize(self) -> bool:
        return "maximize" in self.hyperparameters

    @cached_property
    def _per_group(self) -> frozenset[str]:
        """Hyperparameters that the class keeps in param_groups."""
        parameter = torch.nn.Parameter(torch.zeros(2, 2))
        hyper = {n: _stand_in(h) for n, h in self.hyperparameters.items() if h.required}
        made = self.build([{"params": [parameter]}], hyper, "default")
        return frozenset(made.param_groups[0]) & frozenset(self.hyperparameters)

    # --- checks ----------------------------------------------------------------------------------

    def normalise(self, hyper: Mapping[str, Any], where: str = "optimizer") -> dict[str, Any]:
        """Return the hyperparameters of a create body as the class takes them."""
        checked = check_all(hyper, self.hyperparameters, where)
        for name, known in self.hyperparameters.items():
            if known.required and name not in checked:
                raise Invalid(f"{where}.{name} is missing: {self.name} needs it")
        if checked.get("dampening") and not checked.get("momentum", self.defaults.get("momentum")):
            raise Invalid(f"{where}.dampening has no effect without momentum")
        return checked

    def normalise_group(self, overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return what one param_group sets for itself."""
        self._check_per_group(overrides, where)
        return check_all(overrides, self.hyperparameters, where)

    def normalise_change(self, change: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return new values for a param_group of an optimizer that has stepped.

        torch does not look at these again: what it would refuse at construction is refused here.
        """
        self._check_per_group(change, where)
        for name in change:
            if name in _FIXED_AT_CREATION or (name == "momentum" and self.name in _FIXED_MOMENTUM):
                raise Invalid(
                    f"{where}.{name} is fixed when the session is created: "
                    f"the state of {self.name} depends on it",
                    field=f"{where}.{name}",
                )
        return check_all(change, self.hyperparameters, where)

    def _check_per_group(self, given: Mapping[str, Any], where: str) -> None:
        known = self.hyperparameters
        for name in given:
            if name in known and name not in self._per_group:
                raise Invalid(
                    f"{where}.{name}: {self.name} has one {name} for all groups",
                    field=f"{where}.{name}",
                )

    # --- building --------------------------------------------------------------------------------

    def pick_impl(self, impl: str, device: str, dtype: str, sparse: bool) -> str:
        """Return the implementation to build: ``default`` is the class's own pick."""
        if impl == "auto":
            fused = "fused" in self.impls and not sparse and dtype in _FUSED_DTYPES
            return "fused" if fused and device in ("cpu", "cuda") else "default"
        if impl not in self.impls:
            raise Invalid(f"impl must be auto or one of {', '.join(self.impls)}, got {impl!r}")
        if impl == "fused" and sparse:
            raise Invalid("impl: fused does not take sparse gradients")
        return impl

    def flags(self, impl: str) -> dict[str, bool]:
        """Return the constructor's flags for an implementation."""
        if impl == "single":
            return {"foreach": False} if "foreach" in self._arguments else {}
        return {} if impl == "default" else {impl: True}

    def build(
        self, param_groups: list[dict[str, Any]], hyper: Mapping[str, Any], impl: str
    ) -> torch.optim.Optimizer:
        """Construct the class; what it refuses is TorchRefused with its sentence."""
        given = {**self.defaults, **hyper, **self.fixed, **self.flags(impl)}
        with torchs_refusals():
            made: torch.optim.Optimizer = self.cls(param_groups, **given)
        if self.eval_weights:
            made.train()  # type: ignore[attr-defined]
        return made

    def torch_line(self, hyper: Mapping[str, Any], impl: str) -> str:
        """Return the line of Python that builds the same optimizer."""
        given = {**self.defaults, **hyper, **self.fixed, **self.flags(impl)}
        arguments = ", ".join(["params", *(f"{k}={v!r}" for k, v in given.items())])
        return f"{self.source}({arguments})"

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of ``optimizer`` in a create body."""
        known = self.hyperparameters
        return {
            "type": "object",
            "title": self.name,
            "properties": {
                "name": {"enum": [self.name, *self.aliases]},
                **{name: hyper.schema() for name, hyper in known.items()},
            },
            "required": ["name", *(name for name, hyper in known.items() if hyper.required)],
            "additionalProperties": False,
        }


_FUSED_DTYPES = ("float32", "float64", "bfloat16")


def _stand_in(hyper: Hyper) -> Any:
    return 1 if hyper.kind == "integer" else 1.0


@cache
def _by_key() -> dict[str, Entry]:
    from optserve.optim.rows import ROWS  # the rows are made of entries

    return {_key(name): entry for entry in ROWS for name in (entry.name, *entry.aliases)}


def _key(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def find(name: str) -> Entry:
    """Return the entry that ``name`` spells, in any case, snake_case too."""
    found = _by_key().get(_key(name[:128]))
    if found is None:
        close = difflib.get_close_matches(_key(name[:128]), _by_key(), n=3)
        names = [_by_key()[key].name for key in close] or ["GET /v1/optimizers lists them"]
        raise Invalid(
            f"optimizer.name: unknown optimizer {name[:80]!r}; closest: {', '.join(names)}",
            field="optimizer.name",
        )
    return found


def entries() -> list[Entry]:
    """Return all entries, torch's first."""
    return list(dict.fromkeys(_by_key().values()))


def describe(entry: Entry) -> dict[str, Any]:
    """Return what the catalogue route says of an entry."""
    doc = inspect.getdoc(entry.cls) or ""
    return {
        "name": entry.name,
        "source": entry.source,
        "aliases": list(entry.aliases),
        "meaning": entry.meaning or doc.strip().split("\n")[0].rstrip("."),
        "impls": ["auto", *entry.impls],
        "sparse": entry.sparse,
        "groups": entry.groups,
        "needs_loss": entry.needs_loss,
        "eval_weights": entry.eval_weights,
        "fixed": dict(entry.fixed),
        "schema": entry.schema(),
    }


# --- what an optimizer keeps ---------------------------------------------------------------------


def read_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    """Return what the optimizer keeps for one parameter; tensors are live."""
    own = dict(optimizer.state.get(parameter, {}))
    inner = _wrapped(optimizer)
    return own if inner is None else {**inner.state.get(parameter, {}), "lookahead": own}


def write_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, state: Mapping[str, Any]
) -> None:
    """Put back what :func:`read_state` returned; an empty state is that of no step yet."""
    kept, inner = dict(state), _wrapped(optimizer)
    if inner is not None:
        optimizer.state[parameter] = kept.pop("lookahead", {})
    if kept:
        (inner or optimizer).state[parameter] = kept


def read_extra(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what the class keeps beside groups and state, as its own state_dict says."""
    if _wrapped(optimizer) is not None:
        return {}
    saved = optimizer.state_dict()
    return {name: value for name, value in saved.items() if name not in ("state", "param_groups")}


def write_extra(optimizer: torch.optim.Optimizer, extra: Mapping[str, Any]) -> None:
    """Put back what :func:`read_extra` returned; call it before :func:`write_state`."""
    if taken := {"state", "param_groups"} & extra.keys():
        raise ValueError(f"extra holds {', '.join(sorted(taken))}, which have places of their own")
    if extra:
        optimizer.load_state_dict({**optimizer.state_dict(), **extra})


def _wrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else None


def eval_params(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]
) -> list[torch.Tensor]:
    """Return copies of the weights to evaluate with; the live ones keep every bit.

    ScheduleFree's ``eval`` and ``train`` change the params in place, and back only up to rounding.
    """
    live = list(parameters)
    before = [parameter.detach().clone() for parameter in live]
    optimizer.eval()  # type: ignore[attr-defined]
    evaluated = [parameter.detach().clone() for parameter in live]
    optimizer.train()  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter, value in zip(live, before, strict=True):
            parameter.copy_(value)
    return evaluated
