"""RESULTS.md: one section per benchmark, written anew each time that it runs."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path

from tests import record

PATH = Path(__file__).with_name("RESULTS.md")
HEAD = """\
# Results

What `scripts/bench` measured, one section for each benchmark. A run replaces its own section;
nothing here is written by hand. Compare figures of one section, not across machines.
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine() -> str:
    """Return what a reader needs to judge the figures."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("optserve", "torch")
    )
    return f"{record.machine()}; Python {platform.python_version()}, {versions}"


def write(name: str, command: str, text: str, path: Path = PATH) -> None:
    """Put ``text`` into the section ``name``; the other sections stay."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    section = f"## {name}\n\n{today}; {machine()}; `{command}`\n\n{text}"
    old = path.read_text() if path.exists() else HEAD
    head, *sections = old.split("\n## ")
    kept = [f"## {one}".rstrip() for one in sections]
    others = [one for one in kept if one.splitlines()[0] != f"## {name}"]
    path.write_text("\n\n".join([head.rstrip(), *others, section.rstrip()]) + "\n")
