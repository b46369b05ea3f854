"""The client's process of a contestant, and what the driver asks of it.

A worker is started as ``python -m benchmarks.speed.<module>``. It reads one JSON object a line on
standard input, ``{"do": "steps", "variant": "bare", "count": 3}``, does that, and writes one line:
``{"result": [seconds, ...]}`` or ``{"error": "..."}``. Times are taken here, around the step.
The workers of peers run in another environment: nothing but numpy is imported here.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.speed.shapes import Shapes

LR = 1e-3


class Worker:
    """One or more contestants (variants) that share a client process; subclasses fill it in."""

    def server_pids(self) -> list[int]:
        """Return the processes whose memory and time count as the server's."""
        raise NotImplementedError

    def open(self, shapes: Shapes, variants: Sequence[str]) -> None:
        """Make the state on the server, of zeros, and take the first step."""
        raise NotImplementedError

    def steps(self, variant: str, count: int) -> list[float]:
        """Take ``count`` steps and return the seconds of each."""
        raise NotImplementedError

    def close(self) -> None:
        """Drop the state of :meth:`open`, here and on the server."""
        raise NotImplementedError


def timed(step: Callable[[], Any], count: int) -> list[float]:
    """Return the seconds that each of ``count`` calls took.

    What a call returns is let go afterwards, so that giving its memory back is not part of it.
    """
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        result = step()
        taken.append(time.perf_counter() - began)
        del result
    return taken


def gradient(numel: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the gradients that everybody sends: float32, normal, the same each time."""
    return np.random.default_rng(0).standard_normal(numel, dtype=np.float32)


def split(flat: Any, shapes: Shapes) -> list[Any]:
    """Return views of ``flat``, an array or a tensor, with these shapes."""
    views, at = [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        views.append(flat[at : at + size].reshape(tuple(shape)))
        at += size
    return views


def check_first_step(params: Any, grads: Any) -> None:
    """Raise unless these are the params after Adam's first step from zero: -lr * sign(grad).

    So it is known that all contestants do the same work.
    """
    got, sent = (np.asarray(values[:1000], np.float32) for values in (params, grads))
    sure = np.abs(sent) > 1e-3
    if not np.allclose(got[sure], -LR * np.sign(sent[sure]), rtol=0.02):
        raise AssertionError(f"not Adam's first step: {got[:3]} from gradients {sent[:3]}")


def _answer(worker: Worker, line: str) -> dict[str, Any]:
    call = json.loads(line)
    name = call.pop("do")
    try:
        result = getattr(worker, name)(**call)
    except Exception:
        return {"error": traceback.format_exc()}
    if name == "close":
        gc.collect()
    return {"result": result}


@contextmanager
def server_of(
    module: str, *args: str, prefix: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a contestant's server, which ends with its standard input; yield its first line too.

    ``prefix`` is a command that runs it.
    """
    command = [*prefix, sys.executable, "-m", f"benchmarks.speed.{module}", *args]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{module} ended before it listened, with {process.wait(10)}")
        yield process, line
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def die_with_parent() -> None:
    """Be killed when the parent ends, even while stopped."""
    death_signal = 1
    ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)


def run(worker: Worker) -> None:
    """Answer the driver until it closes standard input."""
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say({"result": worker.server_pids()})
    for line in sys.stdin:
        say(_answer(worker, line))
