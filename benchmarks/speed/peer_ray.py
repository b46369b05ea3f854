"""A parameter server as a Ray actor: one call for each step, numpy arrays both ways.

On one machine both ends map the same memory, Ray's object store. Variant ``view`` reads the
parameters where they lie there, read-only; ``copied`` has them in an array of the client's own, as
all other contestants do.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

# Nothing is sent home; and its processes have the priority of all others.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}

import ray
import torch

from benchmarks.speed.peer_state import Model
from benchmarks.speed.shapes import Shapes
from benchmarks.speed.worker import Worker, check_first_step, gradient, run, split, timed

#: Holds gradients and parameters of 100 M float32 twice over.
STORE_BYTES = 2_400_000_000
TIMEOUT_S = 120


class Server:
    """The actor. Ray gives it one thread for each processor it reserves; we ask for torch's own
    number, as all others have."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        # What arrives lies in Ray's store and is read-only; Adam only reads it.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        self._model: Model | None = None

    def pid(self) -> int:
        return os.getpid()

    def make(self, shapes: Shapes | None) -> None:
        self._model = None if shapes is None else Model(shapes)

    def step(self, grads: list[Any]) -> list[Any]:
        assert self._model is not None
        params = self._model.step([torch.from_numpy(grad) for grad in grads])
        return [param.numpy() for param in params]


class Ray(Worker):
    def __init__(self) -> None:
        ray.init(
            num_cpus=4,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            configure_logging=False,
        )
        self._server = ray.remote(Server).remote(torch.get_num_threads())
        self._pid = ray.get(self._server.pid.remote(), timeout=TIMEOUT_S)
        self._grads: list[Any] = []
        self._own: list[Any] = []

    def server_pids(self) -> list[int]:
        return [self._pid]

    def open(self, shapes: Shapes, variants: Sequence[str]) -> None:
        ray.get(self._server.make.remote(shapes), timeout=TIMEOUT_S)
        flat = gradient(sum(torch.Size(shape).numel() for shape in shapes))
        self._grads = split(flat, shapes)
        self._own = [np.zeros_like(grad) for grad in self._grads] if "copied" in variants else []
        check_first_step(self._step()[0].reshape(-1), flat)

    def steps(self, variant: str, count: int) -> list[float]:
        return timed(self._step if variant == "view" else self._step_and_copy, count)

    def close(self) -> None:
        self._grads = self._own = []
        ray.get(self._server.make.remote(None), timeout=TIMEOUT_S)

    def _step(self) -> list[Any]:
        params: list[Any] = ray.get(self._server.step.remote(self._grads), timeout=TIMEOUT_S)
        return params

    def _step_and_copy(self) -> None:
        for own, param in zip(self._own, self._step(), strict=True):
            np.copyto(own, param)


def main() -> None:
    try:
        run(Ray())
    finally:
        ray.shutdown()


if __name__ == "__main__":
    # The actor's class is known by the module's full name.
    from benchmarks.speed import peer_ray

    peer_ray.main()
