"""What the catalogue lists of pytorch_optimizer is what passes the gate: an upgrade shows here."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import pytorch_optimizer
import torch

from optserve.optim import catalogue, rows
from tests.unit.conformance import SHAPES, conforms

#: Left out for what the gate does not look at.
BY_POLICY = {
    name
    for name, why in rows.EXCLUDED.items()
    if why.startswith(("torch.optim has it", "has a non-commercial"))
}
REQUIRED = {"num_iterations": 30}
#: Where the fault shows only above a rank of 256.
LARGE = {"Alice": (((300, 260),),)}


def library() -> dict[str, Any]:
    """Return every optimizer class that pytorch_optimizer exports."""
    return {
        name: cls
        for name, cls in vars(pytorch_optimizer).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    }


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_class_of_the_library_is_listed_or_left_out_with_a_reason() -> None:
    ours = {"SWATS", "Lookahead"}
    assert set(library()) == set(rows.CONFORMING) | set(rows.EXCLUDED) | ours
    assert not set(rows.CONFORMING) & set(rows.EXCLUDED)


@pytest.mark.parametrize("name", [e.name for e in rows.ROWS if not e.needs_loss])
def test_what_is_listed_passes_the_gate(name: str) -> None:
    entry = catalogue.find(name)
    if entry.sparse == "only":
        pytest.skip("SparseAdam takes sparse gradients only; test_update.py steps it")
    hyper = {n: REQUIRED[n] for n, h in entry.hyperparameters.items() if h.required}
    if name == "Lookahead":
        hyper = {"optimizer": {"name": "AdamW"}, "k": 3}

    def build(params: list[Any]) -> Any:
        return entry.build([{"params": params}], hyper, "default")

    assert conforms(build) == []


@pytest.mark.parametrize("name", sorted(set(rows.EXCLUDED) - BY_POLICY))
def test_what_is_left_out_does_not_pass(name: str) -> None:
    cls = library()[name]
    needed = {n: v for n, v in REQUIRED.items() if n in inspect.signature(cls).parameters}
    shapes = LARGE.get(name, SHAPES)
    assert conforms(lambda params: cls(params, **needed), shapes) != []


def test_the_gate_sees_state_that_is_kept_elsewhere() -> None:
    class Forgetful(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.calls = 0

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.calls += 1
            for group in self.param_groups:
                group["lr"] = 0.1 / self.calls
            super().step()

    assert conforms(Forgetful) == ["goes on otherwise after save and load"]
