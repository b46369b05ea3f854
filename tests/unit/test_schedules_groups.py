"""Steps that fail leave everything as it was; groups added later are scheduled like the others."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as t

from optserve.optim import schedules
from optserve_client.errors import Invalid, OptserveError, SchedulerFailed


def sgd(*lrs: float) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    return torch.optim.SGD(groups, momentum=0.9)


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(1))


def lrs(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


#: A specification, the steps that succeed, metrics for the one that fails, and its sentence.
FAILING: list[tuple[Any, int, float | None, type[OptserveError], str]] = [
    (
        {"name": "OneCycleLR", "max_lr": 1, "total_steps": 5},
        5,
        None,
        SchedulerFailed,
        "OneCycleLR at step 6: Tried to step 6 times. The specified number of total steps is 5",
    ),
    (
        {
            "name": "SequentialLR",
            "schedulers": [
                {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1},
                {"name": "LambdaLR", "lr_lambda": "1 / (epoch - 3)"},
            ],
            "milestones": [4],
        },
        6,
        None,
        SchedulerFailed,
        'scheduler.schedulers[1].lr_lambda "1 / (epoch - 3)" at epoch = 3: float division by zero',
    ),
    # The first part of the chain has moved when the second one fails.
    (
        [
            {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1},
            {"name": "MultiplicativeLR", "lr_lambda": ["1", "log(9 - epoch)"]},
        ],
        8,
        None,
        SchedulerFailed,
        'scheduler.schedulers[1].lr_lambda[1] "log(9 - epoch)" at epoch = 9: math domain error',
    ),
    (
        {"name": "ExponentialLR", "gamma": 1e100},
        3,
        None,
        SchedulerFailed,
        "ExponentialLR at step 4: groups[0].lr would be inf, must be finite",
    ),
    (
        {
            "name": "CyclicLR",
            "base_lr": 0.1,
            "max_lr": 1,
            "step_size_up": 1,
            "mode": "triangular2",
        },
        2047,
        None,
        SchedulerFailed,
        "CyclicLR at step 2048: Numerical result out of range",
    ),
    (
        {"name": "ReduceLROnPlateau"},
        2,
        float("nan"),
        Invalid,
        "metrics must be a finite number, got NaN",
    ),
    (
        {"name": "ReduceLROnPlateau"},
        2,
        None,
        Invalid,
        "metrics is required: ReduceLROnPlateau foll",
    ),
    (
        {"name": "ReduceLROnPlateau"},
        2,
        True,
        Invalid,
        "metrics must be a number, got true",
    ),
    (
        {"name": "StepLR", "step_size": 2},
        3,
        0.5,
        Invalid,
        "metrics has no effect on StepLR",
    ),
]


@pytest.mark.parametrize(("spec", "steps", "metrics", "error", "sentence"), FAILING)
def test_a_step_that_fails_changes_nothing(
    spec: Any, steps: int, metrics: float | None, error: type[OptserveError], sentence: str
) -> None:
    optimizer = sgd(0.1, 0.2)
    ours = schedules.build(schedules.check(spec), optimizer)
    for step in range(steps):
        ours.step(1.0 / (step + 1) if ours.needs_metrics else None)
    groups, state = [dict(group) for group in optimizer.param_groups], ours.state()
    attributes = [dict(node.made.__dict__) for node in ours._root.walk()]
    for _ in range(2):
        with pytest.raises(OptserveError) as caught:
            ours.step(metrics)
        assert (type(caught.value), caught.value.detail[: len(sentence)]) == (error, sentence)
        assert optimizer.param_groups == groups
        assert ours.state() == state
        assert [node.made.__dict__ for node in ours._root.walk()] == attributes


def test_a_build_that_fails_at_once_changes_no_group() -> None:
    optimizer = sgd(0.1, 1e308)
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(SchedulerFailed, match=r"LambdaLR at step 0: groups\[1\]\.lr would be inf"):
        schedules.build({"name": "LambdaLR", "lr_lambda": "10"}, optimizer)
    assert optimizer.param_groups == before


#: Specifications that take a group added later.
OPEN: list[Any] = [
    {"name": "LambdaLR", "lr_lambda": "0.9 ** epoch"},
    {"name": "MultiplicativeLR", "lr_lambda": "0.9"},
    {"name": "StepLR", "step_size": 4},
    {"name": "MultiStepLR", "milestones": [3, 12]},
    {"name": "ConstantLR", "factor": 0.5, "total_iters": 7},
    {"name": "LinearLR", "start_factor": 0.5, "total_iters": 7},
    {"name": "ExponentialLR", "gamma": 0.9},
    {"name": "CosineAnnealingLR", "T_max": 8},
    {"name": "CosineAnnealingWarmRestarts", "T_0": 8},
    {"name": "PolynomialLR", "total_iters": 15},
    {"name": "ReduceLROnPlateau", "patience": 0, "min_lr": 0.01},
    {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1, "step_size_up": 3},
    {"name": "OneCycleLR", "max_lr": 1, "total_steps": 50},
    [{"name": "ConstantLR", "total_iters": 3}, {"name": "LambdaLR", "lr_lambda": "0.9 ** epoch"}],
    {
        "name": "SequentialLR",
        "schedulers": [
            {"name": "LinearLR", "total_iters": 10},
            {"name": "CosineAnnealingLR", "T_max": 9},
        ],
        "milestones": [9],
    },
]


@pytest.mark.parametrize("spec", OPEN, ids=str)
def test_a_group_added_later_is_scheduled_and_its_lr_stays_until_the_next_step(spec: Any) -> None:
    optimizer, alone = sgd(0.1), sgd(0.1)
    ours, other = schedules.build(spec, optimizer), schedules.build(spec, alone)
    for _ in range(5):
        for scheduler in (ours, other):
            scheduler.step(1.0 if scheduler.needs_metrics else None)
    ours.check_new_group()
    optimizer.add_param_group({"params": [parameter()], "lr": 0.7})
    ours.adopt_groups()
    assert lrs(optimizer) == [*lrs(alone), 0.7]
    assert ours.last_lr == lrs(optimizer)
    assert json.loads(json.dumps(ours.state(), allow_nan=False)) == ours.state()
    moved = False
    for _ in range(20):
        for scheduler in (ours, other):
            scheduler.step(1.0 if scheduler.needs_metrics else None)
        assert lrs(optimizer)[0] == lrs(alone)[0]
        moved |= lrs(optimizer)[1] != 0.7
    assert moved


def test_a_new_group_that_the_engine_did_not_announce_is_adopted_by_the_next_step() -> None:
    optimizer = sgd(0.1)
    ours = schedules.build({"name": "LambdaLR", "lr_lambda": "0.9 ** epoch"}, optimizer)
    optimizer.add_param_group({"params": [parameter()], "lr": 0.7})
    ours.step()
    assert lrs(optimizer) == [0.1 * 0.9, 0.7 * 0.9]


@pytest.mark.parametrize(
    ("spec", "make"),
    [
        (OPEN[2], lambda o: t.StepLR(o, 4)),
        (OPEN[3], lambda o: t.MultiStepLR(o, [3, 12])),
        (OPEN[4], lambda o: t.ConstantLR(o, 0.5, 7)),
        (OPEN[5], lambda o: t.LinearLR(o, 0.5, 1.0, 7)),
        (OPEN[6], lambda o: t.ExponentialLR(o, 0.9)),
        (OPEN[9], lambda o: t.PolynomialLR(o, 15)),
        (OPEN[10], lambda o: t.ReduceLROnPlateau(o, patience=0, min_lr=0.01)),
    ],
)
def test_where_torch_takes_a_new_group_the_values_are_torchs(spec: Any, make: Any) -> None:
    optimizer, theirs = sgd(0.1), sgd(0.1)
    ours, expected = schedules.build(spec, optimizer), make(theirs)
    for step in range(20):
        if step == 2:
            for each in (optimizer, theirs):
                each.add_param_group({"params": [parameter()], "lr": 0.7})
        metrics = (1.0,) if ours.needs_metrics else ()
        theirs.step()
        expected.step(*metrics)
        ours.step(*metrics)
        assert lrs(optimizer) == lrs(theirs)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: t.LambdaLR(o, lambda _: 1.0),
        lambda o: t.MultiplicativeLR(o, lambda _: 1.0),
        lambda o: t.CosineAnnealingWarmRestarts(o, 4),
        lambda o: t.CyclicLR(o, 0.1, 1.0),
        lambda o: t.OneCycleLR(o, 1.0, 9),
    ],
)
def test_torch_itself_fails_for_the_others(make: Any) -> None:
    optimizer = sgd(0.1)
    scheduler = make(optimizer)
    optimizer.add_param_group({"params": [parameter()], "lr": 0.7})
    optimizer.step()
    with pytest.raises((ValueError, KeyError)):
        scheduler.step()


def test_a_closed_form_gives_a_new_group_what_it_gives_one_of_that_lr_from_the_start() -> None:
    spec = {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1, "step_size_up": 3}
    optimizer, both = sgd(0.1), sgd(0.1, 0.7)
    ours, expected = schedules.build(spec, optimizer), schedules.build(spec, both)
    ours.step()
    optimizer.add_param_group({"params": [parameter()], "lr": 0.7})
    ours.adopt_groups()
    expected.step()
    for _ in range(10):
        ours.step()
        expected.step()
        for mine, its in zip(optimizer.param_groups, both.param_groups, strict=True):
            assert {**mine, "params": 0, "initial_lr": 0} == {**its, "params": 0, "initial_lr": 0}


def test_a_schedule_that_lists_a_value_per_group_takes_no_further_group() -> None:
    optimizer = sgd(0.1, 0.2)
    spec: Any = [
        {"name": "StepLR", "step_size": 9},
        {"name": "LambdaLR", "lr_lambda": ["1", "0.5"]},
    ]
    ours = schedules.build(spec, optimizer)
    with pytest.raises(Invalid) as caught:
        ours.check_new_group()
    assert caught.value.detail == (
        "scheduler.schedulers[1].lr_lambda has 2 values, one per group, so no group can be added; "
        "replace the scheduler first"
    )
    optimizer.add_param_group({"params": [parameter()], "lr": 0.7})
    state = ours.state()
    with pytest.raises(Invalid, match="so no group can be added"):
        ours.step()
    assert (lrs(optimizer), ours.state()) == ([0.1, 0.1, 0.7], state)


@pytest.mark.parametrize("spec", OPEN, ids=str)
def test_a_state_from_after_a_group_was_added_goes_on_in_a_replay(spec: Any) -> None:
    def advance(scheduler: schedules.Scheduler, steps: int) -> None:
        for _ in range(steps):
            scheduler.step(1.0 if scheduler.needs_metrics else None)

    optimizer, replayed = sgd(0.1), sgd(0.1)
    ours, again = schedules.build(spec, optimizer), schedules.build(spec, replayed)
    advance(ours, 3)
    for each in (optimizer, replayed):
        each.add_param_group({"params": [parameter()], "lr": 0.7})
    advance(ours, 2)
    again.load(json.loads(json.dumps(ours.state())))
    for group, values in zip(replayed.param_groups, optimizer.param_groups, strict=True):
        group.update({k: v for k, v in values.items() if k != "params"})
    for _ in range(15):
        advance(ours, 1)
        advance(again, 1)
        assert lrs(replayed) == lrs(optimizer)
        assert again.state() == ours.state()


def test_a_second_scheduler_starts_from_the_first_ones_initial_lr_as_in_torch() -> None:
    optimizer, theirs = sgd(0.1), sgd(0.1)
    first, torchs = schedules.build(OPEN[6], optimizer), t.ExponentialLR(theirs, 0.9)
    for _ in range(4):
        theirs.step()
        first.step()
        torchs.step()
    second, torchs_second = (
        schedules.build(OPEN[0], optimizer),
        t.LambdaLR(theirs, lambda e: 0.9**e),
    )
    assert lrs(optimizer) == lrs(theirs) == [0.1]
    second.step()
    torchs_second.step()
    assert lrs(optimizer) == lrs(theirs)
