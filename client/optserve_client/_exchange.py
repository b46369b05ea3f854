"""One request until it is answered: when it is sent again, and what is known when that ends.

An operation is a generator. It yields :class:`Send` or :class:`Sleep`, is told what came of it, and
returns the answer; ``client.py`` and ``aio.py`` only do what it asks.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TypeAlias, TypeVar

from optserve_client import errors
from optserve_client._messages import Answer, Request

T = TypeVar("T")

#: Answers after which the same request is sent again.
_AGAIN = frozenset({408, 429, 500, 502, 503, 504, 507})
#: Refusals that say nothing about an earlier copy of the same request.
_AT_THE_DOOR = frozenset({401, 403, 408, 421, 429})
#: Failures of the server that say that this copy was not carried out; nothing about an earlier one.
_NOTHING_DONE = (errors.Damaged, errors.OutOfSpace)
#: How often a request is sent again that the server fails on, and would probably fail on for ever.
_FEW = 5
#: What is told once when a request was sent again for so long.
_PATIENCE_S = 2.0

log = logging.getLogger("optserve_client")


@dataclass(frozen=True, slots=True)
class Send:
    """Send this; answer with an :class:`Answer` or raise a :class:`errors.TransportError`."""

    request: Request


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait so many seconds."""

    seconds: float


Steps: TypeAlias = Generator[Send | Sleep, Answer | None, T]


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """When a request that failed is sent again: exponential backoff with jitter, within limits."""

    #: Times that a request is sent again; 0: never; None: as often as ``total_s`` allows.
    retries: int | None = None
    #: Longest time from the first failure to the start of the last attempt. A server that was
    #: killed has to start again, read back and see its disk again in it.
    total_s: float = 60.0
    first_s: float = 0.1
    longest_s: float = 2.0
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    jitter: Callable[[], float] = field(default=random.random, repr=False)

    def pause_s(self, attempt: int, retry_after_s: float) -> float:
        """Return how long to wait after failed attempt ``attempt``, counted from 0."""
        backoff = min(self.longest_s, self.first_s * 2.0 ** min(attempt, 60))
        return max(retry_after_s, backoff * (0.5 + self.jitter() / 2))

    @classmethod
    def of(cls, retries: int | Retry | None) -> Retry:
        return retries if isinstance(retries, Retry) else cls(retries=retries)


@dataclass(slots=True)
class Trail:
    """What is known about a request that was sent, maybe several times."""

    #: Whether the server may have done it without our having seen it say so.
    maybe_done: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verdict:
    """What one attempt came to."""

    failure: errors.OptserveError
    #: Whether this copy may have been carried out; None: it was answered, as every copy would be.
    done: bool | None
    #: Whether to send it again.
    again: bool = True
    #: Whether the server fails on it, and would probably do so for ever.
    stuck: bool = False
    after_s: float = 0.0

    @property
    def final(self) -> bool:
        """Whether this copy was refused for good before anything was done."""
        return self.done is False and not self.again


def _verdict(answer: Answer) -> _Verdict | None:
    """Return what is wrong with ``answer``; None if it is whole and good."""
    if answer.ok:
        fault = answer.fault()
        return None if fault is None else _Verdict(failure=fault, done=True, stuck=True)
    failure = answer.error()
    nothing_done = isinstance(failure, _NOTHING_DONE) or answer.status in _AT_THE_DOOR
    return _Verdict(
        failure=failure,
        done=False if nothing_done else True if answer.status >= 500 else None,
        again=answer.status in _AGAIN and not isinstance(failure, errors.Damaged),
        stuck=answer.status == 500,
        after_s=answer.retry_after_s(),
    )


def exchange(request: Request, retry: Retry, trail: Trail) -> Steps[Answer]:
    """Send ``request`` until there is an answer to keep; raise the last failure if there is none.

    ConnectFailed, OutOfSpace, Damaged and a RequestError mean that no attempt did anything: where
    an earlier one may have, the sentence says so, and what was turned away is a TransportError.
    """
    begun: float | None = None
    stuck, told = 0, False
    for attempt in count():
        before, trail.maybe_done = trail.maybe_done, request.method != "GET"
        try:
            answer = yield Send(request)
        except errors.TransportError as exc:
            verdict = _Verdict(failure=exc, done=not isinstance(exc, errors.ConnectFailed))
        else:
            assert answer is not None
            found = _verdict(answer)
            if found is None or found.done is None or (found.final and not before):
                trail.maybe_done = False
                return replace(answer, doubtful=True) if before else answer
            verdict = found
        failure = verdict.failure
        if not verdict.done:
            trail.maybe_done = before
            failure = doubted(failure) if before else failure
        now = retry.clock()
        begun, stuck = now if begun is None else begun, stuck + verdict.stuck
        pause_s = retry.pause_s(attempt, verdict.after_s)
        over = attempt == retry.retries or stuck > _FEW or now + pause_s > begun + retry.total_s
        if not verdict.again or over:
            raise _tried(failure, attempt + 1, retry)
        if now - begun >= _PATIENCE_S and not told:
            told = True
            log.warning("%s; trying again for %g s", failure.detail, retry.total_s)
        yield Sleep(pause_s)
    raise AssertionError("count() ended")


def doubted(failure: errors.OptserveError) -> errors.OptserveError:
    kind = type(failure) if isinstance(failure, errors.ServerError) else errors.TransportError
    doubted = kind(f"{failure.detail}; an earlier attempt may have worked", **failure.extra)
    doubted.__cause__ = failure.__cause__
    return doubted


def _tried(failure: errors.OptserveError, attempts: int, retry: Retry) -> errors.OptserveError:
    """Return ``failure``; what the network did is told with the number of tries and the limit."""
    if not isinstance(failure, errors.TransportError):
        return failure
    times = "once" if attempts == 1 else f"{attempts} times"
    told = type(failure)(f"{failure.detail} (tried {times}, limit {retry.total_s:g} s)")
    told.__cause__ = failure.__cause__
    return told
