"""Learning rates and momenta are torch's for 200 steps, exported and imported every tenth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler as torchs

from optserve.sessions import describe
from optserve.sessions.registry import Registry
from tests import local
from tests.local import NOBODY, create, exported

Build = Callable[[torch.optim.Optimizer], Any]
STEPS = 200

#: A spec and the same in torch. Groups have lr 0.1, 0.02 and 0.5.
ROWS: dict[str, tuple[Any, Build]] = {
    "LambdaLR": (
        {"name": "LambdaLR", "lr_lambda": "0.95 ** epoch"},
        lambda o: torchs.LambdaLR(o, lambda epoch: 0.95**epoch),
    ),
    "LambdaLR per group": (
        {"name": "LambdaLR", "lr_lambda": ["1 / (1 + epoch)", "0.9 ** (epoch // 10)", "1"]},
        lambda o: torchs.LambdaLR(
            o, [lambda e: 1 / (1 + e), lambda e: 0.9 ** (e // 10), lambda _: 1.0]
        ),
    ),
    "LambdaLR table": (
        {"name": "LambdaLR", "lr_lambda": {"table": [1.0, 0.5, 0.25]}},
        lambda o: torchs.LambdaLR(o, lambda e: [1.0, 0.5, 0.25][min(e, 2)]),
    ),
    "MultiplicativeLR": (
        {"name": "MultiplicativeLR", "lr_lambda": "0.99"},
        lambda o: torchs.MultiplicativeLR(o, lambda _: 0.99),
    ),
    "StepLR": (
        {"name": "StepLR", "step_size": 30, "gamma": 0.3},
        lambda o: torchs.StepLR(o, 30, 0.3),
    ),
    "MultiStepLR": (
        {"name": "MultiStepLR", "milestones": [20, 70, 70, 150], "gamma": 0.5},
        lambda o: torchs.MultiStepLR(o, [20, 70, 70, 150], 0.5),
    ),
    "ConstantLR": (
        {"name": "ConstantLR", "factor": 0.25, "total_iters": 40},
        lambda o: torchs.ConstantLR(o, 0.25, 40),
    ),
    "LinearLR": (
        {"name": "LinearLR", "start_factor": 0.1, "total_iters": 60},
        lambda o: torchs.LinearLR(o, 0.1, total_iters=60),
    ),
    "ExponentialLR": (
        {"name": "ExponentialLR", "gamma": 0.97},
        lambda o: torchs.ExponentialLR(o, 0.97),
    ),
    "CosineAnnealingLR": (
        {"name": "CosineAnnealingLR", "T_max": 50, "eta_min": 0.001},
        lambda o: torchs.CosineAnnealingLR(o, 50, 0.001),
    ),
    "CosineAnnealingWarmRestarts": (
        {"name": "CosineAnnealingWarmRestarts", "T_0": 10, "T_mult": 2},
        lambda o: torchs.CosineAnnealingWarmRestarts(o, 10, 2),
    ),
    "PolynomialLR": (
        {"name": "PolynomialLR", "total_iters": 100, "power": 2.0},
        lambda o: torchs.PolynomialLR(o, 100, 2.0),
    ),
    "CyclicLR": (
        {"name": "CyclicLR", "base_lr": 0.01, "max_lr": 0.3, "step_size_up": 17},
        lambda o: torchs.CyclicLR(o, 0.01, 0.3, 17),
    ),
    "CyclicLR scale_fn": (
        {
            "name": "CyclicLR",
            "base_lr": 0.01,
            "max_lr": [0.3, 0.2, 0.1],
            "step_size_up": 17,
            "scale_fn": "0.9 ** x",
            "scale_mode": "cycle",
        },
        lambda o: torchs.CyclicLR(
            o, 0.01, [0.3, 0.2, 0.1], 17, scale_fn=lambda x: 0.9**x, scale_mode="cycle"
        ),
    ),
    "OneCycleLR": (
        {"name": "OneCycleLR", "max_lr": [0.1, 0.2, 0.3], "total_steps": 250},
        lambda o: torchs.OneCycleLR(o, [0.1, 0.2, 0.3], 250),
    ),
    "ReduceLROnPlateau": (
        {"name": "ReduceLROnPlateau", "factor": 0.5, "patience": 3, "cooldown": 2},
        lambda o: torchs.ReduceLROnPlateau(o, factor=0.5, patience=3, cooldown=2),
    ),
    "a list is a ChainedScheduler": (
        [
            {"name": "LinearLR", "start_factor": 0.1, "total_iters": 20},
            {"name": "ExponentialLR", "gamma": 0.98},
            {"name": "MultiStepLR", "milestones": [50, 100]},
        ],
        lambda o: torchs.ChainedScheduler(
            [
                torchs.LinearLR(o, 0.1, total_iters=20),
                torchs.ExponentialLR(o, 0.98),
                torchs.MultiStepLR(o, [50, 100]),
            ],
            o,
        ),
    ),
    "SequentialLR": (
        {
            "name": "SequentialLR",
            "schedulers": [
                {"name": "LinearLR", "start_factor": 0.01, "total_iters": 30},
                {"name": "CosineAnnealingLR", "T_max": 100},
                {"name": "MultiStepLR", "milestones": [5, 10], "gamma": 0.2},
            ],
            "milestones": [30, 130],
        },
        lambda o: torchs.SequentialLR(
            o,
            [
                torchs.LinearLR(o, 0.01, total_iters=30),
                torchs.CosineAnnealingLR(o, 100),
                torchs.MultiStepLR(o, [5, 10], 0.2),
            ],
            [30, 130],
        ),
    ),
    "chained around a sequence": (
        [
            {
                "name": "SequentialLR",
                "schedulers": [
                    {"name": "ConstantLR", "factor": 0.1, "total_iters": 10},
                    {"name": "ExponentialLR", "gamma": 0.99},
                ],
                "milestones": [10],
            },
            {"name": "MultiStepLR", "milestones": [60], "gamma": 0.1},
        ],
        lambda o: torchs.ChainedScheduler(
            [
                torchs.SequentialLR(
                    o, [torchs.ConstantLR(o, 0.1, 10), torchs.ExponentialLR(o, 0.99)], [10]
                ),
                torchs.MultiStepLR(o, [60], 0.1),
            ],
            o,
        ),
    ),
}
OPTIMIZERS: dict[str, tuple[dict[str, Any], Any]] = {
    "SGD": ({"name": "SGD", "lr": 0.1, "momentum": 0.9}, torch.optim.SGD),
    "Adam": ({"name": "Adam", "lr": 0.1}, torch.optim.Adam),
}


@pytest.fixture
def made() -> Iterator[Registry]:
    with local.registry() as registry:
        yield registry


def moving(groups: Any) -> list[dict[str, Any]]:
    """Return what a schedule can move, per group, as JSON has it."""
    return [
        {k: list(v) if isinstance(v, tuple) else v for k, v in group.items() if k in _MOVING}
        for group in groups
    ]


_MOVING = ("lr", "momentum", "betas")


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("row", ROWS)
def test_lr_and_momenta_are_torchs_through_exports_and_imports(
    made: Registry, row: str, optimizer: str
) -> None:
    (spec, build), (fields, cls) = ROWS[row], OPTIMIZERS[optimizer]
    groups = [{"params": ["w"]}, {"params": ["b"], "lr": 0.02}, {"params": ["s"], "lr": 0.5}]
    params = {name: np.ones(2, "f4") for name in "wbs"}
    session = create(made, {"optimizer": fields, "groups": groups, "scheduler": spec}, params)
    hyper = {k: v for k, v in fields.items() if k != "name"}
    leaves = local.leaves(params)
    alone = cls(
        [{"params": [leaves[n]], **({"lr": lr} if lr else {})} for n, lr in _LRS.items()], **hyper
    )
    scheduler = build(alone)
    metrics = [1.0 / (1 + i // 7) for i in range(STEPS)] if row == "ReduceLROnPlateau" else None
    ahead = session.run(describe.Outlook.of).result(60).ahead(STEPS, metrics)["steps"]
    for i in range(STEPS):
        status = session.status().result(60)
        assert moving(status["groups"]) == moving(alone.param_groups), f"step {i}"
        assert [g["lr"] for g in ahead[i]] == [g["lr"] for g in alone.param_groups]
        local.scheduler_step(session, metrics[i] if metrics else None, NOBODY).result(60)
        scheduler.step(*([metrics[i]] if metrics else []))
        if i % 10 == 9:
            made.import_session("default", f"at{i}", exported(session), NOBODY).result(60)
            session = made.get("default", f"at{i}")


_LRS = {"w": None, "b": 0.02, "s": 0.5}
