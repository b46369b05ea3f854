"""Requests to the app in this process, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

import httpx
import numpy as np
import orjson

from optserve_client import wire
from optserve_client.wire import META_KEY, SAFETENSORS

JSON = {"content-type": "application/json"}
BINARY = {"content-type": SAFETENSORS}
#: Two params, one of them a scalar; AdamW, so that state matters.
CREATE: dict[str, Any] = {
    "optimizer": {"name": "AdamW", "lr": 0.1},
    "params": {"w": [[1.0, 2.0], [3.0, 4.0]], "b": 0.5},
}
GRADS: dict[str, Any] = {"w": [[1.0, -1.0], [0.5, 0.25]], "b": -2.0}


class Api:
    """Asks the app and waits for the answer; an exception that leaves the app leaves this too."""

    def __init__(self, app: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", timeout=60
        )

    def request(self, method: str, url: str, **kwargs: Any) -> httpx.Response:
        return self._loop.run_until_complete(self._client.request(method, url, **kwargs))

    get = partialmethod(request, "GET")
    head = partialmethod(request, "HEAD")
    put = partialmethod(request, "PUT")
    post = partialmethod(request, "POST")
    patch = partialmethod(request, "PATCH")
    delete = partialmethod(request, "DELETE")

    def start(self, method: str, url: str, **kwargs: Any) -> asyncio.Task[httpx.Response]:
        """Send a request that goes on while others are asked for."""
        return self._loop.create_task(self._client.request(method, url, **kwargs))

    def finish(self, started: asyncio.Task[httpx.Response]) -> httpx.Response:
        return self._loop.run_until_complete(started)

    def together(self, *requests: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
        """Send several requests at once."""

        async def send() -> list[httpx.Response]:
            sent = (self._client.request(method, url, **more) for method, url, more in requests)
            return await asyncio.gather(*sent)

        return self._loop.run_until_complete(send())


@contextmanager
def asking(app: Any) -> Iterator[Api]:
    """Yield an :class:`Api` with an event loop of its own."""
    loop = asyncio.new_event_loop()
    try:
        yield Api(app, loop)
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def frame(tensors: Mapping[str, wire.Tensor], fields: Mapping[str, Any] | None = None) -> bytes:
    """Return a safetensors body."""
    metadata = None if fields is None else {META_KEY: orjson.dumps(fields).decode()}
    return b"".join(wire.encode(tensors, metadata))


def unframe(body: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors and the fields of a safetensors reply."""
    tensors, metadata = wire.decode(body)
    return tensors, orjson.loads(metadata[META_KEY])


def f32(values: Any) -> Any:
    return np.array(values, "<f4")


def prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": f32(value) for name, value in values.items()}
