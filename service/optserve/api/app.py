"""The ASGI app: routes in the order of their heat, one outermost layer, no state of its own."""

from __future__ import annotations

from typing import NoReturn

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from optserve import __version__
from optserve.api import (
    catalogue,
    docs_page,
    groups,
    history,
    openapi,
    params,
    probes,
    pushes,
    scheduler,
    sessions,
    state,
    step,
    versions,
)
from optserve.api.draining import Drain
from optserve.api.edge import Edge
from optserve.api.routing import Direct, Handler
from optserve.sessions.registry import Registry
from optserve.settings import Settings

# The router tries routes from the top: the hot one first.
MODULES = (
    step,
    pushes,
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


class App(FastAPI):
    """FastAPI, except that what is hot is found and called without its layers."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (hot := self.state.hot.get(scope["method"])):
            for path, app in hot:
                if found := path.match(scope["path"]):
                    scope["app"], scope["path_params"] = self, found.groupdict()
                    await app(scope, receive, send)
                    return
        await super().__call__(scope, receive, send)


def create_app(registry: Registry, settings: Settings) -> FastAPI:
    """Return the app that serves ``registry``. It closes nothing: the caller owns the registry."""
    drain = Drain()
    app = App(
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
    app.state.hot = {
        method: [
            (route.path_regex, Edge(_answering(route.get_route_handler()), drain))
            for route in (*step.routes.routes, *pushes.routes.routes)
            if isinstance(route, Direct) and method in (route.methods or ())
        ]
        for method in ("POST", "PUT")
    }
    openapi.install(app)
    return app


def _answering(handle: Handler) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await handle(Request(scope, receive))
        await response(scope, receive, send)

    return app


async def _to_edge(request: Request, exc: Exception) -> NoReturn:
    """Leave FastAPI's own exceptions to the place where all others end."""
    raise exc
