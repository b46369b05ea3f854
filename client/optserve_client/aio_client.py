"""The client that is awaited: the methods of ``client.py``, and their words."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from optserve_client import _arguments, _calls, _transport, _worker_calls, wire
from optserve_client._exchange import Retry, Send, Sleep, Steps
from optserve_client._protocol import Call, Lane, Lanes, perform
from optserve_client._values import Json, Page
from optserve_client.aio import AsyncSession, borrow_words
from optserve_client.client import Client

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")


class AsyncClient:
    """:class:`optserve_client.Client` with methods that are awaited; use ``async with``."""

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
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._retry = Retry.of(retries)
        self._lanes = Lanes(worker, epoch, asyncio.Lock)
        self._transport = _transport.awaited(url, timeout, headers, transport, encoding)
        self._patience_s = _arguments.patience_s(timeout)
        self._server = _transport.place(url, transport)

    @property
    def worker(self) -> str:
        return self._lanes.worker

    async def create(
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
    ) -> AsyncSession:
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
        reply = await self._run(_calls.create(id, optimizer, params, fields, hyperparameters))
        return AsyncSession(self, self._lanes.opened(reply), reply)

    def session(self, session_id: str) -> AsyncSession:
        wire.check_id("session id", session_id)
        return AsyncSession(self, session_id)

    async def import_session(
        self,
        frame: wire.BytesLike,
        *,
        id: str | None = None,  # noqa: A002 - the field's name
    ) -> AsyncSession:
        reply = await self._run(_calls.import_session(id, frame))
        return AsyncSession(self, self._lanes.opened(reply, imported=True), reply)

    async def list(
        self,
        *,
        cursor: str | None = None,
        limit: int | None = None,
        tags: Mapping[str, str] | None = None,
        order_by: str | None = None,
    ) -> Page:
        return await self._run(_calls.sessions(cursor, limit, tags, order_by))

    async def optimizers(self) -> Sequence[Json]:
        return await self._run(_calls.listed("optimizers"))

    async def optimizer(self, name: str) -> Json:
        return await self._run(_calls.named("optimizers", name))

    async def schedulers(self) -> Sequence[Json]:
        return await self._run(_calls.listed("schedulers"))

    async def scheduler(self, name: str) -> Json:
        return await self._run(_calls.named("schedulers", name))

    async def preview_scheduler(
        self,
        scheduler: Mapping[str, Any] | Sequence[Any],
        optimizer: str | Mapping[str, Any],
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
        steps: int = 100,
        metrics: Sequence[float] | None = None,
    ) -> Json:
        call = _calls.preview_scheduler(scheduler, optimizer, groups, steps, metrics)
        return await self._run(call)

    async def healthz(self) -> Json:
        return await self._run(_calls.get("/healthz", _calls.scalars))

    async def version(self) -> Json:
        return await self._run(_calls.get("/version", _calls.scalars))

    async def close(self) -> None:
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._server!r}, worker={self.worker!r})"

    async def _run(self, call: Call[T]) -> T:
        if call.changes is None:
            return await self._drive(call, None)
        lane, lock = self._lanes.get(call.changes)
        async with lock:
            return await self._drive(call, lane)

    async def _register(self, session_id: str, name: str | None) -> Json:
        lane, lock = self._lanes.get(session_id)
        call = _worker_calls.register(session_id, lane.worker if name is None else name)
        if name not in (None, lane.worker):
            return await self._run(call)
        async with lock:
            reply = await self._run(call)
            lane.begin(reply)
        return reply

    async def _drive(self, call: Call[T], lane: Lane | None) -> T:
        return await self._play(perform(call, self._retry, lane))

    async def _play(self, steps: Steps[T]) -> T:
        try:
            effect = next(steps)
            while True:
                if isinstance(effect, Sleep):
                    await asyncio.sleep(effect.seconds)
                    effect = next(steps)
                    continue
                try:
                    answer = None
                    if isinstance(effect, Send):
                        answer = await self._transport.send(effect.request)
                    else:
                        await asyncio.to_thread(effect.do)
                except BaseException as exc:
                    effect = steps.throw(exc)
                else:
                    effect = steps.send(answer)
        except StopIteration as done:
            result: T = done.value
            return result
        finally:
            steps.close()


borrow_words(AsyncClient, Client)
