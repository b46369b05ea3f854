"""The section "Speed" of RESULTS.md, from the raw figures of one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import results
from benchmarks.speed import targets
from benchmarks.speed.contestants import BY_KEY, CONTESTANTS, TCP
from benchmarks.speed.latency import ratio
from benchmarks.speed.shapes import LABELS, numel

INTRODUCTION = """\
A step is: gradients up, Adam, parameters down; float32, server and client in a process each, over
loopback unless a row says otherwise. In each round every contestant takes a step (of the small
ones a batch) in turn; ratios are medians over rounds of the ratios within a round. optserve runs
with every check on, and with durability `memory` unless a row says otherwise; the peers have
neither checks nor durability. CPU is processor time per step. p99 is by nearest rank: of fewer than
a hundred steps it is the slowest.
"""
CHART = "![Time of a step at 25 M and at 10 parameters](speed.svg)\n"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def optional(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def latency(measured: dict[str, Any]) -> str:
    absent = measured["absent"]
    return "\n".join(_size(size, field, absent) for size, field in measured["sizes"].items())


def _size(size: str, field: dict[str, Any], absent: dict[str, str]) -> str:
    rows = []
    for one in CONTESTANTS:
        if one.key in field:
            taken = field[one.key]
            rows.append(
                [
                    one.label,
                    ms(taken["p50_s"]),
                    ms(taken["p99_s"]),
                    f"{numel(size) / taken['p50_s'] / 1e6:.3g}",
                    *(optional(ratio(taken, field.get(key))) for key in ("floors.safe", TCP)),
                    ms(taken["server_cpu_s"]),
                    ms(taken["client_cpu_s"]),
                ]
            )
        elif numel(size) <= one.most and (why := absent.get(one.key) or absent.get(one.worker)):
            rows.append([f"{one.label}: not run: {why}", *[""] * 7])
    head = (
        f"Parameters: {LABELS[size]}",
        "p50 ms",
        "p99 ms",
        "M parameters/s",
        "÷ safe floor",
        "÷ optserve TCP",
        "server CPU ms",
        "client CPU ms",
    )
    return results.table(head, rows)


def memory(measured: dict[str, Any]) -> str:
    rows = [
        [
            BY_KEY[key].label if key in BY_KEY else "while a snapshot is written (durability os)",
            *(optional(row[side]) for side in ("server", "client")),
        ]
        for key, row in measured["rows"].items()
    ]
    rows += [
        [f"{BY_KEY[k].label}: not run: {why}", "", ""] for k, why in measured["absent"].items()
    ]
    head = (
        f"Peak of resident memory minus idle, {LABELS[measured['size']]} ÷ parameter bytes",
        "server",
        "client",
    )
    note = (
        "\nOf a Ray actor and its client, each counts all that it has mapped of the store between "
        "them.\n"
    )
    return results.table(head, rows) + (note if "ray.copied" in measured["rows"] else "")


def small(measured: dict[str, Any]) -> str:
    rows = [
        ["step of 10 parameters", ms(measured["step"]["p50_s"]), optional(measured["ratio"])],
        ["empty FastAPI POST", ms(measured["empty"]["p50_s"]), "1.00"],
    ]
    return results.table(("Through the same Client", "p50 ms", "÷ empty POST"), rows)


def throughput(measured: dict[str, Any]) -> str:
    rows = [
        [
            count,
            f"{one['step']['per_s']:.0f}",
            f"{one['empty']['per_s']:.0f}",
            optional(one["ratio"]),
            ms(one["step"]["p50_s"]),
            ms(one["step"]["p99_s"]),
        ]
        for count, one in measured.items()
    ]
    head = (
        "Connections, a session of 10 parameters each, durability os",
        "steps/s",
        "empty POSTs/s",
        "steps ÷ POSTs",
        "step p50 ms",
        "step p99 ms",
    )
    return results.table(head, rows)


def resident(measured: dict[str, Any]) -> str:
    first = next(iter(measured))
    rows = [
        [
            f"{int(count):,}",
            ms(one["p50_s"]),
            optional(one["ratio"]),
            "" if count == first else f"{one['bytes_per_session'] / 1024:.1f}",
        ]
        for count, one in measured.items()
    ]
    head = ("Resident sessions of 10 parameters", "p50 ms", f"÷ {first}", "KiB per session")
    return results.table(head, rows)


def json_lists(measured: dict[str, Any]) -> str:
    labels = {
        "optserve": "optserve",
        "orjson": "orjson loads + dumps, nothing else",
        "naive": "naive service, the same text",
        "naive_httpx": "naive service through httpx, arrays to arrays",
    }
    rows = []
    for name, label in labels.items():
        row = [label]
        for one in measured.values():
            taken = one.get(name)
            over = None if taken is None or name == "optserve" else 1 / taken["optserve_over"]
            row += ["" if taken is None else ms(taken["p50_s"]), optional(over)]
        rows.append(row)
    head = ["A step as JSON lists"]
    for size in measured:
        head += [f"{size} ms", "÷ optserve"]
    return results.table(head, rows)


def link(measured: dict[str, Any]) -> str:
    if "absent" in measured:
        return f"A link of 1 Gbit/s: not run: {measured['absent']}\n"
    labels = {"link": "the bytes of f32 alone", "f32": "step, f32", "bf16": "step, bf16 both ways"}
    rows = [
        [label, ms(measured[name]["p50_s"]), optional(ratio(measured[name], measured["link"]))]
        for name, label in labels.items()
    ]
    rows.append(["bytes of f32 ÷ 1 Gbit/s", ms(measured["ideal_s"]), ""])
    head = (f"{LABELS[measured['size']]} over a link of 1 Gbit/s", "ms", "÷ the bytes alone")
    return results.table(head, rows)


#: In the order of the section.
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "latency": latency,
    "memory": memory,
    "small": small,
    "throughput": throughput,
    "resident": resident,
    "json": json_lists,
    "link": link,
}


def text(raw: dict[str, Any], *, judged: bool, chart: bool) -> str:
    """Return the whole section; ``judged``: with the targets, ``chart``: with the picture."""
    parts = [INTRODUCTION]
    if judged:
        parts.append(targets.text(raw))
    if chart:
        parts.append(CHART)
    parts += [make(raw[part]) for part, make in TABLES.items() if part in raw]
    return "\n".join(parts)
