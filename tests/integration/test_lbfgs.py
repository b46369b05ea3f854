"""LBFGS by reverse communication, against torch's own with a closure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from optserve.sessions.registry import Registry
from optserve.sessions.session import Session
from optserve_client.errors import Invalid, LineSearchOpen
from tests import local
from tests.local import NOBODY, assert_equal, create, exported, params_of, read_back, step

Loss = Callable[[dict[str, torch.Tensor]], torch.Tensor]
SHAPES: dict[str, tuple[int, ...]] = {"x": (3,), "y": (), "z": (2, 2)}


def rosenbrock(p: dict[str, torch.Tensor]) -> torch.Tensor:
    flat = torch.cat([p["x"], p["y"].reshape(1), p["z"].reshape(-1)])
    return (100 * (flat[1:] - flat[:-1] ** 2) ** 2 + (1 - flat[:-1]) ** 2).sum()


def quadratic(p: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(((i + 1) * (t - i) ** 2).sum() for i, t in enumerate(p.values()))  # type: ignore


@pytest.fixture
def made() -> Iterator[Registry]:
    with local.registry() as registry:
        yield registry


def evaluate(loss: Loss, at: dict[str, Any]) -> tuple[float, dict[str, np.ndarray]]:
    leaves = {n: torch.tensor(np.asarray(t)).requires_grad_() for n, t in at.items()}
    value = loss(leaves)
    value.backward()
    return value.item(), {n: np.asarray(t.grad) for n, t in leaves.items()}


def search(session: Session, loss: Loss, at: dict[str, Any], **fields: Any) -> tuple[Any, int]:
    """Answer evaluations until the step is done; return its params and how many it took."""
    for count in range(1, 100):
        value, grads = evaluate(loss, at)
        reply = step(session, grads, loss=value, **fields)
        at = params_of(reply)
        if reply.scalars["applied"]:
            assert reply.scalars["need"] is None
            return at, count
        assert reply.scalars["need"] == "evaluate"
        assert reply.scalars["applied_version"] is None
    raise AssertionError("the line search did not end")


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
@pytest.mark.parametrize("loss", [rosenbrock, quadratic], ids=["rosenbrock", "quadratic"])
@pytest.mark.parametrize("more", [{}, {"history_size": 2, "max_iter": 7}, {"max_iter": 1}], ids=str)
def test_steps_are_bit_equal_to_torchs_lbfgs_with_a_closure(
    made: Registry, dtype: str, line_search_fn: str | None, loss: Loss, more: dict[str, Any]
) -> None:
    lr = 1.0 if line_search_fn else 1e-3
    hyper = {"lr": lr, "line_search_fn": line_search_fn, **more}
    start = local.arrays(4, SHAPES, dtype)
    session = create(made, {"optimizer": {"name": "LBFGS", **hyper}}, start)
    leaves = local.leaves(start)
    optimizer = torch.optim.LBFGS(leaves.values(), **hyper)
    evaluations = 0

    def closure() -> float:
        nonlocal evaluations
        evaluations += 1
        value, grads = evaluate(loss, {n: t.detach().numpy() for n, t in leaves.items()})
        local.set_grads(leaves, grads)
        return value

    at: dict[str, Any] = start
    for version in range(1, 5):
        at, count = search(session, loss, at)
        evaluations = 0
        optimizer.step(closure)
        assert count == evaluations
        assert_equal(at, leaves)
        assert session.version == version


def test_trial_params_are_never_what_get_shows(made: Registry) -> None:
    start = local.arrays(4, SHAPES, "f8")
    session = create(
        made, {"optimizer": {"name": "LBFGS", "line_search_fn": "strong_wolfe"}}, start
    )
    value, grads = evaluate(rosenbrock, start)
    trial = params_of(step(session, grads, loss=value))
    assert any(not np.array_equal(trial[n], start[n]) for n in start)
    assert_equal(session.published().result(10).arrays(), local.leaves(start))
    status = session.status().result(10)
    assert (status["version"], status["updates"], status["line_search"]["evaluations"]) == (0, 0, 1)


def test_a_search_in_progress_comes_back_from_the_journal_and_from_a_state_file(
    made: Registry,
) -> None:
    start = local.arrays(4, SHAPES, "f8")
    body = {"optimizer": {"name": "LBFGS", "line_search_fn": "strong_wolfe"}}
    session = create(made, body, start)
    at, _ = search(session, rosenbrock, start)
    value, grads = evaluate(rosenbrock, at)
    trial = params_of(step(session, grads, loss=value))
    saved = exported(session)
    assert read_back(session) == saved
    made.import_session("default", "copy", saved, NOBODY).result(10)
    ends = [search(s, rosenbrock, trial)[0] for s in (session, made.get("default", "copy"))]
    assert all(np.array_equal(ends[0][n], ends[1][n]) for n in start)


def test_other_changes_need_abandon_while_a_search_is_open(made: Registry) -> None:
    start = local.arrays(4, SHAPES, "f8")
    session = create(
        made, {"optimizer": {"name": "LBFGS", "line_search_fn": "strong_wolfe"}}, start
    )
    value, grads = evaluate(rosenbrock, start)
    step(session, grads, loss=value)
    before = exported(session)
    with pytest.raises(LineSearchOpen, match="abandon: true"):
        local.put_params(session, start, NOBODY).result(10)
    with pytest.raises(LineSearchOpen):
        local.patch_group(session, 0, {"lr": 0.5}, NOBODY).result(10)
    with pytest.raises(LineSearchOpen):
        step(session, grads, loss=value, params=start)
    assert exported(session) == before
    local.put_params(session, start, NOBODY, abandon=True).result(10)
    assert session.status().result(10)["line_search"] == {"evaluations": 0}
    assert session.version == 1


def test_the_scheduler_waits_for_an_open_search(made: Registry) -> None:
    start = local.arrays(4, SHAPES, "f8")
    body = {
        "optimizer": {"name": "LBFGS", "line_search_fn": "strong_wolfe"},
        "scheduler": {"name": "StepLR", "step_size": 1},
    }
    session = create(made, body, start)
    value, grads = evaluate(rosenbrock, start)
    step(session, grads, loss=value)
    before = exported(session)
    for refused in (
        lambda: local.scheduler_step(session, None, NOBODY),
        lambda: local.put_scheduler(session, None, NOBODY),
        lambda: local.patch(session, {"nonfinite": "skip"}, NOBODY),
    ):
        with pytest.raises(LineSearchOpen):
            refused().result(10)
    assert exported(session) == before
    local.patch(session, {"name": "x"}, NOBODY).result(10)
    search(session, rosenbrock, params_of(step(session, grads, loss=value, abandon=True)))


def test_params_of_a_first_evaluation_become_live_with_the_step(made: Registry) -> None:
    start, other = local.arrays(4, SHAPES, "f8"), local.arrays(5, SHAPES, "f8")
    body = {"optimizer": {"name": "LBFGS", "line_search_fn": "strong_wolfe"}}
    session = create(made, body, start)
    value, grads = evaluate(rosenbrock, other)
    trial = params_of(step(session, grads, loss=value, params=other))
    assert session.version == 0
    assert_equal(session.published().result(10).arrays(), local.leaves(start))
    assert read_back(session) == exported(session)
    at, _ = search(session, rosenbrock, trial)
    leaves = local.leaves(other)
    optimizer = torch.optim.LBFGS(leaves.values(), line_search_fn="strong_wolfe")

    def closure() -> float:
        value, grads = evaluate(rosenbrock, {n: t.detach().numpy() for n, t in leaves.items()})
        local.set_grads(leaves, grads)
        return value

    optimizer.step(closure)
    assert_equal(at, leaves)


def test_abandon_in_a_step_starts_the_search_again_from_the_live_params(made: Registry) -> None:
    start = local.arrays(4, SHAPES, "f8")
    session = create(
        made, {"optimizer": {"name": "LBFGS", "line_search_fn": "strong_wolfe"}}, start
    )
    value, grads = evaluate(rosenbrock, start)
    first = params_of(step(session, grads, loss=value))
    step(session, grads, loss=value + 1)
    again = params_of(step(session, grads, loss=value, abandon=True))
    assert all(np.array_equal(first[n], again[n]) for n in start)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"accumulate": 2}, "accumulate cannot be used with LBFGS"),
        ({"clip_grad_norm": 1.0}, "clip_grad_norm cannot be used with LBFGS"),
        ({"clip_grad_value": 1.0}, "clip_grad_value cannot be used with LBFGS"),
        ({"groups": [{"params": ["x"], "lr": 0.5}]}, "groups cannot be used with LBFGS"),
    ],
)
def test_what_changes_gradients_is_refused_at_creation(
    made: Registry, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(Invalid) as caught:
        create(made, {"optimizer": {"name": "LBFGS"}, **fields}, local.arrays(4, SHAPES))
    assert caught.value.detail == sentence


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "loss is missing: LBFGS needs loss and gradients at the same params"),
        ({"loss": 1.0, "loss_scale": 2.0}, "loss_scale cannot be used with LBFGS"),
        ({"loss": 1.0, "return": "none"}, "return must be 'params' with LBFGS, got 'none'"),
        ({"loss": 1.0, "return": "delta"}, "return must be 'params' with LBFGS, got 'delta'"),
    ],
)
def test_an_evaluation_needs_its_loss_and_nothing_that_scales(
    made: Registry, fields: dict[str, Any], sentence: str
) -> None:
    session = create(made, {"optimizer": {"name": "LBFGS"}}, local.arrays(4, SHAPES))
    with pytest.raises(Invalid) as caught:
        step(session, local.arrays(5, SHAPES), **fields)
    assert caught.value.detail == sentence
