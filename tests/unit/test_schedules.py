"""Every scheduler, alone and nested, against torch's own class driven by hand."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as t

from optserve.optim import schedule_binding, schedule_catalogue, schedules
from optserve_client.errors import Invalid

STEPS = 200
LRS = (0.1, 0.03, 1.0)

Make = Callable[[torch.optim.Optimizer], Any]


def warm_then_cosine(o: torch.optim.Optimizer) -> Any:
    return t.SequentialLR(o, [t.LinearLR(o, 0.1, 1.0, 20), t.CosineAnnealingLR(o, 80)], [20])


#: Attributes of torch's schedulers that hold functions, made anew from the specification.
FUNCTIONS = ("lr_lambdas", "_scale_fn_ref", "_scale_fn_custom")

#: A name, the specification, and the same by hand.
CASES: dict[str, tuple[Any, Make]] = {
    "LambdaLR": (
        {"name": "LambdaLR", "lr_lambda": "0.95 ** epoch"},
        lambda o: t.LambdaLR(o, lambda epoch: 0.95**epoch),
    ),
    "LambdaLR of integers": (
        {"name": "lambda_lr", "lr_lambda": "1 / (1 + epoch // 30) if epoch % 7 < 5 else 0.5"},
        lambda o: t.LambdaLR(o, lambda e: 1 / (1 + e // 30) if e % 7 < 5 else 0.5),
    ),
    "LambdaLR per group": (
        {
            "name": "LambdaLR",
            "lr_lambda": [
                "min(1, (epoch + 1) / 10)",
                {"table": [1, 0.5, 0.25]},
                "0.5 * (1 + cos(pi * epoch / 50))",
            ],
        },
        lambda o: t.LambdaLR(
            o,
            [
                lambda epoch: min(1, (epoch + 1) / 10),
                lambda epoch: [1, 0.5, 0.25][min(epoch, 2)],
                lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / 50)),
            ],
        ),
    ),
    "MultiplicativeLR": (
        {"name": "MultiplicativeLR", "lr_lambda": "0.95 if epoch < 50 or epoch > 180 else 1"},
        lambda o: t.MultiplicativeLR(o, lambda e: 0.95 if e < 50 or e > 180 else 1),
    ),
    "StepLR": ({"name": "step_lr", "step_size": 7.0, "gamma": 0.7}, lambda o: t.StepLR(o, 7, 0.7)),
    "MultiStepLR": (
        {"name": "MULTISTEPLR", "milestones": [5, 31, 31, 120], "gamma": 0.3},
        lambda o: t.MultiStepLR(o, [5, 31, 31, 120], 0.3),
    ),
    "ConstantLR": (
        {"name": "ConstantLR", "factor": 0.3, "total_iters": 17},
        lambda o: t.ConstantLR(o, 0.3, 17),
    ),
    "LinearLR": (
        {"name": "LinearLR", "start_factor": 0.2, "end_factor": 0.9, "total_iters": 90},
        lambda o: t.LinearLR(o, 0.2, 0.9, 90),
    ),
    "ExponentialLR": ({"name": "ExponentialLR", "gamma": 0.97}, lambda o: t.ExponentialLR(o, 0.97)),
    "SequentialLR": (
        {
            "name": "SequentialLR",
            "schedulers": [
                {"name": "LinearLR", "start_factor": 0.1, "end_factor": 1, "total_iters": 20},
                {"name": "CosineAnnealingLR", "T_max": 80},
            ],
            "milestones": [20],
        },
        warm_then_cosine,
    ),
    "CosineAnnealingLR": (
        {"name": "CosineAnnealingLR", "T_max": 60, "eta_min": 0.001},
        lambda o: t.CosineAnnealingLR(o, 60, 0.001),
    ),
    "ChainedScheduler": (
        [
            {"name": "ConstantLR", "factor": 0.1, "total_iters": 20},
            {"name": "exponential_lr", "gamma": 0.9},
        ],
        lambda o: t.ChainedScheduler([t.ConstantLR(o, 0.1, 20), t.ExponentialLR(o, 0.9)]),
    ),
    "ReduceLROnPlateau": (
        {"name": "ReduceLROnPlateau", "factor": 0.5, "patience": 3, "cooldown": 2},
        lambda o: t.ReduceLROnPlateau(o, factor=0.5, patience=3, cooldown=2),
    ),
    "ReduceLROnPlateau of the largest": (
        {
            "name": "reduce_lr_on_plateau",
            "mode": "max",
            "threshold": 0.001,
            "threshold_mode": "abs",
            "patience": 5,
            "min_lr": [0.001, 0.0, 0.2],
        },
        lambda o: t.ReduceLROnPlateau(
            o, "max", patience=5, threshold=0.001, threshold_mode="abs", min_lr=[0.001, 0.0, 0.2]
        ),
    ),
    "CyclicLR": (
        {"name": "CyclicLR", "base_lr": 0.01, "max_lr": [0.1, 0.2, 0.3], "step_size_up": 13},
        lambda o: t.CyclicLR(o, 0.01, [0.1, 0.2, 0.3], 13),
    ),
    "CyclicLR triangular2": (
        {
            "name": "CyclicLR",
            "base_lr": 0.01,
            "max_lr": 0.1,
            "step_size_up": 5,
            "step_size_down": 9,
            "mode": "triangular2",
            "base_momentum": [0.5, 0.6, 0.7],
            "max_momentum": 0.95,
        },
        lambda o: t.CyclicLR(
            o,
            0.01,
            0.1,
            5,
            9,
            "triangular2",
            base_momentum=[0.5, 0.6, 0.7],  # type: ignore[arg-type]  # a list works, says its text
            max_momentum=0.95,
        ),
    ),
    "CyclicLR exp_range": (
        {
            "name": "CyclicLR",
            "base_lr": [0.01, 0.02, 0.03],
            "max_lr": 0.1,
            "step_size_up": 10,
            "mode": "exp_range",
            "gamma": 0.99,
            "cycle_momentum": False,
        },
        lambda o: t.CyclicLR(
            o, [0.01, 0.02, 0.03], 0.1, 10, mode="exp_range", gamma=0.99, cycle_momentum=False
        ),
    ),
    "CyclicLR scale_fn of the cycle": (
        {
            "name": "CyclicLR",
            "base_lr": 0,
            "max_lr": 1,
            "step_size_up": 6,
            "scale_fn": "1 / x ** 0.5",
        },
        lambda o: t.CyclicLR(o, 0.0, 1.0, 6, scale_fn=lambda x: 1 / x**0.5),
    ),
    "CyclicLR scale_fn of the iterations": (
        {
            "name": "CyclicLR",
            "base_lr": 0.01,
            "max_lr": 1.0,
            "step_size_up": 6,
            "scale_fn": {"table": [0.5, 0.75, 1.0]},
            "scale_mode": "iterations",
        },
        lambda o: t.CyclicLR(
            o,
            0.01,
            1.0,
            6,
            scale_fn=lambda x: [0.5, 0.75, 1.0][min(int(x), 2)],
            scale_mode="iterations",
        ),
    ),
    "CosineAnnealingWarmRestarts": (
        {"name": "CosineAnnealingWarmRestarts", "T_0": 9, "T_mult": 2, "eta_min": 1e-4},
        lambda o: t.CosineAnnealingWarmRestarts(o, 9, 2, 1e-4),
    ),
    "OneCycleLR": (
        {"name": "OneCycleLR", "max_lr": [0.1, 0.2, 0.5], "total_steps": STEPS},
        lambda o: t.OneCycleLR(o, [0.1, 0.2, 0.5], STEPS),
    ),
    "OneCycleLR in three phases": (
        {
            "name": "OneCycleLR",
            "max_lr": 0.5,
            "epochs": 10,
            "steps_per_epoch": 21,
            "pct_start": 0.25,
            "anneal_strategy": "linear",
            "three_phase": True,
            "max_momentum": [0.9, 0.8, 0.7],
            "base_momentum": 0.5,
        },
        lambda o: t.OneCycleLR(
            o,
            0.5,
            epochs=10,
            steps_per_epoch=21,
            pct_start=0.25,
            anneal_strategy="linear",
            three_phase=True,
            max_momentum=[0.9, 0.8, 0.7],
            base_momentum=0.5,
        ),
    ),
    "PolynomialLR": (
        {"name": "PolynomialLR", "total_iters": 150, "power": 0.9},
        lambda o: t.PolynomialLR(o, 150, 0.9),
    ),
    "three in sequence": (
        {
            "name": "SequentialLR",
            "schedulers": [
                {"name": "ConstantLR", "factor": 0.5, "total_iters": 4},
                {"name": "MultiStepLR", "milestones": [10, 20, 130], "gamma": 0.5},
                {"name": "CosineAnnealingWarmRestarts", "T_0": 10},
                {"name": "PolynomialLR", "total_iters": 30},
            ],
            "milestones": [15, 60, 150],
        },
        lambda o: t.SequentialLR(
            o,
            [
                t.ConstantLR(o, 0.5, 4),
                t.MultiStepLR(o, [10, 20, 130], 0.5),
                t.CosineAnnealingWarmRestarts(o, 10),
                t.PolynomialLR(o, 30),
            ],
            [15, 60, 150],
        ),
    ),
    "functions and cycles in sequence": (
        {
            "name": "SequentialLR",
            "schedulers": [
                {"name": "LambdaLR", "lr_lambda": "(1 + epoch) / 30"},
                {"name": "CyclicLR", "base_lr": 0.01, "max_lr": 0.2, "step_size_up": 8},
                {"name": "OneCycleLR", "max_lr": 0.3, "total_steps": 120},
            ],
            "milestones": [30, 90],
        },
        lambda o: t.SequentialLR(
            o,
            [
                t.LambdaLR(o, lambda epoch: (1 + epoch) / 30),
                t.CyclicLR(o, 0.01, 0.2, 8),
                t.OneCycleLR(o, 0.3, 120),
            ],
            [30, 90],
        ),
    ),
    "a chain of a sequence and a step": (
        [
            {
                "name": "SequentialLR",
                "schedulers": [
                    {"name": "LinearLR", "start_factor": 0.1, "total_iters": 20},
                    {"name": "CosineAnnealingLR", "T_max": 80},
                ],
                "milestones": [20],
            },
            {"name": "StepLR", "step_size": 45, "gamma": 0.5},
        ],
        lambda o: t.ChainedScheduler([warm_then_cosine(o), t.StepLR(o, 45, 0.5)]),
    ),
    "a sequence that begins with a chain": (
        {
            "name": "SequentialLR",
            "schedulers": [
                [
                    {"name": "MultiStepLR", "milestones": [3, 8]},
                    {"name": "ExponentialLR", "gamma": 0.9},
                ],
                {"name": "LinearLR", "start_factor": 0.5, "total_iters": 20},
            ],
            "milestones": [12],
        },
        lambda o: t.SequentialLR(
            o,
            [
                t.ChainedScheduler([t.MultiStepLR(o, [3, 8]), t.ExponentialLR(o, 0.9)]),
                t.LinearLR(o, 0.5, 1.0, 20),
            ],
            [12],
        ),
    ),
    "a sequence that begins with a sequence": (
        {
            "name": "SequentialLR",
            "schedulers": [
                {
                    "name": "SequentialLR",
                    "schedulers": [
                        {"name": "LinearLR", "start_factor": 0.1, "total_iters": 20},
                        {"name": "CosineAnnealingLR", "T_max": 80},
                    ],
                    "milestones": [20],
                },
                {"name": "ExponentialLR", "gamma": 0.99},
            ],
            "milestones": [100],
        },
        lambda o: t.SequentialLR(o, [warm_then_cosine(o), t.ExponentialLR(o, 0.99)], [100]),
    ),
    "chains in chains": (
        [
            [
                [{"name": "MultiStepLR", "milestones": [50, 150]}],
                {"name": "StepLR", "step_size": 40},
            ],
            [{"name": "MultiplicativeLR", "lr_lambda": ["0.99", "1.01", "1"]}],
        ],
        lambda o: t.ChainedScheduler(
            [
                t.ChainedScheduler(
                    [t.ChainedScheduler([t.MultiStepLR(o, [50, 150])]), t.StepLR(o, 40)]
                ),
                t.ChainedScheduler(
                    [t.MultiplicativeLR(o, [lambda _: 0.99, lambda _: 1.01, lambda _: 1.0])]
                ),
            ]
        ),
    ),
}

OPTIMIZERS: dict[str, Callable[[], torch.optim.Optimizer]] = {
    "SGD": lambda: torch.optim.SGD(params(), lr=LRS[0], momentum=0.9),
    "Adam": lambda: torch.optim.Adam(params(), lr=LRS[0], betas=(0.8, 0.99)),
}


def params() -> list[dict[str, Any]]:
    return [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in LRS]


def metric(step: int) -> float:
    """Fall, hold, rise, and come back lower: with negative values too."""
    return round(3 * math.exp(-step / 40) * math.cos(step / 9), 3)


def hyper(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return what an engine keeps of each group."""
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def through_text(state: Any) -> Any:
    return json.loads(json.dumps(state, allow_nan=False))


