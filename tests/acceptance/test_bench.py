"""``scripts/bench speed --quick`` without its peers, which install themselves, and ``scripts/bench
compression --quick``: every row is there, and every figure is a figure."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compression
from benchmarks.speed import report
from benchmarks.speed.shapes import resnet50
from tests.serving import ROOT, environment

LIMIT_S = 120


def bench(tmp_path: Path, *args: str) -> tuple[dict[str, Any], str]:
    """Run ``scripts/bench speed --quick`` with ``args``; return its raw figures and what it says.

    Without scripts/setup, which has done its work before any test runs.
    """
    raw = tmp_path / "raw.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", "--quick", "--json", str(raw), *args],
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
            if name in {"p50_s", "p99_s", "ratio", "per_s", "optserve_over"}:
                yield value
            yield from times(value)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    only = "floors,optserve,memory,small,throughput,resident,json,link"
    return bench(tmp_path_factory.mktemp("bench"), "--only", only)


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


def test_resnet50_has_torchvisions_shapes() -> None:
    shapes = resnet50()
    assert len(shapes) == 161
    assert sum(math.prod(shape) for shape in shapes) == 25_557_032


@pytest.fixture(scope="module")
def compressed() -> list[dict[str, list[str]]]:
    """The tables of ``scripts/bench compression --quick``: cells by the name of their row."""
    document = compression.DOCUMENT.read_text()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compression", "--quick"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=ROOT,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert compression.DOCUMENT.read_text() == document
    tables: list[dict[str, list[str]]] = []
    for line in done.stdout.splitlines():
        if line.startswith("|  |"):
            tables.append({})
        elif line.startswith("| ") and "---" not in line:
            name, *cells = line.strip("| ").split(" | ")
            tables[-1][name] = cells
    return tables


def test_every_way_to_compress_was_measured(compressed: list[dict[str, list[str]]]) -> None:
    large, digits = compressed
    assert list(large) == list(compression.CONTESTANTS)
    assert list(digits) == [*compression.CONTESTANTS, *compression.WITHOUT_FEEDBACK]
    for cells in (*large.values(), *digits.values()):
        assert all(float(cell.replace(",", "")) > 0 for cell in cells)


def test_bytes_are_as_few_as_each_way_says(compressed: list[dict[str, list[str]]]) -> None:
    share = {name: float(cells[1]) for name, cells in compressed[0].items()}
    assert share["none"] == 100
    assert share["`Half()`, bfloat16"] == pytest.approx(50, abs=0.2)
    assert share["`Int8()`"] == pytest.approx(25.4, abs=0.3)
    assert share["`TopK(0.1)`"] == pytest.approx(20, abs=0.3)
    assert share["`TopK(0.01)`"] == pytest.approx(2, abs=0.2)
    assert 80 < share["zstd"] < 100


def test_training_in_fewer_bits_ends_where_it_does_in_all(
    compressed: list[dict[str, list[str]]],
) -> None:
    losses = {name: float(cells[-2]) for name, cells in compressed[1].items()}
    assert losses["gzip"] == losses["zstd"] == losses["none"]
    for name in ("`Int8()`", "`Half()`, bfloat16"):
        assert losses[name] == pytest.approx(losses["none"], rel=0.01)
    assert losses["`TopK(0.01)`"] < losses["`TopK(0.01, error_feedback=False)`"]


def test_the_table_goes_between_its_marks_and_nothing_else_changes(tmp_path: Path) -> None:
    path = tmp_path / "document.md"
    for text in ("first", "second\n\n| a |"):
        path.write_text(f"before\n{compression.BEGIN}old\n{compression.END}after\n")
        compression.write(text, path)
        marked = f"{compression.BEGIN}\n{text}\n\n{compression.END}"
        assert path.read_text() == f"before\n{marked}after\n"
    path.write_text("no marks")
    with pytest.raises(SystemExit, match="has no line <!-- measured -->"):
        compression.write("text", path)
