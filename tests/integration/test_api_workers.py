"""Several workers on one session over HTTP: rounds, asynchronous pushes, registration."""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from optserve_client import wire
from optserve_client.wire import META_KEY, SAFETENSORS
from tests.integration.api_client import (
    BINARY,
    GRADS,
    JSON,
    Api,
    asking,
    f32,
    frame,
    prefixed,
    unframe,
)
from tests.integration.api_uvicorn import served
from tests.serving import ServerProcess
from tests.waiting import wait_until

S = "/v1/sessions/s"
PARAMS: dict[str, Any] = {"w": [[1.0, 2.0], [3.0, 4.0]], "b": 0.5}
SYNC: dict[str, Any] = {"mode": "sync", "count": 2, "deadline_s": 3600}
WANTS_BINARY = {"accept": SAFETENSORS}


@pytest.fixture
def api(app: Any) -> Iterator[Api]:
    with asking(app) as api:
        yield api


def created(api: Api, workers: Any = SYNC, **fields: Any) -> dict[str, Any]:
    body = {"optimizer": {"name": "SGD", "lr": 0.5}, "params": PARAMS, "workers": workers, **fields}
    reply = api.put(S, json=body)
    assert reply.status_code == 201, reply.text
    status: dict[str, Any] = reply.json()
    return status


def body_of(worker: str, seq: int, base: int, by: float = 1.0, **fields: Any) -> dict[str, Any]:
    grads = {n: (np.array(g) * by).tolist() for n, g in GRADS.items()}
    return {"grads": grads, "worker": worker, "seq": seq, "base_version": base, **fields}


def push(api: Api, worker: str, seq: int, base: int, by: float = 1.0, **fields: Any) -> Any:
    return api.post(f"{S}/step", json=body_of(worker, seq, base, by, **fields))


def begin(api: Api, worker: str, seq: int, base: int, by: float = 1.0, **fields: Any) -> Any:
    """Send a push and return once it is in the open round; it goes on waiting."""
    started = api.start("POST", f"{S}/step", json=body_of(worker, seq, base, by, **fields))
    for _ in range(1000):
        found = api.get(f"{S}/workers").json()["round"]
        if found and worker in found["contributed"]:
            return started
    raise AssertionError(f"{worker} is not in the round")


def after(*means: float) -> dict[str, np.ndarray]:
    """Return the params after updates with GRADS times each of these."""
    params = {n: np.array(p, "<f4") for n, p in PARAMS.items()}
    for by in means:
        for name, param in params.items():
            params[name] = param - np.float32(0.5) * f32(np.array(GRADS[name]) * by)
    return params


def assert_params(served: Any, want: dict[str, np.ndarray]) -> None:
    assert list(served) == list(want)
    for name, array in want.items():
        assert np.array_equal(np.array(served[name], "<f4"), array), name


