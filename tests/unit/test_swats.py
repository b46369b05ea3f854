"""SWATS: the library's steps bit for bit, and a switch that happens."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_optimizer
import torch

from optserve.optim.swats import SWATS

CURVATURE = torch.tensor([0.5, 1.0, 2.0])


def train(cls: Any, steps: int, **hyper: Any) -> tuple[torch.Tensor, list[str]]:
    """Minimise a smooth quadratic; return the params and the phase after each step."""
    param = torch.nn.Parameter(torch.tensor([3.0, -2.0, 1.0]))
    optimizer = cls([param], lr=0.05, **hyper)
    phases = []
    for _ in range(steps):
        param.grad = CURVATURE * param.detach()
        optimizer.step()
        phases.append(optimizer.param_groups[0]["phase"])
    return param.detach(), phases


@pytest.mark.parametrize(
    "hyper", [{}, {"foreach": True}, {"ams_bound": True}, {"eps": 0.1}], ids=str
)
def test_without_switch_tol_it_is_the_librarys(hyper: dict[str, Any]) -> None:
    ours, phases = train(SWATS, 300, **hyper)
    theirs, expected = train(pytorch_optimizer.SWATS, 300, **hyper)
    assert torch.equal(ours, theirs)
    assert phases == expected


def test_with_its_default_eps_the_library_never_switches_on_a_smooth_problem() -> None:
    _, phases = train(pytorch_optimizer.SWATS, 2000)
    assert set(phases) == {"adam"}


def test_switch_tol_makes_it_switch_and_leaves_the_denominator_alone() -> None:
    _, phases = train(SWATS, 2000, switch_tol=1e-2)
    at = phases.index("sgd")
    assert set(phases[at:]) == {"sgd"}
    before, _ = train(SWATS, at, switch_tol=1e-2)
    plain, _ = train(pytorch_optimizer.SWATS, at)
    assert torch.equal(before, plain)


def test_groups_switch_apart() -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = SWATS(
        [
            {"params": [params[0]], "switch_tol": 10.0},
            {"params": [params[1]], "switch_tol": 0.0, "eps": 1e-3},
        ],
        lr=0.05,
    )
    for _ in range(20):
        for param in params:
            param.grad = param.detach().clone()
        optimizer.step()
    assert [group["phase"] for group in optimizer.param_groups] == ["sgd", "adam"]
    assert [group["eps"] for group in optimizer.param_groups] == [1e-6, 1e-3]
