"""What the commands have in common: flags that are settings, and a sentence for every failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter, Signature
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from pydantic import ValidationError

from optserve.config_file import BadConfigFile
from optserve.memory_budget import default_budget
from optserve.settings import Settings, StoreSettings, contradiction, explain

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


#: Settings that a flag sets, with the type that it is read as.
SERVER_FLAGS: dict[str, type] = {
    "config": str,
    "host": str,
    "port": int,
    "uds": str,
    "fd": int,
    "data_dir": str,
    "store": str,
    "store_password_file": str,
    "files": str,
    "memory_budget": str,
    "session_ttl": str,
    "threads": int,
    "device": str,
    "log_level": str,
}


def settings_flags(command: Callable[[Mapping[str, Any]], None]) -> Callable[..., None]:
    """Give ``command`` a flag for each of SERVER_FLAGS; it is called with those that were given."""

    @wraps(command)
    def with_flags(**flags: Any) -> None:
        command({name: value for name, value in flags.items() if value is not None})

    kinds = {name: Annotated[kind | None, flag(name)] for name, kind in SERVER_FLAGS.items()}
    with_flags.__annotations__ = dict(kinds)
    with_flags.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            for name, kind in kinds.items()
        ]
    )
    return with_flags


def say(sentence: str) -> None:
    """Print one line to stderr, as this program's."""
    typer.echo(f"optserve: {sentence}", err=True)


def fail(sentence: str, status: int, cause: BaseException | None = None) -> NoReturn:
    """Print one line to stderr and exit."""
    say(sentence)
    raise typer.Exit(status) from cause


def within_memory(settings: Settings) -> Settings:
    """Return ``settings`` with a memory budget, where one can be told, and no body beyond it: what
    is larger could not become a session."""
    budget = settings.memory_budget or default_budget()
    if budget is None:
        return settings
    largest = min(settings.max_body_bytes, budget)
    return settings.model_copy(update={"memory_budget": budget, "max_body_bytes": largest})


def read_settings(kind: type[S], flags: Mapping[str, Any]) -> S:
    """Return the settings that flags, variables and defaults make; exits with 2 for a bad value."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return kind(**given)
    except BadConfigFile as exc:
        fail(str(exc), 2, exc)
    except ValidationError as exc:
        for line in explain(exc, given):
            say(line)
        raise typer.Exit(2) from exc


def server_settings(flags: Mapping[str, Any]) -> Settings:
    """Return a server's settings as :func:`read_settings` does; also exits with 2 where two flags
    contradict each other."""
    settings = read_settings(Settings, flags)
    if (sentence := contradiction(settings, flags)) is not None:
        fail(sentence, 2)
    return settings
