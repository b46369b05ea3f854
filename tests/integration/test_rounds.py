"""Rounds: the pushes of several workers make one update, whoever is late, repeats or goes away."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch

from optserve.sessions import gathering
from optserve.sessions.registry import Registry
from optserve.sessions.session import Session
from optserve.sessions.step import Step
from optserve_client import wire
from optserve_client.errors import (
    Conflict,
    Invalid,
    KeyReused,
    Nonfinite,
    OptserveError,
    RoundFailed,
    StaleGradient,
    VersionConflict,
)
from tests import local, rounds
from tests.local import NOBODY, Identity, arrays, create, exported
from tests.rounds import (
    Clock,
    Local,
    adamw,
    ended,
    future_of,
    mean,
    params,
    push,
    round_of,
    rows_of,
    sync,
    waits,
    who,
)

ADAMW: dict[str, Any] = {"optimizer": {"name": "AdamW", "lr": 0.1}}


@pytest.fixture
def both() -> Iterator[tuple[Registry, Clock]]:
    with rounds.registry() as made:
        yield made


@pytest.fixture
def made(both: tuple[Registry, Clock]) -> Registry:
    return both[0]


@pytest.fixture
def clock(both: tuple[Registry, Clock]) -> Clock:
    return both[1]


def refused(error: type[OptserveError], session: Session, *args: Any, **fields: Any) -> Any:
    """Send a push that must be refused and leave no trace; return the exception."""
    before = exported(session)
    with pytest.raises(error) as caught:
        push(session, *args, **fields)
    assert exported(session) == before
    return caught.value


# --- a round closes ------------------------------------------------------------------------------


def test_a_round_closes_with_the_last_push_and_answers_everybody(made: Registry) -> None:
    session = create(made, sync(3), arrays(0))
    first, second = push(session, "w2", 1, 0, 1), push(session, "w0", 1, 0, 2)
    assert waits(first)
    assert waits(second)
    replies = [ended(r) for r in (first, second, push(session, "w1", 1, 0, 3))]
    for reply in replies:
        assert reply.scalars["round"] == {
            "number": 1,
            "base_version": 0,
            "workers": ["w0", "w1", "w2"],
            "missing": 0,
            "closed_by": "count",
        }
        assert (reply.scalars["version"], reply.scalars["applied_version"]) == (1, 1)
        assert (reply.scalars["applied"], reply.scalars["duplicate"]) == (True, False)
        assert (reply.scalars["updates"], reply.scalars["skipped"]) == (1, None)
    oracle = Local(arrays(0))
    oracle.step(mean([arrays(2), arrays(3), arrays(1)]))
    for reply in replies:
        oracle.check(local.params_of(reply))
    rounds.read_back(session)


def test_what_is_known_of_an_open_round_comes_with_the_push(made: Registry, clock: Clock) -> None:
    session = create(made, sync(3, deadline_s=30), arrays(0))
    opened_at = clock.time
    push(session, "b", 1, 0)
    clock.advance(1)
    reply = push(session, "a", 1, 0)
    assert reply.params is None
    assert (reply.scalars["applied"], reply.scalars["applied_version"]) == (False, None)
    assert (reply.scalars["version"], reply.scalars["updates"]) == (0, 0)
    assert reply.scalars["round"] == {
        "number": 1,
        "base_version": 0,
        "contributed": ["a", "b"],
        "count": 3,
        "deadline_at": opened_at + 30,
    }
    assert round_of(session) == {
        **reply.scalars["round"],
        "quorum": 3,
        "opened_at": opened_at,
    }


def test_rounds_are_bit_equal_to_one_process_with_the_same_gradients(made: Registry) -> None:
    session, oracle = create(made, {**sync(4), **ADAMW}, arrays(0)), Local(arrays(0), adamw)
    for version in range(10):
        seeds = {f"w{i}": 10 * version + i for i in range(4)}
        order = np.random.default_rng(version).permutation(4)
        for i in order:
            reply = push(session, f"w{i}", version + 1, version, seeds[f"w{i}"])
        oracle.step(mean([arrays(seed) for seed in seeds.values()]))
        oracle.check(local.params_of(ended(reply)))
        assert session.version == version + 1
    rounds.read_back(session)


#: Magnitudes whose sum depends on its order.
UNEVEN = {"w10": 1e8, "w2": 1.0, "w1": -1e8}


def test_the_order_of_arrival_changes_no_bit_that_of_the_names_does(made: Registry) -> None:
    start = {"p": np.zeros(3, "f4")}
    seen = set()
    for i, order in enumerate(itertools.permutations(UNEVEN)):
        session = create(made, sync(3, reduce="sum"), start, f"s{i}")
        for name in order:
            reply = push(session, name, 1, 0, {"p": np.full(3, UNEVEN[name], "f4")})
        seen.add(bytes(wire.as_bytes(local.params_of(ended(reply))["p"])))
    # w1, w10, w2 in byte order: (-1e8 + 1e8) + 1; by number w2 would come before w10.
    assert seen == {np.full(3, -0.5, "f4").tobytes()}


@pytest.mark.parametrize(
    ("fields", "combine"),
    [
        ({"reduce": "sum"}, lambda g, w: sum(g[1:], g[0])),
        ({"reduce": "median"}, lambda g, w: np.median(np.stack(g), axis=0)),
        (
            {"reduce": "trimmed_mean", "trim": 0.25},
            lambda g, w: (lambda s: ((s[1] + s[2]) + s[3]) / np.float32(3))(
                np.sort(np.stack(g), axis=0)
            ),
        ),
        (
            {"reduce": "weighted_mean"},
            lambda g, w: sum((a * np.float32(b) for a, b in zip(g[1:], w[1:], strict=True)),
                             g[0] * np.float32(w[0])) / np.float32(sum(w)),
        ),
    ],
    ids=lambda part: part.get("reduce", "") if isinstance(part, dict) else "",
)  # fmt: skip
def test_each_reduction_reaches_the_optimizer(
    made: Registry, fields: dict[str, Any], combine: Any
) -> None:
    session, oracle = (
        create(made, {**sync(5, **fields), **ADAMW}, arrays(0)),
        Local(arrays(0), adamw),
    )
    weights = [1.0, 32.0, 0.3, 7.0, 128.0]
    weighted = fields["reduce"] == "weighted_mean"
    for version in range(3):
        for i in (3, 1, 4, 0, 2):
            more = {"weight": weights[i]} if weighted else {}
            reply = push(session, f"w{i}", version + 1, version, 7 * version + i, **more)
        grads = [arrays(7 * version + i) for i in range(5)]
        oracle.step({n: np.asarray(combine([g[n] for g in grads], weights)) for n in grads[0]})
        oracle.check(local.params_of(ended(reply)))
    rounds.read_back(session)


def test_each_reply_says_what_the_own_push_weighed(made: Registry) -> None:
    session = create(made, sync(2, reduce="weighted_mean"), arrays(0))
    first = push(session, "a", 1, 0, weight=3.0)
    push(session, "b", 1, 0, weight=5.0)
    assert ended(first).scalars["round"]["weight"] == 3.0
    for name, weight in (("a", 3.0), ("b", 5.0)):
        again = push(session, name, 1, 0, weight=weight)
        assert again.scalars["duplicate"] is True
        assert again.scalars["round"]["weight"] == weight


def test_each_push_is_divided_by_its_own_loss_scale(made: Registry) -> None:
    session, oracle = create(made, sync(2), arrays(0)), Local(arrays(0))
    scaled = {n: g * np.float32(1024) for n, g in arrays(2).items()}
    push(session, "a", 1, 0, 1)
    reply = push(session, "b", 1, 0, scaled, loss_scale=1024.0)
    oracle.step(mean([arrays(1), arrays(2)]))
    oracle.check(local.params_of(ended(reply)))
    rounds.read_back(session)


def test_a_gradient_that_some_lack_counts_as_zero_and_none_at_all_is_none(made: Registry) -> None:
    session, oracle = create(made, {**sync(2), **ADAMW}, arrays(0)), Local(arrays(0), adamw)
    push(session, "a", 1, 0, {**arrays(1), "w": None, "b": None})
    reply = push(session, "b", 1, 0, {**arrays(2), "b": None})
    zero = {n: np.zeros_like(g) for n, g in arrays(1).items()}
    combined: dict[str, Any] = mean([{**arrays(1), "w": zero["w"]}, arrays(2)])
    oracle.step({**combined, "b": None})
    oracle.check(local.params_of(ended(reply)))
    rounds.read_back(session)


def test_rounds_in_bfloat16_combine_in_float32(made: Registry) -> None:
    half = lambda seed: {n: wire.Bits.bfloat16(g) for n, g in arrays(seed).items()}
    session = create(made, {**sync(3), **ADAMW}, half(0))
    leaves = local.leaves({n: t.to_float32() for n, t in half(0).items()}, torch.bfloat16)
    optimizer = adamw(list(leaves.values()))
    for i in range(3):
        reply = push(session, f"w{i}", 1, 0, half(i + 1))
    combined = mean([{n: t.to_float32() for n, t in half(i + 1).items()} for i in range(3)])
    local.set_grads(leaves, combined)  # which rounds once
    optimizer.step()
    local.assert_equal(local.params_of(ended(reply)), leaves)
    rounds.read_back(session)


def test_sparse_pushes_combine_row_by_row(made: Registry) -> None:
    start = {"e": np.zeros((4, 2), "f4")}
    body = {**sync(2), "optimizer": {"name": "SparseAdam", "lr": 0.1}, "sparse": ["e"]}
    session = create(made, body, start)
    leaf = torch.nn.Parameter(torch.zeros(4, 2))
    optimizer = torch.optim.SparseAdam([leaf], lr=0.1)
    for version in range(2):
        for name, row in (("b", 3), ("a", 1)):
            coo = {"indices": [[row, 2]], "values": [[1.0, 2.0], [3.0, 4.0]], "shape": [4, 2]}
            step = session.step_from_json({"grads": {"e": coo}, "base_version": version}, b"")
            reply = session.step(step, who(name, version + 1)).result(10)
        values = torch.tensor([[0.5, 1.0], [3.0, 4.0], [0.5, 1.0]])
        leaf.grad = torch.sparse_coo_tensor(
            [[1, 2, 3]], values, (4, 2), check_invariants=True
        ).coalesce()
        optimizer.step()
        assert torch.equal(torch.tensor(local.params_of(ended(reply))["e"]), leaf.detach())
    rounds.read_back(session)


# --- wire bytes ----------------------------------------------------------------------------------


def binary(session: Session, tensors: dict[str, Any], chunk: int = 7, **fields: Any) -> Step:
    """Feed a binary body in small pieces."""
    import json

    frame = b"".join(wire.encode(tensors, {wire.META_KEY: json.dumps(fields)}))
    intake = session.intake(2**20)
    for at in range(0, len(frame), chunk):
        intake.feed(frame[at : at + chunk])
    return intake.finish()


@pytest.mark.parametrize("how", ["as the session", "another order", "float16", "bfloat16", "none"])
def test_binary_pushes_combine_like_json_ones(made: Registry, how: str) -> None:
    session, oracle = create(made, sync(2), arrays(0)), Local(arrays(0))
    grads: dict[str, Any] = arrays(1)
    sent: dict[str, Any] = {f"grad/{n}": g for n, g in grads.items()}
    more: dict[str, Any] = {}
    if how == "another order":
        sent = dict(reversed(sent.items()))
    elif how in ("float16", "bfloat16"):
        sent = {n: wire.narrow(g, wire.dtype_tag(how)) for n, g in sent.items()}
        grads = {n: wire.widen(sent[f"grad/{n}"], "F32", n) for n in grads}
    elif how == "none":
        del sent["grad/b"]
        grads, more = {**grads, "b": np.zeros_like(grads["b"])}, {"none": ["b"]}
    step = binary(session, sent, base_version=0, worker="a", seq=1, **more)
    first = session.step(step, who("a", 1, how)).result(10)
    reply = push(session, "b", 1, 0, 2)
    oracle.step(mean([grads, arrays(2)]))
    oracle.check(local.params_of(ended(reply)))
    oracle.check(local.params_of(ended(first)))
    rounds.read_back(session)


def test_a_nan_that_comes_in_pieces_is_found_and_named(made: Registry) -> None:
    session = create(made, sync(2), arrays(0))
    bad = arrays(1)
    bad["w"][3, 4] = np.nan
    for chunk in (1, 7, 1000):
        step = binary(session, {f"grad/{n}": g for n, g in bad.items()}, chunk, base_version=0)
        with pytest.raises(Nonfinite, match=r"grads\['w'\]\[3, 4\] is nan, must be finite"):
            session.step(step, who("a", 1)).result(10)
    assert round_of(session) is None


@pytest.mark.parametrize("push_kind", ["json", "binary"])
def test_deltas_are_minus_the_gradient(made: Registry, push_kind: str) -> None:
    session, oracle = create(made, sync(2, push="deltas"), arrays(0)), Local(arrays(0))
    for seq, name in enumerate("ab", start=1):
        delta = {n: -g for n, g in arrays(seq).items()}
        if push_kind == "json":
            reply = push(session, name, 1, 0, delta, kind="deltas")
        else:
            sent = {f"delta/{n}": g for n, g in delta.items()}
            reply = session.step(binary(session, sent, base_version=0), who(name, 1)).result(10)
    oracle.step(mean([arrays(1), arrays(2)]))
    oracle.check(local.params_of(ended(reply)))
    rounds.read_back(session)


def test_gradients_are_refused_where_deltas_are_wanted_and_the_other_way_round(
    made: Registry,
) -> None:
    wants_deltas = create(made, sync(2, push="deltas"), arrays(0), "d")
    wants_grads = create(made, sync(2), arrays(0), "g")
    with pytest.raises(Invalid):
        push(wants_deltas, "a", 1, 0)
    with pytest.raises(Invalid):
        push(wants_grads, "a", 1, 0, kind="deltas")
    with pytest.raises(Invalid):
        binary(wants_deltas, {f"grad/{n}": g for n, g in arrays(1).items()})


# --- the deadline --------------------------------------------------------------------------------


def test_a_quorum_closes_the_round_at_the_deadline(made: Registry, clock: Clock) -> None:
    session = create(made, sync(4, quorum=2, deadline_s=30), arrays(0))
    oracle = Local(arrays(0))
    first = push(session, "w3", 1, 0, 1)
    clock.advance(29, session)
    second = push(session, "w1", 1, 0, 2)
    clock.advance(0.5, session)
    assert waits(first)
    clock.advance(0.5, session)
    oracle.step(mean([arrays(2), arrays(1)]))
    for reply in (ended(first), ended(second)):
        told = reply.scalars["round"]
        assert (told["workers"], told["missing"]) == (["w1", "w3"], 2)
        assert told["closed_by"] == "deadline"
        oracle.check(local.params_of(reply))
    rounds.read_back(session)


def test_without_a_quorum_the_round_fails_and_drops_its_pushes(
    made: Registry, clock: Clock
) -> None:
    session = create(made, sync(3, quorum=2, deadline_s=30), arrays(0))
    start = params(session)
    reply = push(session, "a", 1, 0, 1)
    clock.advance(30, session)
    with pytest.raises(RoundFailed) as failed:
        ended(reply)
    assert failed.value.detail == (
        "round 1 failed: 1 of 3 workers had pushed after 30 s, 2 are needed"
    )
    assert failed.value.extra == {"version": 0, "round": 1}
    assert round_of(session) is None
    assert session.version == 0
    assert all(np.array_equal(start[n], p) for n, p in params(session).items())
    rounds.read_back(session)


@pytest.mark.parametrize("again", ["the same", "another payload", "skipped"])
def test_after_a_failed_round_its_seq_is_used_again_or_skipped(
    made: Registry, clock: Clock, again: str
) -> None:
    session, oracle = create(made, sync(2, deadline_s=30), arrays(0)), Local(arrays(0))
    push(session, "a", 1, 0, 1)
    clock.advance(30, session)
    seq, seed = {"the same": (1, 1), "another payload": (1, 5), "skipped": (2, 1)}[again]
    second = push(session, "a", seq, 0, seed)
    assert second.scalars["duplicate"] is False
    assert second.scalars["round"]["number"] == 2
    reply = push(session, "b", 1, 0, 2)
    oracle.step(mean([arrays(seed), arrays(2)]))
    oracle.check(local.params_of(ended(reply)))
    assert ended(second).scalars["round"]["number"] == 2
    if again == "skipped":
        refused(RoundFailed, session, "a", 1, 0, 1)
        refused(KeyReused, session, "a", 1, 0, 9)
    rounds.read_back(session)


def test_a_failed_round_frees_the_number_also_for_another_request(
    made: Registry, clock: Clock
) -> None:
    session = create(made, sync(2, deadline_s=30), arrays(0))
    push(session, "a", 1, 0, 1)
    clock.advance(30, session)
    local.patch(session, {"name": "n"}, who("a", 1, "patch")).result(10)
    assert push(session, "a", 2, 0, 1).scalars["round"]["contributed"] == ["a"]
    rounds.read_back(session)


def test_the_deadline_counts_from_the_first_push_of_the_round(made: Registry, clock: Clock) -> None:
    session = create(made, sync(2, deadline_s=30), arrays(0))
    for version in range(3):
        clock.advance(100, session)
        first = push(session, "a", version + 1, version)
        clock.advance(29, session)
        assert waits(first)
        ended(push(session, "b", version + 1, version))
    last = push(session, "a", 4, 3)
    clock.advance(29, session)
    assert waits(last)
    clock.advance(1, session)
    with pytest.raises(RoundFailed):
        ended(last)


def test_a_wait_is_as_long_as_asked_for_or_a_little_longer_than_the_deadline(
    made: Registry, clock: Clock
) -> None:
    session = create(made, sync(5, deadline_s=30), arrays(0))
    assert push(session, "a", 1, 0, wait_s=0).pending.wait_s == 0  # type: ignore[union-attr]
    assert push(session, "b", 1, 0, wait_s=7.5).pending.wait_s == 7.5  # type: ignore[union-attr]
    clock.advance(10)
    waiting = push(session, "c", 1, 0).pending
    assert waiting is not None
    assert waiting.wait_s == 20 + gathering.PATIENCE_S


def test_who_does_not_wait_counts_all_the_same(made: Registry) -> None:
    session, oracle = create(made, sync(2), arrays(0)), Local(arrays(0))
    first = push(session, "a", 1, 0, 1, wait_s=0)
    future_of(first).cancel()
    reply = push(session, "b", 1, 0, 2)
    oracle.step(mean([arrays(1), arrays(2)]))
    oracle.check(local.params_of(ended(reply)))
    with pytest.raises(CancelledError):
        ended(first)


# --- late, early, twice --------------------------------------------------------------------------


def test_a_push_for_a_round_that_is_over_is_late(made: Registry) -> None:
    session = create(made, sync(2), arrays(0))
    for name in "ab":
        push(session, name, 1, 0)
    late = refused(StaleGradient, session, "c", 1, 0)
    assert late.detail == ("base_version is 0, the session's version is 1; the round is over")
    assert late.extra == {"version": 1, "base_version": 0, "updates": 1}
    assert push(session, "c", 1, 1).scalars["duplicate"] is False


def test_a_late_push_gets_the_params_only_if_it_says_so(made: Registry) -> None:
    session = create(made, sync(1), arrays(0))
    ended(push(session, "a", 1, 0))
    reply = push(session, "b", 1, 0, **{"return": "params"})
    assert isinstance(reply.refusal, StaleGradient)
    assert reply.scalars == {}
    local.assert_equal(
        local.params_of(reply), {n: torch.tensor(p) for n, p in params(session).items()}
    )
    for wanted in ({}, {"return": "none"}, {"return": "delta"}):
        refused(StaleGradient, session, "b", 1, 0, **wanted)


def test_a_push_for_a_round_to_come_is_refused(made: Registry) -> None:
    session = create(made, sync(2), arrays(0))
    assert refused(VersionConflict, session, "a", 1, 1).extra == {"version": 0}


def test_a_worker_pushes_once_into_a_round(made: Registry) -> None:
    session = create(made, sync(2), arrays(0))
    push(session, "a", 1, 0, 1)
    second = refused(Conflict, session, "a", 2, 0, 2)
    assert second.detail == "worker 'a' has pushed into round 1 already"
    assert second.code == "conflict"
    ended(push(session, "b", 1, 0, 2))
    assert push(session, "a", 2, 1, 2).scalars["round"]["number"] == 2


def test_a_repeat_waits_with_the_first_one_and_counts_once(made: Registry) -> None:
    session, oracle = create(made, sync(2), arrays(0)), Local(arrays(0))
    first, repeat = push(session, "a", 1, 0, 1), push(session, "a", 1, 0, 1)
    assert repeat.scalars["duplicate"] is True
    assert repeat.scalars["round"]["contributed"] == ["a"]
    reply = push(session, "b", 1, 0, 2)
    oracle.step(mean([arrays(1), arrays(2)]))
    for got, duplicate in ((first, False), (repeat, True), (reply, False)):
        assert ended(got).scalars["duplicate"] is duplicate
        assert ended(got).scalars["applied_version"] == 1
        oracle.check(local.params_of(ended(got)))
    assert rows_of(session)["a"]["contributions"] == 1


@pytest.mark.parametrize("after", ["at once", "reading back", "later rounds"])
def test_a_repeat_after_the_round_is_told_what_the_round_made(made: Registry, after: str) -> None:
    session = create(made, sync(2), arrays(0))
    push(session, "a", 1, 0, 1)
    first = ended(push(session, "b", 1, 0, 2))
    if after == "reading back":
        session.in_turn(session._held.drop).result(10)
    if after == "later rounds":
        for name in "ab":
            push(session, name, 2, 1)
    repeat = push(session, "b", 1, 0, 2)
    assert repeat.pending is None
    assert repeat.scalars["duplicate"] is True
    assert repeat.scalars["applied_version"] == 1
    assert repeat.scalars["round"] == first.scalars["round"]
    assert repeat.scalars["applied"] is True
    assert repeat.scalars["version"] == session.version
    local.assert_equal(
        local.params_of(repeat), {n: torch.tensor(p) for n, p in params(session).items()}
    )
    refused(KeyReused, session, "b", 1, 0, 3)


def test_a_repeat_may_want_another_form_of_the_answer(made: Registry) -> None:
    """The digest is of the whole body, so these are told apart: another form is another request."""
    session = create(made, sync(2), arrays(0))
    push(session, "a", 1, 0, 1)
    refused(KeyReused, session, "a", 1, 0, 1, **{"return": "none"})


def test_each_gets_the_form_of_params_that_it_asked_for(made: Registry) -> None:
    session = create(made, sync(4), arrays(0))
    replies = {
        wanted: push(session, wanted, 1, 0, i, **{"return": wanted}, **more)
        for i, (wanted, more) in enumerate(
            {"params": {"return_dtype": "float16"}, "delta": {}, "none": {}}.items()
        )
    }
    full = ended(push(session, "x", 1, 0, 9))
    new, old = local.params_of(full), arrays(0)
    narrow = ended(replies["params"])
    assert narrow.dtype == "float16"
    delta = local.params_of(ended(replies["delta"]))
    assert ended(replies["delta"]).returned == "delta"
    for name in new:
        assert np.array_equal(delta[name], np.asarray(new[name]) - old[name])
    assert ended(replies["none"]).params is None


def test_an_open_round_is_in_the_journal(made: Registry) -> None:
    session, oracle = create(made, {**sync(3), **ADAMW}, arrays(0)), Local(arrays(0), adamw)
    push(session, "b", 1, 0, 1)
    push(session, "a", 1, 0, 2)
    before = round_of(session)
    rounds.read_back(session)
    assert round_of(session) == before
    repeat = push(session, "b", 1, 0, 1)
    assert repeat.scalars["duplicate"] is True
    reply = push(session, "c", 1, 0, 3)
    oracle.step(mean([arrays(2), arrays(1), arrays(3)]))
    oracle.check(local.params_of(ended(reply)))
    oracle.check(local.params_of(ended(repeat)))
    rounds.read_back(session)


def test_who_waits_goes_on_waiting_while_the_state_is_read_back(
    made: Registry, clock: Clock
) -> None:
    session = create(made, sync(2, deadline_s=30), arrays(0))
    waiting = push(session, "a", 1, 0, 1)
    session.in_turn(session._held.drop).result(10)
    clock.advance(1, session)
    ended(push(session, "b", 1, 0, 2))
    assert ended(waiting).scalars["applied_version"] == 1


def test_a_round_ends_in_time_though_its_state_was_dropped(made: Registry, clock: Clock) -> None:
    session = create(made, sync(2, deadline_s=30), arrays(0))
    waiting = push(session, "a", 1, 0, 1)
    session.in_turn(session._held.drop).result(10)
    clock.advance(30, session)
    with pytest.raises(RoundFailed):
        ended(waiting)


# --- what a push needs ---------------------------------------------------------------------------

NEEDS: list[tuple[dict[str, Any], type[OptserveError], str]] = [
    ({"base_version": None}, Invalid,
        "base_version is missing: it tells for which round the push is"),
    ({"dry_run": True}, Invalid, "dry_run cannot be used in a round"),
    ({"abandon": True}, Invalid, "abandon cannot be used in a round"),
    ({"weight": 2.0}, Invalid, "weight has no effect with reduce 'mean'"),
    ({"params": arrays(3)}, Conflict,
        "params cannot come with a push into a round: use PUT params between two rounds"),
    ({"groups": [{}, {}]}, Invalid, "groups has 2 entries and the session has 1 groups"),
    ({"groups": [{"momentum": -1}]}, Invalid, "groups[0].momentum must be >= 0, got -1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "error", "sentence"), NEEDS, ids=lambda p: str(p)[:20])
def test_what_makes_no_sense_in_a_round_is_refused(
    made: Registry, fields: dict[str, Any], error: type[OptserveError], sentence: str
) -> None:
    session = create(made, sync(2), arrays(0))
    if "params" in fields:
        fields = {"params": local.as_json(fields["params"])}
    body = {"grads": local.as_json(arrays(1)), "base_version": 0, **fields}
    before = exported(session)
    with pytest.raises(error) as caught:
        session.step(session.step_from_json(body, b""), who("a", 1)).result(10)
    assert caught.value.detail == sentence
    assert exported(session) == before
    assert push(session, "a", 1, 0).scalars["duplicate"] is False  # its seq is still free


@pytest.mark.parametrize(
    "identity", [NOBODY, Identity(key="k")], ids=["nobody", "an Idempotency-Key"]
)
def test_a_push_needs_a_worker_and_its_number(made: Registry, identity: Identity) -> None:
    session = create(made, sync(2), arrays(0))
    with pytest.raises(Invalid, match="a push into a round needs worker and seq"):
        local.step(session, arrays(1), identity, base_version=0)


def test_a_weighted_mean_needs_a_weight(made: Registry) -> None:
    session = create(made, sync(2, reduce="weighted_mean"), arrays(0))
    assert refused(Invalid, session, "a", 1, 0).detail == (
        "weight is missing: the session's reduce is 'weighted_mean'"
    )


CREATES: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": "LBFGS"}, "workers cannot be used with LBFGS"),
    ({"accumulate": 2},
        "accumulate cannot be used with rounds: workers.count says how many pushes make an "
        "update"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "sentence"), CREATES, ids=lambda p: str(p)[:20])
def test_what_cannot_go_with_rounds_is_refused_at_creation_and_later(
    made: Registry, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(Invalid) as caught:
        create(made, {**sync(2), **fields}, arrays(0))
    assert caught.value.detail == sentence
    body = {"optimizer": {"name": "SGD", "lr": 0.5}, **fields}
    session = create(made, body, arrays(0))
    with pytest.raises(Invalid) as caught:
        local.patch(session, {"workers": sync(2)["workers"]}).result(10)
    assert caught.value.detail == sentence


def test_medians_of_sparse_gradients_are_refused(made: Registry) -> None:
    body = {**sync(2, reduce="median"), "optimizer": "SparseAdam", "sparse": ["e"]}
    with pytest.raises(Invalid, match="'median' cannot be used with sparse gradients"):
        create(made, body, {"e": np.zeros((4, 2), "f4")})


# --- NaN and Infinity ----------------------------------------------------------------------------


def test_a_push_that_is_not_finite_is_refused_and_its_seq_is_free(made: Registry) -> None:
    session = create(made, sync(2), arrays(0))
    bad = {**arrays(1), "s": np.array(np.inf, "f4")}
    assert refused(Nonfinite, session, "a", 1, 0, bad).detail == (
        "grads['s'] is inf, must be finite"
    )
    assert push(session, "a", 1, 0, 1).scalars["round"]["contributed"] == ["a"]


def test_with_a_loss_scale_it_is_skipped_and_the_worker_pushes_again(made: Registry) -> None:
    session, oracle = create(made, sync(2), arrays(0)), Local(arrays(0))
    bad = {**arrays(1), "s": np.array(np.inf, "f4")}
    skipped = push(session, "a", 1, 0, bad, loss_scale=2.0)
    assert skipped.pending is None
    assert skipped.scalars["skipped"] == "nonfinite"
    assert (skipped.scalars["applied"], skipped.scalars["applied_version"]) == (False, None)
    assert push(session, "a", 1, 0, bad, loss_scale=2.0).scalars["duplicate"] is True
    assert round_of(session) is None
    push(session, "a", 2, 0, 1)
    reply = push(session, "b", 1, 0, 2)
    oracle.step(mean([arrays(1), arrays(2)]))
    oracle.check(local.params_of(ended(reply)))
    rounds.read_back(session)


def test_finite_pushes_with_an_infinite_sum_close_the_round_without_an_update(
    made: Registry,
) -> None:
    session = create(made, {**sync(2, reduce="sum"), **ADAMW}, arrays(0))
    huge = {n: np.full_like(g, 3e38) for n, g in arrays(0).items()}
    push(session, "a", 1, 0, huge)
    reply = ended(push(session, "b", 1, 0, huge))
    assert (reply.scalars["applied"], reply.scalars["skipped"]) == (False, "nonfinite")
    assert (reply.scalars["version"], reply.scalars["applied_version"]) == (1, 1)
    assert reply.scalars["updates"] == 0
    assert reply.scalars["detail"] == "grads['w'][0, 0] is inf, must be finite"
    rounds.read_back(session)
    push(session, "a", 2, 1, 1)
    assert ended(push(session, "b", 2, 1, 2)).scalars["updates"] == 1
    rounds.read_back(session)


# --- clip, averages, schedules -------------------------------------------------------------------


def test_a_round_is_one_update_for_all_that_follows_updates(made: Registry) -> None:
    body = {
        **sync(2),
        **ADAMW,
        "scheduler": {"name": "ReduceLROnPlateau", "patience": 0, "factor": 0.5,
                      "advance": "step", "monitor": "acc", "mode": "max"},
        "clip_grad_norm": 0.5,
        "ema": {"decay": 0.75},
        "best": {"monitor": "loss"},
    }  # fmt: skip
    session, oracle = create(made, body, arrays(0)), Local(arrays(0), adamw)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        oracle.optimizer, mode="max", patience=0, factor=0.5
    )
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.75)
    ema: list[torch.Tensor] = []
    losses, best = [[4.0, 2.0], [1.0, 1.0], [8.0, 0.5]], []
    for version, pair in enumerate(losses):
        best.append({n: p.copy() for n, p in params(session).items()})
        for i, (name, loss) in enumerate(zip("ba", pair, strict=True)):
            metrics = {"acc": loss, "only_a": 3.0} if name == "a" else {"acc": loss}
            reply = push(session, name, version + 1, version, 10 * version + i,
                         loss=loss, metrics=metrics)  # fmt: skip
        combined = mean([arrays(10 * version + 1), arrays(10 * version)])
        local.set_grads(oracle.leaves, combined)
        torch.nn.utils.clip_grad_norm_(list(oracle.leaves.values()), 0.5)
        oracle.optimizer.step()
        now = [leaf.detach() for leaf in oracle.leaves.values()]
        if version == 0:  # as AveragedModel does
            ema = [leaf.clone() for leaf in now]
        else:
            average(ema, now, version)
        schedule.step((pair[0] + pair[1]) / 2)
        told = ended(reply).scalars
        assert told["scheduler"]["next_lr"] == [oracle.optimizer.param_groups[0]["lr"]]
        oracle.check(local.params_of(ended(reply)))
    rows = session.history(0, 10)
    assert [row["loss"] for row in rows] == [3.0, 1.0, 4.25]
    assert [row["metrics"] for row in rows] == [
        {"acc": (a + b) / 2, "only_a": 3.0} for a, b in losses
    ]
    kept = session.published("best").result(10).arrays()
    assert all(np.array_equal(kept[n], p) for n, p in best[1].items())
    averaged = session.published("ema").result(10).arrays()
    assert all(torch.equal(torch.tensor(t), e) for t, e in zip(averaged.values(), ema, strict=True))
    rounds.read_back(session)


def test_a_push_must_bring_what_the_scheduler_follows(made: Registry) -> None:
    scheduler = {"name": "ReduceLROnPlateau", "advance": "step", "monitor": "acc"}
    session = create(made, {**sync(2), "scheduler": scheduler}, arrays(0))
    assert refused(Invalid, session, "a", 1, 0).detail == (
        "the scheduler follows 'acc', which this push does not send"
    )


def test_hyperparameters_of_several_pushes_are_assigned_in_the_order_of_the_names(
    made: Registry,
) -> None:
    session = create(made, {**sync(3), **ADAMW}, arrays(0))
    push(session, "w2", 1, 0, groups=[{"lr": 0.25, "betas": [0.5, 0.75]}])
    push(session, "w10", 1, 0, groups=[{"lr": 0.125, "eps": 1e-4}])
    told = ended(push(session, "w1", 1, 0)).scalars["groups"][0]
    assert (told["lr"], told["betas"], told["eps"]) == (0.25, [0.5, 0.75], 1e-4)
    rounds.read_back(session)
    for name in ("w1", "w2", "w3"):
        reply = push(session, name, 2 if name != "w3" else 1, 1)
    assert ended(reply).scalars["groups"][0]["lr"] == 0.25
    rounds.read_back(session)


def test_hyperparameters_of_a_round_that_fails_stay_as_they_were(
    made: Registry, clock: Clock
) -> None:
    session = create(made, sync(2, deadline_s=30), arrays(0))
    push(session, "a", 1, 0, groups=[{"lr": 0.25}])
    clock.advance(30, session)
    assert session.status().result(10)["groups"][0]["lr"] == 0.5
    rounds.read_back(session)


def test_a_schedule_that_cannot_go_on_fails_the_round_and_costs_nothing(made: Registry) -> None:
    scheduler = {"name": "LambdaLR", "lr_lambda": "1 / (4 - epoch)", "advance": "step"}
    session = create(made, {**sync(2), "scheduler": scheduler}, arrays(0))
    for version in range(3):
        for name in "ab":
            push(session, name, version + 1, version)
    start = params(session)
    first = push(session, "a", 4, 3)
    last = push(session, "b", 4, 3)
    for reply in (first, last):
        with pytest.raises(RoundFailed, match=r"round 4 failed: .*1 / "):
            ended(reply)
    assert session.version == 3
    assert all(np.array_equal(start[n], p) for n, p in params(session).items())
    rounds.read_back(session)
    local.put_scheduler(session, None).result(10)
    push(session, "a", 4, 3)
    assert ended(push(session, "b", 5, 3)).scalars["version"] == 4
