"""Valid requests of every route, and ways to spoil them: what tests/integration/test_never_500.py
sends."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from optserve_client import wire
from optserve_client.wire import META_KEY, SAFETENSORS

JSON = "application/json"
Path = tuple[int | str, ...]
Draw = Callable[[st.SearchStrategy[Any]], Any]

W = [[1.0, 2.0], [3.0, 4.0]]
PARAMS: dict[str, Any] = {"w": W, "b": 0.5}
GRADS: dict[str, Any] = {"w": [[1.0, -1.0], [0.5, 0.25]], "b": -2.0}
ROWS = {"indices": [[0, 1, 0]], "values": [[1.0, 2.0], [0.5, 0.5], [1.0, 1.0]], "shape": [2, 2]}

#: Sessions by name: what each was created with, and a step that it takes.
SESSIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (
        {"optimizer": {"name": "AdamW", "lr": 0.1, "betas": [0.9, 0.99]}, "params": PARAMS},
        {"grads": GRADS, "loss": 0.5, "metrics": {"acc": 0.5}},
    ),
    "rich": (
        {
            "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9},
            "params": PARAMS,
            "groups": [{"params": ["w*"], "weight_decay": 0.01}],
            "scheduler": [
                {"name": "LambdaLR", "lr_lambda": "0.9 ** epoch"},
                {
                    "name": "SequentialLR",
                    "schedulers": [
                        {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 0.2, "step_size_up": 3},
                        {"name": "MultiStepLR", "milestones": [2, 4]},
                    ],
                    "milestones": [3],
                },
            ],
            "clip_grad_norm": 1.0,
            "clip_grad_value": 0.5,
            "accumulate": {"steps": 2, "reduce": "mean"},
            "ema": {"decay": 0.9},
            "best": {"monitor": "acc", "mode": "max"},
            "nonfinite": "skip",
            "name": "a name",
            "tags": {"a": "b"},
        },
        {"grads": GRADS, "metrics": {"acc": 0.5}},
    ),
    "plateau": (
        {
            "optimizer": "Adagrad",
            "params": PARAMS,
            "scheduler": {"name": "ReduceLROnPlateau", "advance": "step", "patience": 1},
            "best": {},
            "dtype": "bfloat16",
        },
        {"grads": GRADS, "loss": 0.25, "loss_scale": 2.0},
    ),
    "search": (
        {"optimizer": {"name": "LBFGS", "max_iter": 4, "history_size": 3}, "params": PARAMS},
        {"grads": GRADS, "loss": 1.0},
    ),
    "wrapped": (
        {
            "optimizer": {"name": "Lookahead", "optimizer": {"name": "Prodigy", "lr": 1.0}, "k": 2},
            "params": PARAMS,
        },
        {"grads": GRADS},
    ),
    "rows": (
        {
            "optimizer": "SparseAdam",
            "params": {"e": W},
            "sparse": ["e"],
            "accumulate": 3,
            "impl": "auto",
        },
        {"grads": {"e": ROWS}},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One request, as bytes but for its parts."""

    method: str
    path: str
    query: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    #: JSON to be written, or bytes that are sent as they are; None: no body.
    body: Any = None
    media: str = JSON

    def content(self) -> bytes:
        if self.body is None or isinstance(self.body, bytes):
            return self.body or b""
        return write(self.body)

    def raw(self) -> bytes:
        """Return the request as it goes over the wire."""
        content = self.content()
        target = self.path + (f"?{self.query}" if self.query else "")
        named = {name.lower() for name, _ in self.headers}
        headers = list(self.headers)
        if "host" not in named:
            headers.insert(0, ("Host", "localhost"))
        if self.body is not None and "content-type" not in named:
            headers.append(("Content-Type", self.media))
        if self.body is not None or self.method != "GET":
            headers.append(("Content-Length", str(len(content))))
        lines = [f"{self.method} {target} HTTP/1.1", *(f"{n}: {v}" for n, v in headers), "", ""]
        return "\r\n".join(lines).encode("latin-1") + content


def write(value: Any) -> bytes:
    """Return JSON text, or what would be JSON if it knew NaN."""
    return json.dumps(value, separators=(",", ":")).encode()


