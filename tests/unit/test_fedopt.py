"""FedOpt: sessions beside a numpy of the paper's Algorithm 2, which knows no torch.

Reddi et al., Adaptive Federated Optimization, arXiv 2003.00295. FedAvgM is its Algorithm 1 with
momentum at the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import torch

from optserve.optim.fedopt import FedAdam, FedYogi
from tests import local
from tests.local import SHAPES, Arrays

ETA, BETA1, BETA2, TAU = 0.1, 0.9, 0.6, 1e-2
ROUNDS, WORKERS, LOCAL_STEPS = 30, 4, 5


def worked(x: Arrays, worker: int, round_: int) -> Arrays:
    """Return the delta of one worker: some SGD steps on a noisy quadratic of its own."""
    best, noise = local.arrays(worker, dtype="f8"), local.arrays(1000 * worker + round_, dtype="f8")
    delta = {}
    for name, start in x.items():
        at = start
        for _ in range(LOCAL_STEPS):
            at = at - 0.1 * (at - best[name] + 0.3 * noise[name])
        delta[name] = at - start
    return delta


def mean_delta(x: Arrays, round_: int) -> Arrays:
    deltas = [worked(x, worker, round_) for worker in range(WORKERS)]
    return {name: sum(delta[name] for delta in deltas) / WORKERS for name in x}


Variance = Callable[[np.ndarray, np.ndarray], np.ndarray]
#: v_t of v_{t-1} and the squared pseudo-gradient: the three lines in which Algorithm 2 differs.
VARIANCE: dict[str, Variance] = {
    "FedAdagrad": lambda v, square: v + square,
    "FedYogi": lambda v, square: v - (1 - BETA2) * square * np.sign(v - square),
    "FedAdam": lambda v, square: BETA2 * v + (1 - BETA2) * square,
}


def algorithm_2(name: str, x: Arrays) -> Iterator[Arrays]:
    """Yield the params after each round."""
    beta1 = 0.0 if name == "FedAdagrad" else BETA1  # as in the paper's experiments
    m = {n: np.zeros_like(value) for n, value in x.items()}
    v = {n: np.full_like(value, TAU**2) for n, value in x.items()}
    for round_ in range(ROUNDS):
        delta = mean_delta(x, round_)
        for n in x:
            m[n] = beta1 * m[n] + (1 - beta1) * delta[n]
            v[n] = VARIANCE[name](v[n], delta[n] ** 2)
        x = {n: x[n] + ETA * m[n] / (np.sqrt(v[n]) + TAU) for n in x}
        yield x


def fedavgm(x: Arrays) -> Iterator[Arrays]:
    """Yield the params after each round."""
    m = {n: np.zeros_like(value) for n, value in x.items()}
    for round_ in range(ROUNDS):
        delta = mean_delta(x, round_)
        m = {n: BETA1 * m[n] + delta[n] for n in x}
        x = {n: x[n] + ETA * m[n] for n in x}
        yield x


def paper(name: str, x: Arrays) -> Iterator[Arrays]:
    return fedavgm(x) if name == "FedAvgM" else algorithm_2(name, x)


#: The paper's names, and what a session's ``optimizer`` is for each.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "FedAvgM": {"name": "SGD", "lr": ETA, "momentum": BETA1},
    "FedAdagrad": {
        "name": "Adagrad",
        "lr": ETA,
        "initial_accumulator_value": TAU**2,
        "eps": TAU,
    },
    "FedAdam": {"name": "FedAdam", "lr": ETA, "betas": [BETA1, BETA2], "eps": TAU},
    "FedYogi": {"name": "FedYogi", "lr": ETA, "betas": [BETA1, BETA2], "eps": TAU},
}
#: Both sides round, torch fuses some operations and numpy none, so the last bits may differ, and
#: what differs goes into the next round's deltas. In float32 (the paper's side stays float64) the
#: means are rounded on their way to the session, too.
RELATIVE = {"f8": 1e-12, "f4": 1e-5}


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_session_is_the_papers_algorithm(name: str, dtype: str) -> None:
    start = local.arrays(7, dtype=dtype)
    wide = {n: value.astype("f8") for n, value in start.items()}
    x, tolerance = start, RELATIVE[dtype]
    with local.registry() as made:
        session = local.create(made, {"optimizer": OPTIMIZERS[name]}, start)
        for round_, expected in enumerate(paper(name, wide)):
            delta = mean_delta({n: value.astype("f8") for n, value in x.items()}, round_)
            grads = {n: (-value).astype(dtype) for n, value in delta.items()}
            x = local.params_of(local.step(session, grads))  # type: ignore[assignment]
            for n in SHAPES:
                # Relative to the params' size, which is about 1: some of them pass through 0.
                np.testing.assert_allclose(x[n], expected[n], rtol=tolerance, atol=tolerance)
    assert any(np.abs(x[n] - start[n]).max() > 0.1 for n in ("w", "b"))


def test_the_rounds_let_yogis_second_moment_grow_and_shrink() -> None:
    before, signs = local.arrays(7, dtype="f8"), set()
    v = np.full_like(before["w"], TAU**2)
    for round_, after in enumerate(paper("FedYogi", before)):
        square = mean_delta(before, round_)["w"] ** 2
        signs |= set(np.sign(v - square).ravel())
        v, before = VARIANCE["FedYogi"](v, square), after
    assert signs == {-1.0, 1.0}


@pytest.mark.parametrize(
    ("ours", "others", "hyper"),
    [
        (FedAdam, torch.optim.Adam, {}),
        (FedYogi, pytorch_optimizer.Yogi, {"initial_accumulator": TAU**2}),
    ],
)
def test_the_namesakes_of_the_libraries_are_others(ours: Any, others: Any, hyper: Any) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for cls, param, more in ((ours, params[0], {}), (others, params[1], hyper)):
        param.grad = torch.tensor([0.1, 0.2, -0.3])
        cls([param], lr=ETA, betas=(BETA1, BETA2), eps=TAU, **more).step()
    assert not torch.allclose(params[0], params[1], atol=1e-3)


@pytest.mark.parametrize("cls", [FedAdam, FedYogi])
def test_a_closure_is_called_once_and_its_loss_returned(cls: Any) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = cls([param])
    calls = []

    def closure() -> torch.Tensor:
        loss = (param**2).sum()
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    assert (param < 1).all()
