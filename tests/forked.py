"""Servers without the seconds that importing torch takes: forked from a process that has done it.

A test that kills a hundred servers cannot pay for a hundred imports. ``python -m tests.forked``
imports what ``optserve serve`` imports, makes no thread, and waits. Each start forks it, and the
child calls the console script's own ``optserve.__main__.main`` with the arguments in ``sys.argv``:
from there on it is the program, with its own process id to kill. What it does not go through is
Python's start and the imports; so tests of kills also start some servers the long way.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any

from tests.serving import ROOT, environment

_MESSAGE_BYTES = 2**20


class Forkery:
    """The process that is forked; :meth:`launch` starts a server. A context manager."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env=environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
                pass_fds=(theirs.fileno(),),
                cwd=ROOT,
            )
        self._socket = ours
        self._lock = threading.Lock()

    def launch(self, arguments: Sequence[str], env: Mapping[str, str], stderr: IO[str]) -> Child:
        """Start ``optserve`` with these arguments; a ``tests.serving.Launch``."""
        ours, theirs = os.pipe()
        try:
            pid = self.ask({"argv": list(arguments), "env": dict(env)}, theirs, stderr.fileno())
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        return Child(self, pid, ours)

    def ask(self, message: Mapping[str, Any], *descriptors: int) -> int:
        """Send a message, with open files if it starts a server, and return the answer."""
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(message).encode()], descriptors)
            answer = self._socket.recv(_MESSAGE_BYTES)
        if not answer:
            raise RuntimeError("the process that forks servers is gone")
        return int(answer)

    def __enter__(self) -> Forkery:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()  # it then ends its children and itself
        self._process.wait(20)


class Child:
    """A forked server, as ``subprocess.Popen`` would show it."""

    def __init__(self, forkery: Forkery, pid: int, stdout: int) -> None:
        self._forkery = forkery
        self.pid = pid
        self.stdout: IO[str] | None = os.fdopen(stdout)
        self._pidfd = os.pidfd_open(pid)
        self._status: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, or minus the signal that ended it; None while it runs."""
        if self._status is None:
            # Its parent waits for it only here, so that its number is nobody else's before.
            status = self._forkery.ask({"poll": self.pid})
            if status >= 0:
                self._status = os.waitstatus_to_exitcode(status)
                os.close(self._pidfd)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("optserve", timeout or 0)
            time.sleep(0.002)
        return status

    def send_signal(self, number: int) -> None:
        if self._status is None:
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# --- in the process that is forked ---------------------------------------------------------------


def _import_everything() -> None:
    """Import what a server imports, also what torch imports late; no thread may come of it."""
    import importlib
    import pkgutil

    import optserve
    from optserve.optim import devices

    for module in pkgutil.walk_packages(optserve.__path__, "optserve."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    import uvicorn.lifespan.on
    import uvicorn.loops.uvloop
    import uvicorn.protocols.http.httptools_impl  # noqa: F401

    devices.use_threads(1)
    devices.warm()
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a process that is forked must have one thread, this one has {threads}"


def _become(arguments: Sequence[str], env: Mapping[str, str], descriptors: Sequence[int]) -> None:
    """Take the place that a server started by exec would have."""
    for target, descriptor in zip((1, 2), descriptors, strict=True):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["optserve", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _serve(control: socket.socket) -> None:
    """Fork a child for each message that asks for one; return in the children only."""
    children: set[int] = set()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, 2)
        if not data:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            os._exit(0)
        message = json.loads(data)
        if "poll" in message:
            pid, status = os.waitpid(message["poll"], os.WNOHANG)
            children.discard(pid)
            control.send(str(status if pid else -1).encode())
            continue
        pid = os.fork()
        if pid == 0:
            control.close()
            _become(message["argv"], message["env"], descriptors)
            return
        children.add(pid)
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(str(pid).encode())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test, which then hangs up
    _import_everything()
    _serve(socket.socket(fileno=int(sys.argv[1])))
    from optserve.__main__ import main

    main()
