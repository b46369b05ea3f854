"""Bad requests: each row has a status, a code and a sentence, and leaves the session as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from optserve.api.app import create_app
from optserve.settings import Settings
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
)

S = "/v1/sessions/s"


class Bad(NamedTuple):
    """One request and what must come of it."""

    method: str
    url: str
    sent: dict[str, Any]
    status: int
    code: str
    sentence: str


def text(content: bytes | str) -> dict[str, Any]:
    raw = content.encode() if isinstance(content, str) else content
    return {"content": raw, "headers": JSON}


def binary(content: bytes, **headers: str) -> dict[str, Any]:
    return {"content": content, "headers": {**BINARY, **headers}}


def step(**fields: Any) -> dict[str, Any]:
    return {"json": {"grads": GRADS, **fields}}


GRAD_FRAME = frame(prefixed("grad", GRADS), {})

ROWS = [
    # paths and methods
    Bad("GET", "/v1/nowhere", {}, 404, "not_found", "there is nothing at '/v1/nowhere'"),
    Bad("GET", "/v1/sessions/", {}, 404, "not_found", "there is nothing at '/v1/sessions/'"),
    Bad("GET", f"{S}/", {}, 404, "not_found", f"there is nothing at '{S}/'"),
    Bad("GET", f"{S}/step", {}, 405, "method_not_allowed", "allowed: POST"),
    Bad("DELETE", f"{S}/params", {}, 405, "method_not_allowed", "allowed: GET, HEAD, PUT"),
    Bad("POST", S, {}, 405, "method_not_allowed", "allowed: DELETE, GET, HEAD, PATCH, PUT"),
    Bad("GET", "/v1/sessions/no", {}, 404, "session_not_found", "no session 'no'"),
    Bad("POST", "/v1/sessions/no/step", step(), 404, "session_not_found", "no session 'no'"),
    Bad("GET", "/v1/sessions/a%20b/params", {}, 404, "session_not_found", "no session 'a b'"),
    Bad("GET", "/v1/optimizers/adamm", {}, 404, "not_found", "adamm"),
    Bad("GET", "/v1/schedulers/stepplr", {}, 404, "not_found", "StepLR"),
    Bad("GET", "/docs/secret.txt", {}, 404, "not_found", "/docs/secret.txt"),
    Bad("GET", "/docs/..%2fapp.py", {}, 404, "not_found", "there is nothing"),
    # media types
    Bad("POST", f"{S}/step", {"content": b"{}"}, 415, "unsupported_media_type", "is missing"),
    Bad(
        "POST",
        f"{S}/step",
        {"content": b"{}", "headers": {"content-type": "text/plain"}},
        415,
        "unsupported_media_type",
        "Content-Type must be application/json or application/vnd.safetensors, got 'text/plain'",
    ),
    Bad(
        "PATCH",
        S,
        binary(GRAD_FRAME),
        415,
        "unsupported_media_type",
        "Content-Type must be application/json, got 'application/vnd.safetensors'",
    ),
    Bad("PUT", f"{S}/state", text("{}"), 415, "unsupported_media_type", SAFETENSORS),
    Bad(
        "POST",
        f"{S}/step",
        {"content": b"{}", "headers": {**JSON, "content-encoding": "br"}},
        415,
        "unsupported_media_type",
        "Content-Encoding must be zstd, gzip or identity, got 'br'",
    ),
    Bad(
        "POST",
        f"{S}/step",
        {**step(), "headers": {"accept": "text/html"}},
        406,
        "not_acceptable",
        "Accept must allow application/json or application/vnd.safetensors, got 'text/html'",
    ),
    Bad("GET", S, {"headers": {"accept": SAFETENSORS}}, 406, "not_acceptable", "got"),
    Bad(
        "GET", f"{S}/state", {"headers": {"accept": "application/json"}}, 406, "not_acceptable", ""
    ),
    # JSON text
    Bad("POST", f"{S}/step", {}, 400, "malformed", "the body is empty, expected a step"),
    Bad("PUT", "/v1/sessions/t", {}, 400, "malformed", "the body is empty, expected an object"),
    Bad("POST", f"{S}/step", text("{"), 400, "malformed", "is not JSON: unexpected end of data"),
    Bad("POST", f"{S}/step", text("[]"), 400, "malformed", "must be a JSON object, got a list"),
    Bad("PATCH", S, text("null"), 400, "malformed", "must be a JSON object, got null"),
    Bad(
        "POST",
        f"{S}/step",
        text('{"grads": {"w": [[NaN, 1], [1, 1]], "b": 1}}'),
        400,
        "malformed",
        "NaN at byte 18 is no JSON number",
    ),
    Bad(
        "POST",
        f"{S}/step",
        text('{"loss": 1, "grads": {}, "loss": 2}'),
        400,
        "malformed",
        "the body has the key 'loss' twice in one object",
    ),
    Bad("PUT", f"{S}/scheduler", text('{"name": '), 400, "malformed", "is not JSON"),
    Bad("POST", f"{S}/step", text(b'{"loss": "\xff"}'), 400, "malformed", "is not UTF-8"),
    Bad("POST", f"{S}/step", text("[" * 70 + "]" * 70), 400, "malformed", "64 levels"),
    # frames
    Bad("POST", f"{S}/step", binary(b"short"), 400, "malformed", "inside its header"),
    Bad("POST", f"{S}/step", binary(GRAD_FRAME[:-1]), 400, "malformed", "the body ended after"),
    Bad("POST", f"{S}/step", binary(GRAD_FRAME + b"x"), 400, "malformed", "the body goes on"),
    Bad("PUT", f"{S}/params", binary(b"\xff" * 20), 400, "malformed", "the header length must be"),
    Bad("PUT", f"{S}/state", binary(GRAD_FRAME), 400, "malformed", "format"),
    Bad(
        "POST",
        f"{S}/step",
        binary(frame({"grad/w": f32([[1, 1], [1, 1]]), "oops": f32([1])}, {})),
        422,
        "invalid",
        "tensor 'oops' must be called grad/<name>",
    ),
    Bad(
        "PUT",
        f"{S}/params",
        binary(frame(prefixed("grad", GRADS), {})),
        422,
        "invalid",
        "tensor 'grad/w' is not called param/<name>",
    ),
    Bad(
        "PUT",
        f"{S}/params",
        binary(frame(prefixed("param", GRADS), {"params": {}})),
        422,
        "invalid",
        "params of a binary body are its tensors",
    ),
    # create
    Bad("PUT", "/v1/sessions/t", {"json": {"params": {}}}, 422, "invalid", "optimizer"),
    Bad(
        "PUT",
        "/v1/sessions/t",
        {"json": {"optimizer": "SGD"}},
        422,
        "invalid",
        "params is empty; a session needs at least one parameter",
    ),
    Bad(
        "PUT",
        "/v1/sessions/t",
        {"json": {**CREATE, "params": [1]}},
        422,
        "invalid",
        "params must be an object of tensors by name, got [1]",
    ),
    Bad(
        "PUT",
        "/v1/sessions/t",
        {"json": {**CREATE, "params": {"w": [[1, 2], [3]]}}},
        422,
        "invalid",
        "params['w'] is ragged",
    ),
    Bad(
        "PUT",
        "/v1/sessions/t",
        {"json": {**CREATE, "clip_norm": 1}},
        422,
        "invalid",
        "unknown field 'clip_norm' (did you mean 'clip_grad_norm'?)",
    ),
    Bad("PUT", "/v1/sessions/t", {"json": {**CREATE, "dtype": "f7"}}, 422, "invalid", "'f7'"),
    Bad("PUT", "/v1/sessions/t", {"json": {**CREATE, "order": 5}}, 422, "invalid", "order must"),
    Bad("PUT", "/v1/sessions/t", {"json": {**CREATE, "id": "u"}}, 422, "invalid", "id is no field"),
    Bad("POST", "/v1/sessions", {"json": {**CREATE, "id": "u"}}, 422, "invalid", "PUT"),
    Bad(
        "PUT",
        "/v1/sessions/a%20b",
        {"json": CREATE},
        422,
        "invalid",
        "session id must match",
    ),
    Bad(
        "PUT",
        S,
        {"json": {**CREATE, "optimizer": "SGD"}},
        409,
        "session_exists",
        "session 's' exists",
    ),
    # step
    Bad("POST", f"{S}/step", step(lr=1), 422, "invalid", "unknown field 'lr'"),
    Bad(
        "POST",
        f"{S}/step",
        {"json": {"grads": {"b": 1.0}}},
        422,
        "missing_gradient",
        "parameter 'w' has no gradient",
    ),
    Bad(
        "POST",
        f"{S}/step",
        {"json": {"grads": {**GRADS, "b": [1.0]}}},
        422,
        "invalid",
        "grads['b'] has shape [1], expected []",
    ),
    Bad(
        "POST",
        f"{S}/step",
        {"json": {"grads": {**GRADS, "b": "NaN"}}},
        422,
        "nonfinite",
        "b",
    ),
    Bad("POST", f"{S}/step", step(base_version=9), 409, "version_conflict", "base_version is 9"),
    Bad("POST", f"{S}/step", step(generation="x"), 409, "session_rewound", "generation 'x'"),
    Bad("POST", f"{S}/step", step(worker="a", seq=3), 409, "out_of_sequence", "expected 1"),
    Bad("POST", f"{S}/step", step(worker="a b", seq=1), 422, "invalid", "worker must match"),
    Bad("POST", f"{S}/step", step(seq=1), 422, "invalid", "seq 1 needs a worker"),
    Bad("POST", f"{S}/step", step(return_dtype="int8"), 422, "invalid", "return_dtype must be"),
    Bad("POST", f"{S}/step?seq=1", step(), 422, "invalid", "unknown query parameter 'seq'"),
    # who sent it
    Bad(
        "POST",
        f"{S}/step",
        {**step(worker="a", seq=1), "headers": {"idempotency-key": "k"}},
        422,
        "invalid",
        "send worker and seq or an Idempotency-Key, not both",
    ),
    Bad(
        "POST",
        f"{S}/step",
        {**step(), "headers": {"idempotency-key": "a b"}},
        422,
        "invalid",
        "Idempotency-Key must be 1 to 255 visible ASCII characters, got 'a b'",
    ),
    Bad(
        "PATCH",
        f"{S}?worker=a&seq=1",
        {"json": {"name": "x"}, "headers": {"idempotency-key": "k"}},
        422,
        "invalid",
        "not both",
    ),
    Bad(
        "PATCH",
        S,
        {"json": {"name": "x"}, "headers": {"idempotency-key": "a b"}},
        422,
        "invalid",
        "header parameter idempotency-key",
    ),
    Bad(
        "PATCH",
        f"{S}?worker=a&seq=1",
        {"json": {"name": "x", "worker": "a"}},
        422,
        "invalid",
        "worker is in the body and in the query; send it once",
    ),
    Bad("PATCH", S, {"json": {"worker": 5, "seq": 1}}, 422, "invalid", "worker must be a string"),
    Bad("PATCH", S, {"json": {"worker": "a", "seq": True}}, 422, "invalid", "seq must be an int"),
    Bad("PATCH", S, {"json": {"worker": "a", "seq": 2**63}}, 422, "invalid", "seq must be <="),
    Bad("PATCH", f"{S}?worker=a&seq=0", {"json": {}}, 422, "invalid", "query parameter seq"),
    # query
    Bad("GET", f"{S}/params?wieghts=ema", {}, 422, "invalid", "unknown query parameter 'wieghts'"),
    Bad("GET", f"{S}/params?weights=old", {}, 422, "invalid", "query parameter weights"),
    Bad("GET", f"{S}/params?weights=ema", {}, 422, "invalid", "ema"),
    Bad("GET", f"{S}/params?names=nope", {}, 422, "invalid", "no parameter 'nope'"),
    Bad("GET", f"{S}/params?dtype=int8", {}, 422, "invalid", "query parameter dtype"),
    Bad("GET", "/v1/sessions?limit=0", {}, 422, "invalid", "query parameter limit"),
    Bad("GET", "/v1/sessions?limit=1001", {}, 422, "invalid", "got '1001'"),
    Bad("GET", "/v1/sessions?tag=novalue", {}, 422, "invalid", "tag must be key:value"),
    Bad("GET", "/v1/sessions?tag=a:1&tag=a:2", {}, 422, "invalid", "two values"),
    Bad("GET", "/v1/sessions?cursor=%00", {}, 422, "invalid", "cursor"),
    Bad("GET", "/v1/sessions?order_by=age", {}, 422, "invalid", "query parameter order_by"),
    Bad("GET", f"{S}/history?format=xml", {}, 422, "invalid", "query parameter format"),
    Bad("GET", f"{S}/history?after=-1", {}, 422, "invalid", "query parameter after"),
    Bad("GET", "/healthz?x=1", {}, 422, "invalid", "there are none here"),
    # other changes
    Bad("PATCH", S, {"json": {"lr": 1}}, 422, "invalid", "unknown field 'lr'"),
    Bad("PATCH", S, {"json": {"clip_grad_norm": -1}}, 422, "invalid", "must be > 0, got -1"),
    Bad("PATCH", f"{S}/groups/7", {"json": {"lr": 1}}, 422, "invalid", "groups 0 to 0"),
    Bad("PATCH", f"{S}/groups/x", {"json": {"lr": 1}}, 422, "invalid", "path parameter index"),
    Bad("PATCH", f"{S}/groups/0", {"json": {"lrr": 1}}, 422, "invalid", "'lrr'"),
    Bad(
        "PATCH",
        f"{S}/groups/0",
        {"json": {"abandon": 1}},
        422,
        "invalid",
        "abandon must be",
    ),
    Bad("POST", f"{S}/groups", {"json": {"lr": 1}}, 422, "invalid", "params is empty"),
    Bad(
        "PUT",
        f"{S}/params",
        {"json": {"params": {"w": [[1, 2], [3, 4]]}}},
        422,
        "invalid",
        "lacks",
    ),
    Bad(
        "PUT",
        f"{S}/params",
        {"json": {"params": CREATE["params"], "grads": {}}},
        422,
        "invalid",
        "unknown field 'grads'",
    ),
    Bad(
        "PUT",
        f"{S}/params",
        {"json": {"params": CREATE["params"]}, "headers": {"if-match": '"old"'}},
        412,
        "precondition_failed",
        "If-Match is '\"old\"'",
    ),
    Bad(
        "PUT",
        f"{S}/params",
        binary(frame({n: a.astype("<f8") for n, a in prefixed("param", GRADS).items()}, {})),
        422,
        "invalid",
        "is float64 and the session is float32: that would round",
    ),
    Bad("PUT", f"{S}/scheduler", {"json": {"name": "X"}}, 422, "invalid", "is not a scheduler"),
    Bad("GET", f"{S}/scheduler", {}, 409, "conflict", "the session has no scheduler"),
    Bad("POST", f"{S}/scheduler/step", {}, 409, "conflict", "the session has no scheduler"),
    Bad(
        "POST",
        f"{S}/scheduler/step",
        {"json": {"metrics": "low"}},
        422,
        "invalid",
        "metrics must be a number, got 'low'",
    ),
    Bad(
        "PUT",
        f"{S}/metrics",
        {"json": {"version": 99, "metrics": {"acc": 0.5}}},
        422,
        "invalid",
        "is 99",
    ),
    Bad("PUT", f"{S}/metrics", {"json": {"metrics": {}}}, 422, "invalid", "version is missing"),
    Bad("POST", f"{S}/fork", {"json": {"id": "s"}}, 409, "session_exists", "'s' exists"),
    Bad("POST", f"{S}/fork", {"json": {"version": 50}}, 422, "invalid", "got 50"),
    Bad("DELETE", "/v1/sessions/no", {}, 404, "session_not_found", "no session 'no'"),
    # previews
    Bad(
        "POST",
        "/v1/schedulers/preview",
        {"json": {"optimizer": "SGD", "scheduler": {"name": "StepLR"}}},
        422,
        "invalid",
        "step_size",
    ),
    Bad(
        "POST",
        "/v1/schedulers/preview",
        {"json": {"optimizer": {"lr": 1}, "scheduler": {"name": "ConstantLR"}}},
        422,
        "invalid",
        "optimizer.name is missing",
    ),
    Bad(
        "POST",
        "/v1/schedulers/preview",
        {"json": {"optimizer": "SGD", "scheduler": {"name": "ConstantLR"}, "steps": 10**7}},
        422,
        "invalid",
        "steps must be an integer in [1, 10000]",
    ),
    # a step that names its session
    Bad("POST", "/v1/step", step(), 422, "invalid", "id is missing"),
    Bad("POST", "/step", step(id=5), 422, "invalid", "id must be a string, got 5"),
    Bad("POST", "/step", step(id="no"), 404, "session_not_found", "it is created"),
    Bad("POST", "/step", {}, 400, "malformed", "the body is empty, expected a step"),
    Bad("POST", "/step", binary(b"123"), 400, "malformed", "inside its header"),
    Bad("POST", "/step", binary(GRAD_FRAME), 422, "invalid", "id is missing"),
    Bad(
        "POST",
        "/step",
        step(id="s", optimizer="SGD"),
        409,
        "session_exists",
        "session 's' exists with another configuration",
    ),
    Bad(
        "POST",
        "/step",
        step(id="new", optimizer="SGD"),
        422,
        "invalid",
        "params is empty; a session",
    ),
]


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    from optserve.sessions.registry import Registry
    from optserve.store.memory import MemoryStore

    registry = Registry(MemoryStore(), device="cpu")
    with asking(create_app(registry, Settings())) as api:
        assert api.put(S, json=CREATE).status_code == 201
        assert api.post(f"{S}/step", json={"grads": GRADS}).status_code == 200
        yield api
    registry.close()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.method} {row.url} {row.sentence[:40]}")
def test_a_bad_request_is_refused_with_a_sentence_and_changes_nothing(api: Api, row: Bad) -> None:
    before = api.get(f"{S}/state").content
    sessions = api.get("/v1/sessions").json()
    reply = api.request(row.method, row.url, **row.sent)
    document = reply.json()
    assert (reply.status_code, document["code"]) == (row.status, row.code), document
    assert reply.headers["content-type"] == "application/problem+json"
    assert row.sentence in document["detail"]
    assert document["status"] == row.status
    assert document["type"] == f"urn:optserve:error:{row.code}"
    assert api.get(f"{S}/state").content == before
    assert api.get("/v1/sessions").json() == sessions


def test_there_are_enough_rows_and_no_two_are_equal() -> None:
    assert len(ROWS) >= 100
    assert len({repr(row) for row in ROWS}) == len(ROWS)


def test_a_refused_step_uses_up_no_seq_and_gives_its_buffer_back(api: Api) -> None:
    bad = {"grads": {**GRADS, "b": "Infinity"}, "worker": "z", "seq": 1}
    for _ in range(20):
        assert api.post(f"{S}/step", json=bad).status_code == 422
        assert api.post(f"{S}/step", **binary(GRAD_FRAME[:-2])).status_code == 400
    good = api.post(f"{S}/step", json={"grads": GRADS, "worker": "z", "seq": 1, "dry_run": True})
    assert good.status_code == 200


def test_what_is_too_large_is_refused_with_both_numbers() -> None:
    from optserve.sessions.registry import Registry
    from optserve.store.memory import MemoryStore

    registry = Registry(MemoryStore(), device="cpu")
    settings = Settings(max_body_bytes=2_000, max_json_bytes=1_000)
    with asking(create_app(registry, settings)) as api:
        big = {"w": np.zeros(1_000, "<f4").tolist()}
        json_reply = api.put(S, json={"optimizer": "SGD", "params": big})
        content = frame({"param/w": np.zeros(1_000, "<f4")}, {"optimizer": "SGD"})
        binary_reply = api.put(S, content=content, headers=BINARY)
    registry.close()
    assert (json_reply.status_code, binary_reply.status_code) == (413, 413)
    assert json_reply.json()["limit"] == 1_000
    assert f"has {len(content)} bytes, the limit is 2000" in binary_reply.json()["detail"]
