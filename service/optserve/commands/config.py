"""``optserve config``: what a server would use, and from where it has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from optserve.commands.options import server_settings, settings_flags, within_memory
from optserve.settings import Settings, masked, sources

#: What the defaults of these settings depend on.
_DEFAULTS = {
    "data_dir": "default: the user's data directory",
    "memory_budget": "default: half of what machine or container have beside torch",
}


@settings_flags
def config(given: Mapping[str, Any]) -> None:
    """Print the settings that a server with these flags would use, as TOML, each with its source.

    It can be used as the file of --config. A store with a password is masked, and a comment.
    """
    told, known = server_settings(given), sources(given)
    used = within_memory(told).model_copy(update={"data_dir": told.directory})
    lines = []
    for name in Settings.model_fields:
        value = getattr(used, name)
        why = known.get(name) or _DEFAULTS.get(name, "default")
        if name == "max_body_bytes" and value != told.max_body_bytes:
            why = f"not {told.max_body_bytes} ({why}): never more than memory_budget"
        lines.append((_line(name, value), "not set" if value is None else why))
    width = max(len(line) for line, _ in lines)
    for line, why in lines:
        typer.echo(f"{line:{width}}  # {why}")


def _line(name: str, value: Any) -> str:
    """Return a line of TOML; a comment where it would say something else in a file."""
    if value is None:
        return f"# {name}"
    shown = masked(value) if name == "store" else str(value) if isinstance(value, Path) else value
    line = f"{name} = {json.dumps(shown, ensure_ascii=False)}"
    return f"# {line}" if name == "config" or (shown != value and name == "store") else line
