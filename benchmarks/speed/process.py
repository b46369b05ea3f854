"""The driver's end of a worker: started, asked, waited for with a limit, always stopped."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.speed import procfs
from tests.serving import ROOT, environment

START_S = 120.0
ASK_S = 300.0


class WorkerFailed(Exception):
    """A worker could not be started, said that it failed, or said nothing in time."""


class Process:
    """A worker's process; a context manager."""

    def __init__(
        self,
        module: str,
        *args: str,
        python: str = sys.executable,
        prefix: Sequence[str] = (),
        restless: bool = False,
    ) -> None:
        """Start ``benchmarks.speed.<module>``.

        Args:
            module: Of the worker.
            args: Of the module.
            python: Interpreter that runs it.
            prefix: A command that runs that.
            restless: Whether it, and its server, use the processor while they have nothing to do;
                they are then stopped (SIGSTOP) until they are asked for something.
        """
        self._module = module
        self._restless = restless
        self._stderr = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed on exit
        self._process = subprocess.Popen(
            [*prefix, python, "-m", f"benchmarks.speed.{module}", *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT)),
            start_new_session=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.server_pids: list[int] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, timeout_s: float = ASK_S, **fields: Any) -> Any:
        """Have the worker do something and return its result."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise WorkerFailed(f"{self._module} has ended: {self._said()}") from exc
        try:
            return self._answer(timeout_s)
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        for pid in [self.pid, *self.server_pids] if self._restless else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def cpu_s(self) -> tuple[float, float]:
        """Return the processor seconds of the server and of the client so far."""
        return procfs.cpu_s(self.server_pids), procfs.cpu_s([self.pid])

    def _answer(self, timeout_s: float) -> Any:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise WorkerFailed(f"{self._module} said nothing for {timeout_s:g} s") from None
        if not line:
            raise WorkerFailed(f"{self._module} ended: {self._said()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(f"{self._module}: {answer['error']}")
        return answer["result"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _said(self) -> str:
        size = os.fstat(self._stderr.fileno()).st_size
        text = os.pread(self._stderr.fileno(), size, 0).decode(errors="replace")
        return text.strip()[-2000:] or "it said nothing"

    def close(self) -> None:
        """Let it end, and end whatever does not."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # It, and whatever it started and left behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(20)
            self._reader.join(5)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._stderr.close()

    def __enter__(self) -> Process:
        try:
            self.server_pids = self._answer(START_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def peers_python() -> Path:
    """Return the interpreter of the peers' own environment, which may not be there."""
    return Path(__file__).parents[1] / ".venv-peers" / "bin" / "python"
