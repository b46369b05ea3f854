"""A process that has imported and warmed up everything, and forks a child in some milliseconds.

``python -m tests.zygote MODULE`` imports MODULE, calls its ``warm()``, which may leave no thread
behind, and then forks a child for each request. The child runs ``MODULE.main(channel, text)``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[1]


class Zygote:
    """The process; a context manager."""

    def __init__(self, module: str, **env: str) -> None:
        self._channel, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote", module, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | env,
        )
        theirs.close()
        word = self._channel.recv(16)
        assert word == b"warm", "the zygote did not come up; its stderr says why"

    def fork(self, text: str) -> socket.socket:
        """Start a child with ``text``; return our end of its channel."""
        ours, theirs = socket.socketpair()
        data = text.encode()
        socket.send_fds(self._channel, [len(data).to_bytes(4, "little") + data], [theirs.fileno()])
        theirs.close()
        return ours

    def __enter__(self) -> Zygote:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._channel.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(module: str, channel: socket.socket) -> None:
    """Fork a child for every request until the other end closes."""
    program = importlib.import_module(module)
    program.warm()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody has to wait for them
    channel.sendall(b"warm")
    while True:
        head, fds, _, _ = socket.recv_fds(channel, 4, 1)
        if not head:
            return
        text = channel.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL).decode()
        if os.fork() == 0:
            channel.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with contextlib.closing(socket.socket(fileno=fds[0])) as own:
                try:
                    program.main(own, text)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                    status = 1
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        os.close(fds[0])


if __name__ == "__main__":
    serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
