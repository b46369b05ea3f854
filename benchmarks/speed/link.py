"""The step over a link of 1 Gbit/s: two network namespaces of this machine, shaped with tc tbf.

Needs root and iproute2. The server is in one namespace and the client in the other.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.speed.latency import ratio
from benchmarks.speed.process import Process
from benchmarks.speed.progress import say
from benchmarks.speed.shapes import numel, shapes_of
from benchmarks.speed.worker import server_of
from tests.serving import ServerProcess

RATE_BITS_S = 1e9
#: At 1 Gbit/s a tick of the kernel is up to 0.5 MB; the queue holds some milliseconds.
SHAPE = ("tbf", "rate", "1gbit", "burst", "512kb", "latency", "20ms")
SERVER, CLIENT = "10.111.0.1", "10.111.0.2"


class _Server(ServerProcess):
    """One that only its namespace reaches: its ready line has to do."""

    def _poll_readyz(self, until: float) -> None:
        pass


def _ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(args)}: {done.stderr.strip()}")


@contextmanager
def two_namespaces() -> Iterator[tuple[str, str]]:
    """Make both ends of a shaped link, which go afterwards; raise OSError where they cannot be."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        raise OSError("iproute2 is not installed")
    near, far = names = (f"optserve-{os.getpid()}-s", f"optserve-{os.getpid()}-c")
    ends = (f"os{os.getpid()}", f"oc{os.getpid()}")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", ends[0], "netns", near, "type", "veth", "peer", ends[1], "netns", far)
        for name, end, address in zip(names, ends, (SERVER, CLIENT), strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                _ip("-n", name, "link", "set", device, "up")
            _ip("netns", "exec", name, "tc", "qdisc", "add", "dev", end, "root", *SHAPE)
        yield names
    finally:
        for name in names:  # the link goes with its ends
            subprocess.run(
                ["ip", "netns", "del", name], capture_output=True, timeout=20, check=False
            )


def link(directory: Path, quick: bool) -> dict[str, Any]:
    """Return summaries of ``f32`` and ``bf16`` steps and of the ``link`` with the bytes of f32.

    ``ideal_s`` is what those bytes take at the nominal rate.
    """
    try:
        with two_namespaces() as (near, far):
            return _measure(directory, near, far, quick)
    except OSError as exc:
        return {"absent": str(exc)}


def _measure(directory: Path, near: str, far: str, quick: bool) -> dict[str, Any]:
    size, rounds = ("1M", 3) if quick else ("25M", 5)
    shapes = shapes_of(size)
    inside, outside = (("ip", "netns", "exec", name) for name in (near, far))
    made: dict[str, Any] = {name: {"rounds_s": {}} for name in ("link", "f32", "bf16")}
    with (
        _Server("--host", SERVER, "--port", "8000", data_dir=directory, prefix=inside) as server,
        server_of("floor_server", SERVER, prefix=inside) as (plain, line),
        Process("ours", server.url, str(server.process.pid), prefix=outside) as ours,
        Process("floors", SERVER, line, str(plain.pid), prefix=outside) as floors,
    ):
        turns = {"link": (floors, "link"), "f32": (ours, "memory"), "bf16": (ours, "bf16")}
        floors.ask("open", shapes=shapes, variants=["link"])
        ours.ask("open", shapes=shapes, variants=["memory", "bf16"])
        for number in range(-1, rounds):
            for name, (process, variant) in turns.items():
                seconds = process.ask("steps", variant=variant, count=1)
                if number >= 0:
                    made[name]["rounds_s"][str(number)] = statistics.median(seconds)
    for one in made.values():
        one["p50_s"] = statistics.median(one["rounds_s"].values())
    say(f"link, {size}: done")
    return {
        **made,
        "size": size,
        "ideal_s": 2 * 4 * numel(size) * 8 / RATE_BITS_S,
        "f32_over_link": ratio(made["f32"], made["link"]),
        "bf16_over_f32": ratio(made["bf16"], made["f32"]),
    }
