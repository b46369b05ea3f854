"""Who takes part: which worker plays it, up to which size, and how a reader is told."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed.process import Process, WorkerFailed, peers_python
from benchmarks.speed.progress import say
from tests.serving import ServerProcess


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to take a step."""

    #: Of the results: ``floors.bare``.
    key: str
    #: As it is printed.
    label: str
    #: Largest number of parameters that it is asked for.
    most: int = 10**9
    #: Steps of one round are divided by this: it is slow whatever the size.
    slow: int = 1

    @property
    def worker(self) -> str:
        """Whose process plays it; contestants of one worker share the client and the state."""
        return self.key.partition(".")[0]

    @property
    def variant(self) -> str:
        return self.key.partition(".")[2]


TCP = "optserve.memory"
CONTESTANTS = [
    Contestant(key="floors.local", label="local fused step, no sockets"),
    Contestant(key="floors.bare", label="bare floor: plain sockets"),
    Contestant(key="floors.safe", label="safe floor: + XXH3-128, norm"),
    Contestant(key=TCP, label="optserve, Client over TCP"),
    Contestant(key="uds.memory", label="optserve, Client over a Unix socket"),
    Contestant(key="optserve.os", label="optserve, durability os"),
    Contestant(key="optserve.always", label="optserve, durability always"),
    Contestant(key="optserve.bf16", label="optserve, bf16 both ways"),
    Contestant(key="optserve.curl", label="optserve through curl, its start included", slow=8),
    Contestant(key="rpc.", label="torch RPC (TensorPipe)"),
    Contestant(key="ray.view", label="Ray actor, read in its shared memory"),
    Contestant(key="ray.copied", label="Ray actor, copied out of it"),
    Contestant(key="gloo.", label="torch gloo send/recv"),
    Contestant(key="naive.", label="FastAPI, pydantic, JSON lists, httpx", most=100_000, slow=4),
]
BY_KEY = {contestant.key: contestant for contestant in CONTESTANTS}
#: Name of a set for --only -> workers.
SETS = {
    "floors": {"floors"},
    "optserve": {"optserve", "uds"},
    "peers": {"rpc", "ray", "gloo", "naive"},
}
#: At most so many parameters are held by all contestants at once; above, a few at a time take part,
#: each few with optserve over TCP among them, which all are compared with.
CROWD = 30_000_000
FEWS = [
    ["floors.local", "floors.bare", "floors.safe", TCP, "uds.memory"],
    [TCP, "optserve.os", "optserve.always", "optserve.bf16", "optserve.curl"],
    [TCP, "rpc.", "ray.view", "ray.copied", "gloo."],
]


def needs_peers_environment(worker: str) -> bool:
    """Return whether it needs what only the peers' environment has; the rest is torch and FastAPI,
    in the versions that optserve runs on."""
    return worker == "ray"


class Rig:
    """The workers, each started when it is first asked for and stopped at the end."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self._stack = stack
        self._directory = directory
        self._running: dict[str, Process] = {}
        #: Worker, or key of a contestant -> why it does not take part.
        self.absent: dict[str, str] = {}

    def get(self, worker: str) -> Process | None:
        """Return the running worker, or None if it cannot take part."""
        if worker in self.absent:
            return None
        if worker not in self._running:
            say(f"starting {worker}")
            try:
                self._running[worker] = self._start(worker)
            except (WorkerFailed, OSError, AssertionError) as exc:
                self.drop(worker, exc)
                return None
        return self._running[worker]

    def drop(self, worker: str, reason: BaseException) -> None:
        """Stop ``worker`` for good."""
        text = str(reason).strip()
        self.absent[worker] = text.splitlines()[-1] if text else type(reason).__name__
        say(f"{worker} does not take part: {text}")
        if worker in self._running:
            self._running.pop(worker).close()

    def _start(self, worker: str) -> Process:
        if worker in ("optserve", "uds"):
            # Not in the data directory: the path of a socket has at most 107 bytes.
            place = self._stack.enter_context(tempfile.TemporaryDirectory())
            flags = ("--uds", f"{place}/optserve.sock") if worker == "uds" else ()
            server = self._stack.enter_context(
                ServerProcess(*flags, data_dir=self._directory / worker)
            )
            made = Process("ours", server.url, str(server.process.pid))
        elif worker == "floors":
            made = Process("floors")
        else:
            python = peers_python() if needs_peers_environment(worker) else Path(sys.executable)
            if not python.exists():
                raise WorkerFailed(f"{python.parents[1].name} is not there")
            # TensorPipe polls its shared memory without a pause.
            made = Process(f"peer_{worker}", python=str(python), restless=worker == "rpc")
        return self._stack.enter_context(made)


@contextmanager
def rig(directory: Path) -> Iterator[Rig]:
    with ExitStack() as stack:
        yield Rig(stack, directory)
