"""One of several workers on a session, as a program would be: it registers, pulls and pushes."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from optserve_client import Client, Params, Session, StepResult, wire
from optserve_client._calls import _step_result, create, get, new_id, scalars, session_path
from optserve_client._messages import Draft
from optserve_client._protocol import Call


def open_session(
    client: Client,
    optimizer: Mapping[str, Any],
    params: Mapping[str, Any],
    workers: Mapping[str, Any] | None,
    **fields: Any,
) -> Session:
    """Create a session of several workers."""
    made = client._run(create(None, optimizer, params, {**fields, "workers": workers}, {}))
    return Session(client, made["id"], made)


def open_round(client: Client, session: str) -> Mapping[str, Any] | None:
    """Return what the server says of the round that is open, if one is."""
    found: Mapping[str, Any] = client._run(get(session_path(session, "workers"), scalars))
    return found["round"]


class Worker:
    """A worker under a name; a context manager."""

    def __init__(self, url: str, session: str, name: str, *, kind: str = "grad") -> None:
        """Register. ``kind`` of what it pushes: ``grad`` or ``delta``."""
        self._session, self._kind = session, kind
        draft = Draft(
            method="POST",
            path=session_path(session, "workers"),
            fields={"name": name},
            headers={"Idempotency-Key": new_id()},
        )
        with Client(url) as client:
            self.epoch: int = client._run(Call(draft=draft, read=scalars))["epoch"]
        self._client = Client(url, worker=name, epoch=self.epoch)

    @property
    def next_seq(self) -> int:
        """Of the next push; one that is refused does not use it up."""
        return self._client._lanes.get(self._session)[0].seq

    @property
    def pending(self) -> bool:
        """Whether the open round has a push that came under this name."""
        found = open_round(self._client, self._session)
        return found is not None and self._client.worker in found["contributed"]

    def pull(self) -> Params:
        return self._client.session(self._session).params()

    def push(self, tensors: Mapping[str, Any], base_version: int, **fields: Any) -> StepResult:
        """Push what was computed on ``base_version``; in a round, wait for its end."""
        named: dict[str, wire.Tensor] = {f"{self._kind}/{n}": t for n, t in tensors.items()}
        draft = Draft(
            method="POST",
            path=session_path(self._session, "step"),
            fields={"base_version": base_version, **fields},
            tensors=named,
            accept=wire.SAFETENSORS,
            guarded=True,
        )
        asked = fields.get("return", "params")
        read = lambda answer: _step_result(answer, asked)
        return self._client._run(Call(draft=draft, read=read, changes=self._session))

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.close()
