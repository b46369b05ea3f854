"""The experiments of the course that this service grew from, against formulas written out here.

The caller computes gradients in numpy at the params that the server returned; beside it the same
experiment runs on formulas alone, at their own params. Both trajectories must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import pytest

from optserve_client import Client
from tests.serving import ServerProcess

Array: TypeAlias = np.ndarray
#: From params and gradient to the next params; keeps its own moments.
Update: TypeAlias = Callable[[Array, Array], Array]
#: From params and number of the step to the gradient; all params in one flat array.
Gradient: TypeAlias = Callable[[Array, int], Array]

# numpy rounds each product before the sum; torch's vectorized kernels may fuse the two and multiply
# in another order. That is a few 1e-16 a step, which these problems damp or, where a run diverges,
# multiply with the values themselves: observed at most 2e-15 of what a coordinate ranges over.
CLOSE = 1e-13


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url) as connected:
        yield connected


# The formulas ------------------------------------------------------------------------------------


def sgd(lr: float) -> Update:
    return lambda p, g: p - lr * g


def momentum(lr: float, friction: float = 0.9) -> Update:
    """Sutskever et al. 2013 as the course has it: the velocity carries the learning rate."""
    v = np.zeros(())

    def update(p: Array, g: Array) -> Array:
        nonlocal v
        v = friction * v - lr * g
        return p + v

    return update


def adagrad(lr: float, eps: float = 1e-10) -> Update:
    """Duchi et al. 2011, diagonal."""
    h = np.zeros(())

    def update(p: Array, g: Array) -> Array:
        nonlocal h
        h = h + g * g
        return p - lr * g / (np.sqrt(h) + eps)

    return update


def adam(lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Update:
    """Kingma and Ba 2015, algorithm 1."""
    m = v = np.zeros(())
    t = 0

    def update(p: Array, g: Array) -> Array:
        nonlocal m, v, t
        t += 1
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        return p - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)

    return update


FORMULAS = {"SGD": sgd, "Momentum": momentum, "AdaGrad": adagrad, "Adam": adam}


def computed(update: Update, start: Array, gradient: Gradient, steps: int) -> Array:
    """Return the trajectory of the formula, ``[steps + 1, params]``."""
    path = [start]
    for t in range(steps):
        path.append(update(path[-1], gradient(path[-1], t)))
    return np.array(path)


# The service -------------------------------------------------------------------------------------


def flat(params: Mapping[str, Any]) -> Array:
    return np.concatenate([np.ravel(value) for value in params.values()])


def named(values: Array, like: Mapping[str, Array]) -> dict[str, Array]:
    ends = np.cumsum([value.size for value in like.values()])
    parts = np.split(values, ends[:-1])
    return {n: part.reshape(like[n].shape) for n, part in zip(like, parts, strict=True)}


def served(
    client: Client, name: str, lr: float, start: Mapping[str, Array], gradient: Gradient, steps: int
) -> Array:
    """Return the trajectory of the service, ``[steps + 1, params]``."""
    session = client.create(name, start, lr=lr)
    path = [flat(start)]
    for t in range(steps):
        result = session.step(named(gradient(path[-1], t), start))
        assert (result.version, result.updates, result.applied) == (t + 1, t + 1, True)
        assert result.params is not None
        assert all(value.dtype == np.float64 for value in result.params.values())
        path.append(flat(result.params))
    return np.array(path)


def both(
    client: Client, name: str, lr: float, start: Mapping[str, Array], gradient: Gradient, steps: int
) -> Array:
    """Run an experiment on the service and on its formula; return their one trajectory."""
    got = served(client, name, lr, start, gradient, steps)
    want = computed(FORMULAS[name](lr), flat(start), gradient, steps)
    # Not relative to the value alone, because some cross zero.
    far = np.maximum.accumulate(np.abs(want), axis=0)
    off = np.abs(got - want) > CLOSE * far
    assert not off.any(), f"{name}: step {off.any(axis=1).argmax()} of {steps} is off"
    return got


# Two functions of two variables ------------------------------------------------------------------

STEPS = 30


def valley(p: Array, t: int) -> Array:
    """Return the gradient of x²/20 + y²."""
    return p * [1 / 10, 2]


def form(p: Array, t: int) -> Array:
    """Return the gradient of xᵀ diag(0.2, 2) x."""
    return 2 * np.diag([0.2, 2.0]) @ p


@pytest.mark.parametrize(
    ("name", "lr"), [("SGD", 0.95), ("Momentum", 0.1), ("AdaGrad", 1.5), ("Adam", 0.3)]
)
def test_descent_into_a_long_valley_is_that_of_the_formula(
    client: Client, name: str, lr: float
) -> None:
    start = {"x": np.array(-7.0), "y": np.array(2.0)}
    path = both(client, name, lr, start, valley, STEPS)
    height = path**2 @ [1 / 20, 1]
    assert height[0] == pytest.approx(6.45)
    assert height[-1] < 0.05 * height[0]


def test_sgd_jumps_across_the_valley_at_each_step(client: Client) -> None:
    path = served(client, "SGD", 0.95, {"x": np.array(-7.0), "y": np.array(2.0)}, valley, STEPS)
    t = np.arange(STEPS + 1)
    np.testing.assert_allclose(path[:, 0], -7 * 0.905**t, rtol=CLOSE)
    np.testing.assert_allclose(path[:, 1], 2 * (-0.9) ** t, rtol=CLOSE)


@pytest.mark.parametrize(
    ("name", "lr", "sinks"),
    [
        # 1 - 0.95 * 4 = -2.8: too steep for this lr; it diverges, as its formula does.
        ("SGD", 0.95, False),
        ("SGD", 0.4, True),
        ("Momentum", 0.1, True),
        ("AdaGrad", 1.5, True),
        ("Adam", 0.3, True),
    ],
)
def test_descent_on_a_quadratic_form_is_that_of_the_formula(
    client: Client, name: str, lr: float, sinks: bool
) -> None:
    path = both(client, name, lr, {"x": np.array([3.0, 4.0])}, form, STEPS)
    height = path**2 @ [0.2, 2.0]
    assert height[0] == pytest.approx(33.8)
    assert height[-1] < 0.05 * height[0] if sinks else height[-1] > 1e25 * height[0]


@pytest.mark.parametrize("lr", [0.95, 0.4])
def test_sgd_on_the_quadratic_form_multiplies_each_coordinate_by_its_factor(
    client: Client, lr: float
) -> None:
    path = served(client, "SGD", lr, {"x": np.array([3.0, 4.0])}, form, STEPS)
    t = np.arange(STEPS + 1)[:, None]
    want = np.array([3.0, 4.0]) * (1 - lr * np.array([0.4, 4.0])) ** t
    np.testing.assert_allclose(path, want, rtol=CLOSE)


# Linear regression -------------------------------------------------------------------------------

POINTS, BATCH, EPOCHS = 1000, 20, 5
NOISE = 0.01
# Batches of 20 leave SGD with lr 0.1 a spread of about NOISE * sqrt(lr / 40) = 5e-4 around the
# solution; this is four times that. The start is 4.2 away.
NEAR = 2e-3


@pytest.mark.parametrize(("name", "lr"), [("SGD", 0.1), ("Momentum", 0.02), ("Adam", 0.1)])
def test_mini_batches_reach_the_least_squares_solution(
    client: Client, name: str, lr: float
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(POINTS, 2))
    y = x @ [2.0, -3.4] + 4.2 + NOISE * rng.normal(size=POINTS)
    columns = np.column_stack([x, np.ones(POINTS)])
    batches = np.concatenate([rng.permutation(POINTS) for _ in range(EPOCHS)]).reshape(-1, BATCH)

    def gradient(p: Array, t: int) -> Array:
        rows = columns[batches[t]]
        return rows.T @ (rows @ p - y[batches[t]]) / BATCH

    start = {"weight": np.zeros((1, 2)), "bias": np.zeros(1)}
    path = both(client, name, lr, start, gradient, len(batches))

    solution = np.linalg.lstsq(columns, y, rcond=None)[0]
    assert np.abs(path[0] - solution).max() > 4
    assert np.abs(path[-1] - solution).max() < NEAR
