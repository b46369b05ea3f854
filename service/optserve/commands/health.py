"""``optserve health``: asks the server with these settings whether it is ready."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from optserve.commands.options import fail, read_settings, settings_flags
from optserve.settings import Settings

#: A server that answers later is not healthy.
TIMEOUT_S = 3
#: Addresses to listen on that are none to connect to.
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104


@settings_flags
def health(given: Mapping[str, Any]) -> None:
    """Ask the server that has these settings, on this machine, whether it is ready.

    Exit status: 0 it is, 1 it is not (there is none, it starts, or it stops), 2 a setting cannot be
    used. In a container the settings are its variables.
    """
    settings = read_settings(Settings, given)
    if settings.fd is not None:
        fail("an inherited socket has no address to ask at, expected --port or --uds", 2)
    import httpx

    host = _EVERYWHERE.get(settings.host, settings.host)
    url = f"http://[{host}]" if ":" in host else f"http://{host}"
    where = settings.uds or f"{url}:{settings.port}"
    try:
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=settings.uds), timeout=TIMEOUT_S
        ) as client:
            reply = client.get(f"{url}:{settings.port}/readyz")
    except httpx.TimeoutException as exc:
        fail(f"{where} did not answer within {TIMEOUT_S} s", 1, exc)
    except httpx.TransportError as exc:
        fail(f"{where} cannot be reached: {exc}", 1, exc)
    if reply.status_code != 200:
        fail(f"{where} is not ready: {reply.text:.200}", 1)
    typer.echo("ready")
