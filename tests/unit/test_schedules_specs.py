"""What a scheduler's JSON may say, and the sentence for what it may not."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import pytest
import torch
from torch.optim import lr_scheduler as t

from optserve.optim import schedule_catalogue, schedules
from optserve.optim.schedule_entry import Entry
from optserve_client.errors import Invalid, OptserveError, SchedulerFailed, TorchRefused

STEP = {"name": "StepLR", "step_size": 3}
CYCLE = {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1}
ONE = {"name": "OneCycleLR", "max_lr": 1}
DEEP: Any = STEP
for _ in range(8):
    DEEP = [DEEP]

PLATEAU_IN_A_CHAIN = (
    "ChainedScheduler does not support `ReduceLROnPlateau` scheduler as it requires additional "
    "kwargs to be specified when calling `step`, but got one at index 0 in the given schedulers "
    "sequence."
)

#: A specification, the error's class, and how its sentence begins.
BAD: list[tuple[Any, type[OptserveError], str]] = [
    (None, Invalid, 'scheduler must be an object like {"name": "StepLR", ...}, got null'),
    ("StepLR", Invalid, 'scheduler must be an object like {"name": "StepLR", ...}, got "StepLR"'),
    ({}, Invalid, "scheduler.name is required"),
    ({"name": 3}, Invalid, "scheduler.name must be the name of a scheduler, got 3"),
    (
        {"name": "StepLr2"},
        Invalid,
        'scheduler.name "StepLr2" is not a scheduler: did you mean StepLR or MultiStepLR?',
    ),
    (
        {"name": "qqqqqq"},
        Invalid,
        'scheduler.name "qqqqqq" is not a scheduler: there are LambdaLR,',
    ),
    ({"name": "StepLR"}, Invalid, "scheduler.step_size is required by StepLR"),
    (STEP | {"step_size": 0}, Invalid, "scheduler.step_size must be >= 1, got 0"),
    (STEP | {"step_size": 2.5}, Invalid, "scheduler.step_size must be an integer, got 2.5"),
    (STEP | {"step_size": True}, Invalid, "scheduler.step_size must be an integer, got true"),
    (STEP | {"step_size": "3"}, Invalid, 'scheduler.step_size must be an integer, got "3"'),
    (
        STEP | {"step_size": 10**30},
        Invalid,
        "scheduler.step_size must be <= 9007199254740991, got 10000",
    ),
    (STEP | {"gamma": "x"}, Invalid, 'scheduler.gamma must be a number, got "x"'),
    (STEP | {"gamma": False}, Invalid, "scheduler.gamma must be a number, got false"),
    (STEP | {"gamma": None}, Invalid, "scheduler.gamma must be a number, got null"),
    (STEP | {"gamma": [0.1]}, Invalid, "scheduler.gamma must be a number, got [0.1]"),
    (STEP | {"gamma": -0.1}, Invalid, "scheduler.gamma must be >= 0, got -0.1"),
    (STEP | {"gamma": float("nan")}, Invalid, "scheduler.gamma must be a finite number, got NaN"),
    (STEP | {"gamma": 10**400}, Invalid, "scheduler.gamma must be a finite number, got 1000"),
    (
        STEP | {"gama": 0.1},
        Invalid,
        "scheduler.gama is not a field of StepLR: did you mean gamma?",
    ),
    (
        {"name": "CosineAnnealingLR", "t_max": 3},
        Invalid,
        "scheduler.t_max is not a field of CosineAnnealingLR: did you mean T_max?",
    ),
    (
        STEP | {"power": 1},
        Invalid,
        "scheduler.power is not a field of StepLR: it has step_size, gamma",
    ),
    (
        STEP | {"last_epoch": 3},
        Invalid,
        "scheduler.last_epoch cannot be given: where a scheduler stands is part of its state",
    ),
    (
        STEP | {"advance": "epoch"},
        Invalid,
        'scheduler.advance must be "manual" or "step", got "epoch"',
    ),
    (
        STEP | {"advance": "step", "monitor": "loss"},
        Invalid,
        'scheduler.monitor has no effect without ReduceLROnPlateau and advance "step"',
    ),
    (
        {"name": "ReduceLROnPlateau", "monitor": "loss"},
        Invalid,
        'scheduler.monitor has no effect without ReduceLROnPlateau and advance "step"',
    ),
    (
        {"name": "ReduceLROnPlateau", "advance": "step", "monitor": 3},
        Invalid,
        'scheduler.monitor must be "loss" or the name of a metric, got 3',
    ),
    (
        [STEP | {"advance": "step"}],
        Invalid,
        "scheduler.schedulers[0].advance is a field of the outermost scheduler only",
    ),
    (
        {"name": "MultiStepLR", "milestones": 30},
        Invalid,
        "scheduler.milestones must be a list of at most 10000 integers, got 30",
    ),
    (
        {"name": "MultiStepLR", "milestones": [0, 3]},
        Invalid,
        "scheduler.milestones[0] must be >= 1, got 0",
    ),
    (
        {"name": "MultiStepLR", "milestones": [30, 20]},
        Invalid,
        "scheduler.milestones[1] must be >= scheduler.milestones[0] = 30, got 20",
    ),
    (
        {"name": "MultiStepLR", "milestones": [30, "40"]},
        Invalid,
        'scheduler.milestones[1] must be an integer, got "40"',
    ),
    # torch fails on the next six only when total_iters, T_max or the second step is reached.
    ({"name": "ConstantLR", "factor": 0}, Invalid, "scheduler.factor must be in (0, 1], got 0"),
    (
        {"name": "ConstantLR", "total_iters": 0},
        Invalid,
        "scheduler.total_iters must be >= 1, got 0",
    ),
    ({"name": "LinearLR", "total_iters": 0}, Invalid, "scheduler.total_iters must be >= 1, got 0"),
    ({"name": "PolynomialLR", "power": -1}, Invalid, "scheduler.power must be >= 0, got -1"),
    (
        {"name": "PolynomialLR", "total_iters": 0},
        Invalid,
        "scheduler.total_iters must be >= 1, got 0",
    ),
    ({"name": "CosineAnnealingLR", "T_max": 0}, Invalid, "scheduler.T_max must be >= 1, got 0"),
    (
        {"name": "ConstantLR", "factor": 1.5},
        Invalid,
        "scheduler.factor must be in (0, 1], got 1.5",
    ),
    (
        {"name": "LinearLR", "start_factor": 0},
        Invalid,
        "scheduler.start_factor must be in (0, 1], got 0",
    ),
    (
        {"name": "LinearLR", "end_factor": 2},
        Invalid,
        "scheduler.end_factor must be in [0, 1], got 2",
    ),
    ({"name": "ExponentialLR"}, Invalid, "scheduler.gamma is required by ExponentialLR"),
    (
        {"name": "ExponentialLR", "gamma": 1e308},
        SchedulerFailed,
        "ExponentialLR at step 2: groups[0].lr would be inf, must be finite",
    ),
    (
        {"name": "CosineAnnealingWarmRestarts", "T_0": 3, "T_mult": 0},
        Invalid,
        "scheduler.T_mult must be >= 1, got 0",
    ),
    (
        {"name": "ReduceLROnPlateau", "mode": "less"},
        Invalid,
        'scheduler.mode must be "min" or "max", got "less"',
    ),
    (
        {"name": "ReduceLROnPlateau", "factor": 1},
        Invalid,
        "scheduler.factor must be in [0, 1), got 1",
    ),
    (
        {"name": "ReduceLROnPlateau", "patience": -1},
        Invalid,
        "scheduler.patience must be >= 0, got -1",
    ),
    (
        {"name": "ReduceLROnPlateau", "min_lr": []},
        Invalid,
        "scheduler.min_lr must have one value per parameter group, 1 to 1000, got []",
    ),
    (CYCLE | {"step_size_up": 0}, Invalid, "scheduler.step_size_up must be >= 1, got 0"),
    (CYCLE | {"max_lr": [1, -1]}, Invalid, "scheduler.max_lr[1] must be >= 0, got -1"),
    (
        CYCLE | {"max_momentum": 1},
        Invalid,
        "scheduler.max_momentum must be in [0, 1), got 1",
    ),
    (CYCLE | {"gamma": 0.5}, Invalid, 'scheduler.gamma has no effect: mode is not "exp_range"'),
    (
        CYCLE | {"scale_mode": "iterations"},
        Invalid,
        "scheduler.scale_mode has no effect: scale_fn is not given",
    ),
    (
        CYCLE | {"scale_fn": "1", "mode": "triangular2"},
        Invalid,
        "scheduler.mode has no effect: scale_fn is given",
    ),
    (
        CYCLE | {"cycle_momentum": False, "base_momentum": 0.5},
        Invalid,
        "scheduler.base_momentum has no effect: cycle_momentum is false",
    ),
    (
        CYCLE | {"cycle_momentum": 1},
        Invalid,
        "scheduler.cycle_momentum must be true or false, got 1",
    ),
    (
        CYCLE | {"scale_fn": ["1"]},
        Invalid,
        'scheduler.scale_fn must be text in x or {"table": [...]}, got ["1"]',
    ),
    (
        CYCLE | {"scale_fn": "1 / x", "scale_mode": "iterations"},
        SchedulerFailed,
        'scheduler.scale_fn "1 / x" at x = 0: float division by zero',
    ),
    (ONE, TorchRefused, "You must define either total_steps OR (epochs AND steps_per_epoch)"),
    (
        ONE | {"epochs": 3},
        TorchRefused,
        "You must define either total_steps OR (epochs AND steps_per_epoch)",
    ),
    (
        ONE | {"total_steps": 9, "epochs": 3},
        Invalid,
        "scheduler.epochs has no effect: total_steps is given",
    ),
    (
        ONE | {"total_steps": 10, "pct_start": 0.1},
        Invalid,
        "scheduler: OneCycleLR divides by zero at step 0: a phase has no length with pct_start 0.1",
    ),
    (
        ONE | {"total_steps": 10, "pct_start": 1},
        Invalid,
        "scheduler: OneCycleLR divides by zero at step 10: a phase has no length with pct_start 1",
    ),
    (
        ONE | {"total_steps": 10, "pct_start": 0.55, "three_phase": True},
        Invalid,
        "scheduler: OneCycleLR divides by zero at step 10: a phase has no length",
    ),
    (ONE | {"total_steps": 9, "div_factor": 0}, Invalid, "scheduler.div_factor must be > 0, got 0"),
    (
        ONE | {"total_steps": 9, "max_lr": [1, 1], "max_momentum": [0.9]},
        TorchRefused,
        "max_momentum must have the same length as optimizer.param_groups.",
    ),
    (
        ONE | {"total_steps": 9, "anneal_strategy": "sin"},
        Invalid,
        'scheduler.anneal_strategy must be "cos" or "linear", got "sin"',
    ),
    ({"name": "LambdaLR"}, Invalid, "scheduler.lr_lambda is required by LambdaLR"),
    (
        {"name": "LambdaLR", "lr_lambda": 0.5},
        Invalid,
        'scheduler.lr_lambda must be text in epoch or {"table": [...]}, got 0.5',
    ),
    (
        {"name": "LambdaLR", "lr_lambda": ["1", "x"]},
        Invalid,
        'scheduler.lr_lambda[1] "x": unknown name "x"; names are epoch, pi, e, tau,',
    ),
    (
        {"name": "LambdaLR", "lr_lambda": {"table": []}},
        Invalid,
        "scheduler.lr_lambda.table must be a list of numbers, got []",
    ),
    (
        {"name": "LambdaLR", "lr_lambda": {"table": [1, None]}},
        Invalid,
        "scheduler.lr_lambda.table[1] must be a number, got null",
    ),
    (
        {"name": "LambdaLR", "lr_lambda": {"tabel": [1]}},
        Invalid,
        'scheduler.lr_lambda must have the one key table, got ["tabel"]',
    ),
    (
        {"name": "LambdaLR", "lr_lambda": "1 / (epoch - 2)"},
        SchedulerFailed,
        'scheduler.lr_lambda "1 / (epoch - 2)" at epoch = 2: float division by zero',
    ),
    ([], Invalid, "scheduler.schedulers must be a list of 1 to 64 schedulers, got []"),
    (
        {"name": "ChainedScheduler", "schedulers": STEP},
        Invalid,
        "scheduler.schedulers must be a list of 1 to 64 schedulers, got {",
    ),
    (
        [STEP, STEP | {"gamma": "x"}],
        Invalid,
        'scheduler.schedulers[1].gamma must be a number, got "x"',
    ),
    (
        [STEP, [STEP | {"gamma": "x"}]],
        Invalid,
        'scheduler.schedulers[1].schedulers[0].gamma must be a number, got "x"',
    ),
    (DEEP, Invalid, "scheduler" + ".schedulers[0]" * 8 + " is nested too deeply: the limit is 8"),
    (
        [[STEP] * 33, [STEP] * 33],
        Invalid,
        "scheduler.schedulers[1].schedulers[28] is one scheduler too many: the limit is 64",
    ),
    ([{"name": "ReduceLROnPlateau"}], TorchRefused, PLATEAU_IN_A_CHAIN),
    (
        {"name": "SequentialLR", "schedulers": [STEP], "milestones": [3]},
        Invalid,
        "scheduler.milestones must have one value less than schedulers, so 0, got 1",
    ),
    (
        {"name": "SequentialLR", "schedulers": [STEP, STEP, STEP], "milestones": [3, 3]},
        Invalid,
        "scheduler.milestones[1] must be > scheduler.milestones[0] = 3, got 3",
    ),
    (
        {"name": "SequentialLR", "schedulers": [STEP, [STEP]], "milestones": [3]},
        TorchRefused,
        "scheduler.schedulers[1] is a ChainedScheduler, which torch's SequentialLR cannot start",
    ),
]


@pytest.mark.parametrize(("spec", "error", "sentence"), BAD, ids=lambda v: str(v)[:60])
def test_a_bad_specification_is_refused_with_a_sentence(
    spec: Any, error: type[OptserveError], sentence: str
) -> None:
    with pytest.raises(OptserveError) as caught:
        schedules.check(spec)
    assert (type(caught.value), caught.value.detail[: len(sentence)]) == (error, sentence)
    assert caught.value.extra or error is SchedulerFailed


def test_the_sentence_begins_with_where_the_caller_says_the_scheduler_is() -> None:
    with pytest.raises(Invalid, match=r"^body\.scheduler\.gamma must be >= 0, got -1"):
        schedules.check(STEP | {"gamma": -1}, "body.scheduler")


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda o: t.CosineAnnealingLR(o, 0), ZeroDivisionError),
        (lambda o: t.ConstantLR(o, 0.0, 2), ZeroDivisionError),
        (lambda o: t.PolynomialLR(o, 2, -1.0), ZeroDivisionError),
        (lambda o: t.StepLR(o, 0), ZeroDivisionError),
        (lambda o: t.CyclicLR(o, 0.1, 1.0, 0), ZeroDivisionError),
        (lambda o: t.OneCycleLR(o, 1.0, 10, pct_start=0.1), ZeroDivisionError),
        (lambda o: t.OneCycleLR(o, 1.0, 10, pct_start=1.0), ZeroDivisionError),
        (
            lambda o: t.SequentialLR(
                o, [t.StepLR(o, 2), t.ChainedScheduler([t.StepLR(o, 2)])], [3]
            ),
            NotImplementedError,
        ),
    ],
)
def test_what_is_refused_early_is_what_torch_fails_on_later(
    make: Callable[[Any], Any], error: type[Exception]
) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    with pytest.raises(error):
        scheduler = make(optimizer)
        for _ in range(10):
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("entry", schedule_catalogue.entries(), ids=lambda entry: entry.name)
def test_a_checked_specification_goes_in_again_unchanged(
    entry: Entry,
) -> None:
    checked = schedules.check(dict(entry.example))
    assert schedules.check(json.loads(json.dumps(checked, allow_nan=False))) == checked
    assert checked["name"] == entry.name
    assert checked["advance"] == "manual"


@pytest.mark.parametrize(
    "name", ["StepLR", "steplr", "STEPLR", "step_lr", "Step-LR", "Step_L_R"]
)  # fmt: skip
def test_names_are_taken_in_any_case_and_in_snake_case(name: str) -> None:
    assert schedules.check(STEP | {"name": name})["name"] == "StepLR"


def test_a_list_is_a_chain_at_any_level() -> None:
    checked = schedules.check([STEP, [STEP]])
    assert checked["name"] == "ChainedScheduler"
    assert checked["schedulers"][1]["name"] == "ChainedScheduler"
    assert checked["schedulers"][1]["schedulers"][0]["step_size"] == 3


def test_defaults_are_torchs_and_numbers_are_floats() -> None:
    checked = schedules.check({"name": "LinearLR", "start_factor": 1})
    assert checked == {
        "name": "LinearLR",
        "start_factor": 1.0,
        "end_factor": 1.0,
        "total_iters": 5,
        "advance": "manual",
    }
    assert isinstance(checked["start_factor"], float)


def test_a_field_without_effect_is_taken_if_it_says_what_torchs_default_says() -> None:
    given = CYCLE | {"gamma": 1.0, "scale_fn": None, "scale_mode": "cycle", "step_size_down": None}
    assert schedules.check(given) == schedules.check(CYCLE)


def test_a_plateau_that_advances_by_itself_follows_the_loss_unless_told_otherwise() -> None:
    spec = {"name": "ReduceLROnPlateau", "advance": "step"}
    assert schedules.check(spec)["monitor"] == "loss"
    ours = schedules.build(spec | {"monitor": "acc"}, sgd(1))
    assert (ours.advance, ours.monitor, ours.needs_metrics) == ("step", "acc", True)


def test_a_huge_specification_is_refused_quickly() -> None:
    nested: Any = STEP
    for _ in range(100_000):
        nested = [nested]
    wide: Any = STEP
    for _ in range(6):
        wide = [wide] * 30
    started = time.perf_counter()
    for spec in (nested, wide, {"name": "x" * 10**7}, {"name": "StepLR", "step_size": "9" * 10**7}):
        with pytest.raises(Invalid) as caught:
            schedules.check(spec)
        assert len(caught.value.detail) < 1000
    assert time.perf_counter() - started < 1.0
    while isinstance(nested, list):  # Python frees a deep list by recursion
        nested = nested.pop()


def sgd(groups: int, **hyper: Any) -> torch.optim.Optimizer:
    params = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(groups)]
    return torch.optim.SGD(params, lr=0.1, **{"momentum": 0.9, **hyper})


def by_hand(make: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    return str(caught.value)


#: What only torch can refuse, since it depends on the optimizer: the same sentence, by hand.
REFUSED: list[tuple[Any, Callable[[], Any], Callable[[Any], Any]]] = [
    (
        CYCLE,
        lambda: torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))]),
        lambda o: t.CyclicLR(o, 0.1, 1.0),
    ),
    (
        ONE | {"total_steps": 9},
        lambda: torch.optim.Adadelta([torch.nn.Parameter(torch.zeros(1))]),
        lambda o: t.OneCycleLR(o, 1.0, 9),
    ),
    (
        {"name": "LambdaLR", "lr_lambda": ["1", "1"]},
        lambda: sgd(3),
        lambda o: t.LambdaLR(o, [lambda _: 1.0] * 2),
    ),
    (
        {"name": "ReduceLROnPlateau", "min_lr": [0.1]},
        lambda: sgd(2),
        lambda o: t.ReduceLROnPlateau(o, min_lr=[0.1]),
    ),
    (CYCLE | {"max_lr": [1, 2]}, lambda: sgd(1), lambda o: t.CyclicLR(o, 0.1, [1.0, 2.0])),
]


@pytest.mark.parametrize(("spec", "new", "make"), REFUSED, ids=lambda v: str(v)[:40])
def test_torchs_refusal_has_torchs_sentence_and_changes_no_group(
    spec: Any, new: Callable[[], torch.optim.Optimizer], make: Callable[[Any], Any]
) -> None:
    optimizer = new()
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(TorchRefused) as caught:
        schedules.build(schedules.check(spec), optimizer)
    assert caught.value.detail == by_hand(lambda: make(new()))
    assert optimizer.param_groups == before


@pytest.mark.parametrize("entry", schedule_catalogue.entries(), ids=lambda entry: entry.name)
def test_the_catalogue_describes_every_argument_of_torchs_class(
    entry: Entry,
) -> None:
    shown = schedule_catalogue.describe(entry)
    properties = shown["schema"]["properties"]
    arguments = set(t.__dict__[entry.name].__init__.__code__.co_varnames) & set(properties)
    code = t.__dict__[entry.name].__init__.__code__
    expected = set(code.co_varnames[: code.co_argcount]) - {"self", "optimizer", "last_epoch"}
    assert arguments == expected
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert properties["name"] == {
        "const": entry.name,
        "description": "Lower case and snake_case are taken too.",
    }


@pytest.mark.parametrize("entry", schedule_catalogue.entries(), ids=lambda entry: entry.name)
def test_examples_and_checked_specifications_fit_their_schema(
    entry: Entry,
) -> None:
    validator = jsonschema_rs.Draft202012Validator(entry.schema())
    validator.validate(dict(entry.example))
    validator.validate(schedules.check(dict(entry.example)))


OF_ONE_FIELD = re.compile(
    r"is not a field|is required|must be (an integer|a number|>=? \d|<= \d|in |true or false|\")"
)
ONE_FIELD = [
    spec
    for spec, error, sentence in BAD
    if error is Invalid
    and isinstance(spec, dict)
    and spec.get("name") in t.__all__
    and OF_ONE_FIELD.search(sentence)
]


@pytest.mark.parametrize("spec", ONE_FIELD, ids=str)
def test_a_schema_refuses_what_is_wrong_with_one_field(spec: dict[str, Any]) -> None:
    schema = schedule_catalogue.find(spec["name"]).schema()
    assert not jsonschema_rs.Draft202012Validator(schema).is_valid(spec)


def test_most_of_the_table_is_wrong_in_one_field() -> None:
    assert len(ONE_FIELD) > 35
