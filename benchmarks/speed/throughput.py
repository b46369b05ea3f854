"""Small steps: how many a second, and how many times an empty POST one costs."""

from __future__ import annotations

import base64
import json
import statistics
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.speed.latency import ratio
from benchmarks.speed.load import SLOT
from benchmarks.speed.process import Process
from benchmarks.speed.progress import say
from benchmarks.speed.worker import gradient, server_of
from optserve_client import Client, wire
from tests.serving import ServerProcess

CONNECTIONS = (1, 8, 64)
NUMEL = 10


def step_request(session_id: str, host: str) -> bytes:
    """Return a step as the client sends it, its seq left open."""
    fields = {"return": "params", "worker": "load", "epoch": 1, "seq": int(SLOT)}
    tensors = {"grad/w": gradient(NUMEL)}
    body = b"".join(bytes(one) for one in wire.encode(tensors, {wire.META_KEY: json.dumps(fields)}))
    kind = wire.SAFETENSORS
    return _request(f"/v1/sessions/{session_id}/step", host, kind, kind, body)


def empty_body() -> dict[str, Any]:
    """Return fields that are about as long as a small step."""
    return {"grads": {"w": gradient(NUMEL).tolist()}, "return": "params", "worker": "x" * 30}


def empty_request(host: str) -> bytes:
    body = json.dumps(empty_body()).encode()
    return _request("/empty", host, "application/json", "application/json", body)


def _request(path: str, host: str, kind: str, accept: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nAccept: {accept}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def throughput(directory: Path, quick: bool) -> dict[str, Any]:
    """Return answers per second by connections: steps with durability os, and empty POSTs."""
    rounds, seconds = (2, 0.25) if quick else (5, 1.5)
    with (
        ServerProcess(data_dir=directory) as server,
        server_of("app_server") as (_, line),
        Process("load") as load,
        Client(server.url) as client,
    ):
        place = urlsplit(server.url)
        host, port, other = str(place.hostname), int(place.port or 0), int(line)
        params = {"w": np.zeros(NUMEL, np.float32)}
        sessions = [client.create("Adam", params, durability="os") for _ in range(max(CONNECTIONS))]
        steps = [step_request(session.id, place.netloc) for session in sessions]
        empties = [empty_request(f"{host}:{other}")] * len(sessions)
        for name, to, requests in (("step", port, steps), ("empty", other, empties)):
            texts = [base64.b64encode(request).decode() for request in requests]
            load.ask("prepare", name=name, host=host, port=to, requests=texts)
        return {
            str(count): _in_turns(load, count, rounds, seconds, server.process.pid)
            for count in CONNECTIONS
        }


def _in_turns(load: Process, count: int, rounds: int, seconds: float, pid: int) -> dict[str, Any]:
    taken: dict[str, list[dict[str, float]]] = {"step": [], "empty": []}
    for number in range(rounds + 1):
        for name, into in taken.items():
            one = load.ask("load", name=name, connections=count, seconds=seconds)
            if number:  # the first one warms up
                into.append(one)
    say(f"throughput, {count} connections: done")
    made: dict[str, Any] = {
        name: {what: statistics.median(one[what] for one in into) for what in into[0]}
        for name, into in taken.items()
    }
    pairs = zip(taken["step"], taken["empty"], strict=True)
    made["ratio"] = statistics.median(step["per_s"] / empty["per_s"] for step, empty in pairs)
    return made


def small(directory: Path, quick: bool) -> dict[str, Any]:
    """Return summaries of a step of 10 parameters and of an empty POST through the same client."""
    rounds, batch = (4, 20) if quick else (15, 60)
    summaries: dict[str, Any] = {name: {"rounds_s": {}} for name in ("step", "empty")}
    with (
        ServerProcess(data_dir=directory) as server,
        server_of("app_server") as (_, line),
        Process("ours", server.url, str(server.process.pid)) as ours,
    ):
        url, body = f"http://127.0.0.1:{line}", empty_body()
        ours.ask("open", shapes=[[NUMEL]], variants=["memory"])
        for number in range(-1, rounds):
            taken = {
                "step": ours.ask("steps", variant="memory", count=batch),
                "empty": ours.ask("empty", url=url, count=batch, body=body),
            }
            if number >= 0:
                for name, seconds in taken.items():
                    summaries[name]["rounds_s"][str(number)] = statistics.median(seconds)
    for summary in summaries.values():
        summary["p50_s"] = statistics.median(summary["rounds_s"].values())
    return {**summaries, "ratio": ratio(summaries["step"], summaries["empty"])}
