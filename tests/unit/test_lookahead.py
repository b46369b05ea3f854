"""Lookahead around another optimizer: its state, its groups, its sentences."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytorch_optimizer
import torch

from optserve.optim import catalogue
from optserve.optim.tree import flatten, unflatten
from optserve_client.errors import Invalid, OptserveError

SGD = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
ADAMW = {"name": "AdamW", "lr": 0.01}


def leaves() -> list[torch.nn.Parameter]:
    values = torch.linspace(-1, 1, 9)
    return [
        torch.nn.Parameter(values[:6].view(2, 3).clone()),
        torch.nn.Parameter(values[6:].clone()),
    ]


def step(optimizer: Any, params: list[torch.nn.Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def build(spec: dict[str, Any], params: list[torch.nn.Parameter], groups: Any = None) -> Any:
    entry, hyper = catalogue.parse({"name": "Lookahead", **spec})
    return entry.build(groups or [{"params": params}], json.loads(json.dumps(hyper)), "default")


@pytest.mark.parametrize("pullback", ["none", "reset", "pullback"])
@pytest.mark.parametrize("k", [1, 3])
def test_it_is_the_librarys_bit_for_bit(pullback: str, k: int) -> None:
    ours, theirs = leaves(), leaves()
    served = build({"optimizer": SGD, "k": k, "alpha": 0.3, "pullback_momentum": pullback}, ours)
    local = pytorch_optimizer.Lookahead(
        torch.optim.SGD(theirs, lr=0.1, momentum=0.9), k=k, alpha=0.3, pullback_momentum=pullback
    )
    for i in range(10):
        step(served, ours, i)
        step(local, theirs, i)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("inner", [
    SGD, ADAMW, {"name": "SWATS"}, {"name": "Ranger21", "num_iterations": 20},
    {"name": "AdamW", "betas": [0.5, 0.9]}, {"name": "Adagrad"}, {"name": "Prodigy"},
], ids=lambda spec: spec["name"])  # fmt: skip
@pytest.mark.parametrize("cut", [0, 2, 4])
def test_it_goes_on_from_saved_state_of_both(inner: dict[str, Any], cut: int) -> None:
    spec = {"optimizer": inner, "k": 3}
    params = leaves()
    served = build(spec, params, [{"params": params[:1]}, {"params": params[1:], "lr": 0.02}])
    for i in range(cut):
        step(served, params, i)
    tensors: dict[str, torch.Tensor] = {}
    saved = [
        flatten(catalogue.read_state(served, p), f"s{i}", tensors)[0] for i, p in enumerate(params)
    ]
    extra = flatten(catalogue.read_extra(served), "x", tensors)[0]
    groups = [
        flatten({k: v for k, v in g.items() if k != "params"}, f"g{i}", tensors)[0]
        for i, g in enumerate(served.param_groups)
    ]
    saved, extra, groups = json.loads(json.dumps([saved, extra, groups]))
    kept = {name: tensor.clone() for name, tensor in tensors.items()}

    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    restored = build(spec, again, [{"params": again[:1]}, {"params": again[1:], "lr": 0.5}])
    catalogue.write_extra(restored, unflatten(extra, kept))
    for p, state in zip(again, saved, strict=True):
        catalogue.write_state(restored, p, unflatten(state, kept))
    for group, values in zip(restored.param_groups, groups, strict=True):
        group.update(unflatten(values, kept))
    assert [g["counter"] for g in restored.param_groups] == [cut % 3, cut % 3]
    for i in range(cut, 10):
        step(served, params, i)
        step(restored, again, i)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


def test_its_groups_are_those_of_the_wrapped_optimizer() -> None:
    params = leaves()
    served = build({"optimizer": SGD}, params)
    served.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in params]
    step(served, params, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_an_entry_that_knows_what_it_wraps_checks_groups_like_it() -> None:
    entry = catalogue.find({"name": "Lookahead", "optimizer": SGD})
    assert entry.normalise_group({"nesterov": True}, "groups[0]", {"optimizer": SGD}) == {
        "nesterov": True
    }
    assert entry.normalise_change({"momentum": 0.5}, "groups[0]") == {"momentum": 0.5}
    assert entry.sparse == "allowed"
    assert entry.pick_impl("auto", "cpu", "float32", sparse=False) == "fused"
    with pytest.raises(Invalid, match=r"groups\[0\]: 'amsgrad' is not a hyperparameter of SGD"):
        entry.normalise_change({"amsgrad": True}, "groups[0]")
    assert entry.torch_line({"optimizer": {"name": "SGD", "lr": 0.1}, "k": 3}, "fused") == (
        "pytorch_optimizer.Lookahead(torch.optim.SGD(params, lr=0.1, fused=True), k=3)"
    )


def test_an_entry_that_does_not_know_it_takes_what_nearly_all_have() -> None:
    entry = catalogue.find("Lookahead")
    assert entry.normalise_group({"lr": 1, "weight_decay": 0}, "groups[0]") == {
        "lr": 1.0,
        "weight_decay": 0.0,
    }
    with pytest.raises(Invalid, match=r"groups\[0\].lr must be >= 0, got -1"):
        entry.normalise_change({"lr": -1}, "groups[0]")
    with pytest.raises(Invalid, match=r"groups\[0\]: 'betas' is not a hyperparameter"):
        entry.normalise_change({"betas": [0.5, 0.5]}, "groups[0]")


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "optimizer.optimizer must be the optimizer that Lookahead wraps: a name or an object with "
     "a name"),
    ({"optimizer": 3}, "optimizer.optimizer must be the optimizer that Lookahead wraps"),
    ({"optimizer": {"lr": 0.1}}, "optimizer.optimizer must be the optimizer that Lookahead wraps"),
    ({"optimizer": "LBFGS"}, "optimizer.optimizer: Lookahead does not wrap LBFGS"),
    ({"optimizer": "Lookahead"}, "optimizer.optimizer: Lookahead does not wrap Lookahead"),
    ({"optimizer": "ScheduleFree"}, "optimizer.optimizer: Lookahead does not wrap ScheduleFreeA"),
    ({"optimizer": "Adamm"}, 'optimizer.optimizer.name "Adamm" is not an optimizer: did you mean'),
    ({"optimizer": {"name": "Adam", "lr": -1}}, "optimizer.optimizer.lr must be >= 0, got -1"),
    ({"optimizer": {"name": "Adam", "l": 1}}, "optimizer.optimizer: 'l' is not a hyperparameter"),
    ({"optimizer": "Adam", "k": 0}, "optimizer.k must be >= 1, got 0"),
    ({"optimizer": "Adam", "k": 2.5}, "optimizer.k must be an integer, got 2.5"),
    ({"optimizer": "Adam", "alpha": 1}, "optimizer.alpha must be in [0, 1), got 1"),
    ({"optimizer": "Adam", "lr": 1}, "optimizer: 'lr' is not a hyperparameter of Lookahead"),
    ({"optimizer": "Adam", "pullback_momentum": "x"}, 'optimizer.pullback_momentum must be one of '
     '"none", "reset", "pullback", got "x"'),
    ({"optimizer": "Adam", "pullback_momentum": "reset"}, "optimizer.pullback_momentum has no "
     "effect: Adam keeps no momentum_buffer with these hyperparameters, got reset"),
    ({"optimizer": "SGD", "pullback_momentum": "reset"}, "optimizer.pullback_momentum has no "),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "sentence"), BAD)
def test_what_it_does_not_take_is_named(spec: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptserveError) as caught:
        catalogue.find("Lookahead").normalise(spec)
    assert caught.value.detail.startswith(sentence)


def test_normalising_completes_the_name_and_nothing_else() -> None:
    normal = catalogue.find("lookahead").normalise({"optimizer": "adam_w", "k": 3})
    assert normal == {"optimizer": {"name": "AdamW"}, "k": 3}
