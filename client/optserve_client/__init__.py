"""The client of optserve: numpy in, numpy out, no torch.

    with Client("http://127.0.0.1:8000") as client:
        session = client.create("AdamW", {"w": w}, lr=1e-3)
        w = session.step({"w": grad}).params["w"]

``client.py`` has :class:`Client`, ``session.py`` :class:`Session`, and ``worker.py``
:class:`Worker`, one of several on one session; their twins for asyncio are in ``aio_client.py``,
``aio.py`` and ``aio_worker.py``. ``compress.py`` has ways to send gradients in fewer bytes,
``torch.py`` a ``torch.optim.Optimizer``. Below them ``_calls.py`` knows the API, ``_protocol.py``
decides what is sent and ``_exchange.py`` when it is sent again, ``_transport.py`` moves the bytes
(over ``_sockets.py`` and ``_http.py``, or else ``_over_httpx.py``), and ``wire.py`` turns named
arrays into bytes and back.
"""

from optserve_client import errors, wire
from optserve_client._exchange import Retry
from optserve_client._values import Page, Params, Sparse, StepResult
from optserve_client.aio import AsyncSession
from optserve_client.aio_client import AsyncClient
from optserve_client.aio_worker import AsyncWorker
from optserve_client.client import Client
from optserve_client.compress import Half, Int8, TopK
from optserve_client.session import Session
from optserve_client.wire import Bits
from optserve_client.worker import Worker

__all__ = [
    "AsyncClient",
    "AsyncSession",
    "AsyncWorker",
    "Bits",
    "Client",
    "Half",
    "Int8",
    "Page",
    "Params",
    "Retry",
    "Session",
    "Sparse",
    "StepResult",
    "TopK",
    "Worker",
    "errors",
    "wire",
]
