"""The parity table: every optimizer, impl, grouping and mode, served and local side by side.

The local side is built from torch's (or pytorch_optimizer's) class itself, over separate
Parameters, by nothing of the service but the name of the class. FedAdam and FedYogi are in no
library: they are the service's own classes here too, and test_fedopt.py has their arithmetic.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from optserve.optim import catalogue
from tests import local

STEPS = 30
LR = 0.01
Shapes = dict[str, tuple[int, ...]]

#: From all odd shapes to the tamest: the first that the local class takes is what is stepped.
SHAPES: dict[str, Shapes] = {
    "odd": {"w.big": (257, 301), "scalar": (), "empty": (0, 3), "vec": (7,), "w.tall": (33, 1)},
    "no empty": {"w.big": (257, 301), "scalar": (), "vec": (7,), "w.tall": (33, 1)},
    "no scalar": {"w.big": (257, 301), "vec": (7,), "w.tall": (33, 1)},
    "matrices": {"w.big": (257, 301), "vec": (19, 5), "w.tall": (33, 2)},
}
#: Of classes that take seconds a step for the large matrix, on processors that have no instructions
#: for products in bfloat16.
SMALLER = {"SpectralSphere": {"w.big": (25, 31)}}


def shapes_of(name: str) -> dict[str, Shapes]:
    """Return what a class is tried on, mix by mix."""
    return {label: {**shapes, **SMALLER.get(name, {})} for label, shapes in SHAPES.items()}


#: Those that refuse some of the odd shapes, if only with one impl, and the first set they take.
TAKES = {
    "Muon": "matrices",
    "SpectralSphere": "matrices",
    **dict.fromkeys(
        ("Adafactor", "AdamP", "AvaGrad", "SCION", "SGDP", "SM3", "Shampoo", "StableSPAM"),
        "no empty",
    ),
    "RACS-foreach": "no empty",
}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip_grad_norm": {"clip_grad_norm": 0.5},
    "accumulate": {"accumulate": 3},
}
#: What a class needs beyond its defaults, or what makes it do something within 30 steps.
HYPER: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "Ranger21": {"num_iterations": 30},
    "Lookahead": {"optimizer": {"name": "AdamW", "lr": LR}, "k": 3},
}


@dataclass(frozen=True)
class Cell:
    """One row of the product."""

    name: str
    impl: str
    groups: int
    mode: str

    @property
    def id(self) -> str:
        return f"{self.name}-{self.impl}-{self.groups}-{self.mode}"


def cells() -> Iterator[Cell]:
    """Yield the whole product; LBFGS and sparse-only classes have tests of their own."""
    for entry in catalogue.entries():
        if entry.needs_loss or entry.sparse == "only":
            continue
        yield Cell(entry.name, "auto", 1, "plain")
        for impl, groups, mode in itertools.product(entry.impls, (1, 3), MODES):
            if groups == 1 or entry.groups:
                yield Cell(entry.name, impl, groups, mode)


def body(cell: Cell) -> dict[str, Any]:
    """Return the create body of a cell."""
    entry, more = catalogue.find(cell.name), HYPER.get(cell.name, {})
    wraps = "optimizer" in more
    fields: dict[str, Any] = {
        "optimizer": {"name": cell.name, **({} if wraps else {"lr": LR}), **more},
        "impl": cell.impl,
        "scheduler": {"name": "StepLR", "step_size": 4, "gamma": 0.7, "advance": "step"},
        **MODES[cell.mode],
    }
    if cell.groups == 3:
        decay = {"weight_decay": 0.05} if "weight_decay" in entry.hyperparameters else {}
        fields["groups"] = [
            {"params": ["w.*"], "lr": 2 * LR, **decay},
            {"params": ["vec"], "lr": LR / 3},
        ]
    return fields


def resolve(source: str) -> Any:
    """Return the class that ``torch.optim.AdamW`` names; ours mostly stand for the library's."""
    module, _, name = source.rpartition(".")
    if module.startswith("optserve.") and module != "optserve.optim.fedopt":
        module = "pytorch_optimizer"
    return getattr(importlib.import_module(module), name)


class Local:
    """The same training with the class itself."""

    def __init__(self, cell: Cell, params: Mapping[str, np.ndarray], impl: str) -> None:
        fields, entry = body(cell), catalogue.find(cell.name)
        self.leaves = local.leaves(params)
        hyper = {k: v for k, v in fields["optimizer"].items() if k != "name"}
        flags = {
            "fused": {"fused": True},
            "foreach": {"foreach": True},
            "single": {"foreach": False},
        }
        self.accumulate = fields.get("accumulate", 1)
        self.clip = fields.get("clip_grad_norm")
        names: list[Any] = [["w.big", "w.tall"], ["vec"], ["scalar", "empty"]]
        if cell.groups == 1:
            groups: list[Any] = list(self.leaves.values())
        else:
            overrides = [*fields["groups"], {}]
            groups = [
                {
                    **{k: v for k, v in group.items() if k != "params"},
                    "params": [self.leaves[n] for n in members if n in self.leaves],
                }
                for group, members in zip(overrides, names, strict=True)
            ]
            groups = [group for group in groups if group["params"]]
        flag = {} if entry.impls == ("single",) else flags.get(impl, {})
        hyper = {**entry.defaults, **hyper, **entry.fixed}
        if inner := hyper.pop("optimizer", None):
            wrapped = torch.optim.AdamW(groups, lr=inner["lr"], **flags.get(impl, {}))
            self.optimizer = resolve(entry.source)(wrapped, **hyper)
        else:
            self.optimizer = resolve(entry.source)(groups, **hyper, **flag)
        if entry.eval_weights:
            self.optimizer.train()
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 4, 0.7)
        self.sums: dict[str, Any] = {}
        self.count = 0

    def step(self, grads: Mapping[str, np.ndarray]) -> None:
        """Take one gradient as the session does."""
        for name, leaf in self.leaves.items():
            grad = torch.tensor(grads[name])
            leaf.grad = grad if self.count == 0 else leaf.grad + grad
        self.count += 1
        if self.count < self.accumulate:
            return
        self.count = 0
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.leaves.values(), self.clip)
        self.optimizer.step()
        self.scheduler.step()