def frame(tensors: Mapping[str, np.ndarray], fields: Any = None) -> bytes:
    metadata = {} if fields is None else {META_KEY: json.dumps(fields)}
    return b"".join(wire.encode(tensors, metadata))


def f32(kind: str, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {f"{kind}/{name}": np.array(value, "<f4") for name, value in values.items()}


def seeds(prefix: str, states: Mapping[str, bytes]) -> list[Sent]:
    """Return valid requests to every route; session ids begin with ``prefix``."""
    made: list[Sent] = []

    def add(method: str, path: str, body: Any = None, query: str = "", **headers: str) -> None:
        media = SAFETENSORS if isinstance(body, bytes) else JSON
        named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
        made.append(
            Sent(method=method, path=path, query=query, body=body, media=media, headers=named)
        )

    for name, (create, step) in SESSIONS.items():
        url = f"/v1/sessions/{prefix}{name}"
        grads, rest = step["grads"], {k: v for k, v in step.items() if k != "grads"}
        if name == "rows":
            tensors = {
                "sparse/e/indices": np.array(ROWS["indices"], "<i8"),
                "sparse/e/values": np.array(ROWS["values"], "<f4"),
            }
        else:
            tensors = f32("grad", grads)
        add("PUT", f"{url}-new", create)
        add("POST", f"{url}/step", step)
        add("POST", f"{url}/step", frame(tensors, rest), accept=SAFETENSORS)
        add("PUT", f"{url}-imported/state", states[name])
        add("PUT", f"{url}/state", states[name], query="abandon=true")
        add("GET", url)
        add("GET", f"{url}/state")
        add("GET", f"{url}/params", query="weights=live&names=w&encoding=base64&dtype=float16")
        add("PATCH", url, {"clip_grad_norm": 2.0, "tags": {"x": "y"}, "notes": "n", "ttl_s": 9e9})
        add("PATCH", f"{url}/groups/0", {"lr": 0.01, "abandon": True})
        add("PUT", f"{url}/params", {"params": create["params"], "abandon": True}, if_match="*")
        add("POST", f"{url}/fork", {"id": f"{prefix}{name}-new", "version": 1, "notes": "n"})
        add("GET", f"{url}/history", query="after=0&limit=2&format=csv")
        add("GET", f"{url}/versions", query="after=0&limit=2")
        add("POST", f"{url}/rollback", {"version": 0, "abandon": True}, if_match="*")
        add("POST", f"{url}/versions/1/pin", {"name": "n"}, **KEY)
        add("DELETE", f"{url}/versions/1/pin", query="worker=p&epoch=1&seq=1")
        add("GET", f"{url}/scheduler")
        add("GET", f"{url}/scheduler/preview", query="steps=4")
        add("POST", f"{url}/scheduler/step", {"worker": "a", "seq": 1})
        add("POST", f"{url}/pushes", rest)
        add("POST", f"{url}/pushes/{PUSH}/commit", {**rest, "return": "delta"})
        for parameter, grad in grads.items():
            add("PUT", f"{url}/pushes/{PUSH}/{parameter}", {"grad": grad})
            own = {key: t for key, t in tensors.items() if key.split("/")[1] == parameter}
            add("PUT", f"{url}/pushes/{PUSH}/{parameter}", frame(own))
        add("GET", f"{url}/pushes/{PUSH}")
        add("DELETE", f"{url}/pushes/{PUSH}")
    plain, rich = f"/v1/sessions/{prefix}plain", f"/v1/sessions/{prefix}rich"
    step = SESSIONS["plain"][1]
    add("POST", f"{plain}/step", {**step, "worker": "me", "epoch": 1, "seq": 1, "return": "delta"})
    add("POST", f"{plain}/step", {**step, "dry_run": True, "groups": [{"lr": 0.5}]}, **KEY)
    add("POST", f"{plain}/step", {"grads": {"w": W}, "none": ["b"], "params": PARAMS})
    base64 = {n: wire.tensor_to_json(np.array(v, "<f4"), "base64") for n, v in GRADS.items()}
    add("POST", f"{plain}/step", {"grads": base64, "return_encoding": "base64"})
    add("PUT", f"{plain}/params", frame(f32("param", PARAMS), {"abandon": False}))
    add("PUT", f"{plain}/metrics", {"version": 1, "metrics": {"acc": 0.5}})
    add("POST", f"{plain}/groups", {"params": {"new": [1.0]}, "lr": 0.5})
    add("POST", f"{plain}/groups", frame(f32("param", {"new": [1.0]}), {"lr": 0.5}))
    add("DELETE", f"{plain}-imported", query="worker=a&epoch=1&seq=1")
    for spec in SCHEDULERS:
        add("PUT", f"{rich}/scheduler", spec)
    fields = {"optimizer": "Adam", "order": ["b", "w"]}
    add("PUT", f"{plain}-new", frame(f32("param", PARAMS), fields))
    one_call = {"id": f"{prefix}plain-new", "optimizer": "RMSprop", **PARAMS_AND_GRADS}
    add("POST", "/v1/step", one_call)
    add("POST", "/step", {"id": f"{prefix}plain", **step})
    both = f32("param", PARAMS) | f32("grad", GRADS)
    add("POST", "/step", frame(both, {"id": f"{prefix}plain-new", "optimizer": "NAdam"}))
    add("POST", "/v1/schedulers/preview", PREVIEW)
    add("POST", "/v1/sessions", SESSIONS["plain"][0], **KEY)
    add("GET", "/v1/sessions", query="limit=3&tag=a:b&order_by=-name")
    for path in PAGES:
        add("GET", path)
    return made


#: In a path, the id of a push of that session that has all of its gradients.
PUSH = "p-filled"
KEY = {"Idempotency_Key": "k-1"}
PARAMS_AND_GRADS = {"params": PARAMS, "grads": GRADS}
SCHEDULERS: list[Any] = [
    {"name": "StepLR", "step_size": 2, "gamma": 0.5, "advance": "step"},
    {"name": "OneCycleLR", "max_lr": [0.1, 0.2], "total_steps": 5},
    [{"name": "LambdaLR", "lr_lambda": [{"table": [1, 0.5]}, "1 / (epoch + 1)"]}],
    {"name": "ReduceLROnPlateau", "advance": "step", "monitor": "acc", "min_lr": [0.0, 0.1]},
    {"name": "CosineAnnealingWarmRestarts", "T_0": 2, "T_mult": 2},
]
PREVIEW: dict[str, Any] = {
    "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9},
    "groups": [{}, {"lr": 0.2}],
    "scheduler": {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 0.3, "scale_fn": "1 / x"},
    "steps": 5,
}
PAGES = [
    *("/v1/optimizers", "/v1/optimizers/adamw", "/v1/schedulers", "/v1/schedulers/step_lr"),
    *("/healthz", "/readyz", "/version", "/docs", "/docs/start.js", "/openapi.json", "/"),
]

# --- how they are spoilt -------------------------------------------------------------------------


#: What goes where something else was.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**40, 10**400, 0.5, -0.5, -0.0, 1.5, 1e-320, 1e38, 1e39, 1e308, -1e308),
    *(float("nan"), float("inf"), "NaN", "Infinity", "-Infinity", "", " ", "a", "\0", "\n", "é"),
    *("\ud800", "\U0001f600", "w", "b", "e", "*", "w*", "?", "loss", "acc", "../..", "a" * 300),
    *("__metadata__", "0", "1e5", "step", "manual", "mean", "AdamW", "SGD", "LBFGS", "Lookahead"),
    *("float32", "float64", "bfloat16", "float16", "F32", "int8", "cpu", "cuda", "cuda:0", "auto"),
    *("AAAA", "AACAPw==", "epoch", "1 / epoch", "epoch ** 9999", "x.y", "__import__('os')"),
    *([], [1], [1.0, 2.0], [[]], [[1, 2], [3]], [None], ["w"], ["w", "w"], [[0], [0]], [0.9, 0.99]),
    *({}, {"a": 1}, {"": None}, {"table": []}, {"table": [1, 2]}, {"params": ["*"]}),
    *({"$tensor": "param/w"}, {"$tensor": "no"}, {"$float": "nan"}, {"$float": "x"}, {"$tuple": 1}),
    *({"$dict": [[[], 1]]}, {"$dict": [1]}, {"$counter": [[1, 2]]}, {"$dtype": "float32"}),
    *({"$dtype": "nn"}, {"$device": "param/b"}, {"$what": 1}, {"indices": [], "values": []}),
    *({"dtype": "float32", "shape": [1], "data": "AACAPw=="}, {"name": "StepLR", "step_size": 1}),
    *(2**63 + 1.0, {"$strided": [{"$tensor": "param/w"}, [1, 0]]}, {"$strided": [[], [5]]}),
    *({"steps": 2, "reduce": "sum"}, {"decay": 2}, {"monitor": "loss"}, {"name": "SGD", "lr": 1}),
]
VALUES += [json.loads("[1," * depth + "1" + "]" * depth) for depth in (33, 60, 70, 300)]


