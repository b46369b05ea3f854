"""A client's life over the real store, request by request, for a child that may be killed anywhere.

It creates sessions with payloads in files and in the database, steps them, takes snapshots, pins,
rolls back, forks and deletes. Whoever runs it is told after each request what it was answered and
the digest of the session; with ``first`` a later life goes on at that request, as a client does
that has no answer to it.
"""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
import xxhash

from optserve.sessions import frames, operations
from optserve.sessions.identity import Identity
from optserve.sessions.registry import Registry
from optserve.sessions.reply import Reply
from optserve.sessions.session import Session
from optserve.store.opening import open_store
from optserve_client import wire
from optserve_client.errors import OptserveError, OutOfSpace, SessionNotFound, Unavailable
from tests import local, syscalls
from tests.waiting import wait_until

#: 90 kB: payloads of this session are files.
BIG: dict[str, tuple[int, ...]] = {"w": (150, 150), "b": (150,)}
SMALL: dict[str, tuple[int, ...]] = {"w": (5, 7), "b": (7,), "s": ()}
#: 40 kB: as large as payloads in the database come.
WIDE: dict[str, tuple[int, ...]] = {"w": (100, 100)}
#: How often a request that met an injected error is sent again.
TRIES = 20
#: The session whose events stay in memory, so that it goes back to its snapshot.
FORGETFUL = "forgetful"


def _arrays(seed: int, session: str) -> local.Arrays:
    shapes = {"big": BIG, "copy": BIG, "gone": BIG, "wide": WIDE, "shared": BIG}
    return local.arrays(seed, shapes.get(session, SMALL))


@dataclass(frozen=True)
class Request:
    """One request; sent again, it is the same."""

    session: str
    what: str
    send: Callable[[Registry], Reply | None]


