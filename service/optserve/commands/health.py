"""``optserve health``: asks the server with these settings whether it is ready."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Mapping
from typing import Any

import typer

from optserve.commands.options import fail, server_settings, settings_flags
from optserve.settings import Settings

#: A server that answers later is not healthy.
TIMEOUT_S = 3
#: Addresses to listen on that are none to connect to.
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class _Connection(http.client.HTTPConnection):
    """To a Unix socket, where there is one."""

    def __init__(self, settings: Settings) -> None:
        host = _EVERYWHERE.get(settings.host, settings.host)
        super().__init__(host, settings.port, timeout=TIMEOUT_S)
        self._uds = settings.uds
        self.where = (
            settings.uds or f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
        )

    def connect(self) -> None:
        if self._uds is None:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._uds)


@app.command()
@settings_flags
def health(given: Mapping[str, Any]) -> None:
    """Ask the server that has these settings, on this machine, whether it is ready.

    Exit status: 0 it is, 1 it is not (there is none, it starts, or it stops), 2 a setting cannot be
    used. In a container the settings are its variables.
    """
    settings = server_settings(given)
    if settings.fd is not None:
        fail("an inherited socket has no address to ask at, expected --port or --uds", 2)
    asked = _Connection(settings)
    try:
        asked.request("GET", "/readyz")
        reply = asked.getresponse()
        said = reply.read(200).decode(errors="replace")
    except TimeoutError as exc:
        fail(f"{asked.where} did not answer within {TIMEOUT_S} s", 1, exc)
    except (OSError, http.client.HTTPException) as exc:
        fail(f"{asked.where} cannot be reached: {exc}", 1, exc)
    finally:
        asked.close()
    if reply.status != 200:
        fail(f"{asked.where} is not ready: {said}", 1)
    typer.echo("ready")
