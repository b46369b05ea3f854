"""Is it alive, is it warm, what is it: for load balancers, scripts and clients."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from optserve import __version__
from optserve.api.openapi import operation
from optserve.api.replies import json_response
from optserve.api.routing import registry_of, router
from optserve_client.errors import Unavailable

#: What a client may rely on beyond the version number.
FEATURES = [
    "base64",
    "catalogue",
    "compressed_gradients",
    "content_encoding",
    "dry_run",
    "durability",
    "exactly_once",
    "fork",
    "history",
    "lbfgs",
    "pins",
    "rollback",
    "safetensors",
    "schedulers",
    "sparse",
    "state",
    "versions",
]

routes = router("operations")


@routes.get("/healthz", **operation("Is the process alive?", reply="Status"))
async def get_healthz() -> Response:
    """Answers as long as the event loop runs."""
    return json_response({"status": "ok"})


@routes.get("/readyz", **operation("Will requests be fast?", reply="Status", errors=[Unavailable]))
async def get_readyz(request: Request) -> Response:
    """503 until torch is loaded and warm, because the first optimizer costs a second or more; and
    again from when the server was told to stop."""
    registry = registry_of(request)
    if registry.draining:
        raise Unavailable("the server stops: it finishes what it has and takes nothing new")
    if not registry.ready:
        raise Unavailable("the server is starting: torch is not warm yet")
    return json_response({"status": "ready"})


@routes.get("/version", **operation("What runs here?", reply="Version"))
async def get_version(request: Request) -> Response:
    """The versions of the server, of torch and of Python, what it runs on and what it can do."""
    registry = registry_of(request)
    return json_response(
        {
            **_versions(),
            "device": registry.device,
            "threads": registry.threads,
            "store": registry.store.promise,
        }
    )


@cache
def _versions() -> dict[str, Any]:
    return {
        "optserve": __version__,
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "features": FEATURES,
    }
