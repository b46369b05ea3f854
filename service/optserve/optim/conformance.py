"""The gate: which optimizer classes can live in a session at all.

A session keeps parameters as views of one flat buffer, gives gradients in a buffer that is reused,
saves ``optimizer.state[p]`` and ``param_groups`` and nothing else, and must continue from them bit
for bit. :func:`conforms` tries all of that on small tensors and says what does not hold.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from optserve.optim.entry import Entry
from optserve.optim.hyper import FLAGS, shown
from optserve.optim.state import read_state, write_state
from optserve.optim.tree import flatten, unflatten
from optserve_client.errors import OptserveError

SHAPES: Mapping[str, tuple[int, ...]] = {
    "scalar": (),
    "empty": (0, 3),
    "vector": (5,),
    "matrix": (3, 4),
    "kernel": (2, 3, 2, 2),
}
#: Sets of shapes, from all to the tamest: the first one that a class takes is what it is tried on.
MIXES = (
    tuple(SHAPES),
    ("scalar", "vector", "matrix", "kernel"),
    ("scalar", "vector", "matrix"),
    ("vector", "matrix"),
    ("matrix", "matrix"),
)
STEPS = 24
#: Steps after which the state is saved and read back.
CUTS = (0, 1, 3, 12)


class Trial:
    """A small training run, as a program would write it or as a session has it."""

    def __init__(
        self,
        entry: Entry,
        mix: Sequence[str],
        *,
        impl: str = "single",
        groups: int = 1,
        arena: bool = False,
        dtype: torch.dtype = torch.float32,
        hyper: Mapping[str, Any] | None = None,
    ) -> None:
        shapes = [SHAPES[kind] for kind in mix]
        self.arena = arena
        starts = [_noise(shape, i, dtype) for i, shape in enumerate(shapes)]
        if arena:
            self._flat_grads, self.grads = _flat([torch.zeros_like(s) for s in starts])
            _, starts = _flat(starts)
        self.params = [torch.nn.Parameter(start) for start in starts]
        self.addresses = [p.data_ptr() for p in self.params]
        self.hyper = entry.normalise({**entry.example, **(hyper or {})})
        self.impl = impl
        split = [self.params[i::groups] for i in range(groups)]
        self.groups: list[dict[str, Any]] = [{"params": members} for members in split if members]
        lr = self.hyper.get(entry.lr_name, 0.01)
        for i, group in enumerate(self.groups[1:], 2):
            group[entry.lr_name] = lr / i if lr else 0.01 / i
        self.optimizer = entry.build(self.groups, self.hyper, impl)

    def step(self, number: int, *, skip: int | None = None, sign: float = 1.0) -> None:
        """Make update ``number``; the parameter at ``skip`` gets no gradient."""
        for i, p in enumerate(self.params):
            grad = sign * _noise(p.shape, 100 * number + i, p.dtype)
            if i == skip:
                p.grad = None
            elif self.arena:
                self.grads[i].copy_(grad)
                p.grad = self.grads[i]
            else:
                p.grad = grad
        self.optimizer.step()
        for p in self.params:
            p.grad = None
        if self.arena:  # the next gradient overwrites this buffer: state must not point into it
            self._flat_grads.fill_(torch.nan)

    def run(self, first: int, last: int, **options: Any) -> Trial:
        for number in range(first, last):
            self.step(number, **options)
        return self

    def values(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.params]

    def save(self) -> tuple[str, dict[str, torch.Tensor]]:
        """Return the state as a state file holds it: JSON text and tensors."""
        tensors: dict[str, torch.Tensor] = {}
        groups = [
            {k: v for k, v in group.items() if k not in FLAGS}
            for group in self.optimizer.param_groups
        ]
        json.dumps([shown(group) for group in groups], allow_nan=False)
        states = [
            flatten(read_state(self.optimizer, p), f"state/{i}", tensors)[0]
            for i, p in enumerate(self.params)
        ]
        text = json.dumps([flatten(groups)[0], states], allow_nan=False)
        return text, {name: tensor.clone() for name, tensor in tensors.items()}

    def load(self, saved: tuple[str, dict[str, torch.Tensor]], values: list[torch.Tensor]) -> None:
        text, tensors = saved
        groups, states = json.loads(text)
        for p, value, state in zip(self.params, values, states, strict=True):
            p.data.copy_(value)
            write_state(self.optimizer, p, unflatten(state, tensors))
        for group, kept in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(unflatten(kept))


def _noise(shape: Sequence[int], seed: int, dtype: torch.dtype) -> torch.Tensor:
    values = np.random.default_rng(seed).normal(size=tuple(shape))
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def _flat(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return one buffer and views of it that hold these tensors, at odd offsets."""
    flat = torch.cat([torch.zeros(1, dtype=tensors[0].dtype), *(t.reshape(-1) for t in tensors)])
    views, at = [], 1
    for tensor in tensors:
        views.append(flat[at : at + tensor.numel()].view(tensor.shape))
        at += tensor.numel()
    return flat, views


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def takes(entry: Entry, mix: Sequence[str], **options: Any) -> str | None:
    """Return with which sentence the class refuses these shapes, or None."""
    try:
        Trial(entry, mix, **options).run(0, 2)
    except OptserveError as exc:
        return exc.detail
    except Exception as exc:
        return str(exc) or type(exc).__name__
    return None


