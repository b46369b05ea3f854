"""The gate: which optimizer classes can live in a session.

A session keeps params as views of one buffer, lends gradients that are overwritten afterwards,
saves ``state``, ``param_groups`` and what ``state_dict`` has beside them, and goes on from there
bit for bit. :func:`conforms` tries all of that on small tensors and says what does not hold.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from optserve.optim.entry import Entry
from optserve.optim.hyper import FLAGS
from optserve.optim.state import read_extra, read_state, write_extra, write_state
from optserve.optim.tree import flatten, unflatten

SHAPES: Mapping[str, tuple[int, ...]] = {
    "scalar": (),
    "empty": (0, 3),
    "vector": (5,),
    "matrix": (3, 4),
    "wide": (4, 40),
    "kernel": (2, 3, 2, 2),
}
#: From all shapes to matrices only; the first mix that a class takes is what it is tried on.
MIXES: tuple[tuple[str, ...], ...] = (
    ("vector", "matrix", "scalar", "empty", "wide", "kernel"),
    ("vector", "matrix", "scalar", "wide", "kernel"),
    ("vector", "matrix", "wide"),
    ("matrix", "wide", "matrix"),
)
STEPS = 12
#: Steps after which the state is saved and read back.
CUTS = (0, 1, 7)
#: Hyperparameters with which the gate tries a class: what is rare happens in its few steps.
TRIALS: Mapping[str, Mapping[str, Any]] = {
    "AdaGC": {"warmup_steps": 3},
    "Alice": {"rank": 2, "leading_basis": 1, "update_interval": 3},
    "ApolloDQN": {"warmup_steps": 3},
    "FedYogi": {"betas": (0.9, 0.5)},
    "LaProp": {"centered": True, "steps_before_using_centered": 3},
    "Lookahead": {"k": 3},
    "Ranger": {"k": 3},
    "Ranger21": {"num_iterations": 12},
    "SOAP": {"precondition_frequency": 3},
    "SPlus": {"inverse_steps": 3},
    "SRMM": {"memory_length": 3},
    "ScheduleFreeAdamW": {"warmup_steps": 3},
    "ScheduleFreeSGD": {"warmup_steps": 3},
    "SimplifiedAdEMAMix": {"beta1_warmup": 3},
    "StableSPAM": {"update_proj_gap": 3, "t_max": 4},
    "SpectralSphere": {"solver_max_iterations": 3, "power_iteration_steps": 2, "msign_steps": 2},
    "SWATS": {"switch_tol": 0.5},
}


class Trial:
    """A small training run: with separate params, or as a session has them."""

    def __init__(
        self,
        entry: Entry,
        mix: Sequence[str],
        hyper: Mapping[str, Any],
        *,
        impl: str = "default",
        groups: int = 1,
        arena: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        starts = [_noise(SHAPES[kind], i, dtype) for i, kind in enumerate(mix)]
        self.lent = _flat([torch.zeros_like(s) for s in starts]) if arena else None
        self.params = [torch.nn.Parameter(p) for p in (_flat(starts) if arena else starts)]
        made = [{"params": self.params[i::groups]} for i in range(groups)]
        for i, group in enumerate(made[1:], 2):
            group["lr"] = (hyper.get("lr") or 0.01) / i  # type: ignore[assignment]
        self.torchs = entry.torchs
        self.optimizer = entry.build(made, hyper, impl)

    def step(self, number: int, *, without: int | None = None, sign: float = 1.0) -> None:
        """Make one update; the parameter at ``without`` has no gradient."""
        for i, p in enumerate(self.params):
            p.grad = sign * _noise(p.shape, 100 * number + i, p.dtype)
            if i == without:
                p.grad = None
            elif self.lent is not None:
                lent = self.lent[i].copy_(p.grad)
                p.grad = lent if self.torchs else lent.clone()  # as the engine does
        self.optimizer.step()
        for p in self.params:
            if p.grad is not None:
                p.grad.fill_(torch.nan)  # the next one overwrites it: state must not point there
            p.grad = None

    def run(self, first: int, last: int, **options: Any) -> Trial:
        for number in range(first, last):
            self.step(number, **options)
        return self

    def values(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.params]

    def save(self) -> tuple[str, dict[str, torch.Tensor]]:
        """Return the state as a state file has it: JSON text and tensors."""
        tensors: dict[str, torch.Tensor] = {}
        hyper = [
            flatten({k: v for k, v in group.items() if k not in FLAGS}, f"group/{i}", tensors)[0]
            for i, group in enumerate(self.optimizer.param_groups)
        ]
        extra = flatten(read_extra(self.optimizer), "extra", tensors)[0]
        states = [
            flatten(read_state(self.optimizer, p), f"state/{i}", tensors)[0]
            for i, p in enumerate(self.params)
        ]
        text = json.dumps([hyper, extra, states], allow_nan=False)
        return text, {name: tensor.clone() for name, tensor in tensors.items()}

    def load(self, saved: tuple[str, dict[str, torch.Tensor]], values: list[torch.Tensor]) -> None:
        (hyper, extra, states), tensors = json.loads(saved[0]), saved[1]
        write_extra(self.optimizer, unflatten(extra, tensors))
        for p, value, state in zip(self.params, values, states, strict=True):
            p.data.copy_(value)
            write_state(self.optimizer, p, unflatten(state, tensors))
        for group, kept in zip(self.optimizer.param_groups, hyper, strict=True):
            group.update(unflatten(kept, tensors))

    def scale_lr(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = (group["lr"] or 0.01) * factor


def _noise(shape: Sequence[int], seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=tuple(shape))).to(dtype)


def _flat(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return these tensors as views of one buffer, at odd offsets."""
    flat = torch.cat([tensors[0].new_zeros(1), *(t.reshape(-1) for t in tensors)])
    parts = flat.split([1, *(t.numel() for t in tensors)])[1:]
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def same(one: Trial, other: Trial) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.params, other.params, strict=True))