def refused(reply: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Return the problem document of a refusal."""
    assert (reply.status_code, reply.json()["code"]) == (status, code), reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = reply.json()
    return problem


# --- the field workers ---------------------------------------------------------------------------

COMPLETE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"mode": "sync", "count": 4},
        {"mode": "sync", "count": 4, "reduce": "mean", "quorum": 4, "deadline_s": 30.0,
         "push": "gradients"}),
    ({"mode": "sync", "count": 4, "quorum": 2, "deadline_s": 0.5, "reduce": "median",
      "push": "deltas"},
        {"mode": "sync", "count": 4, "reduce": "median", "quorum": 2, "deadline_s": 0.5,
         "push": "deltas"}),
    ({"mode": "sync", "count": 9, "reduce": "trimmed_mean"},
        {"mode": "sync", "count": 9, "reduce": "trimmed_mean", "trim": 0.1, "quorum": 9,
         "deadline_s": 30.0, "push": "gradients"}),
    ({"mode": "async"},
        {"mode": "async", "max_staleness": None, "on_stale": None, "push": "gradients"}),
    ({"mode": "async", "max_staleness": 8},
        {"mode": "async", "max_staleness": 8, "on_stale": "reject", "push": "gradients"}),
    ({"mode": "async", "max_staleness": 8, "on_stale": "damp"},
        {"mode": "async", "max_staleness": 8, "on_stale": "damp", "push": "gradients"}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "complete"), COMPLETE, ids=lambda p: str(p)[:40])
def test_workers_are_completed_and_shown(
    api: Api, given: dict[str, Any], complete: dict[str, Any]
) -> None:
    assert created(api, given)["config"]["workers"] == complete
    body = {"optimizer": {"name": "SGD", "lr": 0.5}, "params": PARAMS}
    again = api.put(S, json={**body, "workers": complete})
    assert (again.status_code, again.json()["created"]) == (200, False)
    refused(api.put(S, json=body), 409, "session_exists")
    state = api.get(f"{S}/state").content
    copied = api.put("/v1/sessions/copy/state", content=state, headers=BINARY)
    assert copied.status_code == 201, copied.text
    assert copied.json()["config"]["workers"] == complete
    assert api.patch(S, json={"workers": complete}).status_code == 200
    assert api.get(S).json()["config"]["workers"] == complete


def test_without_workers_there_are_none(api: Api) -> None:
    assert created(api, None)["config"]["workers"] is None
    assert api.get(f"{S}/workers").json() == {"id": "s", "version": 0, "workers": [], "round": None}


# --- rounds --------------------------------------------------------------------------------------


def test_a_round_answers_each_push_like_a_step(api: Api) -> None:
    created(api)
    first = begin(api, "b", 1, 0, 2.0)
    last = push(api, "a", 1, 0, 4.0)
    for reply in (api.finish(first), last):
        assert reply.status_code == 200
        said = reply.json()
        assert (said["version"], said["applied_version"], said["updates"]) == (1, 1, 1)
        assert (said["applied"], said["duplicate"], said["skipped"]) == (True, False, None)
        assert said["round"] == {
            "number": 1,
            "base_version": 0,
            "workers": ["a", "b"],
            "missing": 0,
            "closed_by": "count",
        }
        assert_params(said["params"], after(3.0))


def test_a_binary_push_is_answered_in_binary(api: Api) -> None:
    created(api)
    first = begin(api, "b", 1, 0, 2.0)
    content = frame(
        prefixed("grad", {n: np.array(g) * 4 for n, g in GRADS.items()}),
        {"worker": "a", "seq": 1, "base_version": 0},
    )
    reply = api.post(f"{S}/step", content=content, headers={**BINARY, **WANTS_BINARY})
    assert reply.status_code == 200
    tensors, fields = unframe(reply.content)
    assert fields["round"]["workers"] == ["a", "b"]
    assert_params({n.removeprefix("param/"): t for n, t in tensors.items()}, after(3.0))
    assert_params(api.finish(first).json()["params"], after(3.0))


def test_who_does_not_wait_is_told_how_far_the_round_is(api: Api) -> None:
    created(api, {**SYNC, "count": 3})
    for name, contributed in (("b", ["b"]), ("a", ["a", "b"])):
        reply = push(api, name, 1, 0, wait_s=0)
        assert reply.status_code == 202
        said = reply.json()
        assert (said["applied"], said["applied_version"], said["version"]) == (False, None, 0)
        assert "params" not in said
        told = dict(said["round"])
        assert told.pop("deadline_at") > 0
        assert told == {"number": 1, "base_version": 0, "contributed": contributed, "count": 3}
    again = push(api, "a", 1, 0, wait_s=0)
    assert (again.status_code, again.json()["duplicate"]) == (202, True)
    binary = api.post(f"{S}/step", json=body_of("a", 1, 0, wait_s=0), headers=WANTS_BINARY)
    assert binary.status_code == 202
    tensors, fields = unframe(binary.content)
    assert tensors == {}
    assert fields["round"]["contributed"] == ["a", "b"]


def test_a_wait_that_is_over_is_told_how_far_the_round_is(api: Api) -> None:
    created(api)
    reply = push(api, "a", 1, 0, wait_s=0.02)
    assert (reply.status_code, reply.json()["round"]["contributed"]) == (202, ["a"])
    assert push(api, "b", 1, 0).json()["round"]["workers"] == ["a", "b"]
    done = push(api, "a", 1, 0, wait_s=0.02)
    assert (done.status_code, done.json()["duplicate"]) == (200, True)
    assert done.json()["applied_version"] == 1


def test_a_wait_s_of_0_still_gets_the_answer_if_the_round_closes(api: Api) -> None:
    created(api)
    push(api, "a", 1, 0, wait_s=0)
    reply = push(api, "b", 1, 0, wait_s=0)
    assert (reply.status_code, reply.json()["applied_version"]) == (200, 1)


def test_a_repeat_waits_while_the_round_is_open(api: Api) -> None:
    created(api)
    first = begin(api, "a", 1, 0, 2.0)
    again = api.start("POST", f"{S}/step", json=body_of("a", 1, 0, 2.0))
    push(api, "b", 1, 0, 4.0)
    said = [api.finish(started).json() for started in (first, again)]
    assert [s["duplicate"] for s in said] == [False, True]
    assert [s["applied_version"] for s in said] == [1, 1]
    assert api.get(f"{S}/workers").json()["workers"][0]["contributions"] == 1


def test_a_quorum_closes_at_the_deadline(api: Api) -> None:
    created(api, {**SYNC, "count": 3, "quorum": 1, "deadline_s": 0.05})
    told = push(api, "a", 1, 0).json()["round"]
    assert (told["workers"], told["missing"], told["closed_by"]) == (["a"], 2, "deadline")


@pytest.mark.parametrize("headers", [{}, WANTS_BINARY], ids=["json", "binary"])
def test_a_failed_round_is_409_and_its_seq_is_free(api: Api, headers: dict[str, str]) -> None:
    created(api, {**SYNC, "deadline_s": 0.05})
    reply = api.post(f"{S}/step", json=body_of("a", 1, 0), headers=headers)
    problem = refused(reply, 409, "round_failed")
    assert problem["version"] == 0
    assert problem["detail"] == (
        "round 1 failed: 1 of 2 workers had pushed after 0.05 s, 2 are needed"
    )
    assert api.patch(S, json={"workers": SYNC}).status_code == 200
    first = begin(api, "a", 1, 0, 7.0)
    assert push(api, "b", 1, 0, 1.0).json()["round"]["number"] == 2
    assert_params(api.finish(first).json()["params"], after(4.0))


# --- 409 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [
    {"mode": "sync", "count": 1}, {"mode": "async", "max_staleness": 0},
], ids=["sync", "async"])  # fmt: skip
def test_a_stale_push_gets_the_params_if_it_says_so(api: Api, workers: dict[str, Any]) -> None:
    created(api, workers)
    assert push(api, "a", 1, 0).status_code == 200
    for wanted in ({}, {"return": "none"}, {"return": "delta"}):
        for headers in ({}, WANTS_BINARY):
            reply = api.post(f"{S}/step", json=body_of("b", 1, 0, **wanted), headers=headers)
            problem = refused(reply, 409, "stale_gradient")
            assert (problem["version"], problem["base_version"]) == (1, 0)
            assert "params" not in problem
    wants = {"return": "params"}
    problem = refused(push(api, "b", 1, 0, **wants), 409, "stale_gradient")
    assert (problem["version"], problem["base_version"], problem["status"]) == (1, 0, 409)
    assert_params(problem["params"], after(1.0))
    encoded = push(api, "b", 1, 0, **wants, return_encoding="base64", return_dtype="float16")
    assert encoded.json()["params"]["b"]["dtype"] == "float16"
    binary = api.post(f"{S}/step", json=body_of("b", 1, 0, **wants), headers=WANTS_BINARY)
    assert binary.status_code == 409
    assert binary.headers["content-type"] == SAFETENSORS
    tensors, document = unframe(binary.content)
    assert document == {n: value for n, value in problem.items() if n != "params"}
    assert_params({n.removeprefix("param/"): t for n, t in tensors.items()}, after(1.0))
    # Refused, it used no number.
    assert push(api, "b", 1, 1).status_code == 200


def test_other_refusals_have_no_params(api: Api) -> None:
    created(api)
    push(api, "a", 1, 0, wait_s=0)
    wants = {"return": "params"}
    assert "params" not in refused(push(api, "a", 2, 0, **wants), 409, "conflict")
    assert "params" not in refused(push(api, "b", 1, 1, **wants), 409, "version_conflict")


def test_deleting_the_session_answers_who_waits(api: Api) -> None:
    created(api)
    first = begin(api, "a", 1, 0)
    assert api.delete(S).status_code == 200
    problem = refused(api.finish(first), 404, "session_not_found")
    assert problem["detail"] == "session 's' was deleted"


def test_a_patch_of_the_count_answers_who_waits(api: Api) -> None:
    created(api)
    first = begin(api, "a", 1, 0, 3.0)
    status = api.patch(S, json={"workers": {**SYNC, "count": 1}})
    assert status.status_code == 200
    assert_params(api.finish(first).json()["params"], after(3.0))


# --- deltas --------------------------------------------------------------------------------------


def test_deltas_in_json_and_binary_are_minus_the_gradient(api: Api) -> None:
    created(api, {**SYNC, "push": "deltas"})
    told = {"seq": 1, "base_version": 0}
    deltas = {n: (np.array(g) * -2.0).tolist() for n, g in GRADS.items()}
    first = api.post(f"{S}/step", json={"deltas": deltas, "worker": "a", **told, "wait_s": 0})
    assert first.status_code == 202
    content = frame(
        prefixed("delta", {n: np.array(g) * -4.0 for n, g in GRADS.items()}),
        {"worker": "b", **told},
    )
    reply = api.post(f"{S}/step", content=content, headers=BINARY)
    assert_params(reply.json()["params"], after(3.0))


def test_asynchronous_deltas_apply_on_arrival(api: Api) -> None:
    created(api, {"mode": "async", "push": "deltas"})
    deltas = {n: (-np.array(g)).tolist() for n, g in GRADS.items()}
    reply = api.post(f"{S}/step", json={"deltas": deltas})
    assert_params(reply.json()["params"], after(1.0))


# --- asynchronous --------------------------------------------------------------------------------


def test_an_asynchronous_push_is_applied_on_arrival_and_told_its_staleness(api: Api) -> None:
    created(api, {"mode": "async", "max_staleness": 2})
    for version, base in enumerate((0, 0, 0, 1)):
        reply = push(api, f"w{version}", 1, base, 2.0**version)
        assert reply.status_code == 200
        said = reply.json()
        assert (said["applied_version"], said["staleness"]) == (version + 1, version - base)
        assert said["weight"] == 1.0
        assert "round" not in said
    assert_params(reply.json()["params"], after(1.0, 2.0, 4.0, 8.0))
    again = push(api, "w2", 1, 0, 4.0).json()
    assert (again["duplicate"], again["applied_version"], again["staleness"]) == (True, 3, 2)
    refused(push(api, "w9", 1, 1), 409, "stale_gradient")


def test_a_stale_push_is_damped(api: Api) -> None:
    created(api, {"mode": "async", "max_staleness": 0, "on_stale": "damp"})
    weights = []
    for version in range(4):
        said = push(api, f"w{version}", 1, 0).json()
        assert said["staleness"] == version
        weights.append(said["weight"])
    assert weights == [1.0, 1 / 2, 1 / 3, 1 / 4]
    params = {n: np.array(p, "<f4") for n, p in PARAMS.items()}
    for weight in weights:
        for name, param in params.items():
            params[name] = param - np.float32(0.5) * (f32(GRADS[name]) * np.float32(weight))
    assert_params(said["params"], params)
    current = push(api, "w0", 2, 4).json()
    assert (current["staleness"], current["weight"]) == (0, 1.0)


def test_without_a_bound_nobody_needs_to_say_the_version(api: Api) -> None:
    created(api, {"mode": "async"})
    assert "staleness" not in api.post(f"{S}/step", json={"grads": GRADS}).json()
    for _ in range(3):
        api.post(f"{S}/step", json={"grads": GRADS})
    said = api.post(f"{S}/step", json={"grads": GRADS, "base_version": 0}).json()
    assert (said["staleness"], said["weight"]) == (4, 1.0)


def test_a_dry_run_of_an_asynchronous_push_leaves_no_trace(api: Api) -> None:
    created(api, {"mode": "async", "max_staleness": 0, "on_stale": "damp"})
    push(api, "a", 1, 0)
    before = api.get(f"{S}/state").content
    said = push(api, "b", 1, 0, dry_run=True).json()
    assert (said["dry_run"], said["staleness"], said["weight"]) == (True, 1, 0.5)
    assert api.get(f"{S}/state").content == before


def test_asynchronous_pushes_accumulate(api: Api) -> None:
    created(api, {"mode": "async", "max_staleness": 5}, accumulate=2)
    first = push(api, "a", 1, 0, 1.0).json()
    assert (first["applied"], first["accumulated"], first["staleness"]) == (False, 1, 0)
    second = push(api, "b", 1, 0, 2.0).json()
    assert_params(second["params"], after(3.0))
    rows = {row["worker"]: row for row in api.get(f"{S}/workers").json()["workers"]}
    assert [rows[name]["contributions"] for name in "ab"] == [1, 1]


# --- the other addresses -------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["/v1/step", "/step"])
def test_one_call_creates_the_session_with_its_first_push(api: Api, url: str) -> None:
    create = {"id": "s", "optimizer": {"name": "SGD", "lr": 0.5}, "workers": SYNC, "params": PARAMS}
    first = api.post(url, json={**create, **body_of("a", 1, 0, 2.0, wait_s=0)})
    assert first.status_code in (201, 202)
    assert first.json()["created"] is True
    assert first.json()["round"]["contributed"] == ["a"]
    assert api.get(f"{S}/workers").json()["round"]["contributed"] == ["a"]
    del create["params"]
    last = api.post(url, json={**create, **body_of("b", 1, 0, 4.0)})
    assert last.status_code == 200
    assert_params(last.json()["params"], after(3.0))
    again = api.post(url, json={"id": "s", **body_of("b", 1, 0, 4.0)})
    assert again.json()["code"] == "key_reused"  # the create fields are part of the request
    late = api.post(url, json={"id": "s", **body_of("c", 1, 0, **{"return": "params"})})
    assert_params(refused(late, 409, "stale_gradient")["params"], after(3.0))


def test_history_has_a_row_per_round_with_the_mean_loss(api: Api) -> None:
    created(api)
    push(api, "a", 1, 0, loss=1.0, metrics={"acc": 0.5}, wait_s=0)
    push(api, "b", 1, 0, loss=3.0)
    [row] = api.get(f"{S}/history").json()["rows"]
    assert (row["version"], row["loss"], row["metrics"]) == (1, 2.0, {"acc": 0.5})


def test_who_waits_for_the_next_version_is_answered_when_the_round_closes(api: Api) -> None:
    created(api)
    pull = {"min_version": 1, "wait_s": 30}
    waiting = api.start("GET", f"{S}/params", params=pull)
    push(api, "a", 1, 0, 2.0, wait_s=0)
    none = api.get(f"{S}/params", params={"min_version": 1, "wait_s": 0.01})
    assert none.status_code == 304
    push(api, "b", 1, 0, 4.0, **{"return": "none"})
    reply = api.finish(waiting)
    assert (reply.status_code, reply.json()["version"]) == (200, 1)
    assert_params(reply.json()["params"], after(3.0))


# --- registration --------------------------------------------------------------------------------


def register(api: Api, name: str, key: str | None = None, **headers: str) -> httpx.Response:
    told = {"idempotency-key": key} if key else {}
    return api.post(f"{S}/workers", json={"name": name}, headers={**told, **headers})


def test_a_registration_gives_an_epoch_and_fences_the_one_before(api: Api) -> None:
    generation = created(api)["generation"]
    first = register(api, "w", "k1")
    assert first.status_code == 200
    assert first.json() == {
        "id": "s",
        "generation": generation,
        "version": 0,
        "applied_version": None,
        "updates": 0,
        "duplicate": False,
        "durability": "memory",
        "worker": "w",
        "epoch": 1,
        "last_seq": 0,
    }
    assert register(api, "w", "k1").json() == {**first.json(), "duplicate": True}
    push(api, "w", 1, 0, epoch=1, wait_s=0)
    assert register(api, "w", "k2").json()["epoch"] == 2
    fenced = refused(push(api, "w", 2, 0, epoch=1), 409, "fenced")
    assert (fenced["epoch"], fenced["last_seq"]) == (2, 0)
    refused(push(api, "w", 1, 0, epoch=3), 409, "out_of_sequence")


def test_a_registration_can_be_answered_in_binary(api: Api) -> None:
    created(api)
    tensors, fields = unframe(register(api, "w", **WANTS_BINARY).content)
    assert (tensors, fields["epoch"]) == ({}, 1)


def test_workers_can_be_registered_where_there_are_no_rounds(api: Api) -> None:
    created(api, None)
    assert register(api, "w").json()["epoch"] == 1
    assert (
        api.post(f"{S}/step", json={"grads": GRADS, "worker": "w", "epoch": 1, "seq": 1}).json()[
            "updates"
        ]
        == 1
    )


def test_a_removed_worker_is_fenced_until_it_registers(api: Api) -> None:
    created(api)
    push(api, "w", 1, 0, wait_s=0)
    reply = api.delete(f"{S}/workers/w")
    assert reply.status_code == 200
    assert (reply.json()["worker"], reply.json()["removed"]) == ("w", True)
    refused(push(api, "w", 2, 0), 409, "fenced")
    refused(api.delete(f"{S}/workers/w"), 404, "worker_not_found")
    again = api.delete(f"{S}/workers/w", headers={"idempotency-key": "k"})
    refused(again, 404, "worker_not_found")
    assert register(api, "w").json()["epoch"] == 2
    gone = api.delete(f"{S}/workers/w", headers={"idempotency-key": "k"})
    repeat = api.delete(f"{S}/workers/w", headers={"idempotency-key": "k"})
    assert repeat.json() == {**gone.json(), "duplicate": True}


def test_the_list_says_who_there_is_and_how_far_the_round_is(api: Api) -> None:
    created(api, {**SYNC, "count": 2, "quorum": 1})
    push(api, "b", 1, 0, wait_s=0)
    push(api, "a", 1, 0)
    register(api, "c")
    push(api, "a", 2, 1, wait_s=0)
    said = api.get(f"{S}/workers").json()
    assert (said["id"], said["version"]) == ("s", 1)
    rows = said["workers"]
    assert [row["worker"] for row in rows] == ["a", "b", "c"]
    for row in rows:
        assert row.pop("last_seen") > 0
    assert rows[0] == {"worker": "a", "epoch": 1, "last_seq": 2, "version": 1, "staleness": 0,
                       "contributions": 2}  # fmt: skip
    assert rows[1] == {"worker": "b", "epoch": 1, "last_seq": 1, "version": 0, "staleness": 1,
                       "contributions": 1}  # fmt: skip
    assert rows[2] == {"worker": "c", "epoch": 1, "last_seq": 0, "version": None,
                       "staleness": None, "contributions": 0}  # fmt: skip
    told = said["round"]
    assert told["deadline_at"] - told["opened_at"] == SYNC["deadline_s"]
    assert {n: v for n, v in told.items() if not n.endswith("_at")} == {
        "number": 2,
        "base_version": 1,
        "contributed": ["a"],
        "count": 2,
        "quorum": 1,
    }


def test_a_refused_push_is_a_sign_of_life(api: Api) -> None:
    created(api, {**SYNC, "count": 1})
    push(api, "a", 1, 0)
    before = api.get(f"{S}/workers").json()["workers"][0]["last_seen"]
    refused(push(api, "a", 2, 0), 409, "stale_gradient")
    assert api.get(f"{S}/workers").json()["workers"][0]["last_seen"] > before


# --- over a socket -------------------------------------------------------------------------------


def test_over_a_socket_pushes_wait_side_by_side(app: Any) -> None:
    with served(app) as (host, port):
        url = f"http://{host}:{port}"
        body = {"optimizer": {"name": "SGD", "lr": 0.5}, "params": PARAMS,
                "workers": {**SYNC, "count": 8}}  # fmt: skip
        assert httpx.put(f"{url}{S}", json=body).status_code == 201
        connections = []
        for i in range(8):
            connection = http.client.HTTPConnection(host, port, timeout=30)
            content = frame(
                prefixed("grad", {n: np.array(g) * 2.0**i for n, g in GRADS.items()}),
                {"worker": f"w{i}", "seq": 1, "base_version": 0},
            )
            connection.request("POST", f"{S}/step", content, {**BINARY, **WANTS_BINARY})
            connections.append(connection)
        for connection in connections:
            reply = connection.getresponse()
            tensors, fields = unframe(reply.read())
            assert (reply.status, fields["applied_version"]) == (200, 1)
            assert_params({n.removeprefix("param/"): t for n, t in tensors.items()}, after(255 / 8))
            connection.close()


def test_a_client_that_hangs_up_counts_all_the_same(app: Any) -> None:
    with served(app) as (host, port), httpx.Client(base_url=f"http://{host}:{port}") as http_:
        body = {"optimizer": {"name": "SGD", "lr": 0.5}, "params": PARAMS, "workers": SYNC}
        assert http_.put(S, json=body).status_code == 201
        gone = http.client.HTTPConnection(host, port)
        sent = json.dumps(body_of("a", 1, 0, 2.0))
        gone.request("POST", f"{S}/step", sent, JSON)
        wait_until(lambda: http_.get(f"{S}/workers").json()["round"], "the push")
        gone.close()
        reply = http_.post(f"{S}/step", json=body_of("b", 1, 0, 4.0))
        assert_params(reply.json()["params"], after(3.0))
        again = http_.post(f"{S}/step", content=sent, headers=JSON).json()
        assert (again["duplicate"], again["applied_version"]) == (True, 1)


def test_a_stop_answers_who_waits_and_the_round_goes_on_after_the_start(tmp_path: Path) -> None:
    env = {"OPTSERVE_DRAIN_S": "60"}  # which nobody waits for
    with ServerProcess(data_dir=tmp_path, env=env) as server:
        body = {"optimizer": {"name": "SGD", "lr": 0.5}, "params": PARAMS, "workers": SYNC}
        assert httpx.put(f"{server.url}{S}", json=body).status_code == 201
        url = httpx.URL(server.url)
        waiting = http.client.HTTPConnection(url.host, url.port or 0, timeout=30)
        sent = json.dumps(body_of("a", 1, 0, 2.0))
        waiting.request("POST", f"{S}/step", sent, JSON)
        look = lambda: httpx.get(f"{server.url}{S}/workers").json()["round"]
        wait_until(look, "the push")
        server.process.send_signal(signal.SIGTERM)
        reply = waiting.getresponse()
        assert (reply.status, json.loads(reply.read())["round"]["contributed"]) == (202, ["a"])
        waiting.close()
        assert server.process.wait(10) == 0
    with ServerProcess(data_dir=tmp_path, env=env) as server:
        held = httpx.get(f"{server.url}{S}/workers").json()["round"]
        assert held["contributed"] == ["a"]
        reply = httpx.post(f"{server.url}{S}/step", json=body_of("b", 1, 0, 4.0))
        assert_params(reply.json()["params"], after(3.0))
        said = httpx.post(f"{server.url}{S}/step", content=sent, headers=JSON).json()
        assert (said["duplicate"], said["applied_version"]) == (True, 1)


def test_the_metadata_of_a_binary_202_is_what_the_json_says(api: Api) -> None:
    created(api)
    sent = body_of("a", 1, 0, wait_s=0)
    said = api.post(f"{S}/step", json=sent).json()
    reply = api.post(f"{S}/step", json=sent, headers=WANTS_BINARY)
    tensors, metadata = wire.decode(reply.content)
    assert tensors == {}
    assert json.loads(metadata[META_KEY]) == {**said, "duplicate": True}