class Script:
    """The requests, numbered per session as one client does."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._seqs: dict[str, int] = {}

    def add(self, session: str, what: str, send: Callable[[Registry, Identity], Any]) -> None:
        seq = self._seqs[session] = self._seqs.get(session, 0) + 1
        identity = Identity(worker="w", seq=seq, digest=f"{session} {seq} {what}".encode())
        self.requests.append(Request(session, what, lambda made: send(made, identity)))

    def create(self, session: str, body: dict[str, Any]) -> None:
        identity = Identity(key=f"create {session}", digest=session.encode())

        def send(made: Registry) -> Reply:
            params = _arrays(1, session)
            return made.create(
                "default", session, body, params, None, identity, exist_ok=False
            ).result(60)

        self.requests.append(Request(session, "create", send))

    def step(self, session: str, **fields: Any) -> None:
        seed = len(self.requests)
        self.add(
            session,
            "step",
            lambda made, who: local.step(
                made.get("default", session), _arrays(seed, session), who, **fields
            ),
        )

    def push(self, session: str, worker: str, seq: int, base: int, *, last: bool = False) -> None:
        """Push into a round of two; the last one closes it."""
        seed = len(self.requests)
        who = Identity(worker=worker, seq=seq, digest=f"{session} {worker} {seq}".encode())

        def send(made: Registry) -> Reply:
            found = made.get("default", session)
            reply = local.step(found, _arrays(seed, session), who, base_version=base)
            if last and reply.pending is not None:
                return reply.pending.future.result(60)
            return reply

        self.requests.append(Request(session, f"push {worker}", send))

    def change(self, session: str, operation: operations.Operation) -> None:
        self.add(
            session,
            type(operation).__name__,
            lambda made, who: made.get("default", session).change(operation, who).result(60),
        )

    def snapshot(self, session: str) -> None:
        """What the server does by itself; to do it twice changes nothing."""

        def send(made: Registry) -> None:
            made.get("default", session).snapshot().result(60)

        self.requests.append(Request(session, "snapshot", send))

    def fork(self, session: str, name: str, **fields: Any) -> None:
        identity = Identity(key=f"fork {name}", digest=name.encode())

        def send(made: Registry) -> Reply:
            body = {"id": name, **fields}
            return made.fork("default", session, body, identity).result(60)

        self.requests.append(Request(name, "fork", send))

    def delete(self, session: str) -> None:
        def send(made: Registry, who: Identity) -> Reply | None:
            try:
                return made.delete("default", session, who).result(60)
            except SessionNotFound:
                return None  # what a client that repeats a deletion takes for an answer

        self.add(session, "delete", send)

    def updates(self, session: str, count: int) -> None:
        """Step a session without identities until it has ``count`` updates."""

        def send(made: Registry) -> Reply | None:
            reply, found = None, made.get("default", session)
            while (done := found.status().result(60)["updates"]) < count:
                reply = local.step(found, _arrays(1000 + done, session))
            return reply

        self.requests.append(Request(session, f"updates {count}", send))


def script() -> list[Request]:
    """Return the requests, in order."""
    s = Script()
    s.create("big", {"optimizer": {"name": "Adam", "lr": 0.1}})
    s.create(
        "small",
        {
            "optimizer": {"name": "AdamW", "lr": 0.1},
            "scheduler": {"name": "LambdaLR", "lr_lambda": "0.9 ** epoch", "advance": "step"},
            "clip_grad_norm": 0.5,
            "accumulate": 2,
            "ema": {"decay": 0.9},
            "best": {"monitor": "loss"},
        },
    )
    for _ in range(2):
        s.step("big")
        s.step("small", loss=1.0)
    s.create("quick", {"optimizer": {"name": "SGD", "momentum": 0.9}, "durability": "os"})
    s.step("quick")
    s.create("gone", {"optimizer": {"name": "SGD"}})
    s.step("gone")
    s.snapshot("big")
    s.step("big", params=local.arrays(7, BIG), loss=0.5)
    s.step("quick")
    s.create(FORGETFUL, {"optimizer": {"name": "Adam"}, "durability": "memory"})
    s.updates(FORGETFUL, 1)
    s.snapshot(FORGETFUL)
    s.updates(FORGETFUL, 3)
    s.snapshot("small")
    s.step("small", loss=0.5)
    s.fork("big", "copy", version=1)
    s.step("copy")
    s.change("big", operations.Pin(version=2, name="good"))
    s.delete("gone")
    s.snapshot("big")
    s.step("big")
    s.change("small", operations.PatchGroup(index=0, hyper={"weight_decay": 0.1}))
    s.change("big", operations.Rollback(version=2))
    s.step("big")
    s.snapshot("big")
    s.step("small", loss=0.25)
    s.snapshot("small")
    s.create("search", {"optimizer": {"name": "LBFGS", "line_search_fn": "strong_wolfe"}})
    for loss in (3.0, 2.0):
        s.step("search", loss=loss)
    s.step("small", loss=2.0)
    s.snapshot("small")
    s.change("big", operations.Unpin(version=2))
    s.step("big")
    rounds = {"mode": "sync", "count": 2, "deadline_s": 3600.0}
    s.create("shared", {"optimizer": {"name": "Adam"}, "workers": rounds})
    s.push("shared", "w", 1, 0)
    s.push("shared", "v", 1, 0, last=True)
    s.snapshot("shared")
    s.push("shared", "v", 2, 1)
    s.snapshot("shared")
    s.push("shared", "w", 2, 1, last=True)
    return s.requests


def unsynced() -> list[Request]:
    """So many unsynced commits that the database copies its log, and then a synced one."""
    s = Script()
    s.create("small", {"optimizer": {"name": "SGD"}})
    s.create("wide", {"optimizer": {"name": "SGD"}, "durability": "os"})
    for _ in range(120):
        s.step("wide")
    s.step("small")
    s.step("wide")
    s.step("small")
    return s.requests


SCRIPTS = {"life": script, "unsynced": unsynced}


# --- what a session is -------------------------------------------------------------------------


def digest(made: Registry, session: str) -> str | None:
    """Return the digest of a session but for its generation and times; None: there is none."""
    try:
        found = made.get("default", session)
        wait_until(lambda: not _full(found), "the end of a round")
    except SessionNotFound:
        return None
    frame = frames.decode(local.exported(found))
    leave = {"generation", "created", "changed"}
    if session == FORGETFUL:  # going back is an event too
        leave |= {"lsn", "rewound", "ledger"}
    meta = {name: value for name, value in frame.meta.items() if name not in leave}
    for worker in meta.get("ledger", {"workers": []})["workers"]:
        del worker["seen"]
    for kept in _results(meta.get("ledger", {"workers": [], "keys": []})):
        del kept["time"]
    seen = xxhash.xxh3_128(json.dumps(meta, sort_keys=True).encode())
    for name, tensor in sorted(frame.tensors.items()):
        seen.update(f"{name} {wire.dtype_of(tensor)} {tensor.shape}".encode())
        seen.update(wire.as_bytes(tensor))
    return seen.hexdigest()


def _full(session: Session) -> bool:
    """Whether a round is about to close: that follows a start which found it full."""
    found = session.workers().result(60)["round"]
    return found is not None and len(found["contributed"]) >= found["count"]


def _results(ledger: dict[str, Any]) -> list[dict[str, Any]]:
    answered = (worker["results"] for worker in ledger["workers"])
    return list(itertools.chain(ledger["keys"], *answered))


def digests(made: Registry, requests: list[Request]) -> dict[str, str | None]:
    return {name: digest(made, name) for name in sorted({r.session for r in requests})}


# --- one life ----------------------------------------------------------------------------------


Tell = Callable[[dict[str, Any]], None]


def live(requests: list[Request], directory: Path, first: int, tell: Tell) -> None:
    """Open the store, send the requests from ``first`` on, close it."""
    made = _patiently("open", tell, lambda: _open(directory))
    try:
        if first:
            tell({"found": digests(made, requests)})
            _remember(made, requests[:first])
        for index in range(first, len(requests)):
            _request(made, requests[index], index, tell)
        tell({"final": digests(made, requests)})
    finally:
        made.close()
    tell({"closed": True})


def _remember(made: Registry, answered: list[Request]) -> None:
    """Bring the session that went back to its snapshot to where it was: its client starts over."""
    for request in reversed(answered):
        if request.session == FORGETFUL and request.what.startswith("updates"):
            request.send(made)
            return


def _open(directory: Path) -> Registry:
    store = open_store(url=None, data_dir=directory, files=None)
    try:
        return Registry(store, threads=1, executor_threads=1)
    except BaseException:
        store.close()
        raise


def _request(made: Registry, request: Request, index: int, tell: Tell) -> None:
    def refused() -> None:
        try:
            tell({"read": index, "digest": digest(made, request.session)})
        except Unavailable as exc:
            tell({"unread": index, "detail": exc.detail})

    reply = _patiently(f"{index} {request.what}", tell, lambda: request.send(made), refused)
    scalars = reply.scalars if reply is not None else {}
    tell(
        {
            "done": index,
            "session": request.session,
            "what": request.what,
            "version": scalars.get("version"),
            "applied_version": scalars.get("applied_version"),
            "duplicate": scalars.get("duplicate", False),
            "digest": digest(made, request.session),
        }
    )


def _patiently(
    what: str,
    tell: Tell,
    send: Callable[[], Any],
    refused: Callable[[], None] = lambda: None,
) -> Any:
    """Repeat what is refused for a time, as a client does."""
    for _ in range(TRIES):
        try:
            return send()
        except OptserveError as exc:
            if not isinstance(exc, (Unavailable, OutOfSpace)):
                raise
            tell({"refused": what, "code": exc.code, "detail": exc.detail})
            refused()
        except Exception as exc:
            if what != "open":
                raise
            tell({"refused": what, "code": type(exc).__name__, "detail": str(exc)})
    raise AssertionError(f"{what} was refused {TRIES} times")


# --- for the zygote ------------------------------------------------------------------------------


def warm() -> None:
    """Live once, so that everything is imported and compiled."""
    torch.set_num_threads(1)  # no pool of threads, which would not survive the fork
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    directory = Path(tempfile.mkdtemp(prefix="optserve-warm-"))
    try:
        live(script(), directory, 0, lambda message: None)
    finally:
        shutil.rmtree(directory)
    assert threading.active_count() == 1, threading.enumerate()


def main(channel: socket.socket, text: str) -> None:
    """Live as ``text`` says, with the other end answering for every call that changes a file."""
    order = json.loads(text)
    syscalls.submit(channel)

    def tell(message: dict[str, Any]) -> None:
        channel.sendall(json.dumps(message).encode() + b"\n")

    live(SCRIPTS[order["script"]](), Path(order["directory"]), order["first"], tell)
