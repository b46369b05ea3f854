"""The service that one would write first: FastAPI, a pydantic model, JSON lists; through httpx.

The server is another process of this module, started with ``serve``; it says its port.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import torch
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.speed.app_server import serve
from benchmarks.speed.peer_state import Model
from benchmarks.speed.shapes import Shapes, names
from benchmarks.speed.worker import Worker, check_first_step, gradient, run, server_of, split, timed


class Create(BaseModel):
    shapes: list[list[int]]


class Step(BaseModel):
    grads: dict[str, list[float]]


class Updated(BaseModel):
    params: dict[str, list[float]]


def service() -> FastAPI:
    app, models = FastAPI(), {}

    @app.put("/sessions/{session_id}")
    def create(session_id: str, body: Create) -> None:
        models[session_id] = Model(body.shapes)

    @app.post("/sessions/{session_id}/step")
    def step(session_id: str, body: Step) -> Updated:
        model = models[session_id]
        shapes = [param.shape for param in model.params]
        grads = [
            torch.tensor(v).reshape(s) for v, s in zip(body.grads.values(), shapes, strict=True)
        ]
        params = model.step(grads)
        lists = [param.flatten().tolist() for param in params]
        return Updated(params=dict(zip(body.grads, lists, strict=True)))

    return app


class Naive(Worker):
    def __init__(self, pid: int, port: int) -> None:
        self._pid, self._port = pid, port
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        self._grads: dict[str, Any] = {}

    def server_pids(self) -> list[int]:
        return [self._pid]

    def port(self) -> int:
        return self._port

    def open(self, shapes: Shapes, variants: Sequence[str]) -> None:
        self._client.put("/sessions/a", json={"shapes": shapes}).raise_for_status()
        flat = gradient(sum(int(np.prod(shape)) for shape in shapes))
        self._grads = dict(zip(names(shapes), split(flat, shapes), strict=True))
        check_first_step(self._step()["w000"].reshape(-1), flat)

    def steps(self, variant: str, count: int) -> list[float]:
        return timed(self._step, count)

    def close(self) -> None:
        self._grads = {}
        self._client.put("/sessions/a", json={"shapes": []}).raise_for_status()

    def _step(self) -> dict[str, Any]:
        body = {"grads": {name: grad.ravel().tolist() for name, grad in self._grads.items()}}
        reply = self._client.post("/sessions/a/step", json=body)
        params = reply.raise_for_status().json()["params"]
        return {name: np.array(values, np.float32) for name, values in params.items()}


def main() -> None:
    if len(sys.argv) > 1:
        serve(service())
        return
    with server_of("peer_naive", "serve") as (process, line):
        run(Naive(process.pid, int(line)))


if __name__ == "__main__":
    main()
