"""Clients that train all kinds of sessions and note what they were told, for tests of failure.

A :class:`Trainer` is a program that uses :class:`optserve_client.Client` as it comes: what a
failing server or network does to a request, the client repeats and settles. Where it gives up, its
docstring asks for the same call again, and that is all that is done here.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

from optserve.sessions import frames
from optserve.store.base import Durability
from optserve_client import Client, Session, StepResult, errors
from tests import oracle
from tests.oracle import Story, Tree
from tests.specs import SHARED, Spec

T = TypeVar("T")
#: How often a call is made that fails although the client repeats its requests.
PATIENCE = 20
RETURNS: tuple[Literal["params", "none", "delta"], ...] = ("params", "none", "delta")


class Again(Protocol):
    """Makes a call until it is answered."""

    def __call__(self, call: Callable[[], T]) -> T: ...


def delete(session: Session, again: Again) -> None:
    """Delete a session, whatever became of it."""
    # A network that delivers a deletion twice lets the client hear of the second one.
    with contextlib.suppress(errors.SessionNotFound):
        try:
            again(session.delete)
        except errors.SessionRewound:
            session.resume()
            delete(session, again)


class Owned:
    """A session that one client changes, and the story of it."""

    def __init__(
        self,
        spec: Spec,
        session: Session,
        story: Story,
        rng: random.Random,
        again: Again,
        *,
        past: bool,
        lossy: bool,
    ) -> None:
        self.spec, self.session, self.story, self.rng = spec, session, story, rng
        self.duplicates = 0
        #: Changes to versions that could not be reached any more.
        self.unreachable = 0
        #: Times that the session went back, and acknowledged changes that were lost by it.
        self.rewinds = self.lost = 0
        info = session.info or again(session.status)
        self.generations: list[str] = [info["generation"]]
        self._lossy = lossy
        self._again = again
        self._lbfgs = spec.body["optimizer"]["name"] == "LBFGS"
        self._past = past
        #: Where the next LBFGS evaluation is wanted, and of which objective.
        self.trial: Mapping[str, Any] | None = None
        self.search = rng.getrandbits(32)
        self.pinned: int | None = None

    @property
    def searching(self) -> bool:
        head = self.story.head.change
        return isinstance(head, oracle.Evaluate) and not head.done

    def act(self) -> None:
        """Make one change, mostly a step."""
        kinds = [*self.spec.more]
        if self._past and not self.searching:
            kinds += ["roll_back", "pin"]
        kind = self.rng.choice(kinds) if kinds and self.rng.random() < 0.15 else "step"
        getattr(self, kind)()

    def step(self) -> None:
        if self._lbfgs:
            self._evaluate()
            return
        seed = self.rng.getrandbits(32)
        loss = round(self.rng.uniform(0, 10), 3) if self._wants_loss() else None
        grads = oracle.tensors(seed, self.spec.shapes, self.spec.dtype)
        returns = self.rng.choice(RETURNS)
        result = self._again(lambda: self.session.step(grads, loss=loss, returns=returns))
        self._noted(result, oracle.Step(seed, loss))

    def _wants_loss(self) -> bool:
        return "best" in self.spec.body or self.spec.body.get("scheduler", {}).get("monitor")

    def _evaluate(self) -> None:
        if self.trial is None:
            self.trial = dict(self._again(self.session.params))
        loss, grads = oracle.objective(self.trial, self.search)
        result = self._again(lambda: self.session.step(grads, loss=loss))
        self._noted(result, oracle.Evaluate(self.search, done=result.need is None))
        self.trial = result.params
        if result.need is None:
            self.search = self.rng.getrandbits(32)

    def _noted(self, result: StepResult, what: oracle.Change) -> None:
        self.duplicates += result.duplicate
        self.story.note(what, moves=result.applied, updates=int(result.applied))
        made = self.story.version if result.applied else None
        assert result.applied_version == made, f"{self.session.id} made {result.applied_version}"
        self._check(result.raw)

    def _check(self, reply: Mapping[str, Any]) -> None:
        """Nobody else changes this session: the counters are those of the story."""
        told = (reply["version"], reply["updates"])
        assert told == (self.story.version, self.story.updates), (
            f"{self.session.id} says {told}, its story {self.story.version, self.story.updates}"
        )

    def put_params(self) -> None:
        seed = self.rng.getrandbits(32)
        params = oracle.tensors(seed, self.spec.shapes, self.spec.dtype)
        reply = self._again(lambda: self.session.put_params(params))
        self.story.note(oracle.PutParams(seed), moves=True)
        self._check(reply)

    def patch_group(self) -> None:
        lr = self.rng.uniform(0.001, 0.1)
        reply = self._again(lambda: self.session.patch_group(0, lr=lr))
        self.story.note(oracle.PatchGroup(0, lr))
        self._check(reply)

    def advance(self) -> None:
        reply = self._again(self.session.scheduler_step)
        self.story.note(oracle.Advance())
        self._check(reply)

    def put_loss(self) -> None:
        loss = round(self.rng.uniform(0, 10), 3)
        version = self.story.version
        reply = self._again(lambda: self.session.put_metrics(version, {"loss": loss}))
        self.story.note(oracle.PutLoss(loss))
        self._check(reply)

    def roll_back(self) -> None:
        version = self._near()
        reply = self._unless_gone(lambda: self.session.rollback(version))
        if reply is not None:
            self.story.roll_back(version)
            self.trial = None
            self._check(reply)

    def pin(self) -> None:
        version = self._near() if self.pinned is None else self.pinned
        pinning = self.pinned is None
        call = self.session.pin if pinning else self.session.unpin
        reply = self._unless_gone(lambda: call(version))
        self.pinned = version if pinning and reply is not None else None
        if reply is not None:
            self.story.note(oracle.Nothing())
            self._check(reply)

    def _unless_gone(self, call: Callable[[], T]) -> T | None:
        """Return the reply, or None where the version cannot be reached any more."""
        try:
            return self._again(call)
        except errors.Invalid as exc:
            self._gone(exc)
            return None

    def _gone(self, refusal: errors.Invalid) -> None:
        ahead = self._lossy and "version must be in" in refusal.detail  # it went back meanwhile
        if not ahead and "cannot be reached any more" not in refusal.detail:
            raise refusal
        self.unreachable += 1

    def _near(self) -> int:
        """Return one of the last few versions, most of which can be reached.

        The current one, or one whose state is the same right after it was made and right before the
        next one: a snapshot of a version may be of either moment.
        """
        now = self.story.version
        near = range(max(self.story.first.version, now - 4), now)
        return self.rng.choice([*(v for v in near if self.story.plain(v)), now])

    def fork(self, name: str) -> Owned | None:
        """Return a copy, which goes its own way; None if the version cannot be reached any more."""
        version = self._near() if self._past and not self.searching else None
        client = self.session._client
        try:
            session = self._again(lambda: self.session.fork(name, version=version))
        except errors.SessionExists:  # made by an earlier call that the client had to give up
            session = client.session(name)
        except errors.Invalid as exc:
            self._gone(exc)
            return None
        except errors.SessionRewound:
            assert self._lossy
            return None  # what is lost, the next change is told
        origin = session.info.get("forked_from", {}).get("generation")
        if origin not in (None, self.generations[-1]):
            # Right after resume() the client names no generation, and it went back once more.
            assert self._lossy
            delete(session, self._again)
            return None
        made = Owned(
            self.spec,
            session,
            self.story.forked(version),
            self.rng,
            self._again,
            past=self._past,
            lossy=self._lossy,
        )
        if version is None:
            made.trial, made.search = self.trial, self.search
        return made

    def export(self) -> None:
        """Have the tree compare the state file as it is now."""
        exported = bytes(self._again(self.session.export_state))
        generation = frames.decode(exported).meta["generation"]
        if generation == self.generations[-1]:
            self.story.head.exports.append(exported)
        else:  # it went back meanwhile, which the next change is told
            assert self._lossy

    def go_back(self, lost: errors.SessionRewound) -> None:
        """The server has lost acknowledged changes and said so: go on from where it is."""
        assert self._lossy, lost
        known = len(self.story.log)
        last = lost.extra.get("last_seq", known)  # this client's seqs count all changes there are
        assert last <= known
        self.story.rewind(last)
        self.lost += known - last
        self.rewinds += 1
        self.trial = None
        assert lost.extra["version"] == self.story.version
        assert lost.extra["generation"] not in self.generations
        self.generations.append(lost.extra["generation"])
        self.session.resume()
        self.export()


class Trainer(threading.Thread):
    """A program with one client that trains its sessions until :attr:`enough` is set."""

    def __init__(
        self,
        client: Client,
        specs: Mapping[str, Spec],
        seed: int,
        *,
        past: bool = True,
        least: int = 40,
        limit: int | None = None,
        durability: Durability | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            client: Its own.
            specs: Of its sessions, by their ids.
            seed: Of everything that it draws.
            past: Go back to earlier versions too.
            least: Changes to make before it ends.
            limit: Changes after which it ends, by itself and not before.
            durability: Of its sessions.
        """
        super().__init__(name=f"trainer-{seed}", daemon=True)
        self.client, self.past = client, past
        self.enough = threading.Event()
        self.changes = 0
        #: Calls that the client gave up, so that they were made again.
        self.given_up = 0
        self.owned: list[Owned] = []
        #: Copies that were made, trained, compared and deleted.
        self.forks = 0
        #: A session that others step too: id, and what each acknowledged step made.
        self.shared: tuple[str, Spec] | None = None
        self.shared_steps: list[tuple[int, int]] = []
        self.failure: BaseException | None = None
        self._specs, self._rng = specs, random.Random(seed)
        self._least, self._limit, self._durability = least, limit, durability
        self._lossy = durability == "memory"
        self._forks = 0
        self._fork: Owned | None = None

    def again(self, call: Callable[[], T]) -> T:
        """Make a call until it is answered, as the client's docstring says."""
        for _ in range(PATIENCE):
            try:
                return call()
            except (errors.TransportError, errors.ServerError) as exc:
                self.given_up += 1
                last = exc
        raise last

    def run(self) -> None:
        try:
            for name, spec in self._specs.items():
                self._create(name, spec)
            while not self._ended():
                self._act()
                self.changes += 1
            self._end_fork()
            for one in self.owned:
                self._export(one)
        except BaseException as exc:
            self.failure = exc
        finally:
            self.client.close()

    def finish(self, limit_s: float = 120) -> None:
        """Have it end unless it has a limit, wait for the end, and raise what it failed with."""
        self.enough.set()
        self.join(limit_s)
        if self.failure is not None:
            raise self.failure
        assert not self.is_alive(), f"{self.name} hangs after {self.changes} changes"

    def _ended(self) -> bool:
        if self._limit is not None:
            return self.changes >= self._limit
        return self.enough.is_set() and self.changes >= self._least

    def _create(self, name: str, spec: Spec) -> None:
        params = oracle.tensors(self._rng.getrandbits(32), spec.shapes, spec.dtype)
        session = self.again(lambda: self._created(name, spec, params))
        tree = Tree(spec.body, params, self.again(session.status)["impl"])
        self.owned.append(
            Owned(
                spec, session, Story(tree), self._rng, self.again, past=self.past, lossy=self._lossy
            )
        )

    def _created(self, name: str, spec: Spec, params: oracle.Tensors) -> Session:
        fields = dict(spec.body)
        optimizer = fields.pop("optimizer")
        if self._durability is not None:
            fields["durability"] = self._durability
        return self.client.create(optimizer, params, id=name, **fields)

    def _act(self) -> None:
        if self.shared is not None and self._rng.random() < 0.15:
            self._step_shared()
            return
        draw = self._rng.random()
        one = self._rng.choice(self.owned)
        if draw < 0.02:
            self._end_fork()
            self._forks += 1
            name = f"{one.session.id}-{self._forks}"
            self._fork = one.fork(name)
        elif draw < 0.1 and self._fork is not None:
            self._change(self._fork)
        else:
            self._change(one)

    def _export(self, one: Owned) -> None:
        if self._lossy:  # whether it went back, the next change is told
            self._change(one)
        one.export()

    def _change(self, one: Owned) -> None:
        try:
            one.act()
        except errors.SessionRewound as lost:
            one.go_back(lost)

    def _end_fork(self) -> None:
        if self._fork is not None:
            self._export(self._fork)
            self.forks += 1
            delete(self._fork.session, self.again)
            self._fork = None

    def _step_shared(self) -> None:
        assert self.shared is not None
        name, spec = self.shared
        seed = self._rng.getrandbits(32)
        grads = oracle.tensors(seed, spec.shapes, spec.dtype)
        result = self.again(lambda: self.client.session(name).step(grads, returns="none"))
        assert result.applied_version is not None
        self.shared_steps.append((result.applied_version, seed))