def make_by_hand(make: Make, optimizer: torch.optim.Optimizer) -> Any:
    with warnings.catch_warnings():
        # Nested in a SequentialLR, torch steps a scheduler twice while it is built, and warns.
        warnings.simplefilter("ignore")
        return make(optimizer)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_values_equal_torchs_with_save_and_load_at_every_tenth_step(
    case: str, optimizer_name: str
) -> None:
    given, make = CASES[case]
    new = OPTIMIZERS[optimizer_name]
    theirs, optimizer = new(), new()
    expected = make_by_hand(make, theirs)
    spec = schedules.check(given)
    ours = schedules.build(spec, optimizer)
    assert hyper(optimizer) == hyper(theirs)
    for step in range(STEPS):
        if step % 10 == 0:
            saved, groups = through_text(ours.state()), hyper(optimizer)
            optimizer = new()
            ours = schedules.build(through_text(spec), optimizer)
            built = [group["lr"] for group in optimizer.param_groups]
            ours.load(saved)
            assert [group["lr"] for group in optimizer.param_groups] == built
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(values)
            assert ours.state() == saved
        metrics = (metric(step),) if ours.needs_metrics else ()
        theirs.step()
        expected.step(*metrics)
        ours.step(*metrics)
        assert hyper(optimizer) == hyper(theirs)
        assert ours.last_lr == expected.get_last_lr()
        if hasattr(expected, "last_epoch"):
            assert ours.last_epoch == expected.last_epoch


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    names = {name for name in t.__all__ if name != "LRScheduler"}
    assert {entry.name for entry in schedule_catalogue.entries()} == names
    assert {schedules.check(spec)["name"] for spec, _ in CASES.values()} == names


