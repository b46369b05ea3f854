"""The ASGI app: routes in the order of their heat, one outermost layer, no state of its own."""

from __future__ import annotations

from typing import NoReturn

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request

from optserve import __version__
from optserve.api import (
    catalogue,
    docs_page,
    groups,
    history,
    openapi,
    params,
    probes,
    scheduler,
    sessions,
    state,
    step,
    versions,
)
from optserve.api.draining import Drain
from optserve.api.edge import Edge
from optserve.sessions.registry import Registry
from optserve.settings import Settings

# The router tries routes from the top: the hot one first.
MODULES = (
    step,
    params,
    probes,
    sessions,
    groups,
    scheduler,
    history,
    versions,
    state,
    catalogue,
    docs_page,
)


def create_app(registry: Registry, settings: Settings) -> FastAPI:
    """Return the app that serves ``registry``. It closes nothing: the caller owns the registry."""
    drain = Drain()
    app = FastAPI(
        title="optserve",
        version=__version__,
        summary="Optimization as a service",
        description=openapi.DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        middleware=[Middleware(Edge, drain=drain)],
        exception_handlers={HTTPException: _to_edge, RequestValidationError: _to_edge},
        separate_input_output_schemas=False,
    )
    app.state.registry = registry
    app.state.drain = drain
    app.state.settings = settings
    for module in MODULES:
        # Not include_router, which would put a second lookup before each request.
        app.router.routes.extend(module.routes.routes)
    openapi.install(app)
    return app


async def _to_edge(request: Request, exc: Exception) -> NoReturn:
    """Leave FastAPI's own exceptions to the place where all others end."""
    raise exc