def share(trainers: Sequence[Trainer], durability: Durability | None = None) -> None:
    """Create a session that these trainers step beside their own."""
    fields = dict(SHARED.body)
    optimizer, params = fields.pop("optimizer"), oracle.tensors(0, SHARED.shapes)
    client = trainers[0].client
    client.create(optimizer, params, id=SHARED.name, durability=durability, **fields)
    for trainer in trainers:
        trainer.shared = (SHARED.name, SHARED)


def stories(trainers: Sequence[Trainer], client: Client) -> dict[str, Story]:
    """Return the story of each session that is left, by its id."""
    found = {one.session.id: one.story for trainer in trainers for one in trainer.owned}
    if any(trainer.shared for trainer in trainers):
        impl = client.session(SHARED.name).status()["impl"]
        found[SHARED.name] = _shared_story(trainers, impl)
    return found


def _shared_story(trainers: Sequence[Trainer], impl: str) -> Story:
    """Put what the clients stepped in the order that the replies gave."""
    steps = sorted(pair for trainer in trainers for pair in trainer.shared_steps)
    assert [version for version, _ in steps] == list(range(1, len(steps) + 1))
    story = Story(Tree(SHARED.body, oracle.tensors(0, SHARED.shapes), impl))
    for _, seed in steps:
        story.note(oracle.Step(seed), moves=True, updates=1)
    return story
