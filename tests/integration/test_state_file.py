"""A state file holds everything: what was exported and imported goes on bit for bit."""

from __future__ import annotations

import time
from typing import Any

import pytest

from optserve.optim import catalogue
from optserve.sessions import snapshots
from optserve.sessions.identity import Identity
from optserve.sessions.registry import Registry
from optserve.sessions.session import Session
from tests.conftest import LONG
from tests.local import NOBODY, arrays, create, exported, params_of, read_back, step

SHAPES: dict[str, tuple[int, ...]] = {"w": (5, 7), "b": (7,), "s": ()}
MATRIX = {"w": (5, 7)}
#: What some optimizers need beside their name.
SPECIAL: dict[str, dict[str, Any]] = {
    "Lookahead": {"optimizer": "AdamW", "k": 3},
    "Ranger21": {"num_iterations": 100},
}
#: Those whose state is of a kind of its own: tensors in groups, transposed matrices, lists, another
#: optimizer's, values beside groups and state.
SHORT = [
    *("AdamW", "ASGD", "LBFGS", "Muon", "DAdaptAdam", "Lookahead", "Prodigy", "SOAP", "SPlus"),
    *("SWATS", "ScheduleFreeAdamW", "Shampoo"),
]
DENSE = [entry.name for entry in catalogue.entries() if entry.sparse != "only"]


def train(session: Session, first: int, steps: int) -> None:
    shapes = {slot.name: slot.shape for slot in session.layout.slots}
    for i in range(first, first + steps):
        step(session, arrays(i, shapes), loss=1.0 / i)


CELLS = [
    (name, accumulate)
    for name in (DENSE if LONG else SHORT)
    for accumulate in ([1] if name == "LBFGS" else [1, 3])
]


@pytest.mark.parametrize(("name", "accumulate"), CELLS)
def test_an_imported_session_goes_on_bit_for_bit(
    registry: Registry, name: str, accumulate: int
) -> None:
    shapes = MATRIX if name in ("Muon", "SpectralSphere") else SHAPES
    body = {
        "optimizer": {"name": name, **SPECIAL.get(name, {})},
        "accumulate": accumulate,
        "ema": {},
        "best": {},
        "scheduler": {"name": "ExponentialLR", "gamma": 0.9, "advance": "step"},
    }
    original = create(registry, body, arrays(0, shapes))
    train(original, 1, 7)
    registry.import_session("default", "b", exported(original), NOBODY).result(60)
    copy = registry.get("default", "b")
    for i in range(10, 16):
        one, two = (step(session, arrays(i, shapes), loss=0.1) for session in (original, copy))
        for tensor, same in zip(params_of(one).values(), params_of(two).values(), strict=True):
            assert bytes(tensor) == bytes(same)
        assert one.scalars["groups"] == two.scalars["groups"]
        assert one.scalars["scheduler"] == two.scalars["scheduler"]


@pytest.mark.parametrize("name", ["Prodigy", "SPlus"])
def test_a_snapshot_holds_all_that_an_optimizer_keeps(
    registry: Registry, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "REPLAY_EVENTS", 4)
    session = create(registry, {"optimizer": name}, arrays(0, SHAPES))
    train(session, 1, 6)
    live = exported(session)
    assert read_back(session) == live
    assert step(session, arrays(9, SHAPES), dry_run=True).scalars["applied"] is True


def test_a_snapshot_that_cannot_be_written_does_not_fail_the_step(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(snapshots, "REPLAY_EVENTS", 2)
    monkeypatch.setattr(registry.store, "snapshot", full)
    session = create(registry, {"optimizer": "AdamW"}, arrays(0, SHAPES))
    train(session, 1, 5)
    assert session.version == 5
    assert read_back(session) == exported(session)


def test_a_ledger_larger_than_any_header_is_exported_with_the_session(registry: Registry) -> None:
    session = create(registry, {"optimizer": "AdamW"}, arrays(0, SHAPES))
    identity = Identity(key="the-key", digest=b"0123456789abcdef")
    step(session, arrays(1, SHAPES), identity)
    state = session._held._state
    assert state is not None
    for i in range(200):
        state.ledger.commit(
            Identity(key=f"key-{i}", digest=b"0123456789abcdef"),
            applied_version=None,
            lsn=2,
            reply={"padding": "x" * 100_000},
            time=time.time(),
        )
    registry.import_session("default", "b", exported(session), NOBODY).result(60)
    repeated = step(registry.get("default", "b"), arrays(1, SHAPES), identity)
    assert repeated.scalars["duplicate"] is True
