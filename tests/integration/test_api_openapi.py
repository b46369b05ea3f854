"""The OpenAPI document: valid, complete, and true of what the server answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import hypothesis
import jsonschema_rs
import orjson
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from optserve.api.app import create_app
from optserve.settings import Settings
from optserve_client.errors import RequestError, ServerError, tree
from optserve_client.wire import SAFETENSORS
from tests.integration.api_client import CREATE, GRADS, Api, asking, f32, frame, prefixed

#: Sessions that examples are sent to: an ordinary one, LBFGS with an open line search, an averaging
#: one with a scheduler.
SESSIONS: dict[str, dict[str, Any]] = {
    "plain": CREATE,
    "search": {**CREATE, "optimizer": {"name": "LBFGS", "max_iter": 4}},
    "rich": {
        **CREATE,
        "groups": [{"params": ["b"], "lr": 0.01}],
        "scheduler": {"name": "ReduceLROnPlateau"},
        "ema": {},
        "best": {},
        "clip_grad_norm": 1.0,
        "accumulate": {"steps": 2, "reduce": "mean"},
    },
}


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    from optserve.sessions.registry import Registry
    from optserve.store.memory import MemoryStore

    registry = Registry(MemoryStore(), device="cpu")
    registry.warm()
    yield create_app(registry, Settings())
    registry.close()


@pytest.fixture(scope="module")
def api(app: Any) -> Iterator[Api]:
    with asking(app) as api:
        yield api


@pytest.fixture(scope="module")
def document(app: Any) -> dict[str, Any]:
    made: dict[str, Any] = app.openapi()
    return made


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    assert [error.message for error in OPENAPI_31_VALIDATOR.iter_errors(document)] == []


def test_every_component_is_a_json_schema_and_every_reference_leads_to_one(
    document: dict[str, Any],
) -> None:
    components = document["components"]["schemas"]
    for schema in components.values():
        jsonschema_rs.meta.validate(schema)
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', orjson.dumps(document).decode()))
    assert references - set(components) == set()
    unused = set(components) - references
    assert unused == {"HistoryRow"} & unused


def test_every_operation_says_what_it_is(document: dict[str, Any]) -> None:
    seen = set()
    for label, operation in operations(document):
        assert operation["summary"], label
        assert operation["description"], label
        assert len(operation["tags"]) == 1, label
        assert re.fullmatch(r"[a-z_]+", operation["operationId"]), label
        seen.add(operation["operationId"])
        for parameter in operation.get("parameters", []):
            assert parameter["in"] == "path" or parameter["description"], (label, parameter["name"])
    assert len(seen) == sum(1 for _ in operations(document))


def test_every_operation_documents_its_problems(document: dict[str, Any]) -> None:
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for label, operation in operations(document):
        responses = operation["responses"]
        assert responses["default"]["content"] == problem, label
        for status, response in responses.items():
            if status >= "4":
                assert response["content"] == problem, (label, status)
            elif status != "304":
                assert response["content"], (label, status)


def test_every_code_that_the_server_can_send_is_in_the_schema(document: dict[str, Any]) -> None:
    codes = document["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]
    assert set(codes) == {e.code for base in (RequestError, ServerError) for e in tree(base)}


@pytest.mark.parametrize(
    "label",
    [
        "POST /v1/sessions",
        "PUT /v1/sessions/{session_id}",
        "POST /v1/sessions/{session_id}/step",
        "POST /v1/step",
        "POST /step",
        "PUT /v1/sessions/{session_id}/params",
        "PUT /v1/sessions/{session_id}/pushes/{push_id}/{name}",
        "POST /v1/sessions/{session_id}/groups",
        "PUT /v1/sessions/{session_id}/state",
    ],
)
def test_binary_bodies_are_declared(document: dict[str, Any], label: str) -> None:
    body = dict(operations(document))[label]["requestBody"]
    assert body["required"] is True
    assert body["content"][SAFETENSORS]["schema"] == {"type": "string", "format": "binary"}


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_every_change_of_a_session_takes_an_idempotency_key(
    document: dict[str, Any], method: str
) -> None:
    for label, operation in operations(document):
        changes = "preview" not in label and not re.fullmatch(r".*/\{push_id\}(/\{name\})?", label)
        if label.startswith(method) and changes:
            names = {p["name"].lower() for p in operation["parameters"] if p["in"] == "header"}
            assert "idempotency-key" in names, label


# --- true of the server --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sessions(api: Api) -> list[str]:
    for name, body in SESSIONS.items():
        assert api.put(f"/v1/sessions/{name}", json=body).status_code == 201
        step = {"grads": GRADS, "loss": 1.0}
        assert api.post(f"/v1/sessions/{name}/step", json=step).status_code == 200
    return list(SESSIONS)


@schemathesis.serializer(SAFETENSORS)
def _as_frame(context: Any, value: Any) -> bytes:
    return bytes(value) if isinstance(value, bytes) else str(value).encode()


#: Bodies that some operation takes. Each also goes to the operations that do not.
BODIES: list[Any] = [
    {},
    {"grads": GRADS},
    {"grads": GRADS, "loss": 0.5, "return": "delta", "dry_run": True},
    {"grads": GRADS, "loss": 0.25, "return_encoding": "base64", "return_dtype": "float16"},
    {"params": CREATE["params"], "abandon": True},
    {"params": {"new": [1.0]}},
    {"grad": GRADS["w"]},
    {"loss": 0.5, "return": "none"},
    {"lr": 0.01, "abandon": True},
    {"name": "a name"},
    {"version": 0, "metrics": {"acc": 0.5}},
    {"version": 0, "abandon": True},
    {"metrics": 0.5},
    {"name": "CosineAnnealingLR", "T_max": 5},
    CREATE,
    {**CREATE, "id": "one-call", "grads": GRADS},
    {"optimizer": "AdamW", "scheduler": {"name": "StepLR", "step_size": 3}, "steps": 4},
    frame(prefixed("grad", GRADS), {"loss": 0.25}),
    frame({"grad/w": f32(GRADS["w"])}),
    frame(prefixed("grad", GRADS) | prefixed("param", CREATE["params"]), {"loss": 0.25}),
    frame(prefixed("param", CREATE["params"]), {"abandon": True}),
    frame(prefixed("param", CREATE["params"]), {"optimizer": "SGD"}),
]
#: Queries of the operations that have some; None: without.
QUERIES: dict[str, list[str]] = {
    "/params": ["weights=ema&encoding=base64", "weights=best&names=w", "dtype=float16"],
    "/history": ["format=csv", "format=ndjson", "after=1&limit=1"],
    "/versions": ["after=0&limit=1"],
    "/preview": ["steps=3", "steps=3&metrics=1&metrics=2"],
    "/v1/sessions": ["limit=1", "order_by=-name", "tag=a:b"],
}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def opened(api: Api, session: str) -> str:
    """Return the id of a push that can be committed."""
    reply = api.post(f"/v1/sessions/{session}/pushes")
    assert reply.status_code == 201, reply.text
    for name, grad in GRADS.items():
        url = f"{reply.headers['location']}/{name}"
        assert api.put(url, json={"grad": grad}).status_code == 200
    push_id: str = reply.json()["push"]
    return push_id


def names_of(path: str) -> tuple[str, ...]:
    """Return what may stand for ``{name}``."""
    if "{name}" not in path:
        return ("",)
    return ("w",) if "/pushes/" in path else ("adamw", "step_lr")


def likely_requests(
    api: Api, operation: Any, sessions: list[str], bodies: list[Any]
) -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
    """Yield path parameters, URL and body: each session or name with each body or query."""
    queries = next((q for end, q in QUERIES.items() if operation.path.endswith(end)), [])
    for session in sessions if "{session_id}" in operation.path else [""]:
        for name in names_of(operation.path):
            names = {"session_id": session, "name": name, "index": 0, "version": 1}
            for body in bodies if operation.body else [None]:
                if "{push_id}" in operation.path:
                    names["push_id"] = opened(api, session)
                url = operation.path.format(**names)
                kind = SAFETENSORS if isinstance(body, bytes) else "application/json"
                content = body if isinstance(body, bytes) else orjson.dumps(body)
                sent = {"content": content, "headers": {"content-type": kind}}
                yield names, url, sent if body is not None else {"headers": {}}
                if "push_id" in names:
                    api.delete(f"/v1/sessions/{session}/pushes/{names['push_id']}")
            yield from ((names, f"{url}?{query}", {"headers": {}}) for query in queries)


def is_delete(operation: Any) -> int:
    """Return 0 for what deletes nothing; the session itself comes last."""
    session = operation.path.endswith("{session_id}")
    return 0 if operation.method.upper() != "DELETE" else 1 + session


def all_operations(document: dict[str, Any]) -> list[Any]:
    found = [one.ok() for one in schemathesis.openapi.from_dict(document).get_all_operations()]
    return sorted(found, key=is_delete)


def test_answers_to_likely_requests_conform_to_the_document(
    api: Api, document: dict[str, Any], sessions: list[str]
) -> None:
    succeeded = set()
    bodies = [*BODIES, api.get("/v1/sessions/plain/state").content]
    for operation in all_operations(document):
        for i, (names, url, sent) in enumerate(likely_requests(api, operation, sessions, bodies)):
            if i % 2 and "state" not in url:
                sent["headers"]["accept"] = f"{SAFETENSORS}, application/json;q=0.5"
            reply = api.request(operation.method.upper(), url, **sent)
            operation.Case(path_parameters=names).validate_response(reply, checks=CHECKS)
            if reply.is_success:
                succeeded.add(operation.label)
    assert {operation.label for operation in all_operations(document)} - succeeded == set()


def check_operation(api: Api, operation: Any, sessions: list[str], examples: int) -> None:
    """Send ``examples`` requests of schemathesis's making, many to a session that exists."""

    @hypothesis.seed(2026)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy(), session=st.sampled_from([None, *sessions]))
    def run(case: Any, session: str | None) -> None:
        if session is not None and "session_id" in case.path_parameters:
            case.path_parameters["session_id"] = session
            # A made-up ttl_s may have ended the session.
            if "push_id" in case.path_parameters and api.get(f"/v1/sessions/{session}").is_success:
                case.path_parameters["push_id"] = opened(api, session)
        sent = case.as_transport_kwargs(base_url="http://test")
        headers = {k: v for k, v in sent["headers"].items() if k.lower() != "content-length"}
        reply = api.request(
            sent["method"],
            sent["url"],
            params=sent.get("params"),
            headers=headers,
            content=sent.get("data"),
            json=sent.get("json"),
        )
        case.validate_response(reply, checks=CHECKS)
        if session is not None and "push_id" in case.path_parameters:
            api.delete(f"/v1/sessions/{session}/pushes/{case.path_parameters['push_id']}")

    run()


def conforms(api: Api, document: dict[str, Any], sessions: list[str], examples: int) -> None:
    for operation in all_operations(document):
        if not is_delete(operation):
            check_operation(api, operation, sessions, examples)


def test_answers_to_made_up_requests_conform_to_the_document(
    api: Api, document: dict[str, Any], sessions: list[str]
) -> None:
    conforms(api, document, sessions, examples=12)


@pytest.mark.long
def test_answers_to_many_made_up_requests_conform_to_the_document(
    api: Api, document: dict[str, Any], sessions: list[str]
) -> None:
    conforms(api, document, sessions, examples=500)
