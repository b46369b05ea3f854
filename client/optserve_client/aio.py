"""The client that is awaited: the methods of ``client.py`` and ``session.py``, and their words."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from optserve_client import _arguments, _calls, _transport, wire
from optserve_client._exchange import Retry, Sleep
from optserve_client._protocol import Call, Lane, Lanes, perform
from optserve_client._values import Json, Page, Params, StepResult
from optserve_client.client import Client
from optserve_client.push import AsyncPush
from optserve_client.session import Session

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
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._retry = Retry.of(retries)
        self._lanes = Lanes(worker, epoch, asyncio.Lock)
        self._transport = _transport.awaited(url, timeout, headers, transport)
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

    async def _drive(self, call: Call[T], lane: Lane | None) -> T:
        steps = perform(call, self._retry, lane)
        try:
            effect = next(steps)
            while True:
                if isinstance(effect, Sleep):
                    await asyncio.sleep(effect.seconds)
                    effect = next(steps)
                    continue
                try:
                    answer = await self._transport.send(effect.request)
                except BaseException as exc:
                    effect = steps.throw(exc)
                else:
                    effect = steps.send(answer)
        except StopIteration as done:
            result: T = done.value
            return result
        finally:
            steps.close()


class AsyncSession:
    """:class:`optserve_client.Session` with methods that are awaited."""

    def __init__(self, client: AsyncClient, session_id: str, info: Json | None = None) -> None:
        self._client = client
        #: In every URL of the session.
        self.id = session_id
        #: What the server answered to its creation; empty if this client did not create it.
        self.info: Json = info or {}

    @property
    def _dtype(self) -> str | None:
        return _arguments.dtype_of(self.info)

    @property
    def created(self) -> bool:
        return bool(self.info.get("created") or self.info.get("duplicate"))

    async def step(
        self,
        grads: Mapping[str, Any],
        *,
        params: Mapping[str, Any] | None = None,
        none: Iterable[str] | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
        loss_scale: float | None = None,
        base_version: int | None = None,
        dry_run: bool = False,
        returns: Literal["params", "delta", "none"] = "params",
        return_dtype: str | None = None,
        abandon: bool = False,
    ) -> StepResult:
        fields = _arguments.step_fields(
            returns,
            {"dry_run": dry_run, "abandon": abandon},
            groups=groups,
            loss=loss,
            metrics=metrics,
            loss_scale=loss_scale,
            base_version=base_version,
            return_dtype=return_dtype,
        )
        return await self._client._run(
            _calls.step(self.id, grads, params, none or (), fields, self._dtype)
        )

    def push(
        self,
        *,
        none: Iterable[str] | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
        loss_scale: float | None = None,
        base_version: int | None = None,
        dry_run: bool = False,
        returns: Literal["params", "delta", "none"] = "params",
        return_dtype: str | None = None,
        abandon: bool = False,
    ) -> AsyncPush:
        fields = _arguments.step_fields(
            returns,
            {"dry_run": dry_run, "abandon": abandon},
            groups=groups,
            loss=loss,
            metrics=metrics,
            loss_scale=loss_scale,
            base_version=base_version,
            return_dtype=return_dtype,
        )
        return AsyncPush(self._client, self.id, fields, none, self._dtype)

    async def params(
        self,
        weights: Literal["live", "eval", "ema", "best"] = "live",
        *,
        names: Iterable[str] | None = None,
        if_none_match: Params | None = None,
    ) -> Params:
        return await self._client._run(_calls.params(self.id, weights, names, if_none_match))

    async def put_params(
        self,
        params: Mapping[str, Any],
        *,
        if_match: Params | str | None = None,
        abandon: bool = False,
    ) -> Json:
        return await self._client._run(
            _calls.put_params(self.id, params, if_match, abandon, self._dtype)
        )

    async def status(self) -> Json:
        return await self._client._run(_calls.get(_calls.session_path(self.id), _calls.scalars))

    async def delete(self) -> None:
        await self._client._run(_calls.delete(self.id))
        self._client._lanes.forget(self.id)

    async def export_state(self) -> memoryview:
        return await self._client._run(_calls.export_state(self.id))

    async def import_state(self, frame: wire.BytesLike, *, abandon: bool = False) -> Json:
        return await self._client._run(_calls.import_state(self.id, frame, abandon))

    async def patch(self, *, abandon: bool = False, **fields: Any) -> Json:
        return await self._client._run(
            _calls.edit(self.id, "PATCH", "", fields | _arguments.given(abandon=abandon or None))
        )

    async def patch_group(
        self, index: int, *, abandon: bool = False, **hyperparameters: Any
    ) -> Json:
        return await self._client._run(_calls.patch_group(self.id, index, hyperparameters, abandon))

    async def add_group(self, params: Mapping[str, Any], **hyperparameters: Any) -> Json:
        return await self._client._run(
            _calls.add_group(self.id, params, hyperparameters, self._dtype)
        )

    async def scheduler(self) -> Json:
        return await self._client._run(
            _calls.get(_calls.session_path(self.id, "scheduler"), _calls.scalars)
        )

    async def put_scheduler(
        self, scheduler: Mapping[str, Any] | Sequence[Any] | None, *, abandon: bool = False
    ) -> Json:
        return await self._client._run(_calls.put_scheduler(self.id, scheduler, abandon))

    async def scheduler_step(self, metrics: float | None = None, *, abandon: bool = False) -> Json:
        fields = _arguments.given(metrics=metrics, abandon=abandon or None)
        return await self._client._run(_calls.edit(self.id, "POST", "scheduler/step", fields))

    async def scheduler_preview(
        self, steps: int = 100, *, metrics: Sequence[float] | None = None
    ) -> Json:
        return await self._client._run(_calls.scheduler_preview(self.id, steps, metrics))

    async def fork(
        self,
        id: str | None = None,  # noqa: A002 - the field's name
        *,
        version: int | None = None,
        name: str | None = None,
        notes: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> AsyncSession:
        generation = self._client._lanes.generation(self.id)
        fields = _arguments.given(
            id=id, version=version, generation=generation, name=name, notes=notes, tags=tags
        )
        reply = await self._client._run(_calls.fork(self.id, fields))
        return AsyncSession(self._client, self._client._lanes.opened(reply), reply)

    async def history(self, after_version: int = 0, limit: int = 1000) -> Sequence[Json]:
        return await self._client._run(_calls.history(self.id, after_version, limit))

    async def versions(self, after_version: int | None = None, limit: int = 1000) -> Sequence[Json]:
        return await self._client._run(_calls.versions(self.id, after_version, limit))

    async def rollback(
        self, version: int, *, if_match: Params | str | None = None, abandon: bool = False
    ) -> Json:
        return await self._client._run(_calls.rollback(self.id, version, if_match, abandon))

    async def pin(self, version: int, name: str | None = None) -> Json:
        return await self._client._run(_calls.pin(self.id, version, name))

    async def unpin(self, version: int) -> Json:
        return await self._client._run(_calls.unpin(self.id, version))

    async def put_metrics(self, version: int, metrics: Mapping[str, float]) -> Json:
        fields = {"version": version, "metrics": _arguments.finite_metrics(metrics)}
        return await self._client._run(_calls.edit(self.id, "PUT", "metrics", fields))

    def resume(self) -> None:
        self._client._lanes.resume(self.id)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"


def _borrow_words(target: type, source: type) -> None:
    """Give each method of ``target`` the docstring of the one that blocks."""
    for name, member in vars(target).items():
        if callable(member) and not member.__doc__ and hasattr(source, name):
            member.__doc__ = getattr(source, name).__doc__


_borrow_words(AsyncClient, Client)
_borrow_words(AsyncSession, Session)
