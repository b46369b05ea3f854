"""Interim catalogue: torch's own classes by signature."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from optserve_client.errors import Invalid, TorchRefused

FLAGS = {"params", "foreach", "fused", "capturable", "differentiable"}
NAMES = "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax LBFGS Muon NAdam RAdam RMSprop Rprop SGD SparseAdam".split()


@dataclass
class Hyper:
    default: Any
    schema: dict[str, Any]
    doc: str = ""


class Entry:
    def __init__(self, name: str) -> None:
        self.name = name
        self.cls = getattr(torch.optim, name)
        self.source = f"torch.optim.{name}"
        self.aliases: tuple[str, ...] = ()
        self.meaning = name
        parameters = inspect.signature(self.cls).parameters
        self.hyperparameters = {
            k: Hyper(p.default, {}) for k, p in parameters.items() if k not in FLAGS
        }
        self.impls = tuple(i for i in ("foreach", "fused") if i in parameters) or ("single",)
        self.sparse = {"SparseAdam": "only", "SGD": "allowed", "Adagrad": "allowed"}.get(name, "never")
        self.needs_loss = name == "LBFGS"
        self.groups = not self.needs_loss
        self.maximize = "maximize" in parameters
        self.eval_weights = False

    def schema(self) -> dict[str, Any]:
        return {"type": "object"}

    def normalise(self, hyper: Mapping[str, Any], where: str = "optimizer") -> dict[str, Any]:
        out = {}
        for k, v in hyper.items():
            if k not in self.hyperparameters:
                raise Invalid(f"{where}: unknown hyperparameter {k!r}")
            if k == "lr" and (isinstance(v, bool) or not isinstance(v, (int, float))):
                raise Invalid(f"{where}.lr must be a number, got {v!r}")
            out[k] = tuple(v) if isinstance(v, list) else v
        return out

    normalise_group = normalise_change = normalise

    def pick_impl(self, impl: str, device: str, dtype: str, sparse: bool) -> str:
        if impl == "auto":
            return "fused" if "fused" in self.impls and not sparse else "default"
        return impl

    def build(self, groups: list[dict[str, Any]], hyper: Mapping[str, Any], impl: str) -> Any:
        flags = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
        extra = flags.get(impl, {})
        if impl == "single" and "foreach" not in self.impls:
            extra = {}
        try:
            return self.cls(groups, **hyper, **extra)
        except (ValueError, TypeError, RuntimeError) as exc:
            raise TorchRefused(str(exc)) from exc

    def torch_line(self, hyper: Mapping[str, Any], impl: str) -> str:
        extra = ", fused=True" if impl == "fused" else ""
        return f"{self.source}(params, {', '.join(f'{k}={v}' for k, v in hyper.items())}{extra})"


ALL = {name.lower(): Entry(name) for name in NAMES}


def find(name: str) -> Entry:
    if name.lower() not in ALL:
        raise Invalid(f"unknown optimizer {name!r}")
    return ALL[name.lower()]


def entries() -> list[Entry]:
    return list(ALL.values())


def describe(entry: Entry) -> dict[str, Any]:
    return {"name": entry.name, "source": entry.source, "meaning": entry.meaning, "schema": {}}


def read_state(optimizer: Any, p: Any) -> dict[str, Any]:
    return dict(optimizer.state.get(p, {}))


def write_state(optimizer: Any, p: Any, state: dict[str, Any]) -> None:
    if state:
        optimizer.state[p] = state


def eval_params(optimizer: Any, parameters: Iterable[Any]) -> list[Any]:
    return list(parameters)
