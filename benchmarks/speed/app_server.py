"""uvicorn as optserve runs it: httptools, uvloop, no logs; and an app with an empty POST.

``python -m benchmarks.speed.app_server`` serves that, says its port, and ends with its standard
input.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from typing import NoReturn

import uvicorn
from fastapi import FastAPI


def serve(app: FastAPI) -> None:
    """Say the port and serve ``app`` until standard input ends."""
    # The event loop sets TCP_NODELAY only where the socket itself knows that it is TCP.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(2048)
    print(listening.getsockname()[1], flush=True)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    config = uvicorn.Config(
        app,
        http="httptools",
        loop="uvloop",
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=75,
    )
    uvicorn.Server(config).run([listening])


def _end_with_stdin() -> NoReturn:
    sys.stdin.read()
    os._exit(0)


def empty() -> FastAPI:
    """Return an app that reads nothing and does nothing."""
    app = FastAPI()

    @app.post("/empty")
    async def post_empty() -> dict[str, str]:
        return {}

    return app


if __name__ == "__main__":
    serve(empty())