class Gate:
    """One class, with the hyperparameters and the shapes that it is tried on."""

    def __init__(self, entry: Entry, hyper: Mapping[str, Any]) -> None:
        self.entry, self.hyper = entry, hyper
        self.mix: tuple[str, ...] = ()
        self.refusal: str | None = ""
        for self.mix in MIXES:
            self.refusal = self.says()
            if self.refusal is None:
                break

    def trial(self, hyper: Mapping[str, Any] | None = None, **options: Any) -> Trial:
        return Trial(self.entry, self.mix, {**self.hyper, **(hyper or {})}, **options)

    def says(self, **options: Any) -> str | None:
        """Return the sentence with which the class refuses its first step, or None."""
        try:
            self.trial(**options).step(0)
        except Exception as exc:
            return str(exc) or type(exc).__name__
        return None

    def takes(self, impl: str) -> bool:
        return self.says(impl=impl) is None

    @property
    def impls(self) -> list[str]:
        return [impl for impl in self.entry.impls if self.takes(impl)]

    # Each of these returns what does not hold, or None.

    def has_lr(self) -> str | None:
        groups = self.trial().optimizer.param_groups
        return None if all("lr" in group for group in groups) else "has no lr in its groups"

    def draws_nothing(self) -> str | None:
        for dtype in (torch.float32, torch.bfloat16):
            before = _generators()
            if self.says(dtype=dtype) is None:
                self.trial(dtype=dtype).run(0, STEPS)
            if _generators() != before:
                return f"draws random numbers ({dtype})"
        return None

    def moves(self) -> str | None:
        trial = self.trial()
        before, addresses = trial.values(), [p.data_ptr() for p in trial.params]
        trial.run(0, STEPS)
        if [p.data_ptr() for p in trial.params] != addresses:
            return "replaces the memory of the params"
        if not all(torch.isfinite(p).all() for p in trial.params):
            return "makes NaN of finite gradients"
        pairs = zip(self.mix, before, trial.params, strict=True)
        still = [kind for kind, b, p in pairs if p.numel() and torch.equal(p, b)]
        return f"does not move a {', '.join(still)}" if still else None

    def lives_in_an_arena(self) -> str | None:
        for impl in self.impls:
            apart = self.trial(impl=impl, groups=2).run(0, STEPS)
            views = self.trial(impl=impl, groups=2, arena=True).run(0, STEPS)
            if not same(apart, views):
                return f"differs on views of one buffer ({impl})"
        return None

    def goes_on(self) -> str | None:
        for impl in self.impls:
            for cut in CUTS:
                trial = self.trial(impl=impl, groups=3).run(0, min(cut, 2))
                trial.scale_lr(0.7)
                trial.run(2, cut)
                again = self.trial(impl=impl, groups=3)
                again.load(trial.save(), trial.values())
                if not same(trial.run(cut, STEPS), again.run(cut, STEPS)):
                    return f"goes on differently from saved state ({impl}, {cut} steps)"
                if trial.save()[0] != again.save()[0]:
                    return f"has other state after being read back ({impl}, {cut} steps)"
        return None

    def follows_lr(self) -> str | None:
        plain, larger, smaller = self.trial(), self.trial(), self.trial()
        larger.scale_lr(3.0)
        smaller.scale_lr(0.01)
        plain.run(0, STEPS)
        if same(plain, larger.run(0, STEPS)) and same(plain, smaller.run(0, STEPS)):
            return "does not follow lr"
        return None

    def leaves_alone(self) -> str | None:
        """A parameter without a gradient stays as it is, before it has state and after."""
        for impl in self.impls:
            trial = self.trial(impl=impl)
            for number in range(STEPS):
                at = number // 2 % len(self.mix)
                before = trial.params[at].detach().clone()
                trial.step(number, without=at)
                if not torch.equal(trial.params[at], before):
                    return f"moves a parameter that has no gradient ({impl})"
        return None

    def maximizes(self) -> str | None:
        for impl in self.impls if self.entry.maximize else ():
            up = self.trial({"maximize": True}, impl=impl).run(0, STEPS)
            if not same(up, self.trial(impl=impl).run(0, STEPS, sign=-1.0)):
                return f"maximize is not minimizing with the negative gradient ({impl})"
        return None

    def grows(self) -> str | None:
        trial = self.trial().run(0, 3)
        added = torch.nn.Parameter(_noise((3, 4), 7, torch.float32))
        before = added.detach().clone()
        trial.optimizer.add_param_group({"params": [added]})
        trial.params.append(added)
        trial.run(3, STEPS)
        return "does not move an added group" if torch.equal(added, before) else None


def _generators() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    return (torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2])


def conforms(entry: Entry) -> list[str]:
    """Return why this optimizer cannot be listed; an empty list if it can."""
    gate = Gate(entry, {**entry.example, **TRIALS.get(entry.name, {})})
    if gate.refusal is not None:
        return [f"takes none of the shapes: {gate.refusal}"]
    reasons = [reason] if (reason := gate.has_lr()) else []
    checks = [gate.draws_nothing, gate.moves, gate.lives_in_an_arena, gate.goes_on]
    checks += [gate.follows_lr, gate.leaves_alone, gate.maximizes]
    if entry.groups:
        checks.append(gate.grows)
    for check in checks:
        try:
            reason = None if reasons else check()
        except Exception as exc:
            reason = f"{check.__name__}: {str(exc) or type(exc).__name__}"
        reasons += [reason] if reason else []
    return reasons
