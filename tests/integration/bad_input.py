"""Sessions to send bad requests to, and what bad requests are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx
import numpy as np

from optserve_client import wire
from optserve_client.wire import META_KEY, SAFETENSORS

JSON = {"content-type": "application/json"}
BINARY = {"content-type": SAFETENSORS}

V = "/v1/sessions"
#: AdamW; one step of worker ``me``, one with an Idempotency-Key.
A = f"{V}/bad-adamw"
#: SGD in two groups with a manual scheduler, EMA, and an accumulation window that is open.
WINDOW = f"{V}/bad-window"
#: LBFGS with an open line search.
SEARCH = f"{V}/bad-search"
#: SparseAdam.
SPARSE = f"{V}/bad-sparse"
#: bfloat16, with a scheduler that follows a metric after each update.
HALF = f"{V}/bad-half"
#: float64, with a scheduler whose next step cannot be computed.
DOUBLE = f"{V}/bad-double"
#: SGD with rounds of three: one was closed, one failed, worker ``in`` has pushed into the third.
#: Worker ``gone`` was removed, ``late`` went on after its push had failed.
ROUNDS = f"{V}/bad-rounds"
#: Deltas, in rounds that weigh them.
SHARES = f"{V}/bad-shares"
#: Asynchronous, at version 3; gradients may be one version old.
ASYNC = f"{V}/bad-async"
#: Imported with a ledger in which worker ``me`` has reached epoch 2.
FENCED = f"{V}/bad-fenced"
#: An id that nobody has.
NEW = f"{V}/bad-new"

W = [[1.0, 2.0], [3.0, 4.0]]
PARAMS: dict[str, Any] = {"w": W, "b": 0.5}
GRADS: dict[str, Any] = {"w": [[1.0, -1.0], [0.5, 0.25]], "b": -2.0}
HALF_GRADS = {
    name: wire.tensor_to_json(wire.Bits.bfloat16(np.array(grad, "<f4")), "base64")
    for name, grad in GRADS.items()
}
ROWS_OF_E = {"indices": [[0, 2]], "values": [[1.0, 2.0], [3.0, 4.0]], "shape": [3, 2]}

CREATES: dict[str, dict[str, Any]] = {
    A: {"optimizer": {"name": "AdamW", "lr": 0.1}, "params": PARAMS, "name": "n"},
    WINDOW: {
        "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9},
        "params": PARAMS,
        "groups": [{"params": ["b"], "lr": 0.01}],
        "scheduler": {"name": "StepLR", "step_size": 2},
        "accumulate": 3,
        "ema": {},
        "best": {},
        "clip_grad_norm": 1.0,
    },
    SEARCH: {"optimizer": {"name": "LBFGS", "max_iter": 4}, "params": PARAMS},
    SPARSE: {"optimizer": "SparseAdam", "params": {"e": [[1, 2], [3, 4], [5, 6]]}, "sparse": ["e"]},
    HALF: {
        "optimizer": {"name": "SGD", "lr": 0.1},
        "params": PARAMS,
        "dtype": "bfloat16",
        "scheduler": {"name": "ReduceLROnPlateau", "advance": "step", "monitor": "acc"},
    },
    DOUBLE: {
        "optimizer": {"name": "SGD", "lr": 0.1},
        "params": {"w": W},
        "dtype": "float64",
        "scheduler": {"name": "LambdaLR", "lr_lambda": "1 / (5 - epoch)", "advance": "step"},
    },
    ROUNDS: {
        "optimizer": {"name": "SGD", "lr": 0.1},
        "params": PARAMS,
        "workers": {"mode": "sync", "count": 3, "deadline_s": 3600},
    },
    SHARES: {
        "optimizer": {"name": "SGD", "lr": 0.1},
        "params": PARAMS,
        "workers": {"mode": "sync", "count": 2, "reduce": "weighted_mean", "push": "deltas"},
    },
    ASYNC: {
        "optimizer": {"name": "SGD", "lr": 0.1},
        "params": PARAMS,
        "workers": {"mode": "async", "max_staleness": 1},
    },
}


class Row(NamedTuple):
    """A request and what it must come to."""

    method: str
    url: str
    sent: dict[str, Any] | Tampered
    #: Status and code.
    answer: tuple[int, str]
    #: The whole detail; ``<at>`` stands for generation.version, ``<generation>`` for that alone.
    sentence: str


# --- bodies --------------------------------------------------------------------------------------


def body(value: Any) -> dict[str, Any]:
    return text(json.dumps(value))


def text(content: str | bytes, **headers: str) -> dict[str, Any]:
    raw = content if isinstance(content, bytes) else content.encode()
    return {"content": raw, "headers": {**JSON, **named(headers)}}


def named(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def step(**fields: Any) -> dict[str, Any]:
    return body({"grads": GRADS, **fields})


def create(**fields: Any) -> dict[str, Any]:
    return body({"optimizer": "SGD", "params": PARAMS, **fields})


def optimizer(name: str, **hyper: Any) -> dict[str, Any]:
    return create(optimizer={"name": name, **hyper})


def scheduled(name: str, **fields: Any) -> dict[str, Any]:
    return body({"name": name, **fields})


def with_headers(sent: dict[str, Any], **headers: str) -> dict[str, Any]:
    return {**sent, "headers": {**sent.get("headers", {}), **named(headers)}}


def raw(content: bytes) -> dict[str, Any]:
    return {"content": content, "headers": BINARY}


def frame(tensors: Mapping[str, Any], fields: Any = None) -> dict[str, Any]:
    metadata = None if fields is None else {META_KEY: json.dumps(fields)}
    made = {n: t if isinstance(t, wire.Bits) else np.asarray(t) for n, t in tensors.items()}
    return raw(b"".join(wire.encode(made, metadata)))


def header(text: str, data: bytes = b"") -> dict[str, Any]:
    """A frame with this header."""
    return raw(len(text).to_bytes(8, "little") + text.encode() + data)


def f4(value: Any) -> np.ndarray:
    return np.array(value, "<f4")


def grads(**more: Any) -> dict[str, Any]:
    return {"grad/w": f4(GRADS["w"]), "grad/b": f4(GRADS["b"]), **more}


def params(**more: Any) -> dict[str, Any]:
    return {"param/w": f4(W), "param/b": f4(0.5), **more}


def coo(indices: Any, values: Any) -> dict[str, Any]:
    return {"sparse/e/indices": np.array(indices, "<i8"), "sparse/e/values": f4(values)}


def topk(indices: Any, values: Any, name: str = "w") -> dict[str, Any]:
    """A gradient of b, and a top-k one of ``name``."""
    tensors = {f"topk/{name}/indices": np.array(indices, "<i8"), f"topk/{name}/values": f4(values)}
    return {"grad/b": f4(1), **tensors}


def int8(*scales: float) -> dict[str, Any]:
    return {
        "grad/b": f4(1),
        "int8/w/values": np.array([[1, -2], [3, 4]], "i1"),
        "int8/w/scales": f4(scales),
    }


def base64(dtype: str, shape: list[int], data: str) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data": data}


GOOD = wire.tensor_to_json(f4(GRADS["w"]), "base64")["data"]
FRAME = frame(grads())["content"]


class Tampered(NamedTuple):
    """The state file of a session, with pieces changed. It is made when the session exists."""

    session: str
    #: By path: ``engine__groups__0__hyper__lr``.
    fields: dict[str, Any]
    #: By name; None takes one out.
    tensors: dict[str, Any]

    def sent(self, http: httpx.Client) -> dict[str, Any]:
        tensors, metadata = wire.decode(http.get(f"{self.session}/state").content)
        meta = json.loads(metadata[META_KEY])
        meta["ledger"] = json.loads(bytes(np.asarray(tensors["ledger"])))
        for path, value in self.fields.items():
            *above, last = [int(s) if s.isdigit() else s for s in path.split("__")]
            inside = meta
            for step in above:
                inside = inside[step]
            inside[last] = value
        ledger = np.frombuffer(json.dumps(meta.pop("ledger")).encode(), "u1")
        changed = {**tensors, "ledger": ledger, **self.tensors}
        return frame({n: t for n, t in changed.items() if t is not None}, meta)


def state(session: str, *, tensors: dict[str, Any] | None = None, **fields: Any) -> Tampered:
    return Tampered(session, fields, tensors or {})


# --- the sessions --------------------------------------------------------------------------------


def make(http: httpx.Client) -> None:
    """Create the sessions and give each a history."""
    for url, fields in CREATES.items():
        assert http.put(url, json=fields).status_code == 201
    steps = [
        (A, step(worker="me", epoch=1, seq=1)),
        (A, with_headers(step(loss=0.5), idempotency_key="key-1")),
        *((A, step(worker="long", seq=seq)) for seq in range(1, 18)),
        (WINDOW, step(loss=0.5)),
        (SEARCH, step(loss=1.0)),
        (SEARCH, step(loss=0.5)),
        (SPARSE, body({"grads": {"e": ROWS_OF_E}})),
        (HALF, body({"grads": HALF_GRADS, "metrics": {"acc": 0.5}})),
        *((DOUBLE, body({"grads": {"w": W}})) for _ in range(4)),
    ]
    for url, sent in steps:
        reply = http.post(f"{url}/step", **sent)
        assert reply.status_code == 200, reply.text
    make_rounds(http)
    for seq in (1, 2, 3):
        reply = http.post(f"{ASYNC}/step", **push("me", seq, seq - 1))
        assert reply.status_code == 200, reply.text
    reply = http.put(f"{FENCED}/state", **state(A, ledger__workers__0__epoch=2).sent(http))
    assert reply.status_code == 201, reply.text


def push(worker: str, seq: int, base_version: int, **fields: Any) -> dict[str, Any]:
    return step(worker=worker, seq=seq, base_version=base_version, **fields)


def make_rounds(http: httpx.Client) -> None:
    for name, status in (("gone", 202), ("in", 202), ("late", 200)):
        reply = http.post(f"{ROUNDS}/step", **push(name, 1, 0, wait_s=0))
        assert reply.status_code == status, reply.text
    assert http.delete(f"{ROUNDS}/workers/gone").status_code == 200
    soon = {"mode": "sync", "count": 3, "deadline_s": 0.01}
    assert http.patch(ROUNDS, json={"workers": soon}).status_code == 200
    reply = http.post(f"{ROUNDS}/step", **push("late", 2, 1))
    assert reply.json()["code"] == "round_failed"
    fields = {"workers": CREATES[ROUNDS]["workers"], "worker": "late", "seq": 3}
    assert http.patch(ROUNDS, json=fields).status_code == 200
    reply = http.post(f"{ROUNDS}/step", **push("in", 2, 1, wait_s=0))
    assert reply.status_code == 202, reply.text
