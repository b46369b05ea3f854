"""The pure half of both kinds of Worker: what one of several sends, and what its answers change."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias, TypeVar

from optserve_client import _calls, _worker_calls, errors, wire
from optserve_client._exchange import Retry, Steps
from optserve_client._protocol import Call, Lane, perform
from optserve_client._unsent import Unsent
from optserve_client._values import Json, Params, StepResult
from optserve_client.compress import Compressor

T = TypeVar("T")

#: How long one request waits for the next version.
AHEAD_S = 20.0

OnStale: TypeAlias = Literal["raise", "drop"]


class Member:
    """One worker of one session: its epoch, its seq, and the params that it computes with."""

    def __init__(
        self,
        session_id: str,
        name: str | None,
        *,
        retry: Retry,
        patience_s: float,
        on_stale: OnStale,
        retry_rounds: int,
    ) -> None:
        wire.check_id("session id", session_id)
        self.name = f"worker-{secrets.token_hex(8)}" if name is None else name
        wire.check_id("worker", self.name)
        if on_stale not in ("raise", "drop"):
            raise errors.Invalid(f"on_stale must be 'raise' or 'drop', got {on_stale!r:.80}")
        self.session_id = session_id
        self._retry, self._patience_s = retry, patience_s
        self._drops, self._retry_rounds = on_stale == "drop", retry_rounds
        #: What compressed pushes left out, in whatever epoch.
        self._unsent = Unsent()
        #: None: it has to register first.
        self._lane: Lane | None = None
        #: A newer namesake is there, so this one has to stop.
        self._fenced: errors.Fenced | None = None
        #: What :meth:`pull` or a push returned last, and the names that it was pulled with.
        self.params: Params | None = None
        self._names: tuple[str, ...] | None = None

    @property
    def epoch(self) -> int | None:
        return None if self._lane is None else self._lane.epoch

    @property
    def ready(self) -> bool:
        """Whether it has an epoch and nobody has a newer one."""
        return self._lane is not None and self._fenced is None

    @property
    def version(self) -> int | None:
        return None if self.params is None else self.params.version

    # --- who it is -------------------------------------------------------------------------------

    def register(self) -> Steps[Json]:
        reply = yield from self._run(_worker_calls.register(self.session_id, self.name))
        self._lane = Lane(self.name, reply["epoch"], unsent=self._unsent)
        self._fenced = None
        self._lane.begin(reply)
        return reply

    def enter(self) -> Steps[Lane]:
        """Register if that is needed."""
        if self._fenced is not None:
            raise errors.Fenced(self._fenced.detail, **self._fenced.extra)
        if self._lane is None:
            yield from self.register()
        assert self._lane is not None
        return self._lane

    def leave(self) -> Steps[None]:
        self._lane = None
        yield from self._run(_worker_calls.remove_worker(self.session_id, self.name))

    # --- what it computes with -------------------------------------------------------------------

    def pull(self, names: Iterable[str] | None, ahead: Params | None = None) -> Steps[Params]:
        """Return the params, without a transfer if there are no newer ones than are known; those
        in ``ahead``, which were pulled before, if they are newer."""
        wanted = None if names is None else tuple(names)
        known = self.params if wanted == self._names else None
        if ahead is not None and (known is None or ahead.version > known.version):
            return self._hold(ahead, None)
        if known is not None and not known.etag:  # it came with a push
            newer = yield from self._pull(wanted, None, known.version + 1, 0.0)
            return known if newer is None else self._hold(newer, wanted)
        found = yield from self._pull(wanted, known, None, None)
        assert found is not None
        return self._hold(found, wanted)

    def ahead(self, least: int) -> Steps[Params | None]:
        """Return the params of version ``least`` or a later one; None: ask again.

        What fails is not sent again: nobody may need it any more, and who does asks himself.
        """
        call = _calls.params(self.session_id, "live", None, None, least, AHEAD_S)
        return perform(call, replace(self._retry, retries=0), None)

    def newest(self) -> Steps[int]:
        """Return the session's version."""
        reply = yield from self._run(_worker_calls.workers(self.session_id))
        version: int = reply["version"]
        return version

    def _pull(
        self,
        names: tuple[str, ...] | None,
        known: Params | None,
        min_version: int | None,
        wait_s: float | None,
    ) -> Steps[Params | None]:
        call = _calls.params(self.session_id, "live", names, known, min_version, wait_s)
        return self._run(call)

    def _hold(self, found: Params, names: tuple[str, ...] | None) -> Params:
        self.params, self._names = found, names
        return found

    def _took(self, version: int, generation: str, arrays: dict[str, wire.Tensor] | None) -> None:
        """Go on with params that came in an answer to a push."""
        if arrays:
            params = Params(
                version=version, generation=generation, weights="live", etag="", arrays=arrays
            )
            self._hold(params, None)

    # --- what it sends ---------------------------------------------------------------------------

    def push(
        self,
        grads: Mapping[str, Any] | None,
        deltas: Mapping[str, Any] | None,
        none: Iterable[str],
        fields: Json,
        compress: Compressor | None,
    ) -> Steps[StepResult]:
        """Send a push and return what became of it.

        Refused, it is sent again where it cannot count twice: into the next round if its own one
        failed, and in a new epoch if the session does not know this worker any more.
        """
        lane = yield from self.enter()
        if "base_version" not in fields and self.version is not None:
            fields = {**fields, "base_version": self.version}
        call = _calls.step(
            self.session_id,
            grads,
            deltas,
            None,
            none,
            fields,
            compress=compress,
            unsent=self._unsent,
            patience_s=self._patience_s,
        )
        rounds, lost = 0, False
        while True:
            try:
                result = yield from perform(call, self._retry, lane)
            except errors.StaleGradient as exc:
                self._took(exc.extra["version"], lane.generation or "", exc.params)
                if not self._drops:
                    raise
                return self._dropped(exc, lane)
            except errors.RoundFailed:
                rounds += 1
                if rounds > self._retry_rounds:
                    raise
            except errors.SessionRewound:
                # What it computed with is gone, and so are its numbers.
                self._lane = self.params = None
                raise
            except (errors.Fenced, errors.OutOfSequence) as exc:
                if isinstance(exc, errors.Fenced) and not exc.extra.get("removed"):
                    self._fenced = exc
                    raise
                self._lane = None
                if lost or lane.blocked is not None:  # an earlier copy may count
                    raise
                lost, lane = True, (yield from self.enter())
            else:
                self._took(result.version, result.generation, result.params)
                return result

    def _dropped(self, stale: errors.StaleGradient, lane: Lane) -> StepResult:
        """Return the refusal of a push as what it comes to: nothing was applied."""
        return StepResult(
            id=self.session_id,
            generation=lane.generation or "",
            version=stale.extra["version"],
            applied_version=None,
            updates=stale.extra["updates"],
            applied=False,
            accumulated=None,
            duplicate=False,
            skipped=stale.code,
            groups=[],
            scheduler=None,
            grad_norm=None,
            clip_coef=None,
            round=None,
            staleness=stale.extra["version"] - stale.extra["base_version"],
            need=None,
            returned=None if stale.params is None else "params",
            params=stale.params,
            raw=stale.problem(),
        )

    def _run(self, call: Call[T]) -> Steps[T]:
        return perform(call, self._retry, None)
