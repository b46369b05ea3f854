"""What is aimed at, and whether a run has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import results
from benchmarks.speed.contestants import TCP
from benchmarks.speed.latency import ratio

Raw = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A ratio and its bound; ``value`` raises KeyError or TypeError if the run has not got it."""

    what: str
    limit: float
    value: Callable[[Raw], float | None]
    #: Whether more is better.
    least: bool = False

    def row(self, raw: Raw) -> list[str]:
        sign = "≥" if self.least else "≤"
        try:
            value = self.value(raw)
        except (KeyError, TypeError):
            value = None
        if value is None:
            return [self.what, f"{sign} {self.limit:g}", "", "not run"]
        met = value >= self.limit if self.least else value <= self.limit
        return [self.what, f"{sign} {self.limit:g}", f"{value:.2f}", "met" if met else "**missed**"]


def _steps(size: str, above: str, below: str) -> Callable[[Raw], float | None]:
    def value(raw: Raw) -> float | None:
        field = raw["latency"]["sizes"][size]
        return ratio(field.get(above), field.get(below))

    return value


def _large(size: str, label: str) -> list[Target]:
    what = f"{label} parameters, Client over TCP"
    return [
        Target(f"{what} ÷ safe floor", 1.10, _steps(size, TCP, "floors.safe")),
        Target(f"{what} ÷ bare floor", 1.25, _steps(size, TCP, "floors.bare")),
        Target(f"{what} ÷ torch RPC", 0.70, _steps(size, TCP, "rpc.")),
        Target(f"{what} ÷ Ray actor, read in place", 0.55, _steps(size, TCP, "ray.view")),
        Target(f"{what} ÷ Ray actor, copied", 0.55, _steps(size, TCP, "ray.copied")),
    ]


def _one(*keys: str, upside_down: bool = False) -> Callable[[Raw], float]:
    def value(raw: Raw) -> float:
        found: Any = raw
        for key in keys:
            found = found[key]
        return 1 / found if upside_down else float(found)

    return value


_NAIVE = ("naive", "optserve_over"), ("naive_httpx", "optserve_over")
TARGETS = [
    *_large("25M", "25 M"),
    *_large("100M", "100 M"),
    Target("10 parameters, Client p50 ÷ torch RPC", 1.0, _steps("10", TCP, "rpc.")),
    Target("10 parameters, Client p50 ÷ Ray actor", 0.6, _steps("10", TCP, "ray.view")),
    Target("1 Gbit/s, 25 M: bf16 ÷ f32", 0.55, _one("link", "bf16_over_f32")),
    Target("1 Gbit/s, 25 M: f32 ÷ the link's own time", 1.05, _one("link", "f32_over_link")),
    Target(
        "1 M as JSON lists ÷ orjson loads + dumps",
        1.6,
        _one("json", "1M", "orjson", "optserve_over"),
    ),
    Target(
        "1 M as JSON lists: naive service ÷ optserve, the same text posted to both",
        50,
        _one("json", "1M", *_NAIVE[0], upside_down=True),
        least=True,
    ),
    Target(
        "1 M as JSON lists: naive service through httpx ÷ optserve",
        50,
        _one("json", "1M", *_NAIVE[1], upside_down=True),
        least=True,
    ),
    Target("10 parameters, p50 ÷ empty FastAPI POST, same client", 1.4, _one("small", "ratio")),
    Target(
        "steps/s at 64 connections ÷ empty FastAPI POST",
        0.5,
        _one("throughput", "64", "ratio"),
        least=True,
    ),
    Target("latency at 10 k resident sessions ÷ at 10", 1.1, _one("resident", "10000", "ratio")),
    Target("server's peak, 25 M ÷ parameter bytes", 5.2, _one("memory", "rows", TCP, "server")),
    Target(
        "the same while a snapshot is written", 5.5, _one("memory", "rows", "snapshot", "server")
    ),
    Target("25 M: bf16 both ways ÷ f32", 0.65, _steps("25M", "optserve.bf16", TCP)),
    Target("25 M: durability always ÷ memory", 1.5, _steps("25M", "optserve.always", TCP)),
]


def text(raw: Raw) -> str:
    """Return the table of all targets."""
    return results.table(
        ("what", "target", "measured", ""), [target.row(raw) for target in TARGETS]
    )