@pytest.mark.parametrize("case", CASES)
def test_state_holds_all_that_moves(case: str) -> None:
    """What torch would save, and ours does not, is the same after 50 steps and for other lrs."""

    def constants(node: Any) -> Any:
        elsewhere = {"optimizer", "_schedulers", *FUNCTIONS, *schedule_binding._MOVING}
        kept = {k: repr(v) for k, v in node.made.__dict__.items() if k not in elsewhere}
        return [kept, *(constants(child) for child in node.children)]

    spec = schedules.check(CASES[case][0])
    optimizer, other = OPTIMIZERS["SGD"](), OPTIMIZERS["SGD"]()
    for group in other.param_groups:
        group["lr"] *= 3
    ours, built = schedules.build(spec, optimizer), schedules.build(spec, other)
    for step in range(50):
        ours.step(metric(step) if ours.needs_metrics else None)
    assert constants(ours._root) == constants(built._root)


def test_last_epoch_of_a_chain_is_that_of_its_first_part() -> None:
    ours = schedules.build(CASES["chains in chains"][0], OPTIMIZERS["SGD"]())
    assert ours.last_epoch == 0
    for _ in range(7):
        ours.step()
    assert ours.last_epoch == 7


def test_a_plateau_has_no_best_before_its_first_metric() -> None:
    for mode, best in (("min", "Infinity"), ("max", "-Infinity")):
        ours = schedules.build({"name": "ReduceLROnPlateau", "mode": mode}, OPTIMIZERS["SGD"]())
        assert ours.state()["best"] == best
        assert ours.best_or(7.0) == 7.0
        ours.step(0.5)
        assert ours.state()["best"] == 0.5 == ours.best_or(7.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "LinearLR"}, 'scheduler.state.name must be StepLR, got "LinearLR"'),
        ({"last_epoch": 1.5}, "scheduler.state.last_epoch must be an integer, got 1.5"),
        ({"last_epoch": True}, "scheduler.state.last_epoch must be an integer, got true"),
        ({"base_lrs": [0.1]}, "scheduler.state.base_lrs must have 3 values, one per group"),
        ({"base_lrs": [1, "x", 1]}, 'scheduler.state.base_lrs[1] must be a number, got "x"'),
        ({"_last_lr": [1, 1, math.inf]}, "scheduler.state._last_lr[2] must be a finite number"),
        ({"get_lr": 3}, "scheduler.state must be an object with _last_lr, _step_count, base_lrs,"),
    ],
)
def test_a_state_of_something_else_is_refused_and_nothing_is_loaded(
    change: dict[str, Any], sentence: str
) -> None:
    ours = schedules.build({"name": "StepLR", "step_size": 3}, OPTIMIZERS["SGD"]())
    before = ours.state()
    with pytest.raises(Invalid) as caught:
        ours.load({**before, "last_epoch": 5, **change})
    assert caught.value.detail.startswith(sentence)
    assert ours.state() == before


