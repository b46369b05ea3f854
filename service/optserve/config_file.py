"""Settings from a TOML file, which flags and variables beat."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

#: Names the file; a flag beats it.
VARIABLE = "OPTSERVE_CONFIG"
#: One file does not lead to another.
_NOT_IN_FILE = "config"


class BadConfigFile(Exception):
    """The file cannot be read, or says what nobody understands; one sentence."""


def path_of(flags: Mapping[str, Any]) -> Path | None:
    """Return the file that a flag or a variable names."""
    named = flags.get("config") or os.environ.get(VARIABLE)
    return Path(os.path.abspath(Path(named).expanduser())) if named else None


def read(path: Path, known: Collection[str]) -> dict[str, str]:
    """Return the values in the file as variables would have them: as text. Raises BadConfigFile."""
    try:
        with path.open("rb") as file:
            said = tomllib.load(file)
    except OSError as exc:
        raise BadConfigFile(f"the configuration {path} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise BadConfigFile(f"{path} is not TOML: {exc}") from exc
    known = set(known) - {_NOT_IN_FILE}
    for name, value in said.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise BadConfigFile(f"{name} in {path} is no setting{hint}")
        if not isinstance(value, (str, int, float)):
            kind = "a table" if isinstance(value, dict) else f"of type {type(value).__name__}"
            raise BadConfigFile(f"{name} in {path} is {kind}, expected a string or a number")
        if value == "":
            raise BadConfigFile(f"{name} in {path} is empty: leave it out")
    return {name: str(value) for name, value in said.items()}
