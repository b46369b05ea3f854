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
from schemathesis.checks import (
    not_a_server_error,
)
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
from tests.integration.api_client import CREATE, GRADS, Api, asking, frame, prefixed

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
        if label.startswith(method) and "preview" not in label:
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


#: Bodies that come near to being right, beside those that schemathesis makes up.
BODIES: list[Any] = [
    None,
    {"grads": GRADS},
    {"grads": GRADS, "loss": 0.5, "return": "delta", "dry_run": True},
    {"params": CREATE["params"], "abandon": True},
    {"lr": 0.01},
    {"version": 0, "metrics": {"acc": 0.5}},
    {"metrics": 0.5},
    {"name": "CosineAnnealingLR", "T_max": 5},
    CREATE,
    {**CREATE, "id": "one-call", "grads": GRADS},
    {"optimizer": "AdamW", "scheduler": {"name": "StepLR", "step_size": 3}, "steps": 4},
    frame(prefixed("grad", GRADS), {"loss": 0.25}),
    frame(prefixed("param", CREATE["params"]), {"abandon": True}),
]


def check_operation(api: Api, operation: Any, sessions: list[str], examples: int) -> None:
    """Send ``examples`` requests to one operation and compare each answer with the document."""

    @hypothesis.seed(2026)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(
        case=operation.as_strategy(),
        session=st.sampled_from([None, *sessions]),
        body=st.sampled_from(BODIES),
    )
    def run(case: Any, session: str | None, body: Any) -> None:
        if session is not None and "session_id" in case.path_parameters:
            case.path_parameters["session_id"] = session
        request = case.as_transport_kwargs(base_url="http://test")
        headers = {k: v for k, v in request["headers"].items() if k.lower() != "content-length"}
        kwargs: dict[str, Any] = {"content": request.get("data"), "json": request.get("json")}
        if body is not None and operation.body:
            kind = SAFETENSORS if isinstance(body, bytes) else "application/json"
            headers = {k: v for k, v in headers.items() if k.lower() != "content-type"}
            headers["content-type"] = kind
            content = body if isinstance(body, bytes) else orjson.dumps(body)
            kwargs = {"content": content}
        reply = api.request(
            request["method"],
            request["url"],
            params=request.get("params"),
            headers=headers,
            **kwargs,
        )
        case.validate_response(
            reply,
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ],
        )

    run()


def conforms(api: Api, document: dict[str, Any], sessions: list[str], examples: int) -> None:
    schema = schemathesis.openapi.from_dict(document)
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.label != "DELETE /v1/sessions/{session_id}":
            check_operation(api, operation, sessions, examples)


def test_answers_conform_to_the_document(
    api: Api, document: dict[str, Any], sessions: list[str]
) -> None:
    conforms(api, document, sessions, examples=12)


@pytest.mark.long
def test_many_answers_conform_to_the_document(
    api: Api, document: dict[str, Any], sessions: list[str]
) -> None:
    conforms(api, document, sessions, examples=500)
