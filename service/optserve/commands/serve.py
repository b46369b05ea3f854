"""``optserve serve``: builds the pieces and serves."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Mapping
from typing import Any

from optserve import __version__
from optserve.commands.opened import open_place
from optserve.commands.options import (
    SERVER_FLAGS,
    say,
    server_settings,
    settings_flags,
    within_memory,
)
from optserve.settings import PREFIX, Settings, unknown_variables
from optserve_client.errors import OptserveError


def variables_only() -> str:
    """Return what --help says about the settings that have no flag."""
    names = [name for name in Settings.model_fields if name not in SERVER_FLAGS]
    variables = ", ".join(f"{PREFIX}{name.upper()}" for name in names)
    return f"Set by variables and in the file only: {variables}."


@settings_flags
def serve(given: Mapping[str, Any]) -> None:
    """Serve until SIGTERM or Ctrl-C. What no flag sets comes from OPTSERVE_<NAME>, or from the file
    that --config names."""
    settings = within_memory(server_settings(given))
    status = _serve(settings)
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is closed. Python would take seconds more to take torch's modules apart.
    os._exit(status)


def _serve(settings: Settings) -> int:
    """Bind, then open the store, then load torch: what fails first is known first."""
    from optserve import logs, server

    server.end_at_a_signal()
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
            memory_budget=settings.memory_budget,
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
