"""Looking ahead gives what will happen, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as t

from optserve.optim import schedules
from optserve.optim.preview import preview
from optserve_client.errors import Invalid, OptserveError, SchedulerFailed, TorchRefused

COSINE = {"name": "CosineAnnealingLR", "T_max": 20}
CYCLE = {"name": "CyclicLR", "base_lr": 0.01, "max_lr": 0.2, "step_size_up": 6}
WARM = {
    "name": "SequentialLR",
    "schedulers": [
        {"name": "LinearLR", "start_factor": 0.1, "total_iters": 5},
        {"name": "MultiStepLR", "milestones": [5, 9]},
    ],
    "milestones": [5],
}
PLATEAU = {"name": "ReduceLROnPlateau", "patience": 1, "factor": 0.5}


def sgd() -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.4)]
    return torch.optim.SGD(groups, momentum=0.9)


def hyper(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


@pytest.mark.parametrize("spec", [COSINE, CYCLE, WARM, [COSINE, WARM]], ids=str)
def test_a_preview_shows_what_each_of_the_next_updates_will_use(spec: Any) -> None:
    optimizer = sgd()
    ours = schedules.build(spec, optimizer)
    names = ["lr", "momentum"] if spec is CYCLE else ["lr"]
    assert preview(spec, hyper(sgd()), 1) == [[{n: g[n] for n in names} for g in hyper(optimizer)]]
    for _ in range(7):
        ours.step()
    state, groups = ours.state(), hyper(optimizer)
    rows = preview(ours.spec, groups, 12, ours.state())
    assert (ours.state(), hyper(optimizer)) == (state, groups)
    for row in rows:
        assert row == [{name: group[name] for name in names} for group in hyper(optimizer)]
        ours.step()
    assert len(rows) == 12


def test_a_preview_without_a_session_equals_torch() -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.1, betas=(0.8, 0.99))
    expected = t.OneCycleLR(optimizer, 0.5, 30)
    groups = [{"lr": 0.1, "betas": [0.8, 0.99]}]
    for row in preview({"name": "one_cycle_lr", "max_lr": 0.5, "total_steps": 30}, groups, 30):
        (group,) = optimizer.param_groups
        assert row == [{"lr": group["lr"], "betas": list(group["betas"])}]
        optimizer.step()
        expected.step()
    assert groups == [{"lr": 0.1, "betas": [0.8, 0.99]}]


def test_a_plateau_follows_the_metrics_and_the_last_one_holds() -> None:
    optimizer = sgd()
    ours = schedules.build(PLATEAU, optimizer)
    rows = preview(PLATEAU, hyper(sgd()), 10, metrics=[1.0, 0.5, 0.2, 0.3])
    for i, row in enumerate(rows):
        assert row == [{"lr": group["lr"]} for group in hyper(optimizer)]
        ours.step([1.0, 0.5, 0.2, 0.3][min(i, 3)])
    assert rows[-1][0]["lr"] < 0.1


def test_a_plateau_without_metrics_sees_one_that_does_not_improve() -> None:
    lrs = [row[0]["lr"] for row in preview(PLATEAU, hyper(sgd()), 7)]
    assert lrs == [0.1, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    optimizer = sgd()
    ours = schedules.build(PLATEAU, optimizer)
    ours.step(0.3)
    lrs = [row[0]["lr"] for row in preview(PLATEAU, hyper(optimizer), 5, ours.state())]
    assert lrs == [0.1, 0.1, 0.05, 0.05, 0.025]


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"steps": 0}, Invalid, "steps must be an integer in [1, 10000], got 0"),
        ({"steps": 10_001}, Invalid, "steps must be an integer in [1, 10000], got 10001"),
        ({"steps": "9"}, Invalid, 'steps must be an integer in [1, 10000], got "9"'),
        ({"steps": True}, Invalid, "steps must be an integer in [1, 10000], got true"),
        (
            {"steps": 10_000, "groups": [{"lr": 0.1}] * 11},
            Invalid,
            "steps x groups x schedulers must be <= 100000, got 10000 x 11 x 1 = 110000",
        ),
        ({"groups": []}, Invalid, "groups must not be empty"),
        ({"groups": [{"lr": 0.1}, {"momentum": 0}]}, Invalid, "groups[1].lr is required"),
        ({"groups": [{"lr": "x"}]}, Invalid, 'groups[0].lr must be a number, got "x"'),
        ({"metrics": [0.1]}, Invalid, "metrics has no effect on CosineAnnealingLR"),
        (
            {"spec": PLATEAU, "metrics": []},
            Invalid,
            "metrics must have 1 to 9 values, one per step",
        ),
        ({"spec": PLATEAU, "metrics": [1] * 10}, Invalid, "metrics must have 1 to 9 values, one"),
        ({"spec": PLATEAU, "metrics": 1}, Invalid, "metrics must be a list of numbers, got 1"),
        ({"spec": PLATEAU, "metrics": [1, "x"]}, Invalid, 'metrics[1] must be a number, got "x"'),
        ({"spec": {"name": "StepLR"}}, Invalid, "scheduler.step_size is required by StepLR"),
        ({"state": {"name": "StepLR"}}, Invalid, "scheduler.state must be an object with"),
        (
            {"spec": CYCLE, "groups": [{"lr": 0.1}]},
            TorchRefused,
            "optimizer must support momentum or beta1 with `cycle_momentum` option enabled",
        ),
        (
            {"spec": {"name": "OneCycleLR", "max_lr": 1, "total_steps": 5}},
            SchedulerFailed,
            "OneCycleLR at step 6: Tried to step 6 times. The specified number of total steps is 5",
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_preview_that_cannot_be_made_is_refused(
    arguments: dict[str, Any], error: type[OptserveError], sentence: str
) -> None:
    call: dict[str, Any] = {
        "spec": COSINE,
        "groups": [{"lr": 0.1, "momentum": 0.9}],
        "steps": 9,
        **arguments,
    }
    with pytest.raises(OptserveError) as caught:
        preview(**call)
    assert (type(caught.value), caught.value.detail[: len(sentence)]) == (error, sentence)
