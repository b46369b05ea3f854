"""A step whose gradients are sent one by one, for both clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from optserve_client import _arguments, _calls, errors
from optserve_client._pushes import TIMES, Staged
from optserve_client._values import Json, StepResult

if TYPE_CHECKING:
    from optserve_client.aio import AsyncClient
    from optserve_client.client import Client


class _Push:
    """What both kinds share. Arrays are kept, not copied, until the commit is answered: leave them
    as they are until then."""

    def __init__(
        self, session_id: str, fields: Json, none: Iterable[str] | None, dtype: str | None
    ) -> None:
        fields = fields | _arguments.given(none=None if none is None else list(none))
        self._staged = Staged(_calls.session_path(session_id, "pushes"), fields)
        self._session_id, self._dtype = session_id, dtype
        #: ``committed`` or ``given up``.
        self._end: str | None = None
        #: Whether a commit ended without an answer: then there may be nothing to give up.
        self._unknown = False

    def _check(self) -> None:
        if self._end is not None:
            raise RuntimeError(f"this push was {self._end}")

    def _keep(self, name: str, grad: Any) -> Callable[[], None]:
        self._check()
        tensors = None if grad is None else _calls.gradient(name, grad, self._dtype)
        return self._staged.keep(name, tensors)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._session_id!r}, {len(self._staged.gradients)} put)"


class Push(_Push):
    """A step in the making, from :meth:`Session.push`. Threads may share it.

    It is opened on the server by the first :meth:`put`. The other changes of the session do not
    wait for it: it gets its number when it is committed. Where the server has lost it, because it
    was started again or because too long nothing came, another one is opened, and what was put
    before goes there with the commit at the latest.
    """

    def __init__(
        self,
        client: Client,
        session_id: str,
        fields: Json,
        none: Iterable[str] | None,
        dtype: str | None,
    ) -> None:
        super().__init__(session_id, fields, none, dtype)
        self._client = client
        self._opening = threading.Lock()

    def put(self, name: str, grad: Any) -> None:
        """Send the gradient of one parameter and return when the server has it.

        ``grad`` is what :meth:`Session.step` takes for it. Once more replaces it. What was refused
        counts as not put; what got no answer is sent again by the commit.
        """
        undo = self._keep(name, grad)
        for attempt in range(TIMES):
            push_id = self._opened()
            try:
                self._client._run(_calls.put_gradient(self._staged, name, push_id))
            except errors.PushNotFound:
                self._staged.lost(push_id)
                if attempt == TIMES - 1:
                    raise
            except errors.RequestError:
                undo()
                raise
            else:
                self._staged.there[name] = push_id
                return

    def _opened(self) -> str:
        with self._opening:
            if self._staged.id is None:
                self._staged.id = self._client._run(_calls.open_push(self._staged))
            return self._staged.id

    def commit(
        self,
        *,
        none: Iterable[str] | None = None,
        loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> StepResult:
        """Take the step and return what :meth:`Session.step` does.

        Every gradient must have been put, or named in ``none``. The arguments are for what was not
        known when :meth:`Session.push` was called. After an error that leaves open whether the step
        was taken, call it again: it happens once.
        """
        self._check()
        call = _calls.commit_push(
            self._session_id, self._staged, _commit_fields(none, loss, metrics)
        )
        self._unknown = True
        try:
            result = self._client._run(call)
        except errors.RequestError:
            self._unknown = False
            raise
        self._end = "committed"
        return result

    def close(self) -> None:
        """Give the push up unless it was committed. What cannot be given up expires."""
        if self._end is not None or self._unknown:
            return
        self._end = "given up"
        if self._staged.id is not None:
            with suppress(errors.OptserveError):
                self._client._run(_calls.give_up_push(self._staged))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncPush(_Push):
    """:class:`Push` with methods that are awaited; use ``async with``, and ``asyncio.gather`` to
    put several gradients at a time."""

    def __init__(
        self,
        client: AsyncClient,
        session_id: str,
        fields: Json,
        none: Iterable[str] | None,
        dtype: str | None,
    ) -> None:
        super().__init__(session_id, fields, none, dtype)
        self._client = client
        self._opening = asyncio.Lock()

    async def put(self, name: str, grad: Any) -> None:
        undo = self._keep(name, grad)
        for attempt in range(TIMES):
            push_id = await self._opened()
            try:
                await self._client._run(_calls.put_gradient(self._staged, name, push_id))
            except errors.PushNotFound:
                self._staged.lost(push_id)
                if attempt == TIMES - 1:
                    raise
            except errors.RequestError:
                undo()
                raise
            else:
                self._staged.there[name] = push_id
                return

    async def _opened(self) -> str:
        async with self._opening:
            if self._staged.id is None:
                self._staged.id = await self._client._run(_calls.open_push(self._staged))
            return self._staged.id

    async def commit(
        self,
        *,
        none: Iterable[str] | None = None,
        loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> StepResult:
        self._check()
        call = _calls.commit_push(
            self._session_id, self._staged, _commit_fields(none, loss, metrics)
        )
        self._unknown = True
        try:
            result = await self._client._run(call)
        except errors.RequestError:
            self._unknown = False
            raise
        self._end = "committed"
        return result

    async def close(self) -> None:
        if self._end is not None or self._unknown:
            return
        self._end = "given up"
        if self._staged.id is not None:
            with suppress(errors.OptserveError):
                await self._client._run(_calls.give_up_push(self._staged))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def _commit_fields(
    none: Iterable[str] | None, loss: float | None, metrics: Mapping[str, float] | None
) -> Json:
    given = _arguments.given(none=None if none is None else list(none))
    return given | _arguments.step_fields("params", {}, loss=loss, metrics=metrics)


AsyncPush.put.__doc__ = Push.put.__doc__
AsyncPush.commit.__doc__ = Push.commit.__doc__
AsyncPush.close.__doc__ = Push.close.__doc__
