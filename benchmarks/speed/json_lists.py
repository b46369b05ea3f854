"""Steps as JSON lists: against orjson's own work on the same text, and the naive service."""

from __future__ import annotations

import http.client
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import orjson

from benchmarks.speed.latency import ratio
from benchmarks.speed.process import Process
from benchmarks.speed.progress import say
from benchmarks.speed.shapes import numel
from benchmarks.speed.worker import Worker, gradient, run, timed
from optserve_client import Client
from tests.serving import ServerProcess

#: Size -> rounds, steps of one round, and rounds in which the naive service takes part too.
ROUNDS = {"10k": (15, 10, 15), "1M": (8, 1, 2)}
QUICK = {"10k": (4, 5, 4), "1M": (3, 1, 0)}
NAIVE = ("naive", "naive_httpx")


class Poster(Worker):
    """Posts text that lies ready and reads the answer without looking at it."""

    def __init__(self) -> None:
        self._posts: dict[str, Callable[[], bytes]] = {}
        self._codec: Callable[[], Any] = lambda: None

    def server_pids(self) -> list[int]:
        return []

    def prepare(self, name: str, host: str, port: int, path: str, tensor: str, size: int) -> None:
        """Make the text: float32 as a Python list has them, with up to 17 digits."""
        fields: dict[str, Any] = {"grads": {tensor: gradient(size).tolist()}}
        if name == "optserve":
            fields["return"] = "params"
        self._posts[name] = partial(
            _post, http.client.HTTPConnection(host, port, timeout=120), path, orjson.dumps(fields)
        )
        text = self._posts[name]()
        if name == "optserve":
            sent, reply = orjson.dumps(fields), orjson.loads(text)
            assert len(reply["params"][tensor]) == size
            self._codec = lambda: (orjson.loads(sent), orjson.dumps(reply))

    def steps(self, variant: str, count: int) -> list[float]:
        return timed(self._codec if variant == "orjson" else self._posts[variant], count)


def _post(server: http.client.HTTPConnection, path: str, text: bytes) -> bytes:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    server.request("POST", path, body=text, headers=headers)
    answer = server.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {body[:500]!r}")
    return body


def json_lists(directory: Path, quick: bool) -> dict[str, Any]:
    """Return summaries by size: ``optserve`` and ``naive`` are the same text posted to each,
    ``orjson`` is loads of that text and dumps of optserve's reply, ``naive_httpx`` is the naive
    service as it is used, from arrays to arrays."""
    with (
        ServerProcess(data_dir=directory) as server,
        Client(server.url) as client,
        Process("json_lists") as poster,
        Process("peer_naive") as naive,
    ):
        made = {}
        for size, (rounds, batch, naive_rounds) in (QUICK if quick else ROUNDS).items():
            count, place = numel(size), urlsplit(server.url)
            session = client.create("Adam", {"w": np.zeros(count, np.float32)}, durability="memory")
            path = f"/v1/sessions/{session.id}/step"
            to: dict[str, Any] = {
                "host": place.hostname,
                "port": place.port,
                "path": path,
                "tensor": "w",
            }
            poster.ask("prepare", name="optserve", size=count, **to)
            if naive_rounds:
                naive.ask("open", shapes=[[count]], variants=[])
                to = {"host": "127.0.0.1", "port": naive.ask("port"), "tensor": "w000"}
                poster.ask("prepare", name="naive", size=count, path="/sessions/a/step", **to)
            made[size] = _in_turns(poster, naive, rounds, batch, naive_rounds)
            session.delete()
            say(f"json, {size}: done")
        return made


def _in_turns(
    poster: Process, naive: Process, rounds: int, batch: int, naive_rounds: int
) -> dict[str, Any]:
    names = ["optserve", "orjson", *(NAIVE if naive_rounds else ())]
    made: dict[str, Any] = {name: {"rounds_s": {}} for name in names}
    for number in range(-1, rounds):
        for name, one in made.items():
            if name in NAIVE and not 0 <= number < naive_rounds:
                continue
            worker, variant = (naive, "") if name == "naive_httpx" else (poster, name)
            seconds = worker.ask("steps", variant=variant, count=batch)
            if number >= 0:
                one["rounds_s"][str(number)] = statistics.median(seconds)
    for one in made.values():
        one["p50_s"] = statistics.median(one["rounds_s"].values())
    for name in names[1:]:
        made[name]["optserve_over"] = ratio(made["optserve"], made[name])
    return made


if __name__ == "__main__":
    run(Poster())
