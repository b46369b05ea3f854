"""What the commands have in common: flags that are settings, and a sentence for every failure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import typer
from pydantic import ValidationError

from optserve.settings import Settings, StoreSettings, explain

S = TypeVar("S", bound=StoreSettings)


def flag(field: str) -> Any:
    """Return the option that sets ``field``; unset, it leaves the field to the environment."""
    info = Settings.model_fields[field]
    default = "" if info.default is None else f" [default: {info.default}]"
    return typer.Option(
        f"--{field.replace('_', '-')}",
        help=f"{info.description}{default}",
        show_default=False,
    )


def say(sentence: str) -> None:
    """Print one line to stderr, as this program's."""
    typer.echo(f"optserve: {sentence}", err=True)


def fail(sentence: str, status: int, cause: BaseException | None = None) -> NoReturn:
    """Print one line to stderr and exit."""
    say(sentence)
    raise typer.Exit(status) from cause


def read_settings(kind: type[S], flags: Mapping[str, Any]) -> S:
    """Return the settings that flags, variables and defaults make; exits with 2 for a bad value."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return kind(**given)
    except ValidationError as exc:
        for line in explain(exc, given):
            say(line)
        raise typer.Exit(2) from exc