def test_a_nested_state_is_checked_inside_too() -> None:
    spec, _ = CASES["SequentialLR"]
    ours = schedules.build(spec, OPTIMIZERS["SGD"]())
    state = through_text(ours.state())
    state["schedulers"][1]["last_epoch"] = None
    with pytest.raises(Invalid, match=r"state\.schedulers\[1\]\.last_epoch"):
        ours.load(state)
    state["schedulers"].pop()
    with pytest.raises(Invalid, match=r"scheduler\.state\.schedulers must have 2 items"):
        ours.load(state)


def test_the_real_optimizer_is_neither_patched_nor_warned_about() -> None:
    optimizer = OPTIMIZERS["SGD"]()
    ours = schedules.build({"name": "ExponentialLR", "gamma": 0.5}, optimizer)
    ours.step()  # before any optimizer.step(): torch itself would warn, and warnings are errors
    assert "step" not in vars(optimizer)
    assert not hasattr(optimizer, "_opt_called")


def test_groups_that_load_state_dict_replaced_are_still_the_ones_scheduled() -> None:
    optimizer = OPTIMIZERS["SGD"]()
    ours = schedules.build({"name": "ExponentialLR", "gamma": 0.5}, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    ours.step()
    assert [group["lr"] for group in optimizer.param_groups] == [lr * 0.5 for lr in LRS]


def test_a_wrapper_whose_groups_are_a_property_is_scheduled() -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    wrapper = pytorch_optimizer.Lookahead(OPTIMIZERS["Adam"]())
    theirs = OPTIMIZERS["Adam"]()
    spec, make = CASES["OneCycleLR"]
    ours, expected = schedules.build(spec, wrapper), make(theirs)
    for _ in range(5):
        theirs.step()
        expected.step()
        ours.step()
    for group, their in zip(wrapper.param_groups, theirs.param_groups, strict=True):
        assert (group["lr"], group["betas"]) == (their["lr"], their["betas"])
