"""One of several workers that is awaited: the methods of ``worker.py``, and their words."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from optserve_client import _arguments
from optserve_client._member import Member, OnStale
from optserve_client._values import Json, Params, StepResult
from optserve_client.aio import AsyncSession, borrow_words
from optserve_client.aio_client import AsyncClient
from optserve_client.compress import Compressor
from optserve_client.worker import Worker, log


class AsyncWorker:
    """:class:`optserve_client.Worker` with methods that are awaited; use ``async with``."""

    def __init__(
        self,
        client: AsyncClient | str,
        session_id: str,
        name: str | None = None,
        *,
        on_stale: OnStale = "raise",
        retry_rounds: int = 0,
    ) -> None:
        if not isinstance(client, (str, AsyncClient)):
            raise TypeError(f"client must be an AsyncClient or a URL, got {client!r:.80}")
        self._owned = isinstance(client, str)
        self._client = AsyncClient(client) if isinstance(client, str) else client
        self._member = Member(
            session_id,
            name,
            retry=self._client._retry,
            patience_s=self._client._patience_s,
            on_stale=on_stale,
            retry_rounds=retry_rounds,
        )
        self._lock = asyncio.Lock()
        #: Pulls params of a version that is to come, or a later one.
        self._ahead: tuple[int, asyncio.Task[Params | None]] | None = None

    @property
    def name(self) -> str:
        return self._member.name

    @property
    def session(self) -> AsyncSession:
        return self._client.session(self._member.session_id)

    @property
    def epoch(self) -> int | None:
        return self._member.epoch

    @property
    def params(self) -> Params | None:
        return self._member.params

    @property
    def version(self) -> int | None:
        return self._member.version

    async def register(self) -> Json:
        async with self._lock:
            return await self._client._play(self._member.register())

    async def pull(self, names: Iterable[str] | None = None) -> Params:
        await self._enter()
        ahead, found = self._ahead if names is None else None, None
        if ahead is not None:
            least, task = ahead
            pending = not task.done()
            if not (pending and await self._client._play(self._member.newest()) < least):
                try:
                    found = await asyncio.shield(task)  # another pull may wait for it, too
                except asyncio.CancelledError:
                    if not task.cancelled():
                        raise  # this pull is given up, not what is pulled ahead
            elif self.params is not None:  # there are none that are newer
                return self.params
            await self._stop()
        return await self._client._play(self._member.pull(names, found))

    async def prefetch(self) -> None:
        await self._enter()
        least = 0 if self.version is None else self.version + 1
        if self._ahead is None or self._ahead[0] < least:
            await self._stop()
            self._ahead = least, asyncio.create_task(self._poll(least))

    async def _poll(self, least: int) -> Params | None:
        try:
            while (found := await self._client._play(self._member.ahead(least))) is None:
                pass
        except Exception as exc:  # a pull says why
            log.debug("nothing was pulled ahead: %s", exc)
            return None
        return found

    async def push(
        self,
        grads: Mapping[str, Any] | None = None,
        *,
        deltas: Mapping[str, Any] | None = None,
        none: Iterable[str] | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
        loss_scale: float | None = None,
        weight: float | None = None,
        base_version: int | None = None,
        wait_s: float | None = None,
        returns: Literal["params", "none"] = "params",
        return_dtype: str | None = None,
        compress: Compressor | None = None,
    ) -> StepResult:
        fields = _arguments.step_fields(
            returns,
            {},
            groups=groups,
            loss=loss,
            metrics=metrics,
            loss_scale=loss_scale,
            weight=weight,
            base_version=base_version,
            wait_s=wait_s,
            return_dtype=return_dtype,
        )
        async with self._lock:
            return await self._client._play(
                self._member.push(grads, deltas, none or (), fields, compress)
            )

    async def leave(self) -> None:
        async with self._lock:
            await self._client._play(self._member.leave())

    async def close(self) -> None:
        await self._stop()
        if self._owned:
            await self._client.close()

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
        return f"{type(self).__name__}({self._member.session_id!r}, {self.name!r})"

    async def _stop(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].cancel()
            await asyncio.wait([ahead[1]])

    async def _enter(self) -> None:
        if not self._member.ready:
            async with self._lock:
                await self._client._play(self._member.enter())


borrow_words(AsyncWorker, Worker)
