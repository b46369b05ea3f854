"""optserve through its own client, and through curl.

Variants: ``memory``, ``os`` and ``always`` are durabilities, float32 both ways; ``bf16`` is
``memory`` with bfloat16 both ways; ``curl`` starts curl for each step, which sends the same body
from a file and throws the answer away. Arguments: the server's url, then its process.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.shapes import Shapes, names
from benchmarks.speed.worker import (
    LR,
    Worker,
    check_first_step,
    gradient,
    run,
    split,
    timed,
)
from optserve_client import Bits, Client, Session, wire
from optserve_client._calls import scalars
from optserve_client._messages import Draft
from optserve_client._protocol import Call

#: Variant -> durability of its session.
SESSIONS = {"memory": "memory", "os": "os", "always": "always", "bf16": "memory", "curl": "memory"}


class Ours(Worker):
    def __init__(self, url: str, pid: int) -> None:
        self._url, self._pid = url, pid
        self._client = Client(url, timeout=300)
        self._sessions: dict[str, Session] = {}
        self._steps: dict[str, Callable[[], Any]] = {}
        self._many: list[Session] = []
        self._files: tempfile.TemporaryDirectory[str] | None = None

    def server_pids(self) -> list[int]:
        return [self._pid]

    def open(self, shapes: Shapes, variants: Sequence[str]) -> None:
        flat = gradient(sum(math.prod(shape) for shape in shapes))
        grads: dict[str, Any] = dict(zip(names(shapes), split(flat, shapes), strict=True))
        for variant in variants:
            durability: Any = SESSIONS[variant]
            if durability not in self._sessions:
                zeros = {name: np.zeros_like(grad) for name, grad in grads.items()}
                session = self._client.create("Adam", zeros, lr=LR, durability=durability)
                self._sessions[durability] = session
                del zeros
                first = session.step(grads).params
                assert first is not None
                check_first_step(np.asarray(first["w000"]).reshape(-1), flat)
                del first
            session = self._sessions[durability]
            if variant == "bf16":
                halves = {n: Bits((g.view(np.uint32) >> 16).astype(np.uint16), "BF16")
                          for n, g in grads.items()}  # fmt: skip
                step: Callable[[], Any] = partial(session.step, halves, return_dtype="bfloat16")
            elif variant == "curl":
                step = self._curl(session, grads)
            else:
                step = partial(session.step, grads)
            self._steps[variant] = step

    def steps(self, variant: str, count: int) -> list[float]:
        return timed(self._steps[variant], count)

    def empty(self, url: str, count: int, body: dict[str, Any]) -> list[float]:
        """Return the seconds of each POST of ``body`` to ``url``/empty through the same client."""
        call = Call(draft=Draft(method="POST", path="/empty", fields=body), read=scalars)
        with Client(url) as client:
            client._run(call)
            return timed(partial(client._run, call), count)

    def populate(self, count: int, numel: int) -> None:
        """Make ``count`` more sessions of ``numel`` parameters, and step each."""
        params, self._small = {"w": np.zeros(numel, np.float32)}, {"w": gradient(numel)}
        for _ in range(count):
            session = self._client.create("Adam", params, lr=LR, durability="os")
            session.step(self._small)
            self._many.append(session)

    def any_steps(self, count: int) -> list[float]:
        """Return the seconds of a step of each of ``count`` of those, picked at random."""
        picked = iter(random.choices(self._many, k=count))
        return timed(lambda: next(picked).step(self._small), count)

    def snapshots(self) -> list[int]:
        """Return the versions of which there is a snapshot, of the one session that is open."""
        (session,) = self._sessions.values()
        return [row["version"] for row in session.versions() if row["snapshot"]]

    def close(self) -> None:
        self._steps.clear()
        for session in self._sessions.values():
            session.delete()
        self._sessions.clear()
        if self._files is not None:
            self._files.cleanup()
            self._files = None

    def _curl(self, session: Session, grads: dict[str, Any]) -> Callable[[], None]:
        self._files = tempfile.TemporaryDirectory()
        path = Path(self._files.name) / "step.safetensors"
        tensors = {f"grad/{name}": grad for name, grad in grads.items()}
        with path.open("wb") as file:
            for piece in wire.encode(tensors, {wire.META_KEY: json.dumps({"return": "params"})}):
                file.write(piece)
        command = ["curl", "--silent", "--show-error", "--fail", "--output", "/dev/null"]
        for header in (f"Content-Type: {wire.SAFETENSORS}", f"Accept: {wire.SAFETENSORS}"):
            command += ["--header", header]
        command += ["--data-binary", f"@{path}", "--request", "POST"]
        command.append(f"{self._url}/v1/sessions/{session.id}/step")

        def step() -> None:
            subprocess.run(command, check=True, timeout=120)

        return step


def main() -> None:
    run(Ours(sys.argv[1], int(sys.argv[2])))


if __name__ == "__main__":
    main()
