"""What a large step costs in memory, as the kernel counts it."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from optserve_client import wire
from optserve_client.wire import META_KEY, SAFETENSORS
from tests.record import Figure
from tests.serving import ServerProcess

NUMEL = 25_000_000
#: Of the parameters, and so of each copy of them.
NBYTES = 4 * NUMEL
#: Parameters, Adam's two moments, the gradient, the published copy.
COPIES = 5
SLACK = 1.05


def memory(pid: int, field: str) -> int:
    """Return VmRSS (resident now) or VmHWM (most since the last reset) in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def reset_peak(pid: int) -> None:
    """Make VmHWM start again from VmRSS, or skip the test where the kernel does not let us."""
    path = f"/proc/{pid}/clear_refs"
    try:
        Path(path).write_text("5")
    except OSError as exc:
        pytest.skip(f"{path} cannot be written, so the peak cannot be told: {exc}")


def send(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    tensors: Mapping[str, np.ndarray],
    **fields: object,
) -> http.client.HTTPResponse:
    """Send one frame and return the answer, whose body is still to be read."""
    pieces = wire.encode(tensors, {META_KEY: json.dumps(fields)})
    length = sum(memoryview(piece).nbytes for piece in pieces)
    headers = {"content-type": SAFETENSORS, "accept": SAFETENSORS, "content-length": str(length)}
    connection.putrequest(method, path)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    for piece in pieces:
        connection.send(piece)
    answer = connection.getresponse()
    assert answer.status in (200, 201, 202), answer.read()[:500]
    return answer


def test_a_large_step_needs_one_gradient_and_one_published_copy_beyond_its_state(
    figure: Figure,
) -> None:
    with ServerProcess() as server:
        pid, where = server.process.pid, urlsplit(server.url)
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=120)
        tiny = {"w": np.ones(3, "<f4")}
        first = {f"{kind}/w": tiny["w"] for kind in ("grad", "param")}
        send(connection, "POST", "/step", first, id="tiny", optimizer={"name": "Adam"}).read()
        idle = memory(pid, "VmRSS")

        gradient = np.random.default_rng(0).normal(size=NUMEL).astype("<f4")
        params = {"param/w": np.zeros(NUMEL, "<f4")}
        optimizer = {"name": "Adam", "lr": 0.1}
        send(connection, "PUT", "/v1/sessions/big", params, optimizer=optimizer).read()
        reset_peak(pid)
        received = np.empty(0, "<f4")
        for step in range(1, 4):
            path = "/v1/sessions/big/step"
            answer = send(connection, "POST", path, {"grad/w": gradient}, **{"return": "params"})
            tensors, metadata = wire.decode(answer.read())
            assert json.loads(metadata[META_KEY])["version"] == step
            received = np.asarray(tensors["param/w"])
        peak = memory(pid, "VmHWM") - idle
        connection.close()

    assert received.shape == (NUMEL,)
    assert np.array_equal(np.sign(received), -np.sign(gradient))
    copies = peak / NBYTES
    figure("peak memory of a 25 M step over idle, in copies of its params", copies, "x")
    assert copies < COPIES * SLACK


#: Of the workers of a round, and of the gradient of each.
WORKERS, GRADIENT = 8, 16 * 2**20


def test_a_round_closes_in_less_than_two_gradients_however_many_pushed(figure: Figure) -> None:
    """Also where the pushes are not in the session's order, which are read from where they lie."""
    half = np.ones(GRADIENT // 8, "<f4")
    with ServerProcess() as server:
        pid, where = server.process.pid, urlsplit(server.url)
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=120)
        workers = {"mode": "sync", "count": WORKERS}
        params = {"param/a": half, "param/b": half}
        made = {"optimizer": {"name": "SGD", "lr": 1.0}, "workers": workers}
        send(connection, "PUT", "/v1/sessions/round", params, **made).read()
        for number in range(WORKERS):
            if number == WORKERS - 1:
                before = memory(pid, "VmRSS")
                reset_peak(pid)
            told = {"worker": f"w{number}", "seq": 1, "base_version": 0, "return": "none"}
            wait_s = 60 if number == WORKERS - 1 else 0
            grads = {"grad/b": half, "grad/a": half}
            path = "/v1/sessions/round/step"
            answer = send(connection, "POST", path, grads, wait_s=wait_s, **told)
            answer.read()
        peak = memory(pid, "VmHWM") - before
        assert answer.status == 200
        connection.close()
    figure(f"peak memory of a round's close, {WORKERS} pushes", peak / GRADIENT, "gradients")
    assert peak < 2 * GRADIENT
