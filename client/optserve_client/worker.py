"""One of several workers that train one model, as a program that blocks sees it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from optserve_client import _arguments
from optserve_client._member import Member, OnStale
from optserve_client._values import Json, Params, StepResult
from optserve_client.client import Client
from optserve_client.compress import Compressor
from optserve_client.session import Session

log = logging.getLogger("optserve_client")


class Worker:
    """One of several that push into one session; it computes nothing itself.

        with Worker("http://127.0.0.1:8000", "run-7", "w3") as worker:
            params = worker.pull()
            for batch in batches:
                params = worker.push(gradients(params, batch)).params

    It registers at its first use, which gives it a new epoch: an older process of the same name is
    refused from then on, with Fenced, and has to stop. It knows the version of the params that
    :meth:`pull` or :meth:`push` returned last, and pushes say that their gradient is of those. A
    push in a round returns when the round ends. What failed on the way is sent again and counts
    once; a worker that was removed, or that the session does not know any more, registers again.

    Beside what the methods of :class:`Session` raise:

    - StaleGradient: the push came too late and was dropped. :attr:`params` are those of now.
    - RoundFailed: not enough workers pushed in time, and the push was dropped. The version is as it
      was: the same gradient may be pushed again.
    - SessionRewound: the session lost history, so :meth:`pull` before you go on.
    - Fenced: a newer process goes by this name. Every further call raises it again.
    """

    def __init__(
        self,
        client: Client | str,
        session_id: str,
        name: str | None = None,
        *,
        on_stale: OnStale = "raise",
        retry_rounds: int = 0,
    ) -> None:
        """Nothing is sent yet.

        Args:
            client: The server, or its URL. Threads may share a client, each with its own worker.
            session_id: Of a session with ``workers`` in its configuration.
            name: Pushes combine in byte order of the workers' names. By default a random one.
            on_stale: ``drop``: do not raise StaleGradient, but return a result with ``skipped`` of
                ``stale_gradient`` and the params of now.
            retry_rounds: How often a push whose round failed goes into the next one by itself.
        """
        if not isinstance(client, (str, Client)):
            raise TypeError(f"client must be a Client or a URL, got {client!r:.80}")
        self._owned = isinstance(client, str)
        self._client = Client(client) if isinstance(client, str) else client
        self._member = Member(
            session_id,
            name,
            retry=self._client._retry,
            patience_s=self._client._patience_s,
            on_stale=on_stale,
            retry_rounds=retry_rounds,
        )
        self._lock = threading.Lock()
        self._ahead: _Ahead | None = None

    @property
    def name(self) -> str:
        """Under which its pushes are numbered and combined."""
        return self._member.name

    @property
    def session(self) -> Session:
        """The session: its status, history and the rest of the API."""
        return self._client.session(self._member.session_id)

    @property
    def epoch(self) -> int | None:
        """Which process of this name this is; None before it has registered."""
        return self._member.epoch

    @property
    def params(self) -> Params | None:
        """The params that it got last, which its next push is of; None before the first pull."""
        return self._member.params

    @property
    def version(self) -> int | None:
        """Of :attr:`params`."""
        return self._member.version

    def register(self) -> Json:
        """Begin a new epoch now, also after Fenced: then the newer process is the one to stop."""
        with self._lock:
            return self._client._play(self._member.register())

    def pull(self, names: Iterable[str] | None = None) -> Params:
        """Return the params, or some of them; without a transfer if there are no newer ones."""
        self._enter()
        ahead, found = self._ahead if names is None else None, None
        if ahead is not None:
            pending = not ahead.ended.is_set()
            if not (pending and self._client._play(self._member.newest()) < ahead.least):
                found = ahead.result()
            elif self.params is not None:  # there are none that are newer
                return self.params
            self._stop()
        return self._client._play(self._member.pull(names, found))

    def prefetch(self) -> None:
        """Begin to pull the next version, on a thread, as soon as there is one.

        The next :meth:`pull` takes it. For loops whose pushes bring no params, or that wait for
        those of others: call it, and compute meanwhile.
        """
        self._enter()
        least = 0 if self.version is None else self.version + 1
        if self._ahead is None or self._ahead.least < least:
            self._stop()
            self._ahead = _Ahead(least, lambda: self._client._play(self._member.ahead(least)))

    def push(
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
        """Send gradients (or deltas), wait for the round if there are rounds, return the outcome.

        Arguments are those of :meth:`Session.step`, with one difference: ``base_version`` is
        :attr:`version` if it is left out. With ``returns="none"`` the next push is of the same
        params, unless there is a pull in between.
        """
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
        with self._lock:
            return self._client._play(
                self._member.push(grads, deltas, none or (), fields, compress)
            )

    def leave(self) -> None:
        """Remove this worker from the session; its push stays in the open round."""
        with self._lock:
            self._client._play(self._member.leave())

    def close(self) -> None:
        """Pull no more ahead; close the client, if this worker made it.

        The session keeps knowing the worker.
        """
        self._stop()
        if self._owned:
            self._client.close()

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
        return f"{type(self).__name__}({self._member.session_id!r}, {self.name!r})"

    def _stop(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.stopped = True

    def _enter(self) -> None:
        if not self._member.ready:
            with self._lock:
                self._client._play(self._member.enter())


class _Ahead:
    """Params that are pulled while the caller computes."""

    def __init__(self, least: int, poll: Callable[[], Params | None]) -> None:
        #: The version that it waits for.
        self.least = least
        self.ended = threading.Event()
        #: Set to have it end after its current request.
        self.stopped = False
        self._poll = poll
        self._found: Params | None = None
        threading.Thread(target=self._run, name="optserve-prefetch", daemon=True).start()

    def result(self) -> Params | None:
        """Wait for them; None if they cannot be had: a pull says why."""
        self.ended.wait()
        return self._found

    def _run(self) -> None:
        try:
            while self._found is None and not self.stopped:
                self._found = self._poll()
        except Exception as exc:
            log.debug("nothing was pulled ahead: %s", exc)
        finally:
            self.ended.set()
