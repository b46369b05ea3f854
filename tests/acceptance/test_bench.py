"""``scripts/bench speed --quick`` without its peers, which install themselves, and ``scripts/bench
workers`` with few workers: every row is there, and every figure is a figure."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import report
from benchmarks.speed.shapes import resnet50
from tests.serving import ROOT, environment

LIMIT_S = 120


def bench(tmp_path: Path, name: str, *args: str) -> tuple[dict[str, Any], str]:
    """Run ``scripts/bench NAME --quick`` with ``args``; return its raw figures and what it says.

    Without scripts/setup, which has done its work before any test runs.
    """
    raw = tmp_path / "raw.json"
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(raw), *args],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=ROOT,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(raw.read_text()), done.stdout


def figures(raw: Any) -> Iterator[float]:
    """Yield every number in ``raw``."""
    if isinstance(raw, dict):
        for value in raw.values():
            yield from figures(value)
    elif isinstance(raw, (int, float)):
        yield raw


def times(raw: Any) -> Iterator[float]:
    """Yield every median and ratio in ``raw``."""
    if isinstance(raw, dict):
        for name, value in raw.items():
            if name in {"p50_s", "p99_s", "ratio", "per_s", "bytes_s", "optserve_over"}:
                yield value
            yield from times(value)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    only = "floors,optserve,memory,small,throughput,resident,json,link"
    return bench(tmp_path_factory.mktemp("bench"), "speed", "--only", only)


def test_every_contestant_that_was_asked_for_took_part(
    measured: tuple[dict[str, Any], str],
) -> None:
    raw, _ = measured
    floors = {"floors.local", "floors.bare", "floors.safe"}
    ours = {f"optserve.{name}" for name in ("memory", "os", "always", "bf16")} | {"uds.memory"}
    assert raw["latency"]["sizes"].keys() == {"10", "100k", "1M"}
    for field in raw["latency"]["sizes"].values():
        assert floors | ours <= field.keys()
    assert raw["latency"]["absent"].keys() <= {"optserve.curl"}
    assert raw["memory"]["rows"].keys() == {"optserve.memory", "optserve.os", "snapshot"}
    assert raw["small"].keys() == {"step", "empty", "ratio"}
    assert raw["resident"].keys() == {"10", "200"}
    assert raw["throughput"].keys() == {"1", "8", "64"}
    assert raw["json"]["10k"].keys() == {"optserve", "orjson", "naive", "naive_httpx"}


def test_every_time_and_ratio_is_a_positive_number(measured: tuple[dict[str, Any], str]) -> None:
    raw, _ = measured
    assert all(math.isfinite(value) for value in figures(raw))
    found = list(times(raw))
    assert len(found) > 40
    assert all(value > 0 for value in found)


def test_the_tables_have_the_rows_and_a_miniature_is_not_judged(
    measured: tuple[dict[str, Any], str],
) -> None:
    raw, said = measured
    assert "| optserve, Client over TCP |" in said
    assert "| Connections, a session of 10 parameters each, durability os |" in said
    assert "| naive service, the same text |" in said
    # As the two that need what not every machine has.
    for part in ("curl, its start included: not run", "A link of 1 Gbit/s: not run"):
        said = said.replace(part, "")
    assert "not run" not in said
    assert "missed" not in said

    judged = report.text(raw, judged=True, chart=False)
    ratio = raw["throughput"]["64"]["ratio"]
    target = "| steps/s at 64 connections ÷ empty FastAPI POST | ≥ 0.5 |"
    assert f"{target} {ratio:.2f} | {'met' if ratio >= 0.5 else '**missed**'} |" in judged
    assert "| 25 M: bf16 both ways ÷ f32 | ≤ 0.65 |  | not run |" in judged


def test_a_step_over_a_slow_link_takes_longer_than_its_bytes(
    measured: tuple[dict[str, Any], str],
) -> None:
    link = measured[0]["link"]
    if "absent" in link:
        pytest.skip(f"no link: {link['absent']}")
    assert link["f32_over_link"] > 1
    assert link["bf16_over_f32"] > 0


def test_workers_are_compared_with_one_alone(tmp_path: Path) -> None:
    raw, said = bench(tmp_path, "workers", "--counts", "1", "2", "--turns", "1")
    for by_count in (raw["1M"]["sync"], raw["1M"]["async"]):
        assert by_count.keys() == {"1", "2"}
        assert by_count["1"]["ratio"] == 1
    assert all(math.isfinite(value) and value >= 0 for value in figures(raw))
    assert all(value > 0 for value in times(raw))
    assert "| 1 M | 2 |" in said


def test_resnet50_has_torchvisions_shapes() -> None:
    shapes = resnet50()
    assert len(shapes) == 161
    assert sum(math.prod(shape) for shape in shapes) == 25_557_032
