"""One session, awaited: the methods of ``session.py``, and their words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from optserve_client import _arguments, _calls, _worker_calls, wire
from optserve_client._values import Json, Params, StepResult, Weights
from optserve_client.compress import Compressor
from optserve_client.session import Session

if TYPE_CHECKING:
    from optserve_client.aio_client import AsyncClient


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
        grads: Mapping[str, Any] | None = None,
        *,
        deltas: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        none: Iterable[str] | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
        loss_scale: float | None = None,
        base_version: int | None = None,
        weight: float | None = None,
        wait_s: float | None = None,
        dry_run: bool = False,
        returns: Literal["params", "delta", "none"] = "params",
        return_dtype: str | None = None,
        abandon: bool = False,
        compress: Compressor | None = None,
    ) -> StepResult:
        fields = _arguments.step_fields(
            returns,
            {"dry_run": dry_run, "abandon": abandon},
            groups=groups,
            loss=loss,
            metrics=metrics,
            loss_scale=loss_scale,
            base_version=base_version,
            weight=weight,
            wait_s=wait_s,
            return_dtype=return_dtype,
        )
        return await self._client._run(
            _calls.step(
                self.id,
                grads,
                deltas,
                params,
                none or (),
                fields,
                self._dtype,
                compress,
                self._client._lanes.unsent(self.id),
                patience_s=self._client._patience_s,
            )
        )

    @overload
    async def params(
        self,
        weights: Weights = "live",
        *,
        names: Iterable[str] | None = None,
        if_none_match: Params | None = None,
    ) -> Params: ...

    @overload
    async def params(
        self,
        weights: Weights = "live",
        *,
        names: Iterable[str] | None = None,
        if_none_match: Params | None = None,
        min_version: int,
        wait_s: float | None = None,
    ) -> Params | None: ...

    async def params(
        self,
        weights: Weights = "live",
        *,
        names: Iterable[str] | None = None,
        if_none_match: Params | None = None,
        min_version: int | None = None,
        wait_s: float | None = None,
    ) -> Params | None:
        return await self._client._run(
            _calls.params(self.id, weights, names, if_none_match, min_version, wait_s)
        )

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

    async def register(self, name: str | None = None) -> Json:
        return await self._client._register(self.id, name)

    async def workers(self) -> Json:
        return await self._client._run(_worker_calls.workers(self.id))

    async def remove_worker(self, name: str) -> Json:
        return await self._client._run(_worker_calls.remove_worker(self.id, name))

    def resume(self) -> None:
        self._client._lanes.resume(self.id)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"


def borrow_words(target: type, source: type) -> None:
    """Give each method of ``target`` the docstring of the one that blocks."""
    for name, member in vars(target).items():
        if callable(member) and not member.__doc__ and hasattr(source, name):
            member.__doc__ = getattr(source, name).__doc__


borrow_words(AsyncSession, Session)
