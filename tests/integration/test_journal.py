"""State is the fold of the journal: reading it back gives the same bits, whatever happened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optserve.sessions import snapshots
from optserve.sessions.registry import Registry
from optserve.sessions.session import Session
from optserve_client.errors import (
    Conflict,
    Damaged,
    Invalid,
    KeyReused,
    OptserveError,
    OutOfSequence,
    SchedulerFailed,
)
from tests import local
from tests.local import NOBODY, Identity, arrays, create, exported, params_of, read_back, step

RICH: dict[str, Any] = {
    "optimizer": {"name": "AdamW", "lr": 0.1},
    "groups": [{"params": ["b"], "lr": 0.2}],
    "scheduler": [
        {"name": "MultiStepLR", "milestones": [2, 5], "gamma": 0.5},
        {"name": "LambdaLR", "lr_lambda": "0.95 ** epoch"},
    ],
    "clip_grad_norm": 0.5,
    "ema": {"decay": 0.9},
    "best": {"monitor": "loss"},
}


@pytest.fixture
def made() -> Iterator[Registry]:
    with local.registry() as registry:
        yield registry


def _rich(advance: str, **more: Any) -> dict[str, Any]:
    chained = {"name": "ChainedScheduler", "schedulers": RICH["scheduler"], "advance": advance}
    return {**RICH, "scheduler": chained, **more}


OPERATIONS: dict[str, Any] = {
    "step": lambda s, i: step(s, arrays(i), loss=float(i % 3)),
    "step_with_params": lambda s, i: step(s, arrays(i), params=arrays(i + 1)),
    "step_with_groups": lambda s, i: step(s, arrays(i), groups=[{"lr": 0.01 * i + 0.01}]),
    "step_with_none": lambda s, i: step(s, {**arrays(i), "b": None}),
    "step_with_scale": lambda s, i: step(s, arrays(i), loss_scale=8.0 + i),
    "step_as_worker": lambda s, i: step(
        s, arrays(i), Identity(worker=f"w{i}", seq=1, digest=bytes([i]))
    ),
    "skip": lambda s, i: step(s, {**arrays(i), "s": np.array(np.nan, "f4")}, loss_scale=2.0),
    "put_params": lambda s, i: local.put_params(s, arrays(i), NOBODY).result(10),
    "patch_group": lambda s, i: local.patch_group(s, 0, {"weight_decay": 0.1 * i}, NOBODY).result(
        10
    ),
    "patch": lambda s, i: local.patch(s, {"clip_grad_norm": 0.1 * i + 0.1}, NOBODY).result(10),
    "accumulate": lambda s, i: local.patch(s, {"accumulate": 1 + i % 3}, NOBODY).result(10),
    "scheduler_step": lambda s, i: local.scheduler_step(s, None, NOBODY).result(10),
    "put_scheduler": lambda s, i: local.put_scheduler(
        s, {"name": "StepLR", "step_size": 1 + i}, NOBODY
    ).result(10),
    "add_group": lambda s, i: local.add_group(
        s, {"lr": 0.3}, {f"new{i}": np.asarray(arrays(i)["b"])}, NOBODY
    ).result(10),
    "metrics": lambda s, i: local.put_metrics(s, s.version, {"acc": i / 10}, NOBODY).result(10),
}


def _drive(session: Session, names: list[str]) -> None:
    for i, name in enumerate(names):
        before = exported(session)
        try:
            OPERATIONS[name](session, i)
        except OptserveError:
            assert exported(session) == before, f"{name} was refused and left a trace"


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=12),
    st.sampled_from(["manual", "step"]),
)
def test_any_history_reads_back_bit_for_bit(names: list[str], advance: str) -> None:
    with local.registry() as made:
        session = create(made, _rich(advance), arrays(100))
        _drive(session, names)
        live = exported(session)
        assert read_back(session) == live


def test_a_snapshot_and_the_events_after_it_read_back_the_same(
    made: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "REPLAY_EVENTS", 4)
    session = create(made, _rich("step", accumulate=2), arrays(1))
    for i in range(15):
        step(session, arrays(i), Identity(worker="w", seq=i + 1, digest=bytes([i])), loss=1.0)
        session._held.snapshots.wait()
        assert made.store.snapshots(session.key) or i < 4
        assert read_back(session) == exported(session)
    assert [row.lsn for row in made.store.snapshots(session.key)] == [9, 13]


def test_replay_evaluates_no_expression_again(
    made: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = create(made, _rich("step"), arrays(1))
    for i in range(3):
        step(session, arrays(i))
    live = exported(session)

    def forbidden(self: Any, metrics: float | None = None) -> None:
        raise AssertionError("replay advanced a scheduler")

    from optserve.optim.schedules import Scheduler

    monkeypatch.setattr(Scheduler, "step", forbidden)
    assert read_back(session) == live


def test_a_failed_apply_is_undone_from_the_journal(made: Registry) -> None:
    scheduler = {"name": "LambdaLR", "lr_lambda": "1 / (7 - epoch)", "advance": "step"}
    body = {"optimizer": {"name": "Adam"}, "scheduler": scheduler, "ema": {}}
    session = create(made, body, arrays(1))
    for i in range(6):
        step(session, arrays(i))
    before, who = exported(session), Identity(worker="w", seq=1, digest=b"x")
    with pytest.raises(SchedulerFailed, match="1 / "):
        step(session, arrays(3), who)
    assert exported(session) == before
    local.put_scheduler(session, None, NOBODY).result(10)
    assert step(session, arrays(3), who).scalars["applied_version"] == 7


def test_a_fork_at_a_version_goes_on_as_the_session_did(made: Registry) -> None:
    session = create(made, _rich("step"), arrays(1))
    for i in range(3):
        step(session, arrays(i), loss=1.0)
    reply = made.fork("default", "a", {"id": "b", "version": 3}, NOBODY).result(10)
    made.fork("default", "a", {"id": "c"}, NOBODY).result(10)
    for i in range(3, 6):
        ends = [step(made.get("default", name), arrays(i), loss=1.0) for name in "abc"]
    assert [end.scalars["version"] for end in ends] == [6, 6, 6]
    first, *others = [params_of(end) for end in ends]
    assert all(np.array_equal(first[n], other[n]) for other in others for n in first)
    assert reply.scalars["forked_from"]["version"] == 3
    assert len({made.get("default", name).generation for name in "abc"}) == 3
    old = made.fork("default", "a", {"id": "d", "version": 1}, NOBODY).result(10)
    assert old.scalars["version"] == 1
    with pytest.raises(Invalid, match="got 99"):
        made.fork("default", "a", {"version": 99}, NOBODY).result(10)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: local.patch(s, {}, NOBODY),
        lambda s: local.patch_group(s, 0, {}, NOBODY),
        lambda s: local.put_metrics(s, 0, {}, NOBODY),
    ],
    ids=["patch", "group", "metrics"],
)
def test_a_change_of_nothing_is_refused(made: Registry, change: Any) -> None:
    session = create(made, _rich("step"), arrays(1))
    before = exported(session)
    with pytest.raises(Invalid, match="is empty"):
        change(session).result(10)
    assert read_back(session) == before


def test_a_session_that_cannot_be_read_back_can_still_be_deleted(
    made: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = create(made, _rich("step"), arrays(1))
    session._held.drop()
    with monkeypatch.context() as broken:
        broken.setattr("optserve.sessions.recovery.replay", lambda *_, **__: 1 / 0)
        with pytest.raises(Damaged, match="'a' cannot be read back"):
            session.status().result(10)
        made.delete("default", "a", NOBODY).result(10)
    create(made, _rich("step"), arrays(1))


def test_a_step_for_the_shape_before_an_import_is_refused(made: Registry) -> None:
    session = create(made, {"optimizer": "SGD"}, arrays(1))
    late = session.step_from_json({"grads": local.as_json(arrays(2))}, b"")
    other = create(made, {"optimizer": "SGD", "sparse": ["w"]}, arrays(1), "b")
    made.import_session("default", "a", exported(other), NOBODY).result(10)
    with pytest.raises(Conflict, match="params changed while the gradient was on its way"):
        session.step(late, NOBODY).result(10)


def test_a_dry_run_answers_like_the_step_and_leaves_no_trace(made: Registry) -> None:
    session = create(made, _rich("step"), arrays(1))
    before = exported(session)
    dry = step(session, arrays(2), dry_run=True, loss=1.0)
    assert exported(session) == before
    real = step(session, arrays(2), loss=1.0)
    assert dry.scalars["dry_run"]
    assert all(np.array_equal(params_of(dry)[n], params_of(real)[n]) for n in params_of(real))
    assert dry.scalars["version"] == real.scalars["version"] == 1


def test_export_and_import_at_every_step_change_nothing(made: Registry) -> None:
    session = create(made, _rich("step", accumulate=3), arrays(1))
    for i in range(8):
        step(session, arrays(i), loss=1.0)
        made.import_session("default", f"copy{i}", exported(session), NOBODY).result(10)
        copy = made.get("default", f"copy{i}")
        assert np.array_equal(
            params_of(step(copy, arrays(i + 1), loss=1.0))["w"],
            params_of(step(made.get("default", _fork(made, i)), arrays(i + 1), loss=1.0))["w"],
        )


def _fork(made: Registry, i: int) -> str:
    name = f"fork{i}"
    made.fork("default", "a", {"id": name}, NOBODY).result(10)
    return name


# --- exactly once --------------------------------------------------------------------------------


def test_retry_is_not_applied_twice(made: Registry) -> None:
    session = create(made, _rich("step"), arrays(1))
    who = Identity(worker="w", seq=1, digest=b"one")
    first = step(session, arrays(2), who)
    later = step(session, arrays(3), Identity(worker="v", seq=1, digest=b"two"))
    again = step(session, arrays(2), who)
    assert again.scalars["duplicate"]
    assert again.scalars["applied_version"] == first.scalars["applied_version"] == 1
    assert again.scalars["version"] == session.version == 2
    assert np.array_equal(params_of(again)["w"], params_of(later)["w"])


def test_a_retry_after_reading_back_is_still_a_duplicate(made: Registry) -> None:
    session = create(made, _rich("step"), arrays(1))
    who = Identity(key="k1", digest=b"one")
    step(session, arrays(2), who)
    read_back(session)
    assert step(session, arrays(2), who).scalars["duplicate"]
    with pytest.raises(KeyReused):
        step(session, arrays(3), Identity(key="k1", digest=b"other"))


def test_a_refused_request_does_not_use_its_seq(made: Registry) -> None:
    session = create(made, _rich("step"), arrays(1))
    who = Identity(worker="w", seq=1, digest=b"one")
    with pytest.raises(OptserveError):
        step(session, {**arrays(2), "s": np.array(np.inf, "f4")}, who)
    with pytest.raises(OutOfSequence):
        step(session, arrays(2), Identity(worker="w", seq=2, digest=b"two"))
    assert step(session, arrays(2), Identity(worker="w", seq=1, digest=b"x")).scalars["applied"]


def test_a_key_creates_one_session_and_numbers_create_none(made: Registry) -> None:
    def post(who: Identity) -> dict[str, Any]:
        made_one = made.create("default", None, _rich("step"), arrays(1), None, who, exist_ok=False)
        return made_one.result(60).scalars

    first = post(Identity(key="k", digest=b"one"))
    again = post(Identity(key="k", digest=b"one"))
    assert (again["id"], again["created"], again["duplicate"]) == (first["id"], False, True)
    with pytest.raises(KeyReused):
        post(Identity(key="k", digest=b"two"))
    with pytest.raises(Invalid, match="takes an Idempotency-Key"):
        post(Identity(worker="w", seq=1, digest=b"one"))
    assert len(made.page("default")["sessions"]) == 1


def test_seq_is_shared_by_all_requests_of_a_worker(made: Registry) -> None:
    session = create(made, _rich("manual"), arrays(1))
    step(session, arrays(2), Identity(worker="w", seq=1, digest=b"1"))
    advance = Identity(worker="w", seq=2, digest=b"2")
    local.scheduler_step(session, None, advance).result(10)
    again = local.scheduler_step(session, None, advance).result(10)
    assert again.scalars["duplicate"]
    assert again.scalars["scheduler"]["last_epoch"] == 1
    with pytest.raises(OutOfSequence):
        local.patch(session, {"name": "x"}, Identity(worker="w", seq=4, digest=b"4")).result(10)


def test_a_loss_that_comes_later_counts_for_the_best(made: Registry) -> None:
    session = create(made, {"optimizer": "Adam", "best": {"monitor": "loss"}}, arrays(0))
    step(session, arrays(1), loss=1.0)
    local.put_metrics(session, 1, {"loss": 0.5}).result(10)
    assert session.status().result(10)["best"] == {"value": 0.5, "version": 1}
    step(session, arrays(2), loss=2.0)
    local.put_metrics(session, 1, {"loss": 0.1}).result(10)  # its params are gone
    assert session.status().result(10)["best"] == {"value": 0.5, "version": 1}
    assert read_back(session) == exported(session)
