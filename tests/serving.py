"""A real server process for tests: started, waited for by its ready line, always stopped."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[1]
READY = re.compile(r"^optserve \S+ ready at (\S+) \(.*, (\d+) threads, .*\)$")
DEADLINE_S = 60.0


def environment(**extra: str) -> dict[str, str]:
    """Return our environment plus ``extra``, without the developer's own ``OPTSERVE_*``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPTSERVE_")}
    return kept | extra


class ServerProcess:
    """``python -m optserve serve`` with ``flags``; a context manager."""

    def __init__(
        self, *flags: str, env: dict[str, str] | None = None, pass_fds: tuple[int, ...] = ()
    ) -> None:
        if not {"--port", "--uds", "--fd"} & set(flags):
            flags = ("--port", "0", *flags)
        self._stderr = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed on exit
        self.process = subprocess.Popen(
            [sys.executable, "-m", "optserve", "serve", *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=environment(**(env or {})),
            pass_fds=pass_fds,
            cwd=ROOT,
        )
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
            raise AssertionError(f"no ready line but {self.line!r}; stderr:\n{self.stderr()}")
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
        self._stderr.seek(0)
        return self._stderr.read()

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

    def __enter__(self) -> ServerProcess:
        return self.wait_ready()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        finally:
            self._stderr.close()
