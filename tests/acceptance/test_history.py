"""16 clients at once: their requests and the answers, with the times of both, fit together."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from optserve_client import Client, Session, StepResult, Worker, errors
from tests import oracle
from tests.history import Operation, check_order, check_values, check_versions, digest
from tests.record import Figure
from tests.serving import ServerProcess

CLIENTS = 16
SHAPES = {"w": (7, 5), "b": (5,), "s": ()}
MOST = 2
#: By the kind of session: its optimizer and its ``workers``. Rounds end by the count, by the
#: deadline with a quorum, or fail; pushes of the other are damped if they are stale.
SPECS: Mapping[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "rounds": (
        {"name": "AdamW", "lr": 0.01},
        {"mode": "sync", "count": 4, "quorum": 3, "deadline_s": 0.03},
    ),
    "stale": (
        {"name": "SGD", "lr": 0.01, "momentum": 0.9},
        {"mode": "async", "max_staleness": MOST, "on_stale": "damp"},
    ),
    "plain": ({"name": "Adam", "lr": 0.01}, None),
}
REFUSALS = ("stale_gradient", "round_failed", "version_conflict")


class Caller(threading.Thread):
    """One client, which does this and that until :attr:`enough` is set."""

    def __init__(self, url: str, sessions: Mapping[str, str], number: int) -> None:
        super().__init__(name=f"c{number}", daemon=True)
        self.enough = threading.Event()
        self.failure: BaseException | None = None
        #: What it did to each kind of session.
        self.done: dict[str, list[Operation]] = {kind: [] for kind in sessions}
        self.failed_rounds = 0
        self._url, self._ids, self._rng = url, sessions, random.Random(number)
        #: The newest version that it knows, by kind.
        self._known = dict.fromkeys(sessions, 0)
        self._acts: list[Callable[[], None]] = [
            self._push,
            self._push,
            self._push,
            self._push_stale,
            self._push_stale,
            self._step,
            self._step,
            self._pull,
            self._pull,
            self._put,
        ]

    def run(self) -> None:
        try:
            with (
                Client(self._url) as client,
                Worker(client, self._ids["rounds"], self.name) as rounds,
                Worker(client, self._ids["stale"], self.name) as stale,
            ):
                self._client, self._rounds, self._stale = client, rounds, stale
                while not self.enough.is_set():
                    self._rng.choice(self._acts)()
        except BaseException as exc:
            self.failure = exc

    def _session(self, kind: str) -> Session:
        return self._client.session(self._ids[kind])

    def _note(self, kind: str, what: str, began: float, version: int, **more: Any) -> None:
        ended = time.perf_counter()
        self._known[kind] = max(self._known[kind], version)
        one = Operation(
            client=self.name, kind=what, began=began, ended=ended, version=version, **more
        )
        self.done[kind].append(one)

    def _gradient(self) -> tuple[int, oracle.Tensors]:
        seed = self._rng.getrandbits(32)
        return seed, oracle.tensors(seed, SHAPES)

    def _stepped(
        self, kind: str, base: int | None, call: Callable[[oracle.Tensors], StepResult]
    ) -> None:
        """Make a step and note its answer, or the version in its refusal."""
        seed, grads = self._gradient()
        began = time.perf_counter()
        try:
            result = call(grads)
        except errors.Conflict as exc:
            if exc.code not in REFUSALS:
                raise
            told = digest(exc.params) if isinstance(exc, errors.StaleGradient) else None
            self._note(kind, exc.code, began, exc.extra["version"], digest=told)
            self.failed_rounds += exc.code == "round_failed"
            return
        found = result.round
        self._note(
            kind,
            "step",
            began,
            result.version,
            applied=result.applied_version,
            seed=seed,
            base=base,
            company=tuple(found["workers"]) if found else None,
            weight=result.raw.get("weight", 1.0),
            digest=digest(result.params or {}),
        )

    def _push(self) -> None:
        base = self._known["rounds"]
        self._stepped("rounds", base, lambda grads: self._rounds.push(grads, base_version=base))

    def _push_stale(self) -> None:
        base = self._known["stale"]
        self._stepped("stale", base, lambda grads: self._stale.push(grads, base_version=base))

    def _step(self) -> None:
        base = self._known["plain"] if self._rng.random() < 0.3 else None
        step = lambda grads: self._session("plain").step(grads, base_version=base)
        self._stepped("plain", base, step)

    def _pull(self) -> None:
        kind = self._rng.choice(list(SPECS))
        began = time.perf_counter()
        params = self._session(kind).params()
        self._note(kind, "pull", began, params.version, digest=digest(params))

    def _put(self) -> None:
        kind = self._rng.choice(("stale", "plain"))
        seed, params = self._gradient()
        began = time.perf_counter()
        reply = self._session(kind).put_params(params)
        made = reply["applied_version"]
        self._note(kind, "put", began, reply["version"], applied=made, seed=seed)


def gradient(made: Sequence[Operation]) -> oracle.Tensors:
    """Return the gradient of a version: of one step by its weight, or the mean of a round."""
    order = sorted(made, key=lambda one: one.client.encode())
    grads = [oracle.tensors(one.seed or 0, SHAPES) for one in order]
    total = dict(grads[0])
    for more in grads[1:]:
        total = {name: total[name] + more[name] for name in total}
    if made[0].company is not None:
        return {name: np.asarray(part / np.float32(len(made))) for name, part in total.items()}
    [one] = made
    if one.base is not None and one.weight != 1.0:
        staleness = (one.applied or 0) - 1 - one.base
        assert staleness > MOST
        assert one.weight == 1 / (1 + staleness)
        total = {name: np.asarray(g * np.float32(one.weight)) for name, g in total.items()}
    return total


@pytest.mark.timeout(900)
def test_a_history_of_16_clients_is_linearizable_and_its_replay_bit_exact(
    long_form: bool, figure: Figure
) -> None:
    first = oracle.tensors(1, SHAPES)
    with ServerProcess("--threads", "1") as server, Client(server.url) as client:
        sessions = {k: client.create(o, first, workers=w) for k, (o, w) in SPECS.items()}
        ids = {kind: session.id for kind, session in sessions.items()}
        callers = [Caller(server.url, ids, number) for number in range(CLIENTS)]
        for caller in callers:
            caller.start()
        time.sleep(300 if long_form else 10)  # how long it lasts is what is wanted here
        for caller in callers:
            caller.enough.set()
        for caller in callers:
            caller.join(60)
            assert not caller.is_alive(), f"{caller.name} hangs"
            if caller.failure is not None:
                raise caller.failure
        final = {kind: session.params() for kind, session in sessions.items()}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    total = compared = 0
    for kind, (optimizer, _) in SPECS.items():
        history = [one for caller in callers for one in caller.done[kind]]
        check_versions(history)
        check_order(history)
        end = time.perf_counter()
        history.append(
            Operation(
                client="last",
                kind="pull",
                began=end,
                ended=end,
                version=final[kind].version,
                digest=digest(final[kind]),
            )
        )
        body = {"optimizer": optimizer}
        twin = oracle.Twin(body, first, sessions[kind].info["impl"])
        compared += check_values(history, twin, gradient)
        assert final[kind].version == max(one.applied or 0 for one in history)
        total += len(history)
    torch.set_num_threads(threads)
    figure("history of 16 clients: operations", total, "operations")
    figure("history of 16 clients: replies whose params were compared", compared, "replies")
    failed = sum(caller.failed_rounds for caller in callers)
    assert failed > 0
    figure("history of 16 clients: pushes whose round failed", failed, "pushes")
    short = {
        one.applied
        for caller in callers
        for one in caller.done["rounds"]
        if one.company is not None and len(one.company) < 4
    }
    assert short
    figure("history of 16 clients: rounds that closed at their deadline", len(short), "rounds")