def conforms(entry: Entry) -> list[str]:
    """Return the reasons for which this optimizer cannot be listed; none if it can."""
    reasons: list[str] = []
    refusal: str | None = ""
    for mix in MIXES:
        refusal = takes(entry, mix)
        if refusal is None:
            break
    else:
        return [f"takes none of the shapes: {refusal}"]
    for check in CHECKS:
        try:
            if reason := check(entry, mix):
                reasons.append(reason)
        except Exception as exc:
            detail = getattr(exc, "detail", "") or str(exc) or type(exc).__name__
            reasons.append(f"{check.__name__.strip('_')}: {type(exc).__name__}: {detail}")
    return reasons


def _draws_nothing(entry: Entry, mix: Sequence[str]) -> str | None:
    for dtype in (torch.float32, torch.bfloat16):
        if takes(entry, mix, dtype=dtype):
            continue
        before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
        Trial(entry, mix, dtype=dtype).run(0, STEPS)
        after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1])
        if (
            not torch.equal(before[0], after[0])
            or before[1] != after[1]
            or not np.array_equal(before[2], after[2])
        ):
            return f"draws random numbers ({dtype})"
    return None


def _moves(entry: Entry, mix: Sequence[str]) -> str | None:
    trial = Trial(entry, mix)
    before = trial.values()
    after = trial.run(0, STEPS).values()
    if [p.data_ptr() for p in trial.params] != trial.addresses:
        return "replaces the parameters' memory"
    if not all(torch.isfinite(a).all() for a in after):
        return "makes NaN of finite gradients"
    still = [kind for kind, b, a in zip(mix, before, after, strict=True) if a.numel() and torch.equal(a, b)]
    return f"does not move {', '.join(still)}" if still else None


def _lives_in_an_arena(entry: Entry, mix: Sequence[str]) -> str | None:
    for impl in entry.impls:
        apart = Trial(entry, mix, impl=impl, groups=2).run(0, STEPS)
        views = Trial(entry, mix, impl=impl, groups=2, arena=True).run(0, STEPS)
        if not same(apart.values(), views.values()):
            return f"differs on views of one buffer ({impl})"
    return None


def _continues(entry: Entry, mix: Sequence[str]) -> str | None:
    for impl in entry.impls:
        for cut in CUTS:
            trial = Trial(entry, mix, impl=impl, groups=3, arena=True).run(0, min(cut, 2))
            for group in trial.optimizer.param_groups:
                group[entry.lr_name] = (group[entry.lr_name] or 0.01) * 0.7
            trial.run(2, cut)
            saved, values = trial.save(), trial.values()
            again = Trial(entry, mix, impl=impl, groups=3, arena=True)
            again.load(saved, values)
            trial.run(cut, STEPS)
            again.run(cut, STEPS)
            if not same(trial.values(), again.values()):
                return f"does not continue from saved state ({impl}, after {cut} steps)"
            if trial.save()[0] != again.save()[0]:
                return f"its state differs after being read back ({impl})"
    return None


def _follows_lr(entry: Entry, mix: Sequence[str]) -> str | None:
    plain, changed = Trial(entry, mix), Trial(entry, mix)
    for group in changed.optimizer.param_groups:
        group[entry.lr_name] = (group[entry.lr_name] or 0.01) * 3.0
    plain.run(0, STEPS)
    changed.run(0, STEPS)
    return "does not follow lr" if same(plain.values(), changed.values()) else None


def _leaves_alone(entry: Entry, mix: Sequence[str]) -> str | None:
    if len(mix) < 2:
        return None
    for impl in entry.impls:
        for index in range(len(mix)):
            trial = Trial(entry, mix, impl=impl)
            trial.step(0, skip=index)
            before = trial.values()[index]
            trial.step(1, skip=index)
            if not torch.equal(trial.values()[index], before):
                return f"moves a parameter without a gradient ({impl})"
            trial.run(2, 8)
            before = trial.values()[index]
            trial.step(8, skip=index)
            if not torch.equal(trial.values()[index], before):
                return f"moves a parameter without a gradient ({impl}, later)"
            trial.run(9, 12)
    return None


def _maximizes(entry: Entry, mix: Sequence[str]) -> str | None:
    if not entry.maximize:
        return None
    for impl in entry.impls:
        up = Trial(entry, mix, impl=impl, hyper={"maximize": True}).run(0, STEPS)
        down = Trial(entry, mix, impl=impl).run(0, STEPS, sign=-1.0)
        if not same(up.values(), down.values()):
            return f"maximize is not minimising with the negative gradient ({impl})"
    return None


def _grows(entry: Entry, mix: Sequence[str]) -> str | None:
    trial = Trial(entry, mix).run(0, 3)
    added = torch.nn.Parameter(_noise((3, 4), 7, torch.float32))
    trial.optimizer.add_param_group({"params": [added]})
    before = added.detach().clone()
    trial.params.append(added)
    trial.run(3, STEPS)
    return "does not move an added group" if torch.equal(added.detach(), before) else None


CHECKS = (
    _draws_nothing,
    _moves,
    _lives_in_an_arena,
    _continues,
    _follows_lr,
    _leaves_alone,
    _maximizes,
    _grows,
)
