"""What a program in another container sees of the service: with the client, and with plain HTTP."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from optserve_client import Client, Session, TopK, errors

URL = os.environ["OPTSERVE_URL"]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(URL) as made:
        yield made


@pytest.fixture
def session(client: Client) -> Iterator[Session]:
    made = client.create("SGD", {"w": np.zeros(3, np.float32)}, lr=0.5)
    yield made
    made.delete()


def test_nothing_of_the_server_is_here() -> None:
    assert importlib.util.find_spec("torch") is None
    assert importlib.util.find_spec("optserve") is None


def test_it_is_ready_and_says_what_it_runs(client: Client) -> None:
    assert httpx.get(f"{URL}/readyz").json() == {"status": "ready"}
    assert {"optserve", "torch"} <= client.version().keys()


def test_steps_are_those_of_the_optimizer_bit_for_bit(session: Session) -> None:
    w, random = np.zeros(3, np.float32), np.random.default_rng(0)
    for number in range(1, 20):
        grad = random.normal(size=3).astype(np.float32)
        w -= np.float32(0.5) * grad
        result = session.step({"w": grad})
        assert (result.version, result.applied) == (number, True)
        assert result.params is not None
        np.testing.assert_array_equal(result.params["w"], w)


def test_a_regression_is_trained(client: Client) -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=(200, 8)).astype(np.float32)
    truth = random.normal(size=8).astype(np.float32)
    session = client.create(
        "AdamW",
        {"w": np.zeros(8, np.float32)},
        lr=0.1,
        weight_decay=0.0,
        scheduler={"name": "CosineAnnealingLR", "T_max": 300, "advance": "step"},
    )
    w = np.zeros(8, np.float32)
    for _ in range(300):
        error = x @ w - x @ truth
        grads = {"w": x.T @ error / len(x)}
        result = session.step(grads, loss=float(np.square(error).mean()))
        assert result.params is not None
        w = result.params["w"]
    assert np.abs(w - truth).max() < 1e-3
    losses = [row["loss"] for row in session.history()]
    assert losses[-1] < losses[0] / 1e4
    session.delete()


def test_a_request_that_comes_twice_counts_once(session: Session) -> None:
    body = {"grads": {"w": [1.0, 2.0, 3.0]}, "worker": "me", "seq": 1}
    first, second = (
        httpx.post(f"{URL}/v1/sessions/{session.id}/step", json=body).json() for _ in range(2)
    )
    assert (first["duplicate"], second["duplicate"]) == (False, True)
    assert first["version"] == second["version"] == second["applied_version"] == 1
    assert first["params"] == second["params"] == {"w": [-0.5, -1.0, -1.5]}


def test_large_tensors_come_and_go(client: Client) -> None:
    start = np.zeros(2_000_000, np.float32)
    session = client.create("SGD", {"w": start}, lr=1.0)
    grad = np.random.default_rng(2).normal(size=start.size).astype(np.float32)
    result = session.step({"w": grad})
    assert result.params is not None
    np.testing.assert_array_equal(result.params["w"], -grad)
    session.step({"w": grad}, compress=TopK(0.01), returns="none")
    assert session.status()["version"] == 2
    session.delete()


def test_what_is_wrong_is_said_and_changes_nothing(client: Client, session: Session) -> None:
    with pytest.raises(errors.Invalid, match="expected"):
        session.step({"w": np.zeros(4, np.float32)})
    with pytest.raises(errors.Nonfinite, match="nan"):
        session.step({"w": np.array([1.0, np.nan, 0.0], np.float32)})
    with pytest.raises(errors.SessionNotFound):
        client.session("nobody-made-this").params()
    assert session.status()["version"] == 0
