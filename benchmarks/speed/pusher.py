"""One of several workers of a session, through the client: it holds a gradient and pushes it.

Arguments: the server's url and the worker's name.
"""

from __future__ import annotations

import sys
import time

from benchmarks.speed.shapes import Shapes, names
from benchmarks.speed.worker import Worker as Answering
from benchmarks.speed.worker import gradient, run, split
from optserve_client import Client, Worker


class Pusher(Answering):
    def __init__(self, url: str, name: str) -> None:
        self._client, self._name = Client(url, timeout=300), name
        self._workers: dict[str, Worker] = {}

    def server_pids(self) -> list[int]:
        return []

    def hold(self, shapes: Shapes, numel: int) -> None:
        """Make the gradient."""
        self._grads = dict(zip(names(shapes), split(gradient(numel), shapes), strict=True))

    def join(self, session: str) -> None:
        self._workers[session] = Worker(self._client, session, self._name)
        self._workers[session].pull()

    def push(self, session: str, count: int) -> tuple[float, float]:
        """Push so often; return when the first one began and the last one was answered."""
        worker, began = self._workers[session], time.perf_counter()
        for _ in range(count):
            worker.push(self._grads)
        return began, time.perf_counter()

    def close(self) -> None:
        self._workers.clear()
        self._grads.clear()


if __name__ == "__main__":
    run(Pusher(sys.argv[1], sys.argv[2]))
