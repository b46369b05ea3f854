"""JSON Schemas of tensors and request bodies, as components of the OpenAPI document.

What the server checks with a model comes from that model; what holds tensors is written here, since
no model ever sees a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from optserve.sessions.config import CreateFields, ForkFields, PatchFields
from optserve.sessions.fields import StepFields

Schema = dict[str, Any]

REF = "#/components/schemas/"


def ref(name: str) -> Schema:
    return {"$ref": REF + name}


def an_object(
    properties: Mapping[str, Schema], required: Iterable[str] = (), doc: str = ""
) -> Schema:
    """Return the schema of an object, which may have members besides ``properties``."""
    schema: Schema = {"type": "object", "properties": dict(properties)}
    if names := list(required):
        schema["required"] = names
    return {**schema, "description": doc} if doc else schema


def a_list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def by_name(of: Schema, doc: str = "") -> Schema:
    """Return the schema of an object whose members are all ``of``."""
    schema: Schema = {"type": "object", "additionalProperties": of}
    return {**schema, "description": doc} if doc else schema


STRING: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
BOOLEAN: Schema = {"type": "boolean"}
NUMBER = ref("Number")
HYPER = ref("Hyperparameters")

_SENDER: dict[str, Schema] = {
    "worker": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    "epoch": {"type": "integer", "minimum": 1},
    "seq": {"type": "integer", "minimum": 1},
}
_PIN: Schema = {"type": "string", "minLength": 1, "maxLength": 128}
_ABANDON: dict[str, Schema] = {
    "abandon": {**BOOLEAN, "description": "Give up an open LBFGS line search."}
}


def of_model(model: type[BaseModel], more: Mapping[str, Schema]) -> Schema:
    """Return the schema of a request model; ``more`` adds properties or replaces its own."""
    schema = model.model_json_schema(ref_template=REF + "{model}")
    schema.pop("$defs", None)
    schema.pop("title", None)
    schema["properties"] = {**schema["properties"], **more}
    return schema


def nested_models() -> dict[str, Schema]:
    """Return the components that the request models refer to."""
    nested: dict[str, Schema] = {}
    for model in (CreateFields, StepFields, ForkFields):
        nested |= model.model_json_schema(ref_template=REF + "{model}").get("$defs", {})
    return nested


TENSORS: dict[str, Schema] = {
    "Number": {
        "anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}],
        "description": "JSON has no NaN and no infinities: they are strings.",
    },
    "TensorBytes": {
        **an_object(
            {
                "dtype": {**STRING, "examples": ["float32", "bfloat16"]},
                "shape": a_list(COUNT),
                "data": {**STRING, "contentEncoding": "base64"},
            },
            ["dtype", "shape", "data"],
            "Little-endian, row by row.",
        ),
        "additionalProperties": False,
    },
    # Not a schema that refers to itself: generators of clients give up on those.
    "Tensor": {
        "anyOf": [NUMBER, a_list({}), ref("TensorBytes")],
        "description": "Nested lists of numbers, row by row (a scalar is a number), or bytes.",
    },
    "SparseTensor": {
        **an_object(
            {"indices": ref("Tensor"), "values": ref("Tensor"), "shape": a_list(COUNT)},
            ["indices", "values", "shape"],
            "COO with int64 indices, [dims, nnz]; duplicates are summed.",
        ),
        "additionalProperties": False,
    },
    "Params": by_name(ref("Tensor"), "Tensors by name; the members' order is kept."),
    "Grads": by_name(
        {"anyOf": [ref("Tensor"), ref("SparseTensor"), {"type": "null"}]},
        "Every parameter's gradient; null where torch has grad is None.",
    ),
    "Hyperparameters": {
        "type": "object",
        "description": "torch's names, as in param_groups.",
        "examples": [{"lr": 0.001, "weight_decay": 0}],
    },
    "OptimizerSpec": {
        "anyOf": [
            STRING,
            an_object(
                {"name": STRING},
                ["name"],
                "A name and hyperparameters; GET /v1/optimizers has their schemas.",
            ),
        ],
        "examples": [{"name": "AdamW", "lr": 0.001, "betas": [0.9, 0.999]}],
    },
    "SchedulerSpec": {
        "anyOf": [
            an_object({"name": STRING}, ["name"]),
            a_list(an_object({"name": STRING}, ["name"])),
        ],
        "description": "GET /v1/schedulers has their schemas; a list is a ChainedScheduler.",
        "examples": [{"name": "StepLR", "step_size": 50, "gamma": 0.1, "advance": "step"}],
    },
    "SchedulerOrNull": nullable(ref("SchedulerSpec")),
}


_FIRST_CREATE: dict[str, Any] = {
    "optimizer": {"name": "SGD", "lr": 0.5, "momentum": 0.5},
    "params": {"w": [1.0, -2.0]},
}
_FIRST_STEP: dict[str, Any] = {"grads": {"w": [0.5, -1.0]}, "loss": 0.7}
#: Bodies to try, by component: those of docs/quickstart.md, so that one fits the other.
EXAMPLES: dict[str, Any] = {
    "CreateBody": _FIRST_CREATE,
    "StepBody": _FIRST_STEP,
    "OneCallBody": {"id": "first", **_FIRST_CREATE, **_FIRST_STEP},
    "PatchBody": {"clip_grad_norm": 1.0},
    "PutParamsBody": {"params": {"w": [1.0, -2.0]}},
    "PushBody": {"loss": 0.7},
    "GradientBody": {"grad": [0.5, -1.0]},
    "GroupBody": {"lr": 0.01},
    "AddGroupBody": {"params": {"v": [0.5]}, "lr": 0.01},
    "MetricsBody": {"version": 0, "metrics": {"accuracy": 0.9}},
    "RollbackBody": {"version": 0},
    "PinBody": {"name": "before the sweep"},
    "PreviewBody": {
        "optimizer": {"name": "SGD", "lr": 0.1},
        "scheduler": {"name": "StepLR", "step_size": 3},
        "steps": 10,
    },
}


def requests() -> dict[str, Schema]:
    """Return the components that are bodies."""
    accumulate: dict[str, Schema] = {
        "accumulate": {"anyOf": [{"type": "integer", "minimum": 1}, ref("Accumulate")]}
    }
    params: dict[str, Schema] = {"params": ref("Params")}
    create = of_model(
        CreateFields,
        {
            "optimizer": ref("OptimizerSpec"),
            "scheduler": nullable(ref("SchedulerSpec")),
            **accumulate,
            **params,
            **_SENDER,
        },
    )
    create["required"] = ["optimizer", "params"]
    step = of_model(StepFields, {"grads": ref("Grads"), **params, **_SENDER})
    groups = {
        **nullable(a_list(HYPER)),
        "description": "With optimizer: create's groups. Without: the step's.",
    }
    one_call = an_object(
        {**create["properties"], **step["properties"], "groups": groups, "id": STRING}, ["id"]
    )
    gradient = {"anyOf": [ref("Tensor"), ref("SparseTensor"), {"type": "null"}]}
    return {
        "CreateBody": create,
        "StepBody": step,
        "PushBody": of_model(StepFields, _SENDER),
        "GradientBody": {**an_object({"grad": gradient}, ["grad"]), "additionalProperties": False},
        "OneCallBody": one_call,
        "PatchBody": of_model(PatchFields, {**accumulate, **_SENDER}),
        "ForkBody": of_model(ForkFields, _SENDER),
        "PutParamsBody": an_object({**params, **_ABANDON, **_SENDER}, ["params"]),
        "GroupBody": {**an_object({**_ABANDON, **_SENDER}), "examples": [{"lr": 0.01}]},
        "AddGroupBody": an_object({**params, **_ABANDON, **_SENDER}, ["params"]),
        "AdvanceBody": an_object({"metrics": nullable({"type": "number"}), **_SENDER}),
        "MetricsBody": an_object(
            {"version": COUNT, "metrics": by_name({"type": "number"}), **_SENDER},
            ["version", "metrics"],
        ),
        "RollbackBody": an_object({"version": COUNT, **_ABANDON, **_SENDER}, ["version"]),
        "PinBody": an_object({"name": nullable(_PIN), **_SENDER}),
        "PreviewBody": an_object(
            {
                "optimizer": ref("OptimizerSpec"),
                "groups": nullable(a_list(HYPER)),
                "scheduler": ref("SchedulerSpec"),
                "steps": {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 100},
                "metrics": nullable(a_list({"type": "number"})),
            },
            ["optimizer", "scheduler"],
        ),
    }
