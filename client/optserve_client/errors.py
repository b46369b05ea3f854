"""The one error tree, shared by server and client.

The docstring of a class is its default sentence, ``code`` is what crosses the wire and never
changes, ``status`` is HTTP's. The server raises them; the client raises the same ones when it reads
them back.

    OptserveError
    ├── RequestError                    the request was refused; nothing was recorded
    │   ├── Malformed                   400 malformed
    │   ├── NotFound                    404 not_found
    │   │   ├── SessionNotFound         404 session_not_found
    │   │   └── PushNotFound            404 push_not_found
    │   ├── MethodNotAllowed            405 method_not_allowed
    │   ├── NotAcceptable               406 not_acceptable
    │   ├── BodyTimeout                 408 body_timeout
    │   ├── Conflict                    409 conflict
    │   │   ├── SessionExists           409 session_exists
    │   │   ├── VersionConflict         409 version_conflict
    │   │   ├── OutOfSequence           409 out_of_sequence
    │   │   ├── Fenced                  409 fenced
    │   │   ├── SessionRewound          409 session_rewound
    │   │   └── LineSearchOpen          409 line_search_open
    │   ├── PreconditionFailed          412 precondition_failed
    │   ├── TooLarge                    413 too_large
    │   ├── UnsupportedMediaType        415 unsupported_media_type
    │   ├── Misdirected                 421 misdirected
    │   └── Invalid                     422 invalid
    │       ├── MissingGradient         422 missing_gradient
    │       ├── Nonfinite               422 nonfinite
    │       ├── KeyReused               422 key_reused
    │       ├── SchedulerFailed         422 scheduler_failed
    │       └── TorchRefused            422 torch_refused
    ├── ServerError                     the server could not; the same request may be sent again
    │   ├── Internal                    500 internal
    │   ├── Damaged                     500 damaged
    │   ├── Unavailable                 503 unavailable
    │   └── OutOfSpace                  507 out_of_space
    └── TransportError                  client only: no complete answer came back
        ├── ConnectFailed
        └── Timeout
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar


class OptserveError(Exception):
    """Something went wrong in optserve."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(self, detail: str = "", **extra: Any) -> None:
        #: One sentence that names the thing, the value and the bound.
        self.detail = detail or (type(self).__doc__ or "").strip().splitlines()[0]
        #: Further JSON members of the problem document (``version``, ``last_seq``, ``field``, ...).
        self.extra = extra
        super().__init__(self.detail)

    def problem(self) -> dict[str, Any]:
        """Return the RFC 9457 problem document."""
        return {
            "type": f"urn:optserve:error:{self.code}",
            "title": (type(self).__doc__ or "").strip().splitlines()[0],
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            **self.extra,
        }


class RequestError(OptserveError):
    """The request was refused."""

    code = "refused"
    status = 400


class Malformed(RequestError):
    """The body is not what its content type says."""

    code = "malformed"
    status = 400


class NotFound(RequestError):
    """There is nothing here."""

    code = "not_found"
    status = 404


class SessionNotFound(NotFound):
    """There is no such session."""

    code = "session_not_found"
    status = 404


class PushNotFound(NotFound):
    """There is no such push: it expired, was given up, or the server has restarted."""

    code = "push_not_found"


class MethodNotAllowed(RequestError):
    """This resource does not take this method."""

    code = "method_not_allowed"
    status = 405


class NotAcceptable(RequestError):
    """The answer has none of the media types in Accept."""

    code = "not_acceptable"
    status = 406


class BodyTimeout(RequestError):
    """The body did not arrive in time."""

    code = "body_timeout"
    status = 408


class Conflict(RequestError):
    """The request contradicts the state of the session."""

    code = "conflict"
    status = 409


class SessionExists(Conflict):
    """A session with this id and another configuration exists."""

    code = "session_exists"


class VersionConflict(Conflict):
    """The session has another version than base_version."""

    code = "version_conflict"


class OutOfSequence(Conflict):
    """The sequence number is not the next one of this worker."""

    code = "out_of_sequence"


class Fenced(Conflict):
    """A worker of the same name and a later epoch has taken over."""

    code = "fenced"


class SessionRewound(Conflict):
    """The session lost acknowledged history and started a new generation."""

    code = "session_rewound"


class LineSearchOpen(Conflict):
    """An LBFGS line search is open; send abandon: true to give it up."""

    code = "line_search_open"


class PreconditionFailed(RequestError):
    """If-Match does not name the current version."""

    code = "precondition_failed"
    status = 412


class TooLarge(RequestError):
    """The body is larger than the limit."""

    code = "too_large"
    status = 413


class UnsupportedMediaType(RequestError):
    """The content type is not one that this resource takes."""

    code = "unsupported_media_type"
    status = 415


class Misdirected(RequestError):
    """This server does not own that session."""

    code = "misdirected"
    status = 421


class Invalid(RequestError):
    """A field has a value that cannot be used."""

    code = "invalid"
    status = 422


class MissingGradient(Invalid):
    """A parameter has no gradient; send null where torch has grad is None."""

    code = "missing_gradient"


class Nonfinite(Invalid):
    """A tensor holds NaN or Infinity."""

    code = "nonfinite"


class KeyReused(Invalid):
    """This key or sequence number was used before with another payload."""

    code = "key_reused"


class SchedulerFailed(Invalid):
    """The scheduler could not compute the next learning rate."""

    code = "scheduler_failed"


class TorchRefused(Invalid):
    """torch refuses this."""

    code = "torch_refused"


class ServerError(OptserveError):
    """The server could not do it; the same request may be sent again."""

    code = "server_error"


class Internal(ServerError):
    """The server failed; the session was read back as of its last committed change."""

    code = "internal"
    status = 500


class Unavailable(ServerError):
    """The server is starting, stopping or overloaded; try again after Retry-After seconds."""

    code = "unavailable"
    status = 503


class Damaged(ServerError):
    """What the server stored of this session cannot be read back; repeating does not help."""

    code = "damaged"
    status = 500


class OutOfSpace(ServerError):
    """The server's disk is full: nothing was applied, and reading goes on."""

    code = "out_of_space"
    status = 507


class TransportError(OptserveError):
    """No complete answer came back, and repeating did not help."""

    code = "transport"


class ConnectFailed(TransportError):
    """The server could not be reached."""

    code = "connect_failed"


class Timeout(TransportError):
    """The answer did not come in time."""

    code = "timeout"


def tree(root: type[OptserveError] = OptserveError) -> Iterator[type[OptserveError]]:
    """Yield ``root`` and every class below it."""
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def from_problem(status: int, problem: dict[str, Any]) -> OptserveError:
    """Return the error that ``problem``, an RFC 9457 document with ``status``, stands for."""
    extra = {
        k: v for k, v in problem.items() if k not in {"type", "title", "status", "code", "detail"}
    }
    detail = str(problem.get("detail", ""))
    by_code = {cls.code: cls for cls in tree()}
    if cls := by_code.get(str(problem.get("code"))):
        return cls(detail, **extra)
    kinds = (*tree(RequestError), *tree(ServerError))
    unknown = RequestError if status < 500 else ServerError
    fallback = next((cls for cls in kinds if cls.status == status), unknown)
    return fallback(detail or f"HTTP {status}", **extra)
