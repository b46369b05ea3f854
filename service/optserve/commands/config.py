"""``optserve config``: what a server would use, and from where it has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from optserve.commands.options import read_settings, settings_flags
from optserve.memory_budget import default_budget
from optserve.settings import Settings, masked, source_of


@settings_flags
def config(given: Mapping[str, Any]) -> None:
    """Print the settings that a server with these flags would use, as TOML, each with its source.

    Passwords are masked. The rest can be used as the file of --config.
    """
    settings = read_settings(Settings, given)
    found = [(name, *_effective(name, settings)) for name in Settings.model_fields]
    lines = [(_line(name, value), source_of(name, given) or why) for name, value, why in found]
    width = max(len(line) for line, _ in lines)
    for line, why in lines:
        typer.echo(f"{line:{width}}  # {why}")


def _effective(name: str, settings: Settings) -> tuple[Any, str]:
    """Return a value, and what to say of it where nobody set it."""
    value = getattr(settings, name)
    if value is not None:
        return masked(value) if name == "store" else value, "default"
    if name == "data_dir":
        return settings.directory, "default: the user's data directory"
    if name == "memory_budget" and (budget := default_budget()) is not None:
        return budget, "default: half of what machine or container have beside torch"
    return None, "not set"


def _line(name: str, value: Any) -> str:
    if value is None or name == "config":  # a file does not name itself
        return f"# {name}" if value is None else f"# {name} = {json.dumps(str(value))}"
    value = str(value) if isinstance(value, Path) else value
    return f"{name} = {json.dumps(value, ensure_ascii=False)}"
