"""The client that blocks; ``aio_client.py`` has its twin with the same methods."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from optserve_client import _arguments, _calls, _transport, _worker_calls, wire
from optserve_client._exchange import Retry, Send, Sleep, Steps
from optserve_client._protocol import Call, Lane, Lanes, perform
from optserve_client._values import Json, Page
from optserve_client.session import Session

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")


class Client:
    """A connection pool to one optserve server. Threads may share it; close it, or use ``with``.

    Every change carries ``worker``, ``epoch`` and a seq, so that sending it again is safe: what
    fails on the way, or at a server that was killed and starts again, is sent again for a minute,
    and applied once. Changes of one session go out one at a time, in the order of the calls.

    Methods raise the classes of :mod:`optserve_client.errors`. A RequestError was refused and
    changed nothing, and so did Damaged and OutOfSpace; ConnectFailed never reached the server; the
    sentence says so if an earlier attempt may have worked. After any other TransportError or
    ServerError it is not known whether the change happened: call the same method with the same
    arguments again, and it happens once. Any other change of that session first sends the open one
    again. After SessionRewound every change raises it again until :meth:`Session.resume`.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        timeout: float = 60.0,
        retries: int | Retry | None = None,
        worker: str | None = None,
        epoch: int = 1,
        headers: Mapping[str, str] | None = None,
        encoding: Literal["gzip", "zstd"] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: Of the server, or ``unix:/path`` of its socket.
            timeout: Seconds to wait for a connection, and for each part of an answer.
            retries: How often a request that failed is sent again, or all about it; by default as
                often as a minute allows.
            worker: Who sends; by default a random name, so that a program that starts again never
                meets its own old numbers. One that names its worker does: see Session.resume.
            epoch: Of that worker.
            headers: Sent with every request.
            encoding: Compress large requests, and let the server compress its answers. For slow
                networks and what shrinks; zstd needs the extra ``optserve-client[zstd]``.
            transport: An httpx transport to go through. Without one, ``http://`` goes over plain
                sockets, which is faster, and ``https://`` or a proxy over httpx.
        """
        self._retry = Retry.of(retries)
        self._lanes = Lanes(worker, epoch, threading.Lock)
        self._transport = _transport.blocking(url, timeout, headers, transport, encoding)
        self._patience_s = _arguments.patience_s(timeout)
        self._server = _transport.place(url, transport)

    @property
    def worker(self) -> str:
        """Name under which this client's changes are numbered."""
        return self._lanes.worker

    def create(
        self,
        optimizer: str | Mapping[str, Any],
        params: Mapping[str, Any],
        *,
        id: str | None = None,  # noqa: A002 - the field's name
        groups: Sequence[Mapping[str, Any]] | None = None,
        sparse: Sequence[str] | None = None,
        scheduler: Mapping[str, Any] | Sequence[Any] | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        accumulate: int | Mapping[str, Any] | None = None,
        ema: Mapping[str, Any] | None = None,
        best: Mapping[str, Any] | None = None,
        maximize: bool | None = None,
        nonfinite: Literal["reject", "skip"] | None = None,
        dtype: str | None = None,
        device: str | None = None,
        impl: Literal["auto", "fused", "foreach", "single"] | None = None,
        durability: Literal["always", "os", "memory"] | None = None,
        ttl_s: float | None = None,
        name: str | None = None,
        notes: str | None = None,
        tags: Mapping[str, str] | None = None,
        workers: Mapping[str, Any] | None = None,
        **hyperparameters: Any,
    ) -> Session:
        """Create a session: ``create("AdamW", {"w": w}, lr=1e-3)``.

        Args:
            optimizer: torch's class name, or an object with it as ``name`` and hyperparameters.
            params: Initial values by name, in the session's order: float32, float64 or bfloat16.
            id: Of the session; by default a new one. If it exists with the same configuration, it
                is opened as it is (``created`` is False), else SessionExists is raised.
            groups: torch's param_groups; ``params`` in them are name patterns with ``*`` and ``?``.
            **hyperparameters: Of the optimizer.
        The other fields are those of ``POST /v1/sessions``.
        """
        fields = _arguments.given(
            groups=groups,
            sparse=sparse,
            scheduler=scheduler,
            clip_grad_norm=clip_grad_norm,
            clip_grad_value=clip_grad_value,
            accumulate=accumulate,
            ema=ema,
            best=best,
            maximize=maximize,
            nonfinite=nonfinite,
            dtype=dtype,
            device=device,
            impl=impl,
            durability=durability,
            ttl_s=ttl_s,
            name=name,
            notes=notes,
            tags=tags,
            workers=workers,
        )
        reply = self._run(_calls.create(id, optimizer, params, fields, hyperparameters))
        return Session(self, self._lanes.opened(reply), reply)

    def session(self, session_id: str) -> Session:
        """Return a handle on an existing session. Nothing is sent."""
        wire.check_id("session id", session_id)
        return Session(self, session_id)

    def import_session(
        self,
        frame: wire.BytesLike,
        *,
        id: str | None = None,  # noqa: A002 - the field's name
    ) -> Session:
        """Create a session from what :meth:`Session.export_state` returned.

        With the ``id`` of an existing one, replace that.
        """
        reply = self._run(_calls.import_session(id, frame))
        return Session(self, self._lanes.opened(reply, imported=True), reply)

    def list(
        self,
        *,
        cursor: str | None = None,
        limit: int | None = None,
        tags: Mapping[str, str] | None = None,
        order_by: str | None = None,
    ) -> Page:
        """Return one page of the sessions that have all of ``tags``.

        ``order_by``: ``created``, ``updated`` or ``name``; a minus in front turns it round.
        """
        return self._run(_calls.sessions(cursor, limit, tags, order_by))

    def optimizers(self) -> Sequence[Json]:
        """Return the catalogue of optimizers."""
        return self._run(_calls.listed("optimizers"))

    def optimizer(self, name: str) -> Json:
        """Return one optimizer with the JSON Schema of its hyperparameters."""
        return self._run(_calls.named("optimizers", name))

    def schedulers(self) -> Sequence[Json]:
        """Return the catalogue of schedulers."""
        return self._run(_calls.listed("schedulers"))

    def scheduler(self, name: str) -> Json:
        """Return one scheduler with the JSON Schema of its arguments."""
        return self._run(_calls.named("schedulers", name))

    def preview_scheduler(
        self,
        scheduler: Mapping[str, Any] | Sequence[Any],
        optimizer: str | Mapping[str, Any],
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
        steps: int = 100,
        metrics: Sequence[float] | None = None,
    ) -> Json:
        """Return the learning rates that ``scheduler`` would give ``optimizer``; needs no session.

        ``groups``: differences of each group. ``metrics``: for ReduceLROnPlateau, one per step.
        """
        call = _calls.preview_scheduler(scheduler, optimizer, groups, steps, metrics)
        return self._run(call)

    def healthz(self) -> Json:
        """Return what the server says of its health."""
        return self._run(_calls.get("/healthz", _calls.scalars))

    def version(self) -> Json:
        """Return the versions of the server and of what it computes with."""
        return self._run(_calls.get("/version", _calls.scalars))

    def close(self) -> None:
        """Close the connections. Sessions stay where they are: on the server."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._server!r}, worker={self.worker!r})"

    def _run(self, call: Call[T]) -> T:
        if call.changes is None:
            return self._drive(call, None)
        lane, lock = self._lanes.get(call.changes)
        with lock:
            return self._drive(call, lane)

    def _register(self, session_id: str, name: str | None) -> Json:
        lane, lock = self._lanes.get(session_id)
        call = _worker_calls.register(session_id, lane.worker if name is None else name)
        if name not in (None, lane.worker):
            return self._run(call)
        with lock:
            reply = self._run(call)
            lane.begin(reply)
        return reply

    def _drive(self, call: Call[T], lane: Lane | None) -> T:
        return self._play(perform(call, self._retry, lane))

    def _play(self, steps: Steps[T]) -> T:
        try:
            effect = next(steps)
            while True:
                if isinstance(effect, Sleep):
                    time.sleep(effect.seconds)
                    effect = next(steps)
                    continue
                try:
                    answer = None
                    if isinstance(effect, Send):
                        answer = self._transport.send(effect.request)
                    else:
                        effect.do()
                except BaseException as exc:
                    effect = steps.throw(exc)
                else:
                    effect = steps.send(answer)
        except StopIteration as done:
            result: T = done.value
            return result
        finally:
            steps.close()
