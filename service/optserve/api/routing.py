"""How a request finds its function: two kinds of route, and what every function may ask for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from optserve.api.bodies import headers_of
from optserve.api.negotiation import negotiate
from optserve.api.replies import JSON
from optserve.sessions.registry import Registry
from optserve.sessions.session import Session
from optserve_client.errors import Invalid
from optserve_client.wire import SAFETENSORS

#: Whose sessions these are, as long as there are no keys to tell tenants apart.
TENANT = "default"

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Strict(APIRoute):
    """A FastAPI route that refuses query parameters that it does not know."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        known = self._query_names()

        async def strict(request: Request) -> Response:
            if request.scope["query_string"]:
                check_query(request, known)
            return await handle(request)

        return strict

    def _query_names(self) -> frozenset[str]:
        dependants = [self.dependant]
        names: set[str] = set()
        while dependants:
            dependant = dependants.pop()
            names |= {parameter.alias for parameter in dependant.query_params}
            dependants += dependant.dependencies
        return frozenset(names)


class Direct(APIRoute):
    """A route of the hot path: documented by FastAPI, called without its dependency machinery."""

    def get_route_handler(self) -> Handler:
        endpoint: Callable[..., Awaitable[Response]] = self.endpoint

        async def direct(request: Request) -> Response:
            if request.scope["query_string"]:
                check_query(request, frozenset())
            return await endpoint(request=request, **request.path_params)

        return direct


def check_query(request: Request, known: frozenset[str]) -> None:
    """Refuse what would otherwise be ignored without a word."""
    for name in request.query_params:
        if name not in known:
            there_are = f"there are {', '.join(sorted(known))}" if known else "there are none here"
            raise Invalid(f"unknown query parameter {name!r:.80}; {there_are}", field=name[:80])


def router(tag: str, route_class: type[APIRoute] = Strict) -> APIRouter:
    """Return a router whose functions answer with a Response of their own making."""
    return APIRouter(
        tags=[tag],
        route_class=route_class,
        default_response_class=Response,
        generate_unique_id_function=lambda route: route.name,
    )


# --- what a function asks for --------------------------------------------------------------------

#: Not validated: an id that cannot exist is as unknown as any other.
SessionId = Annotated[
    str,
    Path(
        description="The session's id.",
        json_schema_extra={"pattern": "^[A-Za-z0-9._-]{1,128}$"},
    ),
]


def registry_of(request: Request) -> Registry:
    registry: Registry = request.app.state.registry
    return registry


def session_of(request: Request, session_id: str) -> Session:
    """Return the session, or raise SessionNotFound."""
    return registry_of(request).get(TENANT, session_id)


def any_media(request: Request) -> str:
    """Return JSON or safetensors, whichever Accept prefers; refuse before anything was done."""
    return negotiate(headers_of(request).get("accept"), (JSON, SAFETENSORS))


def json_media(request: Request) -> str:
    return negotiate(headers_of(request).get("accept"), (JSON,))


# FastAPI calls in a thread what is not async, which takes longer than these do.


async def _any_media(request: Request) -> str:
    return any_media(request)


async def _json_media(request: Request) -> str:
    return json_media(request)


#: The media type of a reply that may hold tensors.
Media = Annotated[str, Depends(_any_media)]
#: The same where there is only JSON.
JsonMedia = Annotated[str, Depends(_json_media)]
