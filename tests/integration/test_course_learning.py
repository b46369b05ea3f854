"""Two moons, learned for 1,000 epochs: the course's experiment with learning-rate schedules.

The caller is an MLP in numpy. The lr curve must be that of torch's schedulers, driven here with the
same losses, and that of three short formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons
from torch.optim import lr_scheduler

from optserve_client import Client
from tests.serving import ServerProcess

Array: TypeAlias = np.ndarray

LR, EPOCHS = 0.1, 1000
STEP_LR = {"name": "StepLR", "step_size": 50, "gamma": 0.99}
MULTI_STEP_LR = {"name": "MultiStepLR", "milestones": [200, 700, 900], "gamma": 0.99}
PLATEAU = {"name": "ReduceLROnPlateau", "factor": 0.5, "patience": 5}
PLATEAU |= {"threshold": 0.001, "threshold_mode": "abs"}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url) as connected:
        yield connected


# The schedules as formulas -----------------------------------------------------------------------


def step_lr(losses: Sequence[float]) -> list[float]:
    return decayed(epoch % 50 == 0 for epoch in range(1, len(losses)))


def multi_step_lr(losses: Sequence[float]) -> list[float]:
    return decayed(epoch in (200, 700, 900) for epoch in range(1, len(losses)))


def decayed(events: Iterable[bool]) -> list[float]:
    curve = [LR]
    for event in events:
        curve.append(curve[-1] * 0.99 if event else curve[-1])
    return curve


def plateau(losses: Sequence[float]) -> list[float]:
    curve, best, bad = [LR], math.inf, 0
    for loss in losses[:-1]:
        best, bad = (loss, 0) if loss < best - 0.001 else (best, bad + 1)
        halve = bad > 5
        bad = 0 if halve else bad
        # torch leaves an lr alone that halving would change by at most its eps, 1e-8
        curve.append(curve[-1] * 0.5 if halve and curve[-1] * 0.5 > 1e-8 else curve[-1])
    return curve


# The experiment ----------------------------------------------------------------------------------


class Moons:
    """200 points on two moons and the loss of an MLP 2-8-1 over all of them, in float32."""

    def __init__(self) -> None:
        x, y = make_moons(200, noise=0.1, random_state=0)
        self.x, self.y = x.astype(np.float32), y.astype(np.float32)
        rng = np.random.default_rng(2)
        shapes = {"hidden.weight": (2, 8), "hidden.bias": (8,), "out.weight": (8,), "out.bias": ()}
        self.start = {n: np.asarray(rng.normal(size=s), np.float32) for n, s in shapes.items()}

    def forward(self, p: Mapping[str, Array]) -> tuple[Array, Array]:
        h = np.tanh(self.x @ p["hidden.weight"] + p["hidden.bias"])
        return h, h @ p["out.weight"] + p["out.bias"]

    def loss_and_grads(self, p: Mapping[str, Array]) -> tuple[float, dict[str, Array]]:
        h, z = self.forward(p)
        loss = float(np.mean(np.logaddexp(0, z) - self.y * z))
        dz = (1 / (1 + np.exp(-z)) - self.y) / np.float32(len(z))
        dh = np.outer(dz, p["out.weight"]) * (1 - h * h)
        grads = [self.x.T @ dh, dh.sum(axis=0), h.T @ dz, dz.sum()]
        return loss, {n: np.asarray(g) for n, g in zip(self.start, grads, strict=True)}

    def accuracy(self, p: Mapping[str, Array]) -> float:
        return float(np.mean((self.forward(p)[1] > 0) == self.y))


def local_scheduler(spec: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    arguments = {k: v for k, v in spec.items() if k != "name"}
    return getattr(lr_scheduler, spec["name"])(optimizer, **arguments)


SCHEDULES = [(STEP_LR, step_lr, 20), (MULTI_STEP_LR, multi_step_lr, 4), (PLATEAU, plateau, 10)]
SHORT = [("StepLR", "manual"), ("MultiStepLR", "step"), ("ReduceLROnPlateau", "step")]


@pytest.mark.parametrize(
    ("spec", "formula", "least", "advance"),
    [
        pytest.param(
            *row,
            advance,
            id=f"{row[0]['name']}-{advance}",
            marks=[] if (row[0]["name"], advance) in SHORT else pytest.mark.long,
        )
        for row in SCHEDULES
        for advance in ("manual", "step")
    ],
)
def test_two_moons_are_learned_on_the_lr_curve_of_torch(
    client: Client,
    spec: dict[str, Any],
    formula: Callable[[Sequence[float]], list[float]],
    least: int,
    advance: str,
) -> None:
    moons = Moons()
    session = client.create("Momentum", moons.start, lr=LR, scheduler={**spec, "advance": advance})
    parameters = [torch.nn.Parameter(torch.tensor(value)) for value in moons.start.values()]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9, fused=True)
    scheduler = local_scheduler(spec, optimizer)
    metrics = spec is PLATEAU

    params: Mapping[str, Array] = moons.start
    losses, lrs, local_lrs = [], [], []
    for epoch in range(EPOCHS):
        loss, grads = moons.loss_and_grads(params)
        losses.append(loss)

        result = session.step(grads, loss=loss)
        lrs.append(result.groups[0]["lr"])
        standing = result.scheduler
        if advance == "manual":
            assert standing == {"advance": "manual", "last_epoch": epoch, "next_lr": lrs[-1:]}
            standing = session.scheduler_step(loss if metrics else None)["scheduler"]

        for parameter, grad in zip(parameters, grads.values(), strict=True):
            parameter.grad = torch.tensor(grad)
        local_lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([loss] if metrics else []))
        next_lr = scheduler.get_last_lr()
        assert standing == {"advance": advance, "last_epoch": epoch + 1, "next_lr": next_lr}

        assert result.params is not None
        params = result.params
        for (name, value), parameter in zip(params.items(), parameters, strict=True):
            assert torch.equal(torch.tensor(value), parameter.detach()), (epoch, name)

    assert lrs == local_lrs == formula(losses)
    assert len(set(lrs)) >= least  # values, so that the curve shows each milestone
    assert moons.accuracy(params) >= 0.95
    rows = session.history(0, EPOCHS)
    assert [row["version"] for row in rows] == list(range(1, EPOCHS + 1))
    assert [row["lr"] for row in rows] == [[lr] for lr in lrs]
    assert [row["loss"] for row in rows] == losses
