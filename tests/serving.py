"""A real server process for tests: started, waited for by its ready line, always stopped."""

from __future__ import annotations

import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol

ROOT = Path(__file__).resolve().parents[1]
READY = re.compile(r"^optserve \S+ ready at (\S+) \(.*, (\d+) threads, .*\)$")
DEADLINE_S = 60.0


def environment(**extra: str) -> dict[str, str]:
    """Return our environment plus ``extra``, without the developer's own ``OPTSERVE_*``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPTSERVE_")}
    return kept | extra


def free_port() -> int:
    """Return a port that a server can be started on again and again.

    It is none that the system gives to outgoing connections: a client that knocks while the server
    is down could be given it, connect to itself, and keep the server from coming back.
    """
    while True:
        port = random.randint(10_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


class Process(Protocol):
    """What is used of a ``subprocess.Popen``."""

    @property
    def pid(self) -> int: ...
    @property
    def stdout(self) -> IO[str] | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int) -> None: ...
    def kill(self) -> None: ...


#: Starts ``optserve`` with these arguments, standard error going there; standard output is a pipe.
Launch = Callable[[Sequence[str], Mapping[str, str], IO[str]], Process]


def execute(
    prefix: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
    preexec: Callable[[], None] | None = None,
) -> Launch:
    """Return a launch that executes ``python -m optserve``.

    ``prefix`` is what stands before it (``strace -f``); ``preexec`` runs in the new process first.
    """

    def launch(arguments: Sequence[str], env: Mapping[str, str], stderr: IO[str]) -> Process:
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "optserve", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=env,
            pass_fds=tuple(pass_fds),
            preexec_fn=preexec,
            cwd=ROOT,
        )

    return launch


class ServerProcess:
    """``python -m optserve serve`` with ``flags``; a context manager.

    Without ``data_dir`` the server has one of its own, which goes with it. With one, and a fixed
    ``--port`` (:func:`free_port`) or ``--uds``, another server can take its place afterwards.
    """

    def __init__(
        self,
        *flags: str,
        env: dict[str, str] | None = None,
        pass_fds: tuple[int, ...] = (),
        data_dir: Path | None = None,
        args: Sequence[str] = (),
        prefix: Sequence[str] = (),
        preexec: Callable[[], None] | None = None,
        launch: Launch | None = None,
    ) -> None:
        """Start it.

        Args:
            flags: Of ``optserve serve``; without a place to listen, a free port is picked.
            env: Further variables.
            pass_fds: Descriptors that it inherits.
            data_dir: Where it keeps its sessions.
            args: Further flags, behind ``flags``.
            prefix: A command that runs it, such as ``("strace", "-f")``.
            preexec: Called in the new process before it becomes the server.
            launch: How to start it instead of executing it.
        """
        flags = (*flags, *args)
        if not {"--port", "--uds", "--fd"} & set(flags):
            flags = ("--port", "0", *flags)
        self._own_dir: tempfile.TemporaryDirectory[str] | None = None
        variables = dict(env or {})
        if data_dir is None and "--data-dir" not in flags:
            self._own_dir = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            variables.setdefault("OPTSERVE_DATA_DIR", self._own_dir.name)
        elif data_dir is not None:
            flags = (*flags, "--data-dir", str(data_dir))
        self._stderr = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed on exit
        launch = launch or execute(prefix, pass_fds, preexec)
        self.process = launch(["serve", *flags], environment(**variables), self._stderr)
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        #: The whole ready line.
        self.line = ""
        #: ``http://127.0.0.1:PORT`` or ``unix:/path``.
        self.url = ""
        self.threads = 0

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put("")

    def wait_ready(self, deadline_s: float = DEADLINE_S) -> ServerProcess:
        """Return when the ready line has come and, over TCP, ``/readyz`` says so too."""
        try:
            self.line = self._lines.get(timeout=deadline_s)
        except queue.Empty:
            self.line = ""
        found = READY.match(self.line)
        if found is None:
            self.stop(signal.SIGKILL)
            said = f"no ready line but {self.line!r}; stderr:\n{self.stderr()}"
            self.close()
            raise AssertionError(said)
        self.url, self.threads = found[1], int(found[2])
        if self.url.startswith("http"):
            self._poll_readyz(time.monotonic() + 10)
        return self

    def _poll_readyz(self, until: float) -> None:
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as reply:
                    if reply.status == 200:
                        return
            except urllib.error.HTTPError as exc:
                exc.close()
            assert time.monotonic() < until, "the ready line came but /readyz never said 200"
            time.sleep(0.05)

    def stderr(self) -> str:
        """Return what it has said on standard error so far."""
        size = os.fstat(self._stderr.fileno()).st_size
        # Not by seeking: where the process writes next is ours too.
        return os.pread(self._stderr.fileno(), size, 0).decode(errors="replace")

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 20) -> int:
        """Send ``number`` if the process still runs and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._reader.join(5)
            if self.process.stdout is not None:
                self.process.stdout.close()

    def close(self) -> None:
        """Stop it if it still runs, and forget what it said and its own directory."""
        try:
            self.stop()
        finally:
            self._stderr.close()
            if self._own_dir is not None:
                self._own_dir.cleanup()

    def __enter__(self) -> ServerProcess:
        return self.wait_ready()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
