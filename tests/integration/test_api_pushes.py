"""Pushes over HTTP: one step sent tensor by tensor answers, and does, what one request would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from optserve.sessions import pushes as module
from optserve.sessions.session import Session
from optserve_client import wire
from optserve_client.errors import OutOfSpace
from optserve_client.wire import SAFETENSORS
from tests.integration.api_client import BINARY, CREATE, GRADS, Api, asking, f32, frame, unframe
from tests.unit.test_pushes import Clock
from tests.waiting import wait_until

S = "/v1/sessions/s"
#: Names that are hard to put into a path, and a parameter that is sparse.
SHAPES: dict[str, tuple[int, ...]] = {
    "layers/0/weight": (3, 4),
    "a b%2F?#é": (5,),
    "..": (2,),
    "commit": (2, 2),
    "s": (),
    "e": (0, 3),
    "emb": (6, 2),
}


@pytest.fixture
def api(app: Any) -> Iterator[Api]:
    with asking(app) as api:
        yield api


def create(api: Api, name: str = "s", **fields: Any) -> None:
    assert api.put(f"/v1/sessions/{name}", json={**CREATE, **fields}).status_code == 201


def opened(api: Api, name: str = "s", /, **fields: Any) -> str:
    """Open a push and return its URL."""
    reply = api.post(f"/v1/sessions/{name}/pushes", json=fields)
    assert reply.status_code == 201, reply.text
    return reply.headers["location"]


def put(api: Api, url: str, name: str, tensors: Any) -> Any:
    content = frame(tensors) if isinstance(tensors, dict) else tensors
    return api.put(f"{url}/{segment(name)}", content=content, headers=BINARY)


def segment(name: str) -> str:
    return quote(name, safe="").replace(".", "%2E")


def fill(api: Api, url: str, grads: Any = GRADS) -> None:
    for name, grad in grads.items():
        assert api.put(f"{url}/{name}", json={"grad": grad}).status_code == 200


def problem(reply: Any, status: int, code: str) -> str:
    document = reply.json()
    assert (reply.status_code, document["code"]) == (status, code), document
    return str(document["detail"])


def state(api: Api, name: str = "s") -> bytes:
    return api.get(f"/v1/sessions/{name}/state").content


# --- what it is for ------------------------------------------------------------------------------


def test_a_push_is_opened_filled_and_committed_as_one_version(api: Api) -> None:
    create(api)
    reply = api.post(f"{S}/pushes", json={"loss": 0.5})
    told = reply.json()
    assert reply.status_code == 201
    assert set(told) == {"id", "push", "expires_at", "missing"}
    assert (told["id"], told["missing"]) == ("s", 2)
    url = reply.headers["location"]
    assert url == f"{S}/pushes/{told['push']}"
    first = api.put(f"{url}/w", json={"grad": GRADS["w"]}).json()
    assert (first["name"], first["missing"]) == ("w", 1)
    assert first["expires_at"] > told["expires_at"]
    assert api.get(url).json() | {"expires_at": 0} == {
        "id": "s",
        "push": told["push"],
        "expires_at": 0,
        "fields": {"loss": 0.5},
        "arrived": ["w"],
        "arriving": [],
        "none": [],
        "missing": ["b"],
    }
    assert "'b' has no gradient" in problem(api.post(f"{url}/commit"), 422, "missing_gradient")
    fill(api, url, {"b": GRADS["b"]})
    pushed = api.post(f"{url}/commit").json()
    create(api, "t")
    stepped = api.post("/v1/sessions/t/step", json={"grads": GRADS, "loss": 0.5}).json()
    ours = {"id", "generation"}
    assert {k: v for k, v in pushed.items() if k not in ours} == {
        k: v for k, v in stepped.items() if k not in ours
    }
    assert [row["loss"] for row in api.get(f"{S}/history").json()["rows"]] == [0.5]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch says so once
@pytest.mark.parametrize("sent", ["F32", "F16", "BF16", "json"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("accept", ["application/json", SAFETENSORS])
def test_it_is_bit_for_bit_the_ordinary_step(api: Api, dtype: str, sent: str, accept: str) -> None:
    if dtype == "bfloat16" and sent in ("F32", "F16"):
        pytest.skip("it would round, and is refused")
    rng, tag = np.random.default_rng(7), wire.dtype_tag(dtype)
    # torch has no sparse gradients in bfloat16.
    shapes = {n: s for n, s in SHAPES.items() if dtype != "bfloat16" or n != "emb"}
    start = {n: wire.narrow(f32(rng.normal(size=s)), tag) for n, s in shapes.items()}
    for name in ("one", "many"):
        fields: dict[str, Any] = {"optimizer": {"name": "Adagrad", "lr": 0.1}, "dtype": dtype}
        fields |= {"order": list(shapes), "sparse": ["emb"] if "emb" in shapes else []}
        body = frame({f"param/{n}": t for n, t in start.items()}, fields)
        reply = api.put(f"/v1/sessions/{name}", content=body, headers=BINARY)
        assert reply.status_code == 201, reply.text
    for number in range(3):
        narrow = tag if sent == "json" else sent
        dense = {
            n: wire.narrow(f32(rng.normal(size=s)), narrow) for n, s in shapes.items() if n != "emb"
        }
        halves: dict[str, Any] = (
            {}
            if "emb" not in shapes
            else {
                "sparse/emb/indices": np.array([[5, 0, 5]]),
                "sparse/emb/values": wire.narrow(f32(rng.normal(size=(3, 2))), narrow),
            }
        )
        tensors: dict[str, Any] = {f"grad/{n}": t for n, t in dense.items()} | halves
        headers = BINARY | {"accept": accept}
        one = api.post(
            "/v1/sessions/one/step",
            content=frame(tensors, {"loss": 0.5 * number, "loss_scale": 2.0}),
            headers=headers,
        )
        url = opened(api, "many", loss=0.5 * number)
        for name in reversed(shapes):
            if name == "emb":
                reply = put(api, url, name, halves)
            elif sent == "json":
                grad = wire.tensor_to_json(dense[name], "base64")
                reply = api.put(f"{url}/{segment(name)}", json={"grad": grad})
            else:
                reply = put(api, url, name, {f"grad/{name}": dense[name]})
            assert reply.status_code == 200, reply.text
        many = api.post(f"{url}/commit", json={"loss_scale": 2.0}, headers={"accept": accept})
        assert (one.status_code, many.status_code) == (200, 200), many.text
        if accept == SAFETENSORS:
            (a, told), (b, other) = unframe(one.content), unframe(many.content)
            assert [wire.as_bytes(t) for t in a.values()] == [wire.as_bytes(t) for t in b.values()]
        else:
            told, other = one.json(), many.json()
            assert told["params"] == other["params"]
        assert told["grad_norm"] == other["grad_norm"]
    a, b = unframe(state(api, "one"))[0], unframe(state(api, "many"))[0]
    assert a.keys() == b.keys()
    for name in a.keys() - {"ledger"}:
        assert wire.as_bytes(a[name]) == wire.as_bytes(b[name]), name


def test_a_slash_in_a_name_may_stay_as_it_is(api: Api) -> None:
    create(api, params={"a/b/c": [1.0], "a": [2.0]})
    url = opened(api)
    assert api.put(f"{url}/a/b/c", json={"grad": [1.0]}).json()["name"] == "a/b/c"
    assert api.put(f"{url}/a%2Fb/c", json={"grad": [2.0]}).json()["missing"] == 1
    assert put(api, url, "a", {"grad/a": f32([1.0])}).status_code == 200
    assert api.post(f"{url}/commit").status_code == 200


def test_fields_may_come_with_the_commit_and_mean_what_they_do_in_a_step(api: Api) -> None:
    create(api)
    before = state(api)
    url = opened(api, dry_run=True)
    fill(api, url)
    reply = api.post(f"{url}/commit", json={"return": "delta", "return_encoding": "base64"})
    told = reply.json()
    assert (told["dry_run"], told["returned"], told["version"]) == (True, "params", 1)
    assert set(told["params"]["w"]) == {"dtype", "shape", "data"}
    assert state(api) == before
    url = opened(api, **{"return": "none"})
    fill(api, url, {"w": GRADS["w"]})
    told = api.post(f"{url}/commit", json={"none": ["b"], "metrics": {"acc": 1.0}}).json()
    assert "params" not in told
    assert api.get(f"{S}/params").json()["params"]["b"] == 0.5
    assert api.get(f"{S}/history").json()["rows"][0]["metrics"] == {"acc": 1.0}


# --- exactly once --------------------------------------------------------------------------------

WHO: dict[str, dict[str, Any]] = {
    "worker and seq": {"json": {"worker": "me", "seq": 1}},
    "a key": {"json": {}, "headers": {"idempotency-key": "k-1"}},
    "neither": {},
}


@pytest.mark.parametrize("who", WHO)
def test_a_commit_that_is_repeated_is_a_duplicate(api: Api, who: str) -> None:
    create(api)
    url = opened(api)
    fill(api, url)
    first = api.post(f"{url}/commit", **WHO[who]).json()
    assert api.post(f"{S}/step", json={"grads": GRADS}).json()["version"] == 2
    again = api.post(f"{url}/commit", **WHO[who]).json()
    assert (first["duplicate"], again["duplicate"]) == (False, True)
    assert (again["applied_version"], again["version"]) == (1, 2)
    assert again["params"] == api.get(f"{S}/params").json()["params"]
    assert api.get(S).json()["version"] == 2


@pytest.mark.parametrize("who", WHO)
def test_commits_at_the_same_time_are_one(api: Api, who: str) -> None:
    create(api, params={"w": [0.5] * 30_000, "b": 0.5})
    url = opened(api)
    fill(api, url, {"w": [0.25] * 30_000, "b": 1.0})
    replies = api.together(*[("POST", f"{url}/commit", WHO[who])] * 5)
    assert {reply.status_code for reply in replies} == {200}
    assert sorted(reply.json()["duplicate"] for reply in replies) == [False, *[True] * 4]
    assert api.get(S).json()["version"] == 1


@pytest.mark.parametrize("who", ["worker and seq", "a key"])
def test_the_same_tensors_in_another_push_are_not_applied_twice(api: Api, who: str) -> None:
    create(api)
    for number, order in enumerate((["w", "b"], ["b", "w"])):
        url = opened(api, loss=0.5)
        fill(api, url, {name: GRADS[name] for name in order})
        told = api.post(f"{url}/commit", **WHO[who]).json()
        assert (told["duplicate"], told["applied_version"]) == (bool(number), 1)
    url = opened(api, loss=0.5)
    fill(api, url, {**GRADS, "b": 1.0})
    problem(api.post(f"{url}/commit", **WHO[who]), 422, "key_reused")
    assert api.get(S).json()["version"] == 1


def test_a_repeat_with_other_fields_is_refused(api: Api) -> None:
    create(api)
    url = opened(api)
    fill(api, url)
    assert api.post(f"{url}/commit", json={"worker": "me", "seq": 1}).status_code == 200
    said = problem(api.post(f"{url}/commit", json={"worker": "me", "seq": 2}), 422, "key_reused")
    assert "was committed before with other fields" in said


def test_a_refused_commit_leaves_nothing_behind(api: Api) -> None:
    create(api)
    before = state(api)
    sent = {"worker": "me", "seq": 1, "base_version": 7}
    url = opened(api, **sent)
    fill(api, url)
    problem(api.post(f"{url}/commit"), 409, "version_conflict")
    assert "nothing came of it" in problem(api.post(f"{url}/commit"), 404, "push_not_found")
    problem(api.put(f"{url}/w", json={"grad": GRADS["w"]}), 404, "push_not_found")
    assert state(api) == before
    # Its seq is free.
    told = api.post(f"{S}/step", json={"grads": GRADS, "worker": "me", "seq": 1}).json()
    assert (told["duplicate"], told["version"]) == (False, 1)


@pytest.mark.parametrize("size", [4, 40_000])
def test_a_disk_that_is_full_leaves_the_push_as_it_is(
    api: Api, registry: Any, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    def full(*args: Any) -> None:
        raise OutOfSpace

    create(api, params={"w": [0.5] * size})
    url = opened(api, worker="me", seq=1)
    fill(api, url, {"w": [0.25] * size})
    with monkeypatch.context() as patch:
        patch.setattr(registry.store, "writer", full)
        problem(api.post(f"{url}/commit"), 507, "out_of_space")
    assert api.get(url).json()["arrived"] == ["w"]
    assert api.post(f"{url}/commit").json()["version"] == 1


def test_what_is_wrong_with_the_sender_is_found_while_the_push_can_still_be_committed(
    api: Api,
) -> None:
    create(api)
    url = opened(api)
    fill(api, url)
    said = problem(api.post(f"{url}/commit", json={"worker": "me"}), 422, "invalid")
    assert said == "worker 'me' needs a seq"
    sent = {"json": {"worker": "me", "seq": 1}, "headers": {"idempotency-key": "k"}}
    problem(api.post(f"{url}/commit", **sent), 422, "invalid")
    assert api.post(f"{url}/commit", json={"worker": "me", "seq": 1}).status_code == 200


def test_a_repeat_of_the_opening_with_its_key_finds_the_same_push(api: Api) -> None:
    create(api)
    sent = {"json": {"loss": 0.5}, "headers": {"idempotency-key": "k"}}
    first, again = api.post(f"{S}/pushes", **sent), api.post(f"{S}/pushes", **sent)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["push"] == again.json()["push"]
    problem(api.post(f"{S}/pushes", **sent | {"json": {}}), 422, "key_reused")


# --- how it ends ---------------------------------------------------------------------------------


def test_a_push_is_given_up_at_once(api: Api) -> None:
    create(api)
    url = opened(api)
    fill(api, url)
    push = url.rpartition("/")[2]
    assert api.delete(url).json() == {"id": "s", "push": push, "deleted": True}
    for reply in (api.delete(url), api.get(url), api.post(f"{url}/commit")):
        problem(reply, 404, "push_not_found")


def test_an_abandoned_push_expires(api: Api, registry: Any) -> None:
    create(api)
    clock = registry.get("default", "s").pushes.clock = Clock()
    url, other = opened(api), opened(api)
    clock.now += 50
    fill(api, url)
    clock.now += 50
    problem(api.get(other), 404, "push_not_found")
    assert api.post(f"{url}/commit").status_code == 200
    clock.now += 59
    assert api.post(f"{url}/commit").json()["duplicate"]
    clock.now += 1
    problem(api.post(f"{url}/commit"), 404, "push_not_found")


def test_pushes_that_nobody_asks_for_are_looked_after(api: Api, registry: Any) -> None:
    create(api)
    session = registry.get("default", "s")
    clock = session.pushes.clock = Clock()
    opened(api)
    clock.now += 60
    wait_until(lambda: not session.pushes._open, "the expiry of a push")
    assert len(session.stage()[0].pool._kept) == 0


def test_so_many_may_be_open_and_ordinary_steps_go_on(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(api)
    monkeypatch.setattr(module, "most_open", lambda nbytes: 2)
    url, _ = opened(api), opened(api)
    reply = api.post(f"{S}/pushes")
    assert "2 pushes are open" in problem(reply, 503, "unavailable")
    assert reply.headers["retry-after"] == "1"
    assert api.post(f"{S}/step", json={"grads": GRADS}).status_code == 200
    fill(api, url)
    assert api.post(f"{url}/commit").status_code == 200
    opened(api)


def test_a_session_that_is_deleted_takes_its_pushes_along(api: Api) -> None:
    create(api)
    url = opened(api)
    fill(api, url)
    assert api.delete(S).status_code == 200
    for reply in (api.post(f"{url}/commit"), api.put(f"{url}/w", json={"grad": GRADS["w"]})):
        problem(reply, 404, "session_not_found")
    create(api)  # under the same id
    problem(api.post(f"{url}/commit"), 404, "push_not_found")


def test_params_that_are_added_meanwhile_end_a_push(api: Api) -> None:
    create(api)
    url = opened(api)
    fill(api, url)
    assert api.post(f"{S}/groups", json={"params": {"v": [1.0]}}).status_code == 200
    said = problem(api.put(f"{url}/w", json={"grad": GRADS["w"]}), 409, "conflict")
    assert "the session's params changed after push" in said
    said = problem(api.post(f"{url}/commit"), 409, "conflict")
    assert said == "the session's params changed while the gradient was on its way"
    problem(api.post(f"{url}/commit"), 404, "push_not_found")
    assert api.get(S).json()["version"] == 1  # made by the new group


def test_a_session_that_is_put_away_comes_back_for_the_commit(api: Api, registry: Any) -> None:
    create(api)
    url = opened(api)
    fill(api, url, {"w": GRADS["w"]})
    session = registry.get("default", "s")
    wait_until(session.put_away, "an idle session")
    fill(api, url, {"b": GRADS["b"]})
    wait_until(session.put_away, "an idle session")
    assert api.post(f"{url}/commit").json()["version"] == 1


def test_a_session_that_was_never_read_back_is_read_for_a_push(api: Api, registry: Any) -> None:
    create(api)
    known = registry.get("default", "s")
    wait_until(known.put_away, "an idle session")
    registry._sessions[known.key] = Session(registry._home, known.row)
    url = opened(api)
    fill(api, url)
    assert api.post(f"{url}/commit").json()["version"] == 1


# --- sessions of all kinds -----------------------------------------------------------------------


def test_each_push_is_one_gradient_of_an_accumulation_window(api: Api) -> None:
    create(api, accumulate=2)
    for number in (1, 2):
        url = opened(api)
        fill(api, url)
        told = api.post(f"{url}/commit").json()
        assert (told["applied"], told["accumulated"]) == (number == 2, number % 2)


def test_a_gradient_that_is_not_finite_is_refused_by_the_commit(api: Api) -> None:
    create(api)
    url = opened(api)
    fill(api, url, {**GRADS, "b": "NaN"})
    said = problem(api.post(f"{url}/commit"), 422, "nonfinite")
    assert said == "grads['b'] is nan, must be finite"
    url = opened(api, loss_scale=8.0)
    fill(api, url, {**GRADS, "b": "Infinity"})
    assert api.post(f"{url}/commit").json()["skipped"] == "nonfinite"


def test_a_line_search_takes_pushes(api: Api) -> None:
    create(api, optimizer={"name": "LBFGS", "max_iter": 4})
    url = opened(api)
    fill(api, url)
    told = api.post(f"{url}/commit", json={"loss": 1.0, "worker": "me", "seq": 1}).json()
    assert told["need"] == "evaluate"
    again = api.post(f"{url}/commit", json={"loss": 1.0, "worker": "me", "seq": 1}).json()
    assert (again["duplicate"], again["params"]) == (True, told["params"])


def test_a_session_of_sparse_parameters_alone_takes_pushes(api: Api) -> None:
    rows = {"indices": [[0, 2]], "values": [[1.0, 2.0], [3.0, 4.0]], "shape": [3, 2]}
    made = {"params": {"e": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]}, "sparse": ["e"]}
    for name in ("s", "t"):
        create(api, name, optimizer="SparseAdam", **made)
    url = opened(api)
    fill(api, url, {"e": rows})
    pushed = api.post(f"{url}/commit", json={"worker": "me", "seq": 1}).json()
    stepped = api.post("/v1/sessions/t/step", json={"grads": {"e": rows}}).json()
    assert pushed["params"] == stepped["params"]
    assert api.post(f"{url}/commit", json={"worker": "me", "seq": 1}).json()["duplicate"]
