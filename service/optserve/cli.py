"""The program ``optserve``: reads flags, builds the pieces, serves."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from optserve import __version__
from optserve.settings import (
    PREFIX,
    Settings,
    contradiction,
    explain,
    unknown_variables,
)
from optserve_client.errors import OptserveError

app = typer.Typer(
    name="optserve",
    help="Optimization as a service: post gradients, get parameters back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _flag(field: str) -> Any:
    """Return the option that sets ``field``; unset, it leaves the field to the environment."""
    info = Settings.model_fields[field]
    default = "" if info.default is None else f" [default: {info.default}]"
    return typer.Option(
        f"--{field.replace('_', '-')}",
        help=f"{info.description}{default}",
        show_default=False,
    )


@app.callback()
def _root() -> None:
    """Keep ``serve`` a subcommand even where it is the only one."""


@app.command()
def version() -> None:
    """Print the versions of optserve, torch and Python."""
    torch = importlib.metadata.version("torch")
    typer.echo(f"optserve {__version__} (torch {torch}, Python {platform.python_version()})")


def _variables_only() -> str:
    """Return what --help says about the settings that have no flag."""
    flags = {"host", "port", "uds", "fd", "threads", "device", "log_level"}
    names = [f"{PREFIX}{name.upper()}" for name in Settings.model_fields if name not in flags]
    return f"Set by variables only: {', '.join(names)}."


@app.command(epilog=_variables_only())
def serve(
    host: Annotated[str | None, _flag("host")] = None,
    port: Annotated[int | None, _flag("port")] = None,
    uds: Annotated[str | None, _flag("uds")] = None,
    fd: Annotated[int | None, _flag("fd")] = None,
    threads: Annotated[int | None, _flag("threads")] = None,
    device: Annotated[str | None, _flag("device")] = None,
    log_level: Annotated[str | None, _flag("log_level")] = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. What no flag sets comes from OPTSERVE_<NAME>."""
    given = {name: value for name, value in locals().items() if value is not None}
    try:
        settings = Settings(**given)
    except ValidationError as exc:
        for line in explain(exc, given):
            typer.echo(f"optserve: {line}", err=True)
        raise typer.Exit(2) from exc
    if (sentence := contradiction(settings, given)) is not None:
        typer.echo(f"optserve: {sentence}", err=True)
        raise typer.Exit(2)
    raise typer.Exit(_serve(settings))


def _serve(settings: Settings) -> int:
    # Imported here: `optserve version`, --help and a port in use need not wait for torch.
    from optserve import logs, server

    logs.configure(settings.log_level)
    for sentence in unknown_variables(os.environ):
        server.log.warning(sentence)
    try:
        sock = server.listen(settings)
    except server.CannotListen as exc:
        typer.echo(f"optserve: {exc}", err=True)
        return 1

    from optserve.api.app import create_app
    from optserve.sessions.registry import Registry
    from optserve.store.memory import MemoryStore

    try:
        registry = Registry(MemoryStore(), device=settings.device, threads=settings.threads)
    except OptserveError as exc:  # a device that is not here
        server.close(sock, settings)
        typer.echo(f"optserve: {exc.detail}", err=True)
        return 2

    def warm() -> str:
        registry.warm()
        torch = importlib.metadata.version("torch").split("+")[0]
        return (
            f"optserve {__version__} ready at {server.address_of(sock)} (torch {torch}, "
            f"{registry.device}, {registry.threads} threads, store: memory)"
        )

    try:
        return server.serve(create_app(registry, settings), sock, settings, warm)
    finally:
        registry.close()


def main() -> None:
    """Run the program."""
    app()
