"""Rounds against a model in plain Python: arrivals, deadlines, fencing, repeats, failures, kills.

The model is a few dictionaries and numpy. After each move the session must be where that is, to
the last bit of its params, and so must be what its journal gives back; nobody may wait for a round
that has ended; and in the whole journal each acknowledged push is in one round, once.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import structlog
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from optserve.sessions import snapshots
from optserve.sessions.gathering import AGAIN_S
from optserve.sessions.ledger import RESULTS_PER_WORKER
from optserve.sessions.membership import Register, Remove
from optserve.sessions.registry import Registry
from optserve.sessions.reply import Reply
from optserve.store.opening import open_store
from optserve_client.errors import (
    Conflict,
    Fenced,
    KeyReused,
    OptserveError,
    OutOfSequence,
    OutOfSpace,
    RoundFailed,
    StaleGradient,
    Unavailable,
    VersionConflict,
    WorkerNotFound,
)
from tests import local, rounds
from tests.conftest import LONG
from tests.local import Identity, create
from tests.record import Figure
from tests.rounds import Clock, push
from tests.stores import Faulty

EXAMPLES = 2_000 if LONG else 30
MOVES = 50 if LONG else 25
#: In another order by number than by bytes; "B" comes before all of them.
NAMES = ["w1", "w10", "w2", "B"]
SHAPES: dict[str, tuple[int, ...]] = {"p": (3,), "q": ()}
FAULTS = ["lost", "refused", "full"]
KINDS = st.sampled_from(["contribution", "contribution", "close", "close", "fail", "worker"])
FATES = st.none() | st.tuples(KINDS, st.sampled_from(FAULTS))
RATE = np.float32(0.5)

T = TypeVar("T")
Arrays = dict[str, np.ndarray]


def grads_of(seed: int) -> Arrays:
    """Return a gradient whose sum with others depends on the order."""
    rng = np.random.default_rng(seed)
    return {
        n: np.asarray(rng.normal(size=s) * 10.0 ** rng.integers(-3, 4), "f4")
        for n, s in SHAPES.items()
    }


def weight_of(seed: int) -> float:
    return 1.0 + seed % 3


# --- the model -----------------------------------------------------------------------------------


@dataclass
class Result:
    """What a request of a worker came to."""

    payload: tuple[int, int]
    #: ``open``, ``closed``, ``failed`` or ``skipped``.
    state: str
    made: int | None = None


@dataclass
class Worker:
    epoch: int = 1
    removed: bool = False
    results: list[Result] = field(default_factory=list)
    contributions: int = 0
    version: int | None = None


@dataclass
class Model:
    """What the session should be."""

    how: dict[str, Any]
    params: Arrays
    version: int = 0
    updates: int = 0
    ended: int = 0
    opened_at: float = 0.0
    #: Epoch, seq and seed of each push in the open round.
    open: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)

    def judge(
        self, name: str, epoch: int | None, seq: int, seed: int, base: int
    ) -> type[OptserveError] | str:
        """Return the error that a push must meet, else ``new`` or the state of its first one."""
        worker = self.workers.get(name, Worker())
        last = len(worker.results)
        if worker.removed or (epoch is not None and epoch < worker.epoch):
            return Fenced
        if epoch is not None and epoch > worker.epoch:
            return OutOfSequence
        again = seq == last and worker.results[-1].state == "failed"
        if seq != last + 1 and not again:
            if seq > last or seq <= last - RESULTS_PER_WORKER:
                return OutOfSequence
            result = worker.results[seq - 1]
            if result.payload != (seed, base):
                return KeyReused
            return RoundFailed if result.state == "failed" else result.state
        if base != self.version:
            return VersionConflict if base > self.version else StaleGradient
        return Conflict if name in self.open else "new"

    def note(self, name: str, seq: int, result: Result) -> Worker:
        worker = self.workers.setdefault(name, Worker())
        worker.results[seq - 1 :] = [result]
        return worker

    def push(self, name: str, seq: int, seed: int, base: int, now: float) -> None:
        worker = self.note(name, seq, Result((seed, base), "open"))
        worker.contributions += 1
        worker.version = base
        if not self.open:
            self.opened_at = now
        self.open[name] = (worker.epoch, seq, seed)

    def due(self, now: float) -> str | None:
        """Return how the open round must have ended by now."""
        if not self.open:
            return None
        if len(self.open) >= self.how["count"]:
            return "count"
        if now < self.opened_at + self.how["deadline_s"]:
            return None
        return "deadline" if len(self.open) >= self.how["quorum"] else "failed"

    def end(self, by: str) -> None:
        if by != "failed":
            grads = self.combined()
            self.params = {n: np.asarray(p - RATE * grads[n]) for n, p in self.params.items()}
            self.version += 1
            self.updates += 1
        self.ended += 1
        for name, (epoch, seq, _) in self.open.items():
            worker = self.workers[name]
            if worker.epoch == epoch and seq > len(worker.results) - RESULTS_PER_WORKER:
                payload = worker.results[seq - 1].payload
                closed = Result(payload, "closed", self.version)
                worker.results[seq - 1] = Result(payload, "failed") if by == "failed" else closed
        self.open = {}

    def combined(self) -> Arrays:
        seeds = [self.open[name][2] for name in sorted(self.open, key=str.encode)]
        grads = [grads_of(seed) for seed in seeds]
        return {n: np.asarray(self._combined([g[n] for g in grads], seeds), "f4") for n in SHAPES}

    def _combined(self, grads: list[np.ndarray], seeds: list[int]) -> Any:
        name, count = self.how["reduce"], np.float32(len(grads))
        if name == "median":
            return np.median(np.stack(grads), axis=0)
        if name == "weighted_mean":
            weights = [weight_of(seed) for seed in seeds]
            grads = [g * np.float32(w) for g, w in zip(grads, weights, strict=True)]
            count = np.float32(sum(weights))
        total = reduce(np.add, grads)
        return total if name == "sum" else total / count


# --- the machine ---------------------------------------------------------------------------------

#: Moves of all examples, for the record.
MADE: Counter[str] = Counter()


class Rounds(RuleBasedStateMachine):
    """Moves of several workers, of time and of fate."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(snapshots, "REPLAY_EVENTS", 7)
        self.logs = structlog.testing.capture_logs()
        self.logs.__enter__()
        self.time = 1_700_000_000.0
        #: Replies that wait for the open round, with what they must say of being a duplicate.
        self.waiting: list[tuple[Reply, bool]] = []
        #: The last request of each worker.
        self.sent: dict[str, tuple[int | None, int, int, int]] = {}
        self.keys = 0
        self.start()

    def start(self) -> None:
        self.store = Faulty(open_store(url=None, data_dir=Path(self.directory.name), files=None))
        self.clock = Clock()
        self.clock.time = self.time
        self.registry = Registry(
            self.store,  # type: ignore[arg-type]
            threads=torch.get_num_threads(),
            alarms=self.clock,
        )
        #: Faults that the store had met when all was settled.
        self.calm = 0

    @property
    def disturbed(self) -> bool:
        """Whether a fault was met in this move."""
        return self.store.met > self.calm

    @initialize(
        count=st.sampled_from([1, 2, 2, 3, 3, 4]),
        absent=st.sampled_from([0, 0, 1, 2]),
        reduction=st.sampled_from(["mean", "sum", "weighted_mean", "median"]),
        durability=st.sampled_from(["os", "os", "os", "always"]),
    )
    def create(self, count: int, absent: int, reduction: str, durability: str) -> None:
        how = {"mode": "sync", "count": count, "quorum": max(count - absent, 1),
               "deadline_s": 10.0, "reduce": reduction}  # fmt: skip
        body = {"optimizer": {"name": "SGD", "lr": 0.5}, "workers": how, "durability": durability}
        create(self.registry, body, grads_of(0))
        self.model = Model(how=how, params=grads_of(0))

    def teardown(self) -> None:
        try:
            if hasattr(self, "model"):
                self.settle()
                self.check_journal()
                rounds.read_back(self.session)
        finally:
            self.store.faults = []
            self.registry.close()
            self.logs.__exit__(None, None, None)
            self.patch.undo()
            self.directory.cleanup()

    @property
    def session(self) -> Any:
        return self.registry.get("default", "a")

    def key(self) -> Identity:
        self.keys += 1
        return Identity(key=f"k{self.keys}", digest=b"")

    def insist(self, fn: Callable[[], T]) -> T:
        """Call ``fn`` again as long as the server cannot, as a client does."""
        for _ in range(8):
            try:
                return fn()
            except (Unavailable, OutOfSpace) as exc:
                MADE[f"faults met: {exc.code}"] += 1
        raise AssertionError("the server is never available again")

    def settle(self) -> None:
        """Let what is due be done, in the session and in the model; answer who waits."""
        for _ in range(8):
            self.insist(lambda: self.session.load().result(10))
            self.clock.advance(AGAIN_S if self.disturbed else 0, self.session)
            if (by := self.model.due(self.clock.time)) is None:
                break
            self.end(by)
        self.time = self.clock.time
        self.calm = self.store.met

    def end(self, by: str) -> None:
        """The round has ended: everybody who waits has been told, or is told once it settles."""
        MADE[f"rounds ended: {by}"] += 1
        self.model.end(by)
        waiting, self.waiting = self.waiting, []
        for _ in range(4):  # faults may put it off
            if all(rounds.future_of(reply).done() for reply, _ in waiting):
                break
            self.clock.advance(AGAIN_S, self.session)
            self.insist(lambda: self.session.load().result(10))
        for reply, duplicate in waiting:
            assert rounds.future_of(reply).done(), "somebody still waits for a round that ended"
            error = rounds.future_of(reply).exception()
            if isinstance(error, Unavailable | OutOfSpace):
                assert self.disturbed
            elif by == "failed":
                assert isinstance(error, RoundFailed)
            else:
                told = rounds.ended(reply).scalars
                assert told["applied_version"] == self.model.version
                assert told["duplicate"] is duplicate
                assert told["round"]["closed_by"] == by

    # --- requests --------------------------------------------------------------------------------

    def send(self, name: str, epoch: int | None, seq: int, seed: int, base: int) -> None:
        verdict = self.model.judge(name, epoch, seq, seed, base)
        MADE[verdict if isinstance(verdict, str) else verdict.__name__] += 1
        more = {"weight": weight_of(seed)} if self.model.how["reduce"] == "weighted_mean" else {}

        def ask() -> Reply:
            return push(self.session, name, seq, base, grads_of(seed), epoch=epoch, **more)

        if not isinstance(verdict, str):
            with pytest.raises(verdict) as refused:
                self.insist(ask)
            assert type(refused.value) is verdict
            return
        reply = self.insist(ask)
        repeated = self.disturbed and verdict == "new"
        duplicate = reply.scalars["duplicate"]
        assert repeated or duplicate is (verdict != "new")
        if verdict == "new":
            self.model.push(name, seq, seed, base, self.clock.time)
            self.sent[name] = (epoch, seq, seed, base)
        elif verdict != "open":
            assert reply.pending is None
            worker = self.model.workers[name]
            assert reply.scalars["applied_version"] == worker.results[seq - 1].made
            return
        if reply.pending is None:  # of which the first answer was lost with that of the close
            assert repeated
        else:
            self.waiting.append((reply, duplicate))
        self.settle()

    @rule(
        name=st.sampled_from(NAMES),
        seed=st.integers(1, 50),
        base=st.sampled_from([0, 0, 0, 0, 0, -1, 1]),
        says_epoch=st.booleans(),
    )
    def pushes(self, name: str, seed: int, base: int, says_epoch: bool) -> None:
        worker = self.model.workers.get(name, Worker())
        epoch = worker.epoch if says_epoch else None
        base = max(self.model.version + base, 0)
        self.send(name, epoch, len(worker.results) + 1, seed, base)

    @rule(
        seeds=st.lists(st.integers(1, 50), min_size=4, max_size=4),
        order=st.permutations(NAMES),
        fate=FATES,
    )
    def everybody_pushes(
        self, seeds: list[int], order: list[str], fate: tuple[str, str] | None
    ) -> None:
        self.store.faults += [fate] if fate else []
        for name, seed in zip(order, seeds, strict=True):
            self.pushes(name, seed, 0, True)

    @rule(
        seeds=st.dictionaries(st.sampled_from(NAMES), st.integers(1, 50), min_size=1),
        repeats=st.sampled_from([True, True, False]),
        fate=FATES,
    )
    def a_deadline_comes(
        self, seeds: dict[str, int], repeats: bool, fate: tuple[str, str] | None
    ) -> None:
        """Some push, others never do."""
        for name, seed in seeds.items():
            self.pushes(name, seed, 0, False)
        self.store.faults += [fate] if fate else []
        self.time_passes(25.0)
        for name in seeds if repeats else ():
            self.an_answer_was_lost(name, None)

    @rule(name=st.sampled_from(NAMES), seed=st.none() | st.integers(1, 50))
    def an_answer_was_lost(self, name: str, seed: int | None) -> None:
        """The last request again, as it was; or, if its number is free again, with another one."""
        if name not in self.sent:
            return
        epoch, seq, before, base = self.sent[name]
        if seed is not None and self.model.judge(name, epoch, seq, seed, base) == "new":
            before = seed
        self.send(name, epoch, seq, before, base)

    @rule(name=st.sampled_from(NAMES), back=st.integers(-1, 20), seed=st.none() | st.just(99))
    def an_old_number_comes_again(self, name: str, back: int, seed: int | None) -> None:
        results = self.model.workers.get(name, Worker()).results
        if 0 <= back < len(results):
            known, base = results[-1 - back].payload
            if results[-1 - back].state != "skipped":
                self.send(name, None, len(results) - back, seed or known, base)
        elif back < 0:
            self.send(name, None, len(results) + 2, 1, self.model.version)

    @rule(name=st.sampled_from(NAMES), seed=st.integers(1, 50), back=st.integers(0, 3))
    def a_push_and_an_old_number(self, name: str, seed: int, back: int) -> None:
        self.pushes(name, seed, 0, False)
        self.an_old_number_comes_again(name, back, None)

    @rule(name=st.sampled_from(NAMES), off=st.sampled_from([-1, 1]))
    def another_epoch_pushes(self, name: str, off: int) -> None:
        worker = self.model.workers.get(name, Worker())
        if worker.epoch + off > 0:
            seq = len(worker.results) + 1
            self.send(name, worker.epoch + off, seq, 1, self.model.version)

    @rule(name=st.sampled_from(NAMES))
    def a_push_overflows(self, name: str) -> None:
        """It uses its number and is in no round."""
        worker = self.model.workers.get(name, Worker())
        seq, base = len(worker.results) + 1, self.model.version
        if self.model.judge(name, None, seq, 0, base) != "new":
            return
        bad = {**grads_of(1), "q": np.array(np.inf, "f4")}
        more = {"weight": 1.0} if self.model.how["reduce"] == "weighted_mean" else {}
        ask = lambda: push(self.session, name, seq, base, bad, loss_scale=2.0, **more)
        assert self.insist(ask).scalars["skipped"] == "nonfinite"
        self.model.note(name, seq, Result((0, base), "skipped"))
        self.sent.pop(name, None)

    @rule(name=st.sampled_from(NAMES))
    def registers(self, name: str) -> None:
        told = self.key()
        reply = self.insist(lambda: self.session.change(Register(worker=name), told).result(10))
        worker = self.model.workers.get(name)
        epoch = 1 if worker is None else worker.epoch + 1
        assert reply.scalars["epoch"] == epoch
        count = worker.contributions if worker else 0
        self.model.workers[name] = Worker(epoch=epoch, contributions=count)

    @rule(name=st.sampled_from(NAMES))
    def is_removed(self, name: str) -> None:
        told = self.key()
        ask = lambda: self.session.change(Remove(worker=name), told).result(10)
        worker = self.model.workers.get(name)
        if worker is None or worker.removed:
            with pytest.raises(WorkerNotFound):
                self.insist(ask)
            return
        self.insist(ask)
        worker.removed = True
        self.pushes(name, 7, 0, False)

    @rule(count=st.integers(1, 5), slack=st.integers(0, 2), deadline_s=st.sampled_from([5.0, 20.0]))
    def is_patched(self, count: int, slack: int, deadline_s: float) -> None:
        quorum = max(count - slack, 1)
        how = {**self.model.how, "count": count, "quorum": quorum, "deadline_s": deadline_s}
        told = self.key()
        self.insist(lambda: local.patch(self.session, {"workers": how}, told).result(10))
        self.model.how = how
        self.settle()

    @rule(seed=st.integers(100, 120))
    def params_are_put(self, seed: int) -> None:
        told = self.key()
        ask = lambda: local.put_params(self.session, grads_of(seed), told).result(10)
        if self.model.open:
            with pytest.raises(Conflict):
                self.insist(ask)
            return
        self.insist(ask)
        self.model.params, self.model.version = grads_of(seed), self.model.version + 1

    # --- time and fate ---------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.5, 4.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds, self.session)
        self.settle()

    @rule(fate=st.tuples(KINDS, st.sampled_from(FAULTS)), often=st.integers(1, 2))
    def the_store_is_about_to_fail(self, fate: tuple[str, str], often: int) -> None:
        self.store.faults = [fate] * often

    @rule()
    def the_state_is_dropped(self) -> None:
        self.session.in_turn(self.session._held.drop).result(10)

    @rule()
    def a_snapshot_is_written(self) -> None:
        self.session.snapshot().result(10)

    @rule(seconds=st.sampled_from([0.0, 3.0, 15.0]), orderly=st.booleans())
    def the_server_starts_again(self, seconds: float, orderly: bool) -> None:
        MADE["stops" if orderly else "kills"] += 1
        self.store.faults = []
        if not orderly:
            self.store.close()
        self.registry.close()
        self.waiting = []
        self.time += seconds
        self.start()
        self.settle()

    # --- what must hold --------------------------------------------------------------------------

    @precondition(lambda self: hasattr(self, "model"))
    @invariant()
    def the_session_is_where_the_model_is(self) -> None:
        session, model = self.session, self.model
        self.insist(lambda: session.load().result(10))
        assert session.version == model.version
        assert session.row.updates == model.updates
        served = rounds.params(session)
        for name, want in model.params.items():
            assert np.asarray(served[name]).tobytes() == want.tobytes()
        listed = session.workers().result(10)
        assert {
            row["worker"]: (row["epoch"], row["last_seq"], row["contributions"], row["version"])
            for row in listed["workers"]
        } == {
            name: (worker.epoch, len(worker.results), worker.contributions, worker.version)
            for name, worker in model.workers.items()
            if not worker.removed
        }
        if not model.open:
            assert listed["round"] is None
            return
        assert listed["round"] == {
            "number": model.ended + 1,
            "base_version": model.version,
            "contributed": sorted(model.open, key=str.encode),
            "count": model.how["count"],
            "quorum": model.how["quorum"],
            "opened_at": model.opened_at,
            "deadline_at": model.opened_at + model.how["deadline_s"],
        }
        assert not any(rounds.future_of(reply).done() for reply, _ in self.waiting)

    @precondition(lambda self: hasattr(self, "model"))
    @rule()
    def the_journal_has_every_bit(self) -> None:
        rounds.read_back(self.session)

    def check_journal(self) -> None:
        """Versions are gapless, and each push is in one round, once."""
        version, number = 0, 1
        open_: dict[str, tuple[int, int]] = {}
        counted: set[tuple[str, int, int]] = set()
        for event in self.store.events(self.session.key, payloads=False):
            request = event.record.get("request", {})
            assert event.version in (version, version + 1)
            version = event.version
            if event.kind == "contribution":
                assert request["round"] == number
                assert event.worker is not None
                assert event.worker not in open_
                open_[event.worker] = (request["epoch"], event.seq or 0)
            elif event.kind in ("close", "fail"):
                assert request["round"] == number
                names = sorted(open_, key=str.encode)
                if event.kind == "close":
                    pushes = [(name, *open_[name]) for name in names]
                    assert request["pushes"] == [list(push_) for push_ in pushes]
                    assert counted.isdisjoint(pushes)
                    counted |= set(pushes)
                else:
                    assert request["workers"] == names
                open_, number = {}, number + 1
        assert version == self.model.version
        assert {n: (e, s) for n, (e, s, _) in self.model.open.items()} == open_


@pytest.mark.timeout(2 * 3600)  # of the long form
def test_rounds_behave_as_their_model(figure: Figure) -> None:
    MADE.clear()
    run_state_machine_as_test(
        Rounds,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=MOVES,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(dict(MADE))
    if not LONG:  # in which some of it may be missing
        return
    ends = ["rounds ended: count", "rounds ended: deadline", "rounds ended: failed"]
    assert {*ends, "stops", "Fenced", "StaleGradient", "Conflict", "closed", "open"} <= MADE.keys()
    for what in (*ends, "kills", "faults met: unavailable", "faults met: out_of_space"):
        figure(f"rounds against a model: {what}", MADE[what], "times")
    figure(f"rounds against a model: differences in {EXAMPLES} histories", 0, "histories")
