"""/step with everything in one body: the first call creates, the later ones step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
import torch

from tests.integration.api_client import BINARY, GRADS, JSON, Api, asking, frame, prefixed

PARAMS: dict[str, Any] = {"w": [[1.0, 2.0], [3.0, 4.0]], "b": 0.5}
OPTIMIZER: dict[str, Any] = {"name": "SGD", "lr": 0.5, "momentum": 0.9}
BODY: dict[str, Any] = {"id": "one", "optimizer": OPTIMIZER, "grads": GRADS}


@pytest.fixture
def api(app: Any) -> Iterator[Api]:
    with asking(app) as api:
        yield api


def as_frame(body: dict[str, Any]) -> bytes:
    """Return the same request as a safetensors body."""
    tensors = prefixed("grad", body.get("grads", {})) | prefixed("param", body.get("params", {}))
    return frame(tensors, {k: v for k, v in body.items() if k not in ("grads", "params")})


def send(api: Api, body: dict[str, Any], binary: bool, path: str = "/step") -> Any:
    if binary:
        return api.post(path, content=as_frame(body), headers=BINARY)
    return api.post(path, content=orjson.dumps(body), headers=JSON)


def sgd_after(steps: int) -> dict[str, torch.Tensor]:
    params = {name: torch.tensor(value) for name, value in PARAMS.items()}
    optimizer = torch.optim.SGD(list(params.values()), lr=0.5, momentum=0.9, fused=True)
    for _ in range(steps):
        for name, param in params.items():
            param.grad = torch.tensor(GRADS[name])
        optimizer.step()
    return params


def assert_equal(served: dict[str, Any], local: dict[str, torch.Tensor]) -> None:
    assert set(served) == set(local)
    for name, tensor in local.items():
        assert torch.equal(torch.from_numpy(np.array(served[name], "<f4")), tensor), name


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("path", ["/step", "/v1/step"])
def test_the_first_call_creates_and_steps_and_the_later_ones_step(
    api: Api, binary: bool, path: str
) -> None:
    first = send(api, {**BODY, "params": PARAMS}, binary, path)
    assert (first.status_code, first.headers["location"]) == (201, "/v1/sessions/one")
    assert (first.json()["created"], first.json()["version"]) == (True, 1)
    assert_equal(first.json()["params"], sgd_after(1))
    second = send(api, BODY, binary, path)
    assert (second.status_code, second.json()["version"]) == (200, 2)
    assert "created" not in second.json()
    without = {"id": "one", "grads": GRADS}
    third = send(api, without, binary, path)
    assert_equal(third.json()["params"], sgd_after(3))


@pytest.mark.parametrize("binary", [False, True])
def test_params_in_a_later_call_replace_the_sessions(api: Api, binary: bool) -> None:
    send(api, {**BODY, "params": PARAMS, "optimizer": "SGD"}, binary)
    again = send(api, {**BODY, "params": PARAMS, "optimizer": "SGD"}, binary).json()
    fresh = torch.tensor(PARAMS["b"]) - 0.001 * torch.tensor(GRADS["b"])
    assert again["version"] == 2
    assert torch.equal(torch.tensor(again["params"]["b"]), fresh)


@pytest.mark.parametrize("binary", [False, True])
def test_a_repeat_of_the_first_call_is_answered_and_not_applied(api: Api, binary: bool) -> None:
    body = {**BODY, "params": PARAMS, "worker": "w", "seq": 1}
    first, again = (send(api, body, binary) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 200)
    assert (first.json()["duplicate"], again.json()["duplicate"]) == (False, True)
    assert again.json()["version"] == 1
    assert_equal(again.json()["params"], sgd_after(1))


def test_a_first_call_with_a_key_is_applied_once(api: Api) -> None:
    content = orjson.dumps({**BODY, "params": PARAMS})
    headers = {**JSON, "idempotency-key": "k"}
    replies = [api.post("/step", content=content, headers=headers).json() for _ in range(2)]
    assert [reply["duplicate"] for reply in replies] == [False, True]
    assert api.get("/v1/sessions/one").json()["version"] == 1


@pytest.mark.parametrize("binary", [False, True])
def test_another_configuration_is_refused_and_changes_nothing(api: Api, binary: bool) -> None:
    send(api, {**BODY, "params": PARAMS}, binary)
    before = api.get("/v1/sessions/one/state").content
    for change in ({"optimizer": {**OPTIMIZER, "lr": 0.25}}, {"clip_grad_norm": 1.0}):
        reply = send(api, {**BODY, **change}, binary)
        assert (reply.status_code, reply.json()["code"]) == (409, "session_exists")
    assert api.get("/v1/sessions/one/state").content == before


def test_defaults_spelled_out_are_the_same_configuration(api: Api) -> None:
    send(api, {**BODY, "params": PARAMS}, False)
    spelled = {**BODY, "optimizer": {**OPTIMIZER, "nesterov": False}, "accumulate": 1}
    assert send(api, spelled, False).status_code == 200


def test_with_optimizer_groups_are_those_of_create_and_without_those_of_the_step(api: Api) -> None:
    groups = [{"params": ["b"], "lr": 0.125}]
    first = send(api, {**BODY, "params": PARAMS, "groups": groups}, False).json()
    assert [group["lr"] for group in first["groups"]] == [0.125, 0.5]
    changed = send(api, {"id": "one", "grads": GRADS, "groups": [{"lr": 0.25}]}, False).json()
    assert [group["lr"] for group in changed["groups"]] == [0.25, 0.5]


def test_a_window_of_gradients_works_from_the_first_call_on(api: Api) -> None:
    body = {**BODY, "accumulate": 2}
    first = send(api, {**body, "params": PARAMS}, False).json()
    assert (first["applied"], first["accumulated"]) == (False, 1)
    assert send(api, body, False).json()["applied"] is True


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"params": {}},
        {"loss": "low"},
        {"returns": "none"},
        {"optimizer": {"name": "SGD", "lr": -1}},
        {"order": ["w"]},
    ],
    ids=str,
)
def test_a_first_call_that_is_refused_leaves_no_session_behind(
    api: Api, binary: bool, change: dict[str, Any]
) -> None:
    reply = send(api, {**BODY, "params": PARAMS, **change}, binary)
    assert reply.status_code == 422
    assert api.get("/v1/sessions/one").status_code == 404


def test_many_first_calls_at_once_create_one_session(api: Api) -> None:
    requests = [
        ("POST", "/step", {"json": {**BODY, "params": PARAMS, "worker": f"w{i}", "seq": 1}})
        for i in range(8)
    ]
    replies = api.together(*requests)
    assert sorted(reply.status_code for reply in replies) == [200] * 7 + [201]
    assert sorted(reply.json()["applied_version"] for reply in replies) == list(range(1, 9))


def test_a_large_binary_call_arrives_in_many_pieces(api: Api) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "grad/w": rng.standard_normal((300, 1000)).astype("<f4"),
        "param/w": rng.standard_normal((300, 1000)).astype("<f4"),
    }
    fields = {"id": "big", "optimizer": {"name": "SGD", "lr": 1.0}, "worker": "w"}
    whole = frame(tensors, {**fields, "seq": 1})

    async def pieces(content: bytes) -> Any:
        for at in range(0, len(content), 70_000):
            yield content[at : at + 70_000]

    first = api.post("/step", content=pieces(whole), headers=BINARY)
    assert first.status_code == 201
    grads = frame({"grad/w": tensors["grad/w"]}, {**fields, "seq": 2})
    second = api.post("/step", content=pieces(grads), headers=BINARY)
    want = torch.from_numpy(tensors["param/w"])
    for _ in range(2):
        want = want - torch.from_numpy(tensors["grad/w"])
    assert second.json()["version"] == 2
    assert torch.equal(torch.tensor(second.json()["params"]["w"]), want)


@pytest.mark.parametrize(
    "grads",
    [{"w": [1.0]}, {}, {"w": [float("1e39"), 0.0]}, {"w": ["NaN", 0.0]}, {"v": [1.0, 2.0]}],
    ids=["shape", "missing", "overflow", "nan", "unknown"],
)
def test_a_refused_first_step_leaves_no_session(api: Api, grads: dict[str, Any]) -> None:
    body = {"id": "gone", "optimizer": "SGD", "params": {"w": [1.0, 2.0]}, "grads": grads}
    assert api.post("/v1/step", json=body).status_code == 422
    assert api.get("/v1/sessions/gone").status_code == 404
