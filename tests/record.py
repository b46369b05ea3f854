"""Figures that tests measured: collected from their reports, kept in docs/track-record.md."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

PROPERTY = "figure"

Row = tuple[str, float, str]
#: Notes name, value and unit.
Figure = Callable[[str, float, str], None]


def collect(stats: Mapping[str, Iterable[Any]]) -> list[Row]:
    """Return the figures of all passed tests, in the order in which they ran.

    They travel in the reports' user_properties, so that they also arrive from other processes.
    """
    return [
        tuple(value)
        for report in stats.get("passed", ())
        for name, value in report.user_properties
        if name == PROPERTY
    ]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def machine() -> str:
    """Return what a reader needs to judge the figures: processor, cores, memory; no host name."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB"


def section(figures: Iterable[Row], today: datetime.date) -> str:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("optserve", "torch")
    )
    rows = "".join(f"| {name} | {number(value)} | {unit} |\n" for name, value, unit in figures)
    return (
        f"\n## {today.isoformat()}\n\n"
        f"{machine()}; Python {platform.python_version()}, {versions}\n\n"
        f"| what | value | unit |\n| --- | ---: | --- |\n{rows}"
    )


def append(path: Path, figures: Iterable[Row]) -> None:
    """Add one dated section with ``figures`` to the end of ``path``."""
    with path.open("a") as file:
        file.write(section(figures, datetime.datetime.now(datetime.UTC).date()))
