"""Asynchronous pushes: each is an update, weighed by its staleness, and reads back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from optserve.sessions.membership import Register, Remove
from optserve.sessions.registry import Registry
from optserve_client import wire
from optserve_client.errors import (
    Conflict,
    Fenced,
    Invalid,
    KeyReused,
    Nonfinite,
    StaleGradient,
    VersionConflict,
)
from tests import local, rounds
from tests.local import NOBODY, arrays, create, exported
from tests.rounds import Local, adamw, push, rows_of

#: Versions that pushes are computed on, one after the other.
BASES = [0, 0, 1, 0, 4, 2, 6, 0]


@pytest.fixture
def made() -> Iterator[Registry]:
    with rounds.registry() as (registry, _):
        yield registry


def asynchronous(**fields: Any) -> dict[str, Any]:
    optimizer = {"name": "AdamW", "lr": 0.1}
    return {"optimizer": optimizer, "workers": {"mode": "async", **fields}}


@pytest.mark.parametrize("most", [0, 2, 5])
def test_damped_pushes_are_those_of_a_local_loop(made: Registry, most: int) -> None:
    body = {**asynchronous(max_staleness=most, on_stale="damp"), "clip_grad_norm": 0.5}
    session, oracle = create(made, body, arrays(0)), Local(arrays(0), adamw)
    for version, base in enumerate(BASES):
        reply = push(session, f"w{version}", 1, base, version)
        staleness = version - base
        weight = 1 / (1 + staleness) if staleness > most else 1.0
        assert (reply.scalars["staleness"], reply.scalars["weight"]) == (staleness, weight)
        local.set_grads(oracle.leaves, arrays(version))
        leaves = list(oracle.leaves.values())
        for leaf in leaves:
            leaf.grad.mul_(weight)
        norm = torch.nn.utils.clip_grad_norm_(leaves, 0.5)
        assert reply.scalars["grad_norm"] == float(norm)
        oracle.optimizer.step()
        oracle.check(local.params_of(reply))
        rounds.read_back(session)


@pytest.mark.parametrize("fields", [{}, {"max_staleness": 100}], ids=["unbounded", "bounded"])
def test_pushes_within_the_bound_count_in_full(made: Registry, fields: dict[str, Any]) -> None:
    session, oracle = create(made, asynchronous(**fields), arrays(0)), Local(arrays(0), adamw)
    for version, base in enumerate(BASES):
        reply = push(session, "w", version + 1, base, version)
        assert reply.scalars["weight"] == 1.0
        oracle.step(arrays(version))
    oracle.check(local.params_of(reply))
    rounds.read_back(session)


def test_a_stale_push_is_rejected_and_its_seq_is_free(made: Registry) -> None:
    session = create(made, asynchronous(max_staleness=1), arrays(0))
    for seq in (1, 2):
        push(session, "a", seq, seq - 1)
    before = exported(session)
    with pytest.raises(StaleGradient) as stale:
        push(session, "b", 1, 0)
    assert stale.value.detail == (
        "base_version is 0, the session's version is 2; max_staleness is 1"
    )
    assert exported(session) == before
    assert push(session, "b", 1, 1).scalars["staleness"] == 1
    with pytest.raises(VersionConflict):
        push(session, "b", 2, 4)


def test_a_repeat_is_told_its_staleness_and_weight_again(made: Registry) -> None:
    session = create(made, asynchronous(max_staleness=0, on_stale="damp"), arrays(0))
    push(session, "a", 1, 0)
    first = push(session, "b", 1, 0, 3)
    for _ in range(2):
        again = push(session, "b", 1, 0, 3)
        assert again.scalars["duplicate"] is True
        said = {n: v for n, v in first.scalars.items() if n != "duplicate"}
        assert {n: v for n, v in again.scalars.items() if n != "duplicate"} == said
        session.in_turn(session._held.drop).result(10)
    with pytest.raises(KeyReused):
        push(session, "b", 1, 0, 4)
    assert session.version == 2


def test_the_weight_is_recorded_not_computed_again(
    made: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = create(made, asynchronous(max_staleness=0, on_stale="damp"), arrays(0))
    for seq in (1, 2, 3):
        push(session, "a", seq, 0, seq)
    monkeypatch.setattr("optserve.sessions.workers.weight_of", lambda *_: 1 / 0)
    rounds.read_back(session)


def test_accumulated_pushes_read_back_and_count_for_their_workers(made: Registry) -> None:
    body = {**asynchronous(max_staleness=3), "accumulate": {"steps": 2, "reduce": "mean"}}
    session, oracle = create(made, body, arrays(0)), Local(arrays(0), adamw)
    for i in range(4):
        reply = push(session, "ab"[i % 2], 1 + i // 2, i // 2, i)
        assert reply.scalars["staleness"] == 0
        rounds.read_back(session)
    for i in (0, 2):
        oracle.step(rounds.mean([arrays(i), arrays(i + 1)]))
    oracle.check(local.params_of(reply))
    assert [row["contributions"] for row in rows_of(session).values()] == [2, 2]


def test_accumulation_and_damping_are_refused_together(made: Registry) -> None:
    damped = asynchronous(max_staleness=1, on_stale="damp")
    with pytest.raises(Invalid, match="accumulate cannot be used with on_stale 'damp'"):
        create(made, {**damped, "accumulate": 2}, arrays(0))
    session = create(made, damped, arrays(0))
    with pytest.raises(Invalid, match="accumulate cannot be used with on_stale 'damp'"):
        local.patch(session, {"accumulate": 2}).result(10)


def test_params_cannot_come_with_a_push_and_a_nan_uses_no_seq(made: Registry) -> None:
    session = create(made, asynchronous(), arrays(0))
    with pytest.raises(Conflict, match="params cannot come with a push of one of several"):
        local.step(session, arrays(1), params=arrays(2))
    bad = {**arrays(1), "s": np.array(np.nan, "f4")}
    with pytest.raises(Nonfinite):
        push(session, "a", 1, 0, bad)
    skipped = push(session, "a", 1, 0, bad, loss_scale=2.0)
    assert skipped.scalars["skipped"] == "nonfinite"
    assert push(session, "a", 2, 0).scalars["applied_version"] == 1
    assert rows_of(session)["a"]["contributions"] == 1
    rounds.read_back(session)


def test_deltas_in_bfloat16_read_back(made: Registry) -> None:
    half = lambda seed, sign=1: {
        n: wire.Bits.bfloat16(g * np.float32(sign)) for n, g in arrays(seed).items()
    }
    body = asynchronous(max_staleness=0, on_stale="damp", push="deltas")
    session = create(made, body, half(0))
    leaves = local.leaves({n: t.to_float32() for n, t in half(0).items()}, torch.bfloat16)
    optimizer = adamw(list(leaves.values()))
    for version in range(3):
        reply = push(session, f"w{version}", 1, 0, half(version, -1), kind="deltas")
        local.set_grads(leaves, {n: t.to_float32() for n, t in half(version).items()})
        for leaf in leaves.values():
            leaf.grad.mul_(1 / (1 + version))
        optimizer.step()
        local.assert_equal(local.params_of(reply), leaves)
        rounds.read_back(session)


def test_registration_and_removal_fence_as_in_rounds(made: Registry) -> None:
    session = create(made, asynchronous(), arrays(0))
    push(session, "w", 1, 0, epoch=1)
    session.change(Register(worker="w"), NOBODY).result(10)
    with pytest.raises(Fenced):
        push(session, "w", 2, 1, epoch=1)
    push(session, "w", 1, 1, epoch=2)
    session.change(Remove(worker="w"), NOBODY).result(10)
    with pytest.raises(Fenced):
        push(session, "w", 2, 2, epoch=2)
    rounds.read_back(session)
    assert session.version == 2


def test_the_past_of_an_asynchronous_session_can_be_reached(made: Registry) -> None:
    session = create(made, asynchronous(max_staleness=0, on_stale="damp"), arrays(0))
    seen = []
    for seq in (1, 2, 3):
        seen.append(local.params_of(push(session, "a", seq, 0, seq)))
    for version in (1, 2):
        body = {"id": f"f{version}", "version": version}
        made.fork("default", "a", body, NOBODY).result(10)
        forked = rounds.params(made.get("default", f"f{version}"))
        assert all(bytes(forked[n]) == bytes(t) for n, t in seen[version - 1].items())
