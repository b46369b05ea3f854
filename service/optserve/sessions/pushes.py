"""The pushes of one session: steps that come tensor by tensor, in this process's memory alone.

What nobody commits or gives up is thrown away some time after its last byte. Pushes may not keep
ordinary steps waiting: however many are open, two gradients more can be on their way.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from optserve.optim.arena import LEASED_BYTES
from optserve.sessions.arriving import Arrival
from optserve.sessions.fields import StepFields
from optserve.sessions.push import Push
from optserve.sessions.step import Expected
from optserve_client.errors import Invalid, KeyReused, PushNotFound, Unavailable

if TYPE_CHECKING:
    from optserve.sessions.holding import Shape

#: Open pushes of a session, however small they are.
MOST_OPEN = 64
#: Committed ones that are known for a while.
MOST_SPENT = 1_000
RETRY_AFTER_S = 1


class Pushes:
    """Finds them, and limits how many there are."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._open: dict[str, Push] = {}
        #: The one that was committed first comes first.
        self._spent: OrderedDict[str, Push] = OrderedDict()
        self._lock = threading.Lock()

    def open(
        self,
        shape: Shape,
        body: Mapping[str, Any],
        *,
        ttl_s: float,
        key: str | None = None,
        digest: bytes = b"",
    ) -> tuple[Push, bool]:
        """Return a push for a step with the fields in ``body``, and whether it is a new one.

        A repeat with the same ``key`` finds the one that is open. Raises Unavailable where there
        are too many.
        """
        for name in ("grads", "params"):
            if name in body:
                raise Invalid(f"{name}: a push is opened with fields only; then PUT each gradient")
        fields = StepFields.parse(body)
        for name in fields.none:
            shape.expected.slot_shape(name, "none")
        self.expire()
        with self._lock:
            for push in self._open.values():
                if key is not None and push.key == key:
                    if push.digest != digest:
                        raise KeyReused(
                            f"Idempotency-Key {key!r} was used before with another payload"
                        )
                    return push, False
            limit = most_open(shape.pool.layout.nbytes)
            if len(self._open) >= limit:
                raise Unavailable(
                    f"{len(self._open)} pushes are open, the limit of this session is {limit}: "
                    "commit them, give them up, or wait until they expire",
                    retry_after=RETRY_AFTER_S,
                )
            push = Push(fields, shape, ttl_s=ttl_s, clock=self.clock, key=key, digest=digest)
            self._open[push.id] = push
            return push, True

    def get(self, push_id: str) -> Push:
        """Return one that is open or was committed lately, or raise PushNotFound."""
        self.expire()
        push = self._open.get(push_id) or self._spent.get(push_id)
        if push is None:
            raise PushNotFound(
                f"no push {push_id!r:.80}: it expired, was given up, or the server has restarted; "
                "begin again"
            )
        return push

    def arrival(self, push: Push, name: str, expected: Expected, limit_bytes: int) -> Arrival:
        """Expect the body of one gradient; ``expected`` is what the session is now."""
        push.check_session(expected)
        return Arrival(push, name, limit_bytes, self._check_room)

    def _check_room(self, nbytes: int) -> None:
        beside = sum(push.beside_bytes for push in list(self._open.values()))
        if beside + nbytes > LEASED_BYTES:
            raise Unavailable(
                f"the open pushes hold {beside} bytes beside their buffers, {nbytes} come, "
                f"the limit is {LEASED_BYTES}",
                retry_after=RETRY_AFTER_S,
            )

    def give_up(self, push_id: str) -> None:
        """Throw one away. Raises Conflict while it is being committed."""
        push = self.get(push_id)
        push.give_up()
        with self._lock:
            self._open.pop(push_id, None)

    def spend(self, push: Push) -> None:
        """Note that a push was made a step."""
        with self._lock:
            self._open.pop(push.id, None)
            self._spent[push.id] = push
            if push.made is not None:
                push.made.set_result(None)
            while len(self._spent) > MOST_SPENT:
                self._spent.popitem(last=False)

    def expire(self) -> None:
        """Throw away those whose time is over. Any thread may call it."""
        with self._lock:
            for push in [push for push in self._open.values() if push.left_s <= 0]:
                if push.expired():
                    del self._open[push.id]
            while self._spent and next(iter(self._spent.values())).left_s <= 0:
                self._spent.popitem(last=False)


def most_open(nbytes: int) -> int:
    """Return how many pushes of gradients of ``nbytes`` may be open: all that may be under way but
    two, and one in any case."""
    return max(1, min(MOST_OPEN, LEASED_BYTES // max(nbytes, 1) - 2))