def paths(value: Any, at: Path = ()) -> Iterator[Path]:
    """Yield where each value inside ``value`` is, itself included."""
    yield at
    if isinstance(value, dict):
        for key, below in value.items():
            yield from paths(below, (*at, key))
    elif isinstance(value, list):
        for i, below in enumerate(value):
            yield from paths(below, (*at, i))


def look(value: Any, path: Path) -> Any:
    for step in path:
        value = value[step]
    return value


def spoil(draw: Draw, value: Any) -> Any:
    """Return a copy of parsed JSON in which one thing is different."""
    value = copy.deepcopy(value)
    everywhere = list(paths(value))
    path = draw(st.sampled_from(everywhere))
    what = draw(st.sampled_from(["put", "put", "put", "drop", "move", "rename", "add", "wrap"]))
    if what == "add" or not path:
        inside = look(value, path)
        new = draw(st.sampled_from(VALUES))
        if isinstance(inside, dict):
            inside[draw(st.sampled_from(KEYS))] = new
        elif isinstance(inside, list):
            inside.insert(draw(st.integers(0, len(inside))), new)
        elif not path:
            return new
        return value
    parent, last = look(value, path[:-1]), path[-1]
    if what == "drop":
        del parent[last]
    elif what == "move":
        parent[last] = copy.deepcopy(look(value, draw(st.sampled_from(everywhere))))
    elif what == "wrap":
        parent[last] = [parent[last]]
    elif what == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from(KEYS))] = parent.pop(last)
    else:
        parent[last] = draw(st.sampled_from(VALUES))
    return value


