"""One session as the fold of its journal: each kind of event has one function that applies it.

Live requests and replay go through the same functions. In replay ``recorded`` is what the committed
row says came out, so that no user expression, clock or reduction is evaluated a second time.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from optserve.optim import checkpoint, imported
from optserve.optim.arena import Arena
from optserve.optim.engine import Engine, Outcome
from optserve.optim.gradients import Inspected
from optserve.optim.layout import Layout
from optserve.sentences import shown
from optserve.sessions import config as configs
from optserve.sessions import frames, workers
from optserve.sessions.identity import Duplicate, Identity
from optserve.sessions.intake import Step
from optserve.sessions.ledger import Ledger
from optserve.sessions.round import Round
from optserve.sessions.step import Expected
from optserve.store import Event
from optserve_client import wire
from optserve_client.errors import (
    Conflict,
    Invalid,
    LineSearchOpen,
    OutOfSequence,
    PreconditionFailed,
    SessionRewound,
)


@dataclass(kw_only=True)
class SessionState:
    """Everything that a snapshot holds. Changed only by its session, under its turn."""

    #: The normalised config; PATCH changes it.
    config: dict[str, Any]
    #: Config, dtype and shapes as created: what a second PUT is compared with.
    origin: dict[str, Any]
    engine: Engine
    generation: str
    created: float
    ledger: Ledger
    version: int = 0
    updates: int = 0
    lsn: int = 0
    changed: float = 0.0
    #: On what the last event was computed: see :func:`optserve.optim.devices.fingerprint`.
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    #: Why the last bits may differ from those that were answered; None: they do not.
    inexact: str | None = None
    #: Acknowledged events were lost at least once: a seq from the future may be of one of them.
    rewound: bool = False
    #: Pushes of several workers that wait for each other.
    round: Round = field(default_factory=Round)

    @property
    def layout(self) -> Layout:
        return self.engine.layout

    # --- events ----------------------------------------------------------------------------------

    def step(
        self,
        step: Step,
        inspected: Inspected,
        changes: list[dict[str, Any]],
        recorded: Mapping[str, Any] | None = None,
        weight: float = 1.0,
    ) -> Outcome:
        """Apply one gradient: params first, then groups, best, and the update."""
        fields = step.fields
        self.take(step, changes)
        return self.update(inspected, fields.loss, fields.metrics, recorded, weight)

    def update(
        self,
        inspected: Inspected,
        loss: float | None,
        metrics: Mapping[str, float],
        recorded: Mapping[str, Any] | None = None,
        weight: float = 1.0,
    ) -> Outcome:
        """Offer the params to best, then update them."""
        self._offer_best(loss, metrics)
        metric = monitored(self.engine.monitor, loss, metrics)
        return self.engine.push(inspected, metric=metric, weight=weight, recorded=recorded)

    def take(self, step: Step, changes: list[dict[str, Any]]) -> None:
        """Make the caller's params and hyperparameters the session's, before the update."""
        if step.params is not None:
            self.engine.params.fill(step.params)
        self.engine.assign(changes)

    def evaluate(
        self,
        step: Step,
        changes: list[dict[str, Any]],
        recorded: Mapping[str, Any] | None = None,
    ) -> Outcome:
        """Apply one LBFGS evaluation; the first of a step is at the live params."""
        search, fields = self.engine.line_search, step.fields
        assert search is not None
        assert fields.loss is not None
        if fields.abandon:
            search.abandon()
        if not search.open:
            start = self.engine.params
            if step.params is not None:
                start = search.start = self.engine.params.clone()
                start.fill(step.params)
            self.engine.assign(changes)
            self._offer_best(fields.loss, fields.metrics, start)
        metric = monitored(self.engine.monitor, fields.loss, fields.metrics)
        return self.engine.evaluate(fields.loss, step, metric=metric, recorded=recorded)

    def _offer_best(
        self,
        loss: float | None,
        metrics: Mapping[str, float] | None,
        params: Arena | None = None,
    ) -> None:
        """A loss belongs to the params at which the gradient was taken: those before the update."""
        best = self.engine.best
        if best is not None:
            value = monitored(self.engine.recipe.best_monitor, loss, metrics)
            best.offer(value, params or self.engine.params, self.version)

    def patch(self, fields: Mapping[str, Any]) -> None:
        """Change the adjustable part of the config."""
        self.config = {**self.config, **fields}
        self.engine.adjust(configs.recipe(self.config))

    def add_group(self, fields: Mapping[str, Any], params: Mapping[str, wire.Tensor]) -> None:
        self.engine.add_group(fields, params)
        groups = [*self.config["groups"], {"params": list(params), **fields}]
        self.config = {**self.config, "groups": groups}
        self.engine.adjust(configs.recipe(self.config))

    def set_scheduler(self, spec: Mapping[str, Any] | None) -> None:
        self.engine.set_scheduler(spec)
        self.config = {**self.config, "scheduler": spec}
        self.engine.adjust(configs.recipe(self.config))

    def replace_by(self, config: dict[str, Any], engine: Engine) -> None:
        """Import: everything but the session's identity, counters and ledger is another's."""
        self.config, self.engine = config, engine

    def add_metrics(self, version: int, metrics: Mapping[str, float]) -> None:
        """Values that came after the step; ``best`` can keep the current version only."""
        if version == self.version:
            self._offer_best(None, metrics)

    # --- what must hold --------------------------------------------------------------------------

    def check_generation(self, generation: str | None) -> None:
        """Refuse what was meant for a session before it lost acknowledged history."""
        if generation is not None and generation != self.generation:
            raise SessionRewound(
                f"generation {generation!r:.80} is over, the session's is {self.generation!r}",
                generation=self.generation,
                version=self.version,
            )

    def check_match(self, if_match: str | None) -> None:
        """Refuse if ``If-Match`` names neither the current version nor ``*``."""
        if if_match is None or if_match.strip() == "*":
            return
        current = f"{self.generation}.{self.version}"
        tags = [tag.strip().removeprefix("W/").strip('"') for tag in if_match.split(",")]
        if not any(tag == current or tag.startswith(f"{current}-") for tag in tags):
            raise PreconditionFailed(
                f"If-Match is {if_match!r:.120}, the session is at {current}",
                version=self.version,
            )

    def check_no_window(self) -> None:
        window = self.engine.window
        if window.count:
            raise Conflict(
                f"an accumulation window is open ({window.count} of {window.steps} gradients)",
                accumulated=window.count,
                version=self.version,
            )

    def check_line_search(self, abandon: bool) -> None:
        """Refuse if a line search is open and is not to be abandoned."""
        search = self.engine.line_search
        if search is not None and search.open and not abandon:
            raise LineSearchOpen(
                f"an LBFGS line search is open after {len(search.record)} evaluations; "
                "send abandon: true to give it up",
                version=self.version,
            )

    def end_line_search(self) -> None:
        if self.engine.line_search is not None:
            self.engine.line_search.abandon()

    # --- counters --------------------------------------------------------------------------------

    def check_identity(self, identity: Identity, now: float) -> Duplicate | None:
        """Return what a repeat was answered, or None: see :meth:`Ledger.check`.

        Raises SessionRewound for a seq that can only follow one which this session lost.
        """
        try:
            return self.ledger.check(identity, now)
        except OutOfSequence as exc:
            if self.rewound and (identity.seq or 0) > exc.extra["last_seq"]:
                raise SessionRewound(
                    f"{exc.detail}: the session lost acknowledged requests and is at version "
                    f"{self.version} of a new generation",
                    **exc.extra,
                    generation=self.generation,
                    version=self.version,
                ) from exc
            raise

    def note_replay(self, event: Event) -> None:
        """Say so if ``event`` was computed where the last bits may come out differently."""
        made = event.record.get("fingerprint", self.fingerprint)
        here = self.engine.fingerprint
        if made and made != here and self.inexact is None:
            name = next(name for name in here if made.get(name) != here[name])
            self.inexact = (
                f"version {event.version} was computed with {name} {made.get(name)!r} and "
                f"replayed with {name} {here[name]!r}: the last bits may differ"
            )

    def rewind(self, generation: str) -> None:
        """What came after the event before this one is lost: begin a new generation."""
        self.generation, self.rewound = generation, True

    def commit(self, event: Event) -> None:
        """Count one committed event in."""
        self.lsn, self.version, self.updates = event.lsn, event.version, event.updates
        self.changed = event.time
        self.fingerprint = event.record.get("fingerprint", self.fingerprint)
        self.ledger.commit(
            Identity(
                worker=event.worker,
                epoch=event.epoch,
                seq=event.seq,
                key=event.idempotency_key,
                digest=event.digest,
            ),
            applied_version=event.record["reply"]["applied_version"],
            lsn=event.lsn,
            reply=event.record["reply"],
            time=event.time,
        )
        if (event.kind != "create" and self.config.get("workers")) or event.kind == "worker":
            self._count_workers(event)

    def _count_workers(self, event: Event) -> None:
        """Count in what an event says of workers and of their round."""
        request, reply = event.record.get("request", {}), event.record["reply"]
        if event.kind == "worker" and request["removed"]:
            self.ledger.remove(request["worker"])
        elif event.kind == "worker":
            self.ledger.register(request["worker"], request["epoch"], event.time)
        elif event.worker is not None and event.kind in ("step", "contribution"):
            self.ledger.pushed(event.worker, request.get("base_version"))
        for push in self.round.contributions.values():
            if event.kind == "close":
                answer = push.answer(reply)
                self.ledger.resolve(push, applied_version=answer["applied_version"], reply=answer)
            elif event.kind == "fail":
                self.ledger.release(push)
        self.round.note(event)

    # --- frames ----------------------------------------------------------------------------------

    def frame(self) -> list[bytes | memoryview]:
        """Return the state file; its buffers are views of live memory: copy them under the turn.

        The pushes of an open round are not in it: in its ledger they are as of one that failed.
        """
        meta, tensors = checkpoint.dump(self.engine)
        ledger = copy.deepcopy(self.ledger) if self.round.open else self.ledger
        for push in self.round.contributions.values():
            ledger.release(push)
        return frames.encode(
            {
                "config": self.config,
                "origin": self.origin,
                "shapes": [[slot.name, list(slot.shape)] for slot in self.layout.slots],
                "dtype": self.config["dtype"],
                "generation": self.generation,
                "version": self.version,
                "updates": self.updates,
                "lsn": self.lsn,
                "created": self.created,
                "changed": self.changed,
                "fingerprint": self.fingerprint,
                "inexact": self.inexact,
                "rewound": self.rewound,
                "rounds": self.round.ended,
                "ledger": ledger.dump(),
                "engine": meta,
            },
            tensors,
        )

    def clone(self) -> SessionState:
        """Return an independent copy, to try something out on."""
        engine = checkpoint.load(self.engine.recipe, self.layout, *checkpoint.dump(self.engine))
        return replace(self, engine=engine, ledger=copy.deepcopy(self.ledger))


#: What Python, torch and the optimizers raise over pieces that do not fit.
_UNFIT = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, ArithmeticError)


def read_engine(frame: frames.Frame, device: str) -> tuple[dict[str, Any], Engine]:
    """Return config and engine of a state file from outside, everything checked.

    Its tensors must have the shapes and dtypes that a step of this optimizer makes, and a step on a
    copy must go through: nothing that a caller can upload may break a later request.
    """
    layout = frame.layout
    for name in ("config", "engine"):
        if not isinstance(frame.meta.get(name), dict):
            raise Invalid(f"{name} must be an object, got {shown(frame.meta.get(name))}")
    Ledger.load(frame.meta["ledger"])
    try:
        config = configs.renormalise(frame.meta["config"], layout, device)
        recipe = configs.recipe(config)
        engine = checkpoint.load(recipe, layout, frame.meta["engine"], frame.tensors)
        imported.check(engine)
        counters = [frame.meta[name] for name in ("version", "updates")]
    except KeyError as exc:
        raise Invalid(f"the state file lacks {shown(exc.args[0])}") from exc
    except _UNFIT as exc:
        raise Invalid(f"the state file's pieces do not belong together: {_reason(exc)}") from exc
    if not all(type(n) is int and 0 <= n < 2**53 for n in counters):
        raise Invalid(f"the state file's version and updates must be integers >= 0, got {counters}")
    return config, engine


def _reason(exc: Exception) -> str:
    return str(exc)[:200] or type(exc).__name__


def restore(meta: Mapping[str, Any], engine: Engine) -> SessionState:
    """Return the state whose own snapshot had ``meta``."""
    return SessionState(
        config=meta["config"],
        origin=meta["origin"],
        engine=engine,
        generation=meta["generation"],
        created=meta["created"],
        ledger=Ledger.load(meta["ledger"]),
        version=meta["version"],
        updates=meta["updates"],
        lsn=meta["lsn"],
        changed=meta["changed"],
        fingerprint=meta["fingerprint"],
        inexact=meta["inexact"],
        rewound=meta["rewound"],
        round=Round(ended=meta.get("rounds", 0)),  # older files have none
    )


def expected_of(state: SessionState) -> Expected:
    """Return what the tensors of a step must be."""
    return Expected(
        layout=state.layout,
        sparse=state.engine.recipe.sparse,
        kind=workers.kind(state.config),
    )


def monitored(
    monitor: str | None, loss: float | None, metrics: Mapping[str, float] | None
) -> float | None:
    """Return the value that ``monitor`` names among those that came with a request."""
    if monitor is None:
        return None
    if monitor == "loss" and loss is not None:
        return loss
    return (metrics or {}).get(monitor)  # also a loss that comes after its step
