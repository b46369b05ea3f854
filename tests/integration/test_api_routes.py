"""Every route, asked for something that it can do."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
import safetensors.numpy
import torch

from optserve_client.wire import SAFETENSORS
from tests.integration.api_client import (
    BINARY,
    CREATE,
    GRADS,
    JSON,
    Api,
    asking,
    f32,
    frame,
    prefixed,
    unframe,
)


@pytest.fixture
def api(app: Any) -> Iterator[Api]:
    with asking(app) as api:
        yield api


@pytest.fixture
def session(api: Api) -> str:
    """The path of a session that has made one step."""
    assert api.put("/v1/sessions/s", json=CREATE).status_code == 201
    assert api.post("/v1/sessions/s/step", json={"grads": GRADS, "loss": 2.5}).status_code == 200
    return "/v1/sessions/s"


def adamw_after(steps: int) -> dict[str, torch.Tensor]:
    """Return what local torch makes of CREATE and GRADS."""
    params = {name: torch.tensor(value) for name, value in CREATE["params"].items()}
    optimizer = torch.optim.AdamW(list(params.values()), lr=0.1, fused=True)
    for _ in range(steps):
        for name, param in params.items():
            param.grad = torch.tensor(GRADS[name])
        optimizer.step()
    return params


def assert_equal(served: dict[str, Any], local: dict[str, torch.Tensor]) -> None:
    assert list(served) == list(local)
    for name, tensor in local.items():
        assert torch.equal(torch.from_numpy(np.array(served[name], "<f4")), tensor), name


# --- sessions ------------------------------------------------------------------------------------


def test_post_creates_a_session_under_an_id_of_the_servers_choice(api: Api) -> None:
    reply = api.post("/v1/sessions", json=CREATE)
    assert reply.status_code == 201
    assert reply.json()["created"] is True
    assert reply.headers["location"] == f"/v1/sessions/{reply.json()['id']}"
    assert api.get(reply.headers["location"]).json()["version"] == 0


def test_a_repeated_post_with_the_same_key_creates_one_session(api: Api) -> None:
    headers = {"idempotency-key": "k-1"}
    first, second = (api.post("/v1/sessions", json=CREATE, headers=headers) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 200)
    assert second.json()["id"] == first.json()["id"]
    assert second.json()["duplicate"] is True
    assert len(api.get("/v1/sessions").json()["sessions"]) == 1


def test_put_creates_once_and_then_finds_it(api: Api) -> None:
    first = api.put("/v1/sessions/s", json=CREATE)
    again = api.put("/v1/sessions/s", json={**CREATE, "params": {"w": [[9.0, 9], [9, 9]], "b": 1}})
    assert (first.status_code, again.status_code) == (201, 200)
    assert (first.json()["created"], again.json()["created"]) == (True, False)
    other = api.put("/v1/sessions/s", json={**CREATE, "optimizer": "SGD"})
    assert (other.status_code, other.json()["code"]) == (409, "session_exists")


def test_a_binary_body_creates_the_same_session_in_byte_order_or_the_order_given(
    api: Api,
) -> None:
    tensors = prefixed("param", CREATE["params"])
    fields = {"optimizer": CREATE["optimizer"]}
    sorted_ = api.put("/v1/sessions/a", content=frame(tensors, fields), headers=BINARY).json()
    fields |= {"order": ["w", "b"]}
    given = api.put("/v1/sessions/b", content=frame(tensors, fields), headers=BINARY).json()
    assert (sorted_["order"], given["order"]) == (["b", "w"], ["w", "b"])
    assert api.get("/v1/sessions/b/params").json()["params"] == CREATE["params"]


def test_the_order_of_the_params_in_json_is_kept(api: Api) -> None:
    api.put("/v1/sessions/s", json={"optimizer": "SGD", "params": {"z": [1.0], "a": [2.0]}})
    assert list(api.get("/v1/sessions/s/params").json()["params"]) == ["z", "a"]


def test_lists_take_the_dtype_that_the_session_asks_for(api: Api) -> None:
    body = {"optimizer": "SGD", "params": {"w": [0.1]}, "dtype": "float64"}
    api.put("/v1/sessions/s", json=body)
    assert api.get("/v1/sessions/s/params").json()["params"]["w"] == [0.1]
    shape = api.get("/v1/sessions/s").json()["params"]["w"]
    assert shape == {"shape": [1], "dtype": "float64"}


def test_status_shows_config_counters_and_the_line_of_torch(api: Api, session: str) -> None:
    status = api.get(session).json()
    assert (status["id"], status["version"], status["updates"]) == ("s", 1, 1)
    assert status["config"]["optimizer"]["lr"] == 0.1
    assert status["groups"][0]["params"] == ["w", "b"]
    assert status["torch"].startswith("torch.optim.AdamW(params, lr=0.1")


def test_the_list_has_pages_tags_and_an_order(api: Api) -> None:
    for name in ("b", "a", "c"):
        tags = {"kind": "odd" if name == "b" else "even", "a": "1"}
        api.put(f"/v1/sessions/{name}", json={**CREATE, "name": name, "tags": tags})

    def ids(query: str) -> list[str]:
        return [row["id"] for row in api.get(f"/v1/sessions?{query}").json()["sessions"]]

    assert ids("") == ["b", "a", "c"]
    assert ids("order_by=-name") == ["c", "b", "a"]
    assert ids("tag=kind:even&order_by=name") == ["a", "c"]
    assert ids("tag=kind:even&tag=a:2") == []
    page = api.get("/v1/sessions?limit=2&order_by=name").json()
    assert [row["id"] for row in page["sessions"]] == ["a", "b"]
    rest = api.get("/v1/sessions", params={"order_by": "name", "cursor": page["next_cursor"]})
    assert [row["id"] for row in rest.json()["sessions"]] == ["c"]
    assert rest.json()["next_cursor"] is None


def test_patch_changes_what_it_names_and_nothing_else(api: Api, session: str) -> None:
    reply = api.patch(session, json={"clip_grad_norm": 1.0, "name": "run 7"})
    assert (reply.status_code, reply.json()["version"]) == (200, 1)
    status = api.get(session).json()
    assert (status["name"], status["config"]["clip_grad_norm"]) == ("run 7", 1.0)
    assert status["config"]["accumulate"] == {"steps": 1, "reduce": "sum"}


def test_delete_forgets_the_session(api: Api, session: str) -> None:
    reply = api.delete(session)
    assert (reply.status_code, reply.json()["deleted"]) == (200, True)
    assert (api.get(session).status_code, api.delete(session).status_code) == (404, 404)


def test_fork_copies_and_then_goes_its_own_way(api: Api, session: str) -> None:
    reply = api.post(f"{session}/fork", json={"id": "t", "name": "copy"})
    assert (reply.status_code, reply.headers["location"]) == (201, "/v1/sessions/t")
    assert reply.json()["forked_from"]["id"] == "s"
    assert reply.json()["generation"] != api.get(session).json()["generation"]
    api.post("/v1/sessions/t/step", json={"grads": GRADS})
    assert_equal(api.get("/v1/sessions/t/params").json()["params"], adamw_after(2))
    assert_equal(api.get(f"{session}/params").json()["params"], adamw_after(1))


def test_fork_needs_no_body(api: Api, session: str) -> None:
    assert api.post(f"{session}/fork").status_code == 201


# --- step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["list", "base64"])
def test_a_json_step_answers_what_torch_computes(api: Api, session: str, encoding: str) -> None:
    reply = api.post(f"{session}/step", json={"grads": GRADS, "return_encoding": encoding})
    assert reply.status_code == 200
    served = reply.json()["params"]
    if encoding == "base64":
        assert served["b"]["dtype"] == "float32"
        served = api.get(f"{session}/params").json()["params"]
    assert_equal(served, adamw_after(2))
    assert reply.json()["version"] == reply.json()["applied_version"] == 2


def test_a_binary_step_with_a_binary_reply(api: Api, session: str) -> None:
    body = frame(prefixed("grad", GRADS), {"loss": 1.5})
    reply = api.post(f"{session}/step", content=body, headers={**BINARY, "accept": SAFETENSORS})
    assert (reply.status_code, reply.headers["content-type"]) == (200, SAFETENSORS)
    tensors, fields = unframe(reply.content)
    assert fields["version"] == 2
    assert_equal({n.removeprefix("param/"): t for n, t in tensors.items()}, adamw_after(2))


def test_json_in_and_binary_out_and_the_other_way_round(api: Api, session: str) -> None:
    binary = api.post(f"{session}/step", json={"grads": GRADS}, headers={"accept": SAFETENSORS})
    assert_equal(
        {n.removeprefix("param/"): t for n, t in unframe(binary.content)[0].items()}, adamw_after(2)
    )
    body = frame(prefixed("grad", GRADS), {})
    assert_equal(
        api.post(f"{session}/step", content=body, headers=BINARY).json()["params"], adamw_after(3)
    )


@pytest.mark.parametrize("binary", [False, True])
def test_a_repeat_of_a_step_is_answered_and_not_applied(
    api: Api, session: str, binary: bool
) -> None:
    sender = {"worker": "w-1", "epoch": 1, "seq": 1}
    content = (
        frame(prefixed("grad", GRADS), sender)
        if binary
        else orjson.dumps({"grads": GRADS, **sender})
    )
    headers = BINARY if binary else JSON
    first, again = (
        api.post(f"{session}/step", content=content, headers=headers).json() for _ in range(2)
    )
    assert (first["duplicate"], again["duplicate"]) == (False, True)
    assert (first["version"], again["version"], again["applied_version"]) == (2, 2, 2)
    other = {"grads": {**GRADS, "b": 0.0}, **sender}
    refused = api.post(f"{session}/step", json=other)
    assert (refused.status_code, refused.json()["code"]) == (422, "key_reused")


def test_a_step_with_an_idempotency_key_is_applied_once(api: Api, session: str) -> None:
    headers = {"idempotency-key": "a-key"}
    replies = [
        api.post(f"{session}/step", json={"grads": GRADS}, headers=headers).json() for _ in range(2)
    ]
    assert [reply["duplicate"] for reply in replies] == [False, True]
    assert api.get(session).json()["version"] == 2


def test_a_dry_run_changes_nothing(api: Api, session: str) -> None:
    before = api.get(f"{session}/state").content
    reply = api.post(f"{session}/step", json={"grads": GRADS, "dry_run": True})
    assert_equal(reply.json()["params"], adamw_after(2))
    assert api.get(f"{session}/state").content == before


def test_return_none_and_delta(api: Api, session: str) -> None:
    nothing = api.post(f"{session}/step", json={"grads": GRADS, "return": "none"}).json()
    assert "params" not in nothing
    delta = api.post(f"{session}/step", json={"grads": GRADS, "return": "delta"}).json()
    two, three = adamw_after(2), adamw_after(3)
    assert_equal(delta["params"], {name: three[name] - two[name] for name in two})


def test_a_reply_in_a_narrower_dtype_is_rounded(api: Api, session: str) -> None:
    reply = api.post(
        f"{session}/step",
        json={"grads": GRADS, "return_dtype": "bfloat16", "return_encoding": "base64"},
    ).json()
    assert reply["params"]["w"]["dtype"] == "bfloat16"
    rounded = adamw_after(2)["w"].to(torch.bfloat16)
    pulled = api.get(f"{session}/params?dtype=bfloat16").json()["params"]["w"]
    assert torch.equal(torch.tensor(pulled), rounded.to(torch.float32))


def test_sparse_gradients_in_json_and_binary(api: Api) -> None:
    body = {"optimizer": {"name": "SGD", "lr": 1.0}, "params": {"e": [[1.0], [2.0], [3.0]]}}
    api.put("/v1/sessions/s", json={**body, "sparse": ["e"]})
    coo = {"indices": [[2, 0, 2]], "values": [[1.0], [2.0], [0.5]], "shape": [3, 1]}
    one = api.post("/v1/sessions/s/step", json={"grads": {"e": coo}}).json()
    assert one["params"]["e"] == [[-1.0], [2.0], [1.5]]
    tensors = {
        "sparse/e/indices": np.array([[1]], "<i8"),
        "sparse/e/values": f32([[4.0]]),
    }
    two = api.post("/v1/sessions/s/step", content=frame(tensors, {}), headers=BINARY).json()
    assert two["params"]["e"] == [[-1.0], [-2.0], [1.5]]


# --- params --------------------------------------------------------------------------------------


def test_params_are_pulled_as_lists_base64_or_binary(api: Api, session: str) -> None:
    local = adamw_after(1)
    reply = api.get(f"{session}/params")
    assert_equal(reply.json()["params"], local)
    assert (reply.json()["version"], reply.json()["weights"]) == (1, "live")
    binary = api.get(f"{session}/params", headers={"accept": SAFETENSORS})
    loaded = safetensors.numpy.load(binary.content)
    assert_equal({n: loaded[f"param/{n}"] for n in local}, local)
    assert binary.headers["etag"] != reply.headers["etag"]


@pytest.mark.parametrize("names", ["names=b&names=w", "names=b,w"])
def test_names_choose_and_the_sessions_order_stays(api: Api, session: str, names: str) -> None:
    assert list(api.get(f"{session}/params?{names}").json()["params"]) == ["w", "b"]
    assert list(api.get(f"{session}/params?names=b").json()["params"]) == ["b"]


def test_a_name_with_a_comma_can_be_asked_for(api: Api) -> None:
    api.put("/v1/sessions/s", json={"optimizer": "SGD", "params": {"a,b": [1.0], "c": [2.0]}})
    assert list(api.get("/v1/sessions/s/params?names=a,b").json()["params"]) == ["a,b"]


def test_an_unchanged_pull_is_304_until_the_next_step(api: Api, session: str) -> None:
    etag = api.get(f"{session}/params").headers["etag"]
    for condition in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        reply = api.get(f"{session}/params", headers={"if-none-match": condition})
        assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", etag)
    for query in ("?names=b", "?encoding=base64", "?dtype=float64"):
        again = api.get(f"{session}/params{query}", headers={"if-none-match": etag})
        assert again.status_code == 200
    api.post(f"{session}/step", json={"grads": GRADS})
    assert api.get(f"{session}/params", headers={"if-none-match": etag}).status_code == 200


def test_head_of_params_has_the_etag_and_no_body(api: Api, session: str) -> None:
    reply = api.head(f"{session}/params")
    assert (reply.status_code, reply.content) == (200, b"")
    assert reply.headers["etag"] == api.get(f"{session}/params").headers["etag"]


@pytest.mark.parametrize("binary", [False, True])
def test_put_params_overwrites_and_keeps_the_optimizers_state(
    api: Api, session: str, binary: bool
) -> None:
    fresh = {"w": [[0.0, 0.0], [0.0, 0.0]], "b": 7.0}
    if binary:
        content = frame(prefixed("param", fresh), {"worker": "x", "seq": 1})
        reply = api.put(f"{session}/params", content=content, headers=BINARY)
    else:
        reply = api.put(f"{session}/params", json={"params": fresh, "worker": "x", "seq": 1})
    assert (reply.status_code, reply.json()["version"]) == (200, 2)
    assert api.get(f"{session}/params").json()["params"] == fresh
    assert api.get(session).json()["updates"] == 1


def test_put_params_only_if_nothing_changed(api: Api, session: str) -> None:
    etag = api.get(f"{session}/params").headers["etag"]
    body = {"params": CREATE["params"]}
    first, second = (
        api.put(f"{session}/params", json=body, headers={"if-match": etag}) for _ in range(2)
    )
    assert (first.status_code, second.status_code) == (200, 412)
    assert second.json()["code"] == "precondition_failed"


def test_ema_and_best_weights(api: Api) -> None:
    api.put("/v1/sessions/s", json={**CREATE, "ema": {"decay": 0.5}, "best": {"monitor": "loss"}})
    for loss in (1.0, 5.0):
        api.post("/v1/sessions/s/step", json={"grads": GRADS, "loss": loss})
    best = api.get("/v1/sessions/s/params?weights=best").json()
    assert best["params"] == CREATE["params"]
    one, two = adamw_after(1)["w"], adamw_after(2)["w"]
    ema = torch.tensor(api.get("/v1/sessions/s/params?weights=ema").json()["params"]["w"])
    assert torch.equal(ema, torch.lerp(one, two, 0.5))


# --- groups, scheduler ---------------------------------------------------------------------------


def test_patch_group_sets_a_hyperparameter_now(api: Api, session: str) -> None:
    reply = api.patch(f"{session}/groups/0", json={"lr": 0.5, "worker": "a", "seq": 1})
    assert (reply.status_code, reply.json()["groups"][0]["lr"]) == (200, 0.5)
    again = api.patch(f"{session}/groups/0", json={"lr": 0.5, "worker": "a", "seq": 1})
    assert again.json()["duplicate"] is True


@pytest.mark.parametrize("binary", [False, True])
def test_add_group_brings_its_own_params(api: Api, session: str, binary: bool) -> None:
    if binary:
        content = frame(prefixed("param", {"head": [1.0, 2.0]}), {"lr": 0.3})
        reply = api.post(f"{session}/groups", content=content, headers=BINARY)
    else:
        reply = api.post(f"{session}/groups", json={"params": {"head": [1.0, 2.0]}, "lr": 0.3})
    assert (reply.status_code, reply.json()["groups"][1]["lr"]) == (200, 0.3)
    assert list(api.get(f"{session}/params").json()["params"]) == ["w", "b", "head"]
    step = api.post(f"{session}/step", json={"grads": {**GRADS, "head": [1.0, 1.0]}})
    assert step.status_code == 200


def test_a_scheduler_is_put_read_advanced_previewed_and_taken_away(api: Api, session: str) -> None:
    spec = {"name": "StepLR", "step_size": 1, "gamma": 0.5}
    put = api.put(f"{session}/scheduler", json=spec)
    assert (put.status_code, put.json()["scheduler"]["last_epoch"]) == (200, 0)
    assert api.get(f"{session}/scheduler").json()["spec"]["gamma"] == 0.5
    preview = api.get(f"{session}/scheduler/preview?steps=3").json()["steps"]
    assert [row[0]["lr"] for row in preview] == [0.1, 0.05, 0.025]
    advanced = api.post(f"{session}/scheduler/step")
    assert advanced.json()["scheduler"]["next_lr"] == [0.05]
    with_body = api.post(f"{session}/scheduler/step", json={"worker": "a", "seq": 1})
    assert with_body.json()["scheduler"]["next_lr"] == [0.025]
    gone = api.put(
        f"{session}/scheduler", content=b"null", headers={"content-type": "application/json"}
    )
    assert gone.json()["scheduler"] is None
    assert api.get(f"{session}/scheduler").status_code == 409


def test_a_list_is_a_chained_scheduler_and_the_query_says_who_sent_it(
    api: Api, session: str
) -> None:
    spec = [{"name": "ExponentialLR", "gamma": 0.5}, {"name": "ConstantLR"}]
    url = f"{session}/scheduler?worker=a&epoch=1&seq=1"
    first, again = (api.put(url, json=spec).json() for _ in range(2))
    assert (first["duplicate"], again["duplicate"]) == (False, True)
    assert api.get(f"{session}/scheduler").json()["spec"]["name"] == "ChainedScheduler"


def test_reduce_on_plateau_takes_metrics(api: Api, session: str) -> None:
    api.put(f"{session}/scheduler", json={"name": "ReduceLROnPlateau", "patience": 0})
    for metric in (1.0, 1.0):
        reply = api.post(f"{session}/scheduler/step", json={"metrics": metric})
    assert reply.json()["scheduler"]["next_lr"] == pytest.approx([0.01])
    preview = api.get(f"{session}/scheduler/preview?steps=2&metrics=5&metrics=5").json()
    assert len(preview["steps"]) == 2


def test_a_schedule_can_be_looked_at_without_a_session(api: Api) -> None:
    body = {
        "optimizer": {"name": "SGD", "lr": 1.0, "momentum": 0.9},
        "groups": [{}, {"lr": 0.1}],
        "scheduler": {"name": "MultiStepLR", "milestones": [2], "gamma": 0.1},
        "steps": 3,
    }
    steps = api.post("/v1/schedulers/preview", json=body).json()["steps"]
    assert [[group["lr"] for group in row] for row in steps[:2]] == [[1.0, 0.1], [1.0, 0.1]]
    assert [group["lr"] for group in steps[2]] == pytest.approx([0.1, 0.01])


# --- history -------------------------------------------------------------------------------------


def test_history_as_json_ndjson_and_csv(api: Api, session: str) -> None:
    api.post(f"{session}/step", json={"grads": GRADS, "metrics": {"acc": 0.5}})
    rows = api.get(f"{session}/history").json()["rows"]
    assert [(row["version"], row["loss"], row["lr"]) for row in rows][-2:] == [
        (1, 2.5, [0.1]),
        (2, None, [0.1]),
    ]
    lines = api.get(f"{session}/history", headers={"accept": "application/x-ndjson"})
    assert lines.headers["content-type"].startswith("application/x-ndjson")
    assert [orjson.loads(line) for line in lines.content.splitlines()] == rows
    text = api.get(f"{session}/history?format=csv")
    assert text.headers["content-type"] == "text/csv; charset=utf-8"
    table = list(csv.DictReader(io.StringIO(text.text)))
    assert (table[-1]["version"], table[-1]["lr.0"], table[-1]["metrics.acc"]) == (
        "2",
        "0.1",
        "0.5",
    )
    assert table[-1]["loss"] == ""


def test_history_goes_on_after_the_last_version_of_a_page(api: Api, session: str) -> None:
    for _ in range(3):
        api.post(f"{session}/step", json={"grads": GRADS, "return": "none"})
    page = api.get(f"{session}/history?after=1&limit=2").json()
    assert [row["version"] for row in page["rows"]] == [2, 3]
    rest = api.get(f"{session}/history?after={page['next_after']}&limit=2").json()
    assert ([row["version"] for row in rest["rows"]], rest["next_after"]) == ([4], None)


def test_metrics_can_come_later(api: Api, session: str) -> None:
    reply = api.put(f"{session}/metrics", json={"version": 1, "metrics": {"acc": 0.75}})
    assert reply.status_code == 200
    assert api.get(f"{session}/history").json()["rows"][-1]["metrics"] == {"acc": 0.75}


# --- state ---------------------------------------------------------------------------------------


def test_a_state_file_makes_an_equal_session(api: Api, session: str) -> None:
    exported = api.get(f"{session}/state")
    assert exported.headers["content-type"] == SAFETENSORS
    assert exported.headers["content-disposition"] == 'attachment; filename="s.safetensors"'
    assert "param/w" in safetensors.numpy.load(exported.content)
    made = api.put("/v1/sessions/t/state", content=exported.content, headers=BINARY)
    assert made.status_code == 201
    again = api.put("/v1/sessions/t/state", content=exported.content, headers=BINARY)
    assert again.status_code == 200
    api.post("/v1/sessions/t/step", json={"grads": GRADS})
    assert_equal(api.get("/v1/sessions/t/params").json()["params"], adamw_after(2))


def test_an_import_with_the_same_seq_is_applied_once(api: Api, session: str) -> None:
    content = api.get(f"{session}/state").content
    url = f"{session}/state?worker=a&seq=1"
    first, again = (api.put(url, content=content, headers=BINARY).json() for _ in range(2))
    assert (first["duplicate"], again["duplicate"]) == (False, True)


# --- catalogue, operations -----------------------------------------------------------------------


def test_the_catalogue_lists_and_describes(api: Api) -> None:
    names = [entry["name"] for entry in api.get("/v1/optimizers").json()["optimizers"]]
    assert {"AdamW", "SGD", "LBFGS"} <= set(names)
    assert api.get("/v1/optimizers/adamw").json()["name"] == "AdamW"
    schedulers = api.get("/v1/schedulers").json()["schedulers"]
    assert len(schedulers) == 15
    assert api.get("/v1/schedulers/step_lr").json()["name"] == "StepLR"


def test_probes_and_version(api: Api, registry: Any) -> None:
    assert api.get("/healthz").json() == {"status": "ok"}
    cold = api.get("/readyz")
    assert (cold.status_code, cold.headers["retry-after"]) == (503, "1")
    registry.warm()
    assert api.get("/readyz").json() == {"status": "ready"}
    version = api.get("/version").json()
    assert version["torch"] == torch.__version__
    assert (version["device"], version["store"]) == ("cpu", "memory")


def test_the_root_leads_to_the_api_page(api: Api) -> None:
    reply = api.get("/")
    assert (reply.status_code, reply.headers["location"]) == (307, "docs")
