"""Ten thousand pulls that wait for a version of one session, against one server process."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import Figure
from tests.serving import ServerProcess

PULLERS = 10_000
#: Files that each side has open beside the pullers' sockets.
SPARE = 500
SESSION = "/v1/sessions/s"
CREATE = {"optimizer": {"name": "SGD", "lr": 0.5}, "params": {"w": [1.0] * 100}}
STEP = {"grads": {"w": [1.0] * 100}}
LIMIT_S = 30
#: How long it is looked at what the server does while all wait.
IDLE_S = 1.0
#: Those that wait again when the server stops.
STAY = 2_000
Answer = asyncio.Future[bytes]


@pytest.fixture(autouse=True)
def _room_for_sockets() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < PULLERS + SPARE:
        pytest.skip(f"a process may have {hard} open files here, {PULLERS + SPARE} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (PULLERS + SPARE, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def few_files() -> None:
    """Begin with what many systems allow; the server has to ask for more."""
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )


class Puller(asyncio.Protocol):
    """One connection, on which pulls wait."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._said = b""
        self._answered: Answer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def pull(self, min_version: int) -> Answer:
        """Send a pull; return the future of its answer."""
        assert self._transport is not None
        target = f"{SESSION}/params?min_version={min_version}&wait_s=3600"
        self._said, self._answered = b"", asyncio.get_running_loop().create_future()
        self._transport.write(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return self._answered

    def data_received(self, data: bytes) -> None:
        assert self._answered is not None
        self._said += data
        head, blank, body = self._said.partition(b"\r\n\r\n")
        length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if blank and len(body) == int(length or 0):
            self._answered.set_result(self._said)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(ConnectionError(f"no answer: {exc}"))

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()


class Watched:
    """The server, as the system sees it: see proc(5)."""

    def __init__(self, server: ServerProcess) -> None:
        self._proc = Path("/proc") / str(server.process.pid)
        self.port = httpx.URL(server.url).port or 0

    def _stat(self, number: int) -> int:
        return int((self._proc / "stat").read_text().rpartition(")")[2].split()[number - 3])

    def _status(self, name: str) -> int:
        lines = (self._proc / "status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])

    def cpu_s(self) -> float:
        return (self._stat(14) + self._stat(15)) / os.sysconf("SC_CLK_TCK")

    def threads(self) -> int:
        return self._status("Threads")

    def wake_ups(self) -> int:
        """Of the main thread, which runs the event loop."""
        return self._status("voluntary_ctxt_switches")

    def memory_kib(self) -> int:
        return self._status("VmRSS")

    def connections(self) -> list[int]:
        """Return how many bytes each of its connections has for it that it did not read yet."""
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        here, established = f":{self.port:04X}", "01"
        return [
            int(row[4].partition(":")[2], 16)
            for row in rows
            if row[1].endswith(here) and row[3] == established
        ]


async def connected(port: int) -> list[Puller]:
    """Return the pullers. They come in groups that the listening socket has room for."""
    loop, pullers = asyncio.get_running_loop(), list[Puller]()
    while len(pullers) < PULLERS:
        group = min(500, PULLERS - len(pullers))
        made = (loop.create_connection(Puller, "127.0.0.1", port) for _ in range(group))
        pullers += [puller for _, puller in await asyncio.gather(*made)]
    return pullers


async def pulling(pullers: list[Puller], min_version: int, server: Watched) -> list[Answer]:
    """Have all of them wait; return the futures of their answers."""
    answers = [puller.pull(min_version) for puller in pullers]
    while (left := server.connections()) and (len(left) < len(pullers) or any(left)):
        await asyncio.sleep(0.05)
    return answers


async def wait_and_step(http: httpx.Client, server: Watched, figure: Figure) -> list[Puller]:
    threads, memory = server.threads(), server.memory_kib()
    pullers = await connected(server.port)
    answers = await pulling(pullers, 2, server)
    # What was read was begun before this is answered, and now waits.
    assert (await asyncio.to_thread(http.get, "/healthz")).status_code == 200
    assert not any(answer.done() for answer in answers)
    assert server.threads() == threads
    memory = server.memory_kib() - memory
    began, cpu_s, wake_ups = time.monotonic(), server.cpu_s(), server.wake_ups()
    await asyncio.sleep(IDLE_S)
    used_s, wake_ups = server.cpu_s() - cpu_s, server.wake_ups() - wake_ups
    seconds = time.monotonic() - began
    assert wake_ups < PULLERS / 10, "somebody polls"
    assert server.threads() == threads
    began = time.monotonic()
    assert (await asyncio.to_thread(http.post, f"{SESSION}/step", json=STEP)).status_code == 200
    got = await asyncio.gather(*answers)
    answered_s = time.monotonic() - began
    for answer in got:
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        reply = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert (reply["version"], reply["params"]) == (2, {"w": [0.0] * 100})
    pullers_ = f"{PULLERS:,} pulls that wait"
    figure(f"{pullers_}: the server's CPU time meanwhile", 1000 * used_s / seconds, "ms per s")
    figure(f"{pullers_}: the event loop's wake-ups meanwhile", wake_ups / seconds, "per s")
    figure(f"{pullers_}: memory", memory / PULLERS, "KiB each")
    figure(f"{pullers_}: from the step to the last answer", answered_s, "s")
    return pullers


async def stop(pullers: list[Puller], process: ServerProcess, server: Watched) -> None:
    for puller in pullers[STAY:]:
        puller.close()
    answers = await pulling(pullers[:STAY], 3, server)
    process.process.send_signal(signal.SIGTERM)
    for answer in await asyncio.gather(*answers):
        assert answer.startswith(b"HTTP/1.1 304 Not Modified\r\n")
    assert await asyncio.to_thread(process.process.wait, LIMIT_S) == 0
    for puller in pullers[:STAY]:
        puller.close()


def test_ten_thousand_wait_for_one_version(figure: Figure) -> None:
    async def whole() -> None:
        with (
            ServerProcess(preexec=few_files) as process,
            httpx.Client(base_url=process.url, timeout=LIMIT_S) as http,
        ):
            assert http.put(SESSION, json=CREATE).status_code == 201
            assert http.post(f"{SESSION}/step", json=STEP).status_code == 200
            server = Watched(process)
            pullers = await wait_and_step(http, server, figure)
            await stop(pullers, process, server)
            assert "Traceback" not in process.stderr()
            assert '"level": "error"' not in process.stderr()

    asyncio.run(whole())