KEYS = [
    *("", "a", "w", "b", "e", "new", "lr", "name", "params", "grads", "groups", "none", "loss"),
    *("worker", "epoch", "seq", "version", "id", "optimizer", "scheduler", "$tensor", "$x"),
    *("betas", "momentum", "initial_lr", "advance", "monitor", "metrics", "abandon", "dtype"),
    *(
        "grad",
        "params ",
        "__metadata__",
        "\0",
        "\ud800",
        "x" * 300,
        "shape",
        "data",
        "sparse",
        "ema",
    ),
    *("best", "window", "foreach", "ledger", "extra", "line_search"),
]


def scramble(draw: Draw, content: bytes) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    before, behind = content[:at], content[at:]
    match draw(st.sampled_from(["flip", "flip", "cut", "insert", "repeat", "swap"])):
        case "flip" if content:
            return before + bytes([behind[0] ^ (1 << draw(st.integers(0, 7)))]) + behind[1:]
        case "cut":
            return before
        case "insert":
            return before + draw(st.binary(min_size=1, max_size=9)) + behind
        case "repeat":
            return before + behind[: draw(st.integers(1, 40))] + behind
        case _:
            return behind + before


#: NaN, Infinity, -1 as an index, the smallest number, in little-endian float32 or int32.
NUMBERS = [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff", b"\1\0\0\0"]


def spoil_frame(draw: Draw, content: bytes) -> bytes:
    """Spoil the bytes, the header, the fields in it, the ledger or the numbers of a frame."""
    what = draw(st.sampled_from(["bytes", "header", "numbers", "ledger", *["fields"] * 4]))
    if what == "bytes":
        return scramble(draw, content)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if what == "numbers":
        at = draw(st.integers(0, max(len(data) - 4, 0)))
        return content[: 8 + length] + data[:at] + draw(st.sampled_from(NUMBERS)) + data[at + 4 :]
    if what == "ledger" and "ledger" in header:
        tensors, metadata = wire.decode(content)
        ledger = spoil(draw, json.loads(bytes(np.asarray(tensors["ledger"]))))
        tensors["ledger"] = np.frombuffer(write(ledger), "u1")
        return b"".join(wire.encode(tensors, metadata))
    if what == "header":
        header = spoil(draw, header)
    else:
        metadata = header.setdefault("__metadata__", {})
        fields = json.loads(metadata.get(META_KEY, "{}"))
        for _ in range(draw(st.integers(1, 3))):
            fields = spoil(draw, fields)
        metadata[META_KEY] = json.dumps(fields)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


HEADERS = [
    *("Accept", "Content-Type", "Idempotency-Key", "If-Match", "If-None-Match", "Expect", "Host"),
    *("Content-Encoding", "Accept-Encoding", "Range", "X-Nothing", "Origin", "Upgrade", "Cookie"),
]
HEADER_VALUES = [
    *("", "*/*", JSON, SAFETENSORS, "text/html", "text/csv", "application/json; charset=utf-16"),
    *(f"{JSON};q=0, {SAFETENSORS};q=nan", "a" * 300, '"', '""', "*", 'W/"x"', '"a", "b"', "["),
    *("[::1", "a:99999999", "gzip", "identity", "100-continue", "h2c", "websocket", "\xff\xfe"),
    *("a b", "bytes=0-1", "k-1", "text/csv;q=x", ","),
]
QUERY = [
    *("worker", "epoch", "seq", "abandon", "weights", "names", "encoding", "dtype", "after"),
    *("limit", "format", "steps", "metrics", "cursor", "tag", "order_by", "", "zzz", "min_version"),
]
QUERY_VALUES = [
    *("", "1", "0", "-1", "1.5", "nan", "inf", "1e999", "9" * 30, "9" * 5000, "true", "null", "a"),
    *("w", "w,b", "%00", "%ff", "%ED%A0%80", "%", "a:b", ":", "created", "-name", "csv", "ema"),
    *("WyJjcmVhdGVkIl0", "WyJjcmVhdGVkIixbMWU5OTksImEiXV0", "best", "eval", "live", "base64"),
    *("list", "float16", "bfloat16", "ndjson", "+", "&", "=", "#"),
]
SEGMENTS = [
    *("", ".", "..", "%2e%2e", "%2f", "%00", "%ff", "a%20b", "\xe9", "0", "-1", "9" * 30, "*"),
    *("x" * 200, "step", "params", "state", "v1", "sessions", "groups", "scheduler", "fork"),
    *("pushes", PUSH, "commit"),
]
METHODS = ["GET", "PUT", "POST", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW"]


def spoil_path(draw: Draw, path: str) -> str:
    parts = path.split("/")
    parts[draw(st.integers(0, len(parts) - 1))] = draw(st.sampled_from(SEGMENTS))
    return "/".join(parts) or "/"


def pairs(names: list[str], values: list[str]) -> st.SearchStrategy[list[tuple[str, str]]]:
    pair = st.tuples(st.sampled_from(names), st.sampled_from(values))
    return st.lists(pair, min_size=1, max_size=3)


def spoilt(draw: Draw, sent: Sent) -> Sent:
    """Return ``sent`` with something wrong somewhere; now and then it is still right."""
    places = ["query", "header", "path", "method", *["body"] * (8 if sent.body is not None else 0)]
    match draw(st.sampled_from(places)):
        case "query":
            kept = sent.query.split("&") if sent.query and draw(st.booleans()) else []
            more = draw(pairs(QUERY, QUERY_VALUES))
            return replace(sent, query="&".join([*kept, *(f"{k}={v}" for k, v in more)]))
        case "header":
            return replace(sent, headers=(*sent.headers, *draw(pairs(HEADERS, HEADER_VALUES))))
        case "path":
            return replace(sent, path=spoil_path(draw, sent.path))
        case "method":
            return replace(sent, method=draw(st.sampled_from(METHODS)))
    if isinstance(sent.body, bytes):
        return replace(sent, body=spoil_frame(draw, sent.body))
    body = sent.body
    for _ in range(draw(st.integers(1, 3))):
        body = spoil(draw, body)
    content = write(body)
    if draw(st.integers(0, 5)) == 0:
        content = scramble(draw, content)
    return replace(sent, body=content, media=JSON)
