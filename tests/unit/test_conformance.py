"""What the catalogue lists of pytorch_optimizer is what passes the gate: an upgrade shows here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_optimizer
import torch

from optserve.optim import catalogue, third_party
from optserve.optim.entry import Entry
from tests.unit.conformance import conforms

#: torch's fused SGD cannot step when some momentum buffers are there and others are not yet.
KNOWN = {
    name: ["leaves_alone: expected Tensor as element 0 in argument 2, but got NoneType"]
    for name in ("Momentum", "Nesterov")
}


def library() -> dict[str, Any]:
    """Return every optimizer class that pytorch_optimizer exports."""
    return {
        name: cls
        for name, cls in vars(pytorch_optimizer).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    }


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ROSE and SGDSaI, about a spread of one element
        yield
    torch.set_num_threads(before)


def test_every_class_of_the_library_is_listed_or_left_out_with_a_reason() -> None:
    listed, left_out = {*third_party.CONFORMING, "Lookahead"}, set(third_party.EXCLUDED)
    assert listed | left_out == set(library())
    assert not listed & left_out
    assert not set(third_party.BY_HAND) & set(third_party.BY_GATE)


@pytest.mark.parametrize("entry", catalogue.entries(), ids=lambda entry: entry.name)
def test_what_is_listed_passes_the_gate(entry: Entry) -> None:
    if entry.needs_loss or entry.sparse == "only":
        pytest.skip("the gate gives dense gradients and no loss; other tests step it")
    assert conforms(entry) == KNOWN.get(entry.name, [])


@pytest.mark.parametrize("name", sorted(third_party.BY_GATE))
def test_what_the_gate_keeps_out_does_not_pass(name: str) -> None:
    assert conforms(Entry(name=name, source=f"pytorch_optimizer.{name}")) != []


class Plain(torch.optim.SGD):
    """SGD, to be spoilt."""

    def __init__(self, params: Any, lr: float = 0.1, maximize: bool = False) -> None:
        super().__init__(params, lr=lr, maximize=maximize)
        self.calls = 0


class Forgetful(Plain):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.calls
        super().step()


class Random(Plain):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(torch.rand_like(p))


class Keeping(Plain):
    """Steps by the gradient before, of which it keeps no copy."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                before = self.state[p].get("before", p.grad)
                p.data.sub_(before, alpha=group["lr"])
                self.state[p]["before"] = p.grad


class Decaying(Plain):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1 - group["lr"])
        super().step()


class Replacing(Plain):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.data = p.data - group["lr"] * p.grad


class Deaf(Plain):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.data.sub_(p.grad, alpha=-0.1 if group["maximize"] else 0.1)


class Lopsided(Plain):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.data.sub_(p.grad, alpha=group["lr"])


SPOILT = {
    Forgetful: "goes on differently from saved state (single, 1 steps)",
    Random: "draws random numbers (torch.float32)",
    Keeping: "makes NaN of finite gradients",
    Decaying: "moves a parameter that has no gradient (single)",
    Replacing: "replaces the memory of the params",
    Deaf: "does not follow lr",
    Lopsided: "maximize is not minimizing with the negative gradient (single)",
}


@pytest.mark.parametrize("cls", [Plain, *SPOILT], ids=lambda cls: cls.__name__)
def test_the_gate_sees_what_is_wrong(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, cls.__name__, cls, raising=False)
    entry = Entry(name=cls.__name__, source=f"torch.optim.{cls.__name__}")
    reasons = [SPOILT[cls]] if cls in SPOILT else []
    assert conforms(entry) == reasons
