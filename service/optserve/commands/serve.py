"""``optserve serve``: builds the pieces and serves."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Annotated

import typer

from optserve import __version__
from optserve.commands.opened import open_place
from optserve.commands.options import flag, read_settings, say
from optserve.memory_budget import default_budget
from optserve.settings import PREFIX, Settings, contradiction, unknown_variables
from optserve_client.errors import OptserveError

_FLAGS = (
    "host",
    "port",
    "uds",
    "fd",
    "data_dir",
    "store",
    "files",
    "memory_budget",
    "session_ttl",
    "threads",
    "device",
    "log_level",
)


def variables_only() -> str:
    """Return what --help says about the settings that have no flag."""
    names = [f"{PREFIX}{name.upper()}" for name in Settings.model_fields if name not in _FLAGS]
    return f"Set by variables only: {', '.join(names)}."


def serve(
    host: Annotated[str | None, flag("host")] = None,
    port: Annotated[int | None, flag("port")] = None,
    uds: Annotated[str | None, flag("uds")] = None,
    fd: Annotated[int | None, flag("fd")] = None,
    data_dir: Annotated[str | None, flag("data_dir")] = None,
    store: Annotated[str | None, flag("store")] = None,
    files: Annotated[str | None, flag("files")] = None,
    memory_budget: Annotated[str | None, flag("memory_budget")] = None,
    session_ttl: Annotated[str | None, flag("session_ttl")] = None,
    threads: Annotated[int | None, flag("threads")] = None,
    device: Annotated[str | None, flag("device")] = None,
    log_level: Annotated[str | None, flag("log_level")] = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. What no flag sets comes from OPTSERVE_<NAME>."""
    given = {name: value for name, value in locals().items() if value is not None}
    settings = read_settings(Settings, given)
    if (sentence := contradiction(settings, given)) is not None:
        say(sentence)
        raise typer.Exit(2)
    status = _serve(settings)
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is closed. Python would take seconds more to take torch's modules apart.
    os._exit(status)


def _serve(settings: Settings) -> int:
    """Bind, then open the store, then load torch: what fails first is known first."""
    from optserve import logs, server

    logs.configure(settings.log_level)
    for sentence in unknown_variables(os.environ):
        server.log.warning(sentence)
    try:
        sock = server.listen(settings)
    except server.CannotListen as exc:
        say(str(exc))
        return 1

    from optserve.store.opening import CannotOpen

    try:
        store = open_place(settings)
    except CannotOpen as exc:
        server.close(sock, settings)
        say(str(exc))
        return 1

    from optserve.api.app import create_app
    from optserve.sessions.registry import Registry

    try:
        registry = Registry(
            store,
            device=settings.device,
            threads=settings.threads,
            memory_budget=settings.memory_budget or default_budget(),
            session_ttl_s=settings.session_ttl,
        )
    except OptserveError as exc:  # a device that is not here
        store.close()
        server.close(sock, settings)
        say(exc.detail)
        return 2

    def warm() -> str:
        registry.warm()
        torch = importlib.metadata.version("torch").split("+")[0]
        return (
            f"optserve {__version__} ready at {server.address_of(sock)} (torch {torch}, "
            f"{registry.device}, {registry.threads} threads, store: {store.name})"
        )

    server.log.info("sessions are kept here", place=settings.place, store=store.name)
    return server.serve(create_app(registry, settings), sock, settings, warm, registry.close)
