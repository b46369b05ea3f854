"""Rows for people on a terminal, and for programs in a pipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

#: Heading and field of each column.
COLUMNS = (
    ("ID", "id"),
    ("OPTIMIZER", "optimizer"),
    ("VERSION", "version"),
    ("UPDATES", "updates"),
    ("PARAMETERS", "numel"),
    ("DTYPE", "dtype"),
    ("DURABILITY", "durability"),
    ("CHANGED", "updated_at"),
    ("NAME", "name"),
)
_NUMBERS = {"version", "updates", "numel"}


def lines(rows: Sequence[Mapping[str, Any]], terminal: bool) -> Iterator[str]:
    """Yield the heading and a line for each row: in columns, or separated by tabs."""
    cells = [[_cell(row.get(field), field) for _, field in COLUMNS] for row in rows]
    table = [[heading for heading, _ in COLUMNS], *cells]
    if not terminal:
        yield from ("\t".join(line) for line in table)
        return
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        yield "  ".join(_fit(*each) for each in zip(line, widths, COLUMNS, strict=True)).rstrip()


def _fit(cell: str, width: int, column: tuple[str, str]) -> str:
    return cell.rjust(width) if column[1] in _NUMBERS else cell.ljust(width)


def _cell(value: Any, field: str) -> str:
    if value is None:
        return ""
    if field == "updated_at":
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    # A name is anybody's text: no tabs, lines or escape codes from it.
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
