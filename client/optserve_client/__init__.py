"""The client of optserve: numpy in, numpy out, no torch.

    with Client("http://127.0.0.1:8000") as client:
        session = client.create("AdamW", {"w": w}, lr=1e-3)
        w = session.step({"w": grad}).params["w"]

``client.py`` has :class:`Client`, ``session.py`` :class:`Session`, ``aio.py`` their twins for
asyncio, ``push.py`` a step that is sent tensor by tensor, for both, and ``torch.py`` a
``torch.optim.Optimizer``. Below them ``_calls.py`` knows the API, ``_protocol.py`` decides what is
sent (of a push ``_pushes.py`` does) and ``_exchange.py`` when it is sent again, ``_transport.py``
moves the bytes (over ``_sockets.py`` and ``_http.py``, or else ``_over_httpx.py``), and ``wire.py``
turns named arrays into bytes and back.
"""

from optserve_client import errors, wire
from optserve_client._exchange import Retry
from optserve_client._values import Page, Params, Sparse, StepResult
from optserve_client.aio import AsyncClient, AsyncSession
from optserve_client.client import Client
from optserve_client.push import AsyncPush, Push
from optserve_client.session import Session
from optserve_client.wire import Bits

__all__ = [
    "AsyncClient",
    "AsyncPush",
    "AsyncSession",
    "Bits",
    "Client",
    "Page",
    "Params",
    "Push",
    "Retry",
    "Session",
    "Sparse",
    "StepResult",
    "errors",
    "wire",
]
