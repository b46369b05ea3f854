"""What happens to what nobody asks for: sessions with a time to live are deleted, and so are steps
that came in part and were not committed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import structlog

from optserve.sessions.session import Session
from optserve_client.errors import OptserveError

log = structlog.get_logger(__name__)

#: Longest and shortest time between two looks; a session lives so much longer at most.
LOOK_S = 2.0
SHORTEST_LOOK_S = 0.05
#: How long a session that is due may be busy before it is left for the next look.
BUSY_S = 5.0


class Expiry:
    """A thread that deletes sessions which were not used for their ``ttl_s``, and pushes.

    Time counts from the last request, and anew when the server starts.
    """

    def __init__(
        self,
        sessions: Callable[[], Iterable[Session]],
        delete: Callable[[Session], None],
        default_ttl_s: float | None,
    ) -> None:
        self._sessions = sessions
        self._delete = delete
        self._default = default_ttl_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="optserve-expiry", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        wait_s = 0.0
        while not self._closed.wait(wait_s):
            try:
                wait_s = self._sweep()
            except Exception:
                log.exception("expired sessions were not looked for")
                wait_s = LOOK_S

    def _sweep(self) -> float:
        """Delete what is due; return seconds until the next may be."""
        wait_s = LOOK_S
        for session in self._sessions():
            if self._closed.is_set():
                break
            session.pushes.expire()
            left_s = self._left_s(session)
            if left_s is not None and left_s <= 0:
                self._expire(session)
            elif left_s is not None:
                wait_s = min(wait_s, left_s)
        return max(wait_s, SHORTEST_LOOK_S)

    def _left_s(self, session: Session) -> float | None:
        ttl_s = session.row.about["ttl_s"] or self._default
        return None if ttl_s is None else session.used_at + ttl_s - time.monotonic()

    def _expire(self, session: Session) -> None:
        """Delete a session in its turn, unless somebody used it meanwhile."""

        def job() -> None:
            left_s = self._left_s(session)
            if not session.closed and left_s is not None and left_s <= 0:
                self._delete(session)
                log.info("a session's time to live is over", session=session.id)

        try:
            session.in_turn(job).result(BUSY_S)
        except (OptserveError, TimeoutError) as exc:
            log.warning("an expired session was not deleted", session=session.id, why=str(exc))
