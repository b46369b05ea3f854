"""Served parameters are torch's, bit for bit: the whole table in the long form, a part else.

The short form takes one cell of every optimizer, another one on each day of the year.
"""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from optserve.optim import catalogue
from optserve_client import wire
from tests import local
from tests.conftest import LONG, Figure
from tests.integration.parity import (
    STEPS,
    TAKES,
    Cell,
    Local,
    Shapes,
    body,
    cells,
    resolve,
    shapes_of,
)
from tests.serving import ServerProcess


def encoding(i: int) -> str:
    """Return how step ``i`` travels; lists, the slow ones, are every tenth."""
    return "list" if i % 10 == 5 else ("binary", "base64")[i % 2]


#: Exceptions by which a class refuses its construction or its first step.
REFUSALS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    ArithmeticError,
    AttributeError,
    AssertionError,
)


def chosen() -> list[Cell]:
    """Return the cells of this run."""
    if LONG:
        return list(cells())
    day = datetime.datetime.now(datetime.UTC).timetuple().tm_yday
    by_name = itertools.groupby(cells(), key=lambda cell: cell.name)
    rows = [list(group) for _, group in by_name]
    return [row[(day + i) % len(row)] for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    """A server with one thread, like this side: two that spin would halve each other's speed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with (
        ServerProcess("--threads", "1") as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        yield client
    torch.set_num_threads(before)


def encoded(fields: dict[str, Any], tensors: local.Arrays, kind: str, how: str) -> dict[str, Any]:
    """Return content and headers of a request with these ``grads`` or ``params``."""
    if how == "binary":
        named = {f"{kind.removesuffix('s')}/{n}": t for n, t in tensors.items()}
        pieces = wire.encode(named, {wire.META_KEY: json.dumps(fields)})
        content = b"".join(bytes(piece) for piece in pieces)
        return {"content": content, "headers": dict.fromkeys(_TYPES, wire.SAFETENSORS)}
    values = {name: wire.tensor_to_json(t, how) for name, t in tensors.items()}  # type: ignore[arg-type]
    return {"json": {**fields, kind: values, **({} if kind == "params" else _reply(how))}}


_TYPES = ("content-type", "accept")


def _reply(how: str) -> dict[str, str]:
    return {"return_encoding": how}


def params_of(answer: httpx.Response, shapes: Shapes) -> dict[str, wire.Tensor]:
    """Return the params in a reply, whatever its encoding, in the session's order."""
    assert answer.status_code in (200, 201), answer.text[:500]
    if answer.headers["content-type"] == wire.SAFETENSORS:
        tensors, _ = wire.decode(answer.content)
        return {name.removeprefix("param/"): t for name, t in tensors.items()}
    found = answer.json()["params"]
    return {n: wire.tensor_from_json(v, n, "F32", shapes[n]) for n, v in found.items()}


def refusal(cell: Cell, shapes: Shapes) -> str | None:
    """Return the sentence with which the class itself refuses these shapes, or None."""
    try:
        trial = Local(cell, {n: np.ones(s, "f4") for n, s in shapes.items()}, cell.impl)
        for _ in range(trial.accumulate):
            trial.step({n: np.full(s, 0.5, "f4") for n, s in shapes.items()})
    except REFUSALS as exc:
        return str(exc) or type(exc).__name__
    return None


@pytest.mark.filterwarnings("ignore:std:UserWarning")  # of a class that takes it of one element
@pytest.mark.parametrize("cell", chosen(), ids=lambda cell: cell.id)
def test_served_params_are_bit_equal_to_local_ones(cell: Cell, http: httpx.Client) -> None:
    for label, shapes in shapes_of(cell.name).items():
        params = local.arrays(0, shapes)
        fields = {**body(cell), "order": list(shapes)}
        request = encoded(fields, params, "params", "binary")
        path = f"/v1/sessions/{cell.id}-{label.replace(' ', '-')}"
        answer = http.put(
            path, content=request["content"], headers={"content-type": wire.SAFETENSORS}
        )
        sentence = refusal(cell, shapes)
        if sentence is None:
            break
        assert answer.status_code == 422, f"{label}: the class says {sentence}"
        assert answer.json()["code"] == "torch_refused", answer.text
        assert answer.json()["detail"] == sentence
    else:
        pytest.fail(f"{cell.name} takes none of the shapes: {sentence}")
    assert answer.status_code == 201, answer.text
    assert label == TAKES.get(f"{cell.name}-{cell.impl}", TAKES.get(cell.name, "odd"))
    alone = Local(cell, params, answer.json()["impl"])
    for i in range(STEPS):
        grads = local.arrays(1000 + i, shapes)
        request = encoded({}, grads, "grads", encoding(i))
        served = http.post(f"{path}/step", **request)
        alone.step(grads)
        local.assert_equal(params_of(served, shapes), alone.leaves)
    assert any(not np.array_equal(params[n], alone.leaves[n].detach()) for n in params)
    http.delete(path)


@pytest.mark.parametrize("inner", ["SGD", "RMSprop", "Muon", "Lion", "AdaBelief", "Prodigy"])
def test_lookahead_wraps_others_bit_equal(inner: str, http: httpx.Client) -> None:
    entry, params = catalogue.find(inner), local.arrays(0, {"w": (31, 17)})
    spec = {"name": "Lookahead", "optimizer": {"name": inner, "lr": 0.02}, "k": 3, "alpha": 0.7}
    path = f"/v1/sessions/around-{inner}"
    body = {"optimizer": spec, "params": local.as_json(params)}
    assert http.put(path, json=body).status_code == 201
    leaves = local.leaves(params)
    wrapped = resolve(entry.source)(leaves.values(), lr=0.02)
    alone = resolve("pytorch_optimizer.Lookahead")(wrapped, k=3, alpha=0.7)
    for seed in range(10):
        grads = local.arrays(seed, {"w": (31, 17)})
        local.set_grads(leaves, grads)
        alone.step()
        served = http.post(f"{path}/step", **encoded({}, grads, "grads", "base64"))
        local.assert_equal(params_of(served, {"w": (31, 17)}), leaves)


def test_the_table_holds_every_optimizer(figure: Figure) -> None:
    figure("parity: cells that were stepped", len(chosen()), f"of {len(list(cells()))}")
    tested = {cell.name for cell in cells()}
    apart = {e.name for e in catalogue.entries() if e.needs_loss or e.sparse == "only"}
    assert tested | apart == {entry.name for entry in catalogue.entries()}
    assert apart == {"LBFGS", "SparseAdam"}
    assert {cell.name for cell in chosen()} == tested
