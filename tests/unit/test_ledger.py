"""The ledger: which requests were committed before, and what they were answered."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optserve.sessions import ledger as ledger_module
from optserve.sessions.identity import Duplicate, Identity
from optserve.sessions.ledger import KEY_LIFE_S, Ledger
from optserve_client.errors import Conflict, Fenced, Invalid, KeyReused, OutOfSequence

NOW = 1_700_000_000.0
D1, D2 = b"\x01" * 16, b"\xff" * 16


def by_worker(
    seq: int, worker: str = "w1", epoch: int | None = None, digest: bytes = D1
) -> Identity:
    return Identity(worker=worker, epoch=epoch, seq=seq, digest=digest)


def by_key(key: str, digest: bytes = D1) -> Identity:
    return Identity(key=key, digest=digest)


def commit(ledger: Ledger, identity: Identity, lsn: int, time: float = NOW) -> None:
    ledger.commit(identity, applied_version=lsn - 1, lsn=lsn, reply={"version": lsn - 1}, time=time)


def with_seqs(upto: int, worker: str = "w1") -> Ledger:
    ledger = Ledger()
    for seq in range(1, upto + 1):
        assert ledger.check(by_worker(seq, worker), NOW) is None
        commit(ledger, by_worker(seq, worker), seq + 1)
    return ledger


# --- workers -------------------------------------------------------------------------------------


def test_a_worker_is_registered_by_its_first_request() -> None:
    ledger = Ledger()
    assert ledger.position("w1") == (1, 0)
    assert ledger.check(by_worker(1), NOW) is None
    assert ledger.position("w1") == (1, 0)  # a check records nothing
    commit(ledger, by_worker(1), 2)
    assert ledger.position("w1") == (1, 1)


def test_the_next_seq_is_new_with_the_epoch_and_without() -> None:
    ledger = with_seqs(4)
    assert ledger.check(by_worker(5), NOW) is None
    assert ledger.check(by_worker(5, epoch=1), NOW) is None


def test_a_repeat_is_answered_as_it_was() -> None:
    ledger = with_seqs(4)
    for seq in (1, 4):
        want = Duplicate(applied_version=seq, reply={"version": seq}, lsn=seq + 1)
        assert ledger.check(by_worker(seq), NOW) == want
        assert ledger.check(by_worker(seq, epoch=1), NOW) == want


def test_a_refused_request_may_use_its_seq_again_with_another_payload() -> None:
    ledger = with_seqs(4)
    assert ledger.check(by_worker(5, digest=D1), NOW) is None
    assert ledger.check(by_worker(5, digest=D2), NOW) is None


def test_a_gap_is_refused_with_the_expected_seq() -> None:
    with pytest.raises(OutOfSequence) as refused:
        with_seqs(4).check(by_worker(7), NOW)
    assert refused.value.detail == "worker 'w1' sent seq 7, expected 5 (last applied 4)"
    assert refused.value.extra == {"epoch": 1, "last_seq": 4}


def test_an_unknown_worker_must_begin_with_seq_1() -> None:
    with pytest.raises(OutOfSequence) as refused:
        Ledger().check(by_worker(3), NOW)
    assert refused.value.detail == "worker 'w1' sent seq 3, expected 1 (last applied 0)"
    assert refused.value.extra == {"epoch": 1, "last_seq": 0}


def test_the_last_16_results_of_a_worker_are_kept() -> None:
    ledger = with_seqs(40)
    assert [bool(ledger.check(by_worker(seq), NOW)) for seq in range(25, 41)] == [True] * 16
    with pytest.raises(OutOfSequence) as refused:
        ledger.check(by_worker(24), NOW)
    assert refused.value.detail == (
        "worker 'w1' sent seq 24, expected 41 (last applied 40); "
        "that is too long ago to tell what it did"
    )


def test_a_repeat_with_another_payload_is_refused() -> None:
    with pytest.raises(KeyReused) as refused:
        with_seqs(4).check(by_worker(3, digest=D2), NOW)
    assert refused.value.detail == "worker 'w1' sent seq 3 before with another payload"


def test_a_lower_epoch_is_fenced() -> None:
    ledger = Ledger.load({"workers": [row("w1", epoch=3, last_seq=2)], "keys": []})
    with pytest.raises(Fenced) as refused:
        ledger.check(by_worker(3, epoch=2), NOW)
    assert refused.value.detail == "worker 'w1' sent epoch 2, the current one is 3"
    assert refused.value.extra == {"epoch": 3, "last_seq": 2}
    assert ledger.check(by_worker(3), NOW) is None  # left out: the current one


@pytest.mark.parametrize("known", [True, False])
def test_an_epoch_that_was_never_given_is_out_of_sequence(known: bool) -> None:
    ledger = with_seqs(4) if known else Ledger()
    with pytest.raises(OutOfSequence) as refused:
        ledger.check(by_worker(1, epoch=2), NOW)
    assert refused.value.detail == "worker 'w1' sent epoch 2, the highest given is 1"
    assert refused.value.extra == {"epoch": 1, "last_seq": 4 if known else 0}


def test_workers_do_not_share_their_seqs() -> None:
    ledger = with_seqs(4)
    assert ledger.check(by_worker(1, "w2", digest=D2), NOW) is None


def test_what_is_done_to_an_answer_does_not_reach_the_ledger() -> None:
    ledger = with_seqs(1)
    first = ledger.check(by_worker(1), NOW)
    assert first is not None
    first.reply["version"] = 99
    second = ledger.check(by_worker(1), NOW)
    assert second is not None
    assert second.reply == {"version": 1}


# --- keys ----------------------------------------------------------------------------------------


def test_a_key_is_new_once_and_a_duplicate_afterwards() -> None:
    ledger = Ledger()
    assert ledger.check(by_key("k"), NOW) is None
    ledger.commit(by_key("k"), applied_version=None, lsn=2, reply={"a": [1]}, time=NOW)
    assert ledger.check(by_key("k"), NOW) == Duplicate(
        applied_version=None, reply={"a": [1]}, lsn=2
    )
    assert ledger.check(by_key("other"), NOW) is None


def test_a_key_with_another_payload_is_refused() -> None:
    ledger = Ledger()
    commit(ledger, by_key("k"), 2)
    with pytest.raises(KeyReused) as refused:
        ledger.check(by_key("k", D2), NOW)
    assert refused.value.detail == "Idempotency-Key 'k' was used before with another payload"


def test_a_key_lives_for_24_hours() -> None:
    ledger = Ledger()
    commit(ledger, by_key("k"), 2)
    assert ledger.check(by_key("k"), NOW + KEY_LIFE_S) is not None
    late = NOW + KEY_LIFE_S + 1
    assert ledger.check(by_key("k", D2), late) is None
    assert len(ledger.dump()["keys"]) == 1  # only a commit forgets
    commit(ledger, by_key("k2"), 3, late)
    assert [r["key"] for r in ledger.dump()["keys"]] == ["k2"]


def test_a_key_that_expired_can_be_committed_again() -> None:
    ledger = Ledger()
    commit(ledger, by_key("k"), 2)
    late = NOW + KEY_LIFE_S + 1
    commit(ledger, by_key("k", D2), 3, late)
    found = ledger.check(by_key("k", D2), late)
    assert found is not None
    assert found.lsn == 3


def test_the_last_10_000_keys_are_kept() -> None:
    ledger = Ledger()
    for i in range(10_002):
        commit(ledger, by_key(f"k{i}"), i + 2)
    assert ledger.check(by_key("k1"), NOW) is None
    assert ledger.check(by_key("k2"), NOW) is not None
    assert len(ledger.dump()["keys"]) == 10_000


# --- bounds of one session -----------------------------------------------------------------------


def test_results_of_all_workers_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "RESULTS", 5)
    ledger = Ledger()
    for lsn, (worker, seq) in enumerate(
        [("a", 1), ("b", 1), ("a", 2), ("c", 1), ("c", 2), ("c", 3), ("c", 4)], start=2
    ):
        commit(ledger, by_worker(seq, worker), lsn)
    assert ledger.check(by_worker(2, "a"), NOW) is not None
    for worker in ("a", "b"):
        with pytest.raises(OutOfSequence, match="too long ago to tell"):
            ledger.check(by_worker(1, worker), NOW)
    assert ledger.check(by_worker(2, "b"), NOW) is None  # and still goes on


def test_the_workers_that_are_silent_for_longest_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger_module, "WORKERS", 2)
    monkeypatch.setattr(ledger_module, "RESULTS", 2)
    ledger = Ledger()
    commits = [("a", 1), ("b", 1), ("a", 2), ("c", 1)]
    for lsn, (worker, seq) in enumerate(commits, start=2):
        commit(ledger, by_worker(seq, worker), lsn)
    assert [r["worker"] for r in ledger.dump()["workers"]] == ["a", "c"]
    with pytest.raises(OutOfSequence):
        ledger.check(by_worker(2, "b"), NOW)


# --- identities ----------------------------------------------------------------------------------


def test_a_request_without_identity_is_always_new() -> None:
    ledger = Ledger()
    for lsn in (2, 3):
        assert ledger.check(Identity(digest=D1), NOW) is None
        commit(ledger, Identity(digest=D1), lsn)
    assert ledger.dump() == Ledger().dump()


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"worker": "w"}, "worker 'w' needs a seq"),
        ({"worker": "w", "epoch": 1}, "worker 'w' needs a seq"),
        ({"seq": 3}, "seq 3 needs a worker"),
        ({"epoch": 2}, "epoch 2 needs a worker"),
        (
            {"worker": "w", "seq": 1, "key": "k"},
            "send worker and seq or an Idempotency-Key, not both",
        ),
        ({"seq": 1, "key": "k"}, "send worker and seq or an Idempotency-Key, not both"),
        ({"epoch": 1, "key": "k"}, "send worker and seq or an Idempotency-Key, not both"),
        ({"key": ""}, "Idempotency-Key must have 1 to 255 characters, got 0"),
        ({"key": "x" * 256}, "Idempotency-Key must have 1 to 255 characters, got 256"),
        ({"worker": "w", "seq": 0}, "seq must be >= 1, got 0"),
        ({"worker": "w", "seq": 1, "epoch": 0}, "epoch must be >= 1, got 0"),
        ({"worker": "a b", "seq": 1}, "worker must match [A-Za-z0-9._-]{1,128}, got 'a b'"),
        ({"worker": "", "seq": 1}, "worker must match [A-Za-z0-9._-]{1,128}, got ''"),
    ],
)
def test_half_an_identity_is_refused(fields: dict[str, Any], sentence: str) -> None:
    ledger = with_seqs(2)
    before = ledger.dump()
    with pytest.raises(Invalid) as refused:
        ledger.check(Identity(**fields), NOW)
    assert refused.value.detail == sentence
    assert ledger.dump() == before


# --- snapshots and replay ------------------------------------------------------------------------


def row(worker: str, epoch: int, last_seq: int) -> dict[str, Any]:
    return {"worker": worker, "epoch": epoch, "last_seq": last_seq, "results": []}


request = st.one_of(
    st.tuples(st.just("worker"), st.sampled_from("abcd"), st.integers(0, 3)),
    st.tuples(st.just("key"), st.sampled_from("klmnop"), st.integers(0, 3)),
    st.tuples(st.just("none"), st.just(""), st.just(0)),
)


def replay(ledger: Ledger, requests: list[tuple[str, str, int]], first_lsn: int = 2) -> Ledger:
    """Send requests as clients do; ``step`` is how many seqs back, or the digest of a key."""
    for lsn, (kind, name, step) in enumerate(requests, start=first_lsn):
        time = NOW + lsn * KEY_LIFE_S / 8
        if kind == "worker":
            identity = by_worker(ledger.position(name)[1] + 1 - step, name)
        else:
            identity = by_key(name, bytes([step])) if kind == "key" else Identity()
        try:
            duplicate = ledger.check(identity, time)
        except (Conflict, Invalid):
            continue
        if duplicate is None:
            commit(ledger, identity, lsn, time)
    return ledger


@settings(deadline=None)
@given(st.lists(request, max_size=60), st.integers(0, 60), st.booleans())
def test_a_ledger_from_a_snapshot_and_the_rest_equals_the_whole_one(
    requests: list[tuple[str, str, int]], cut: int, tight: bool
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        if tight:
            for name, value in (("RESULTS_PER_WORKER", 3), ("RESULTS", 5), ("WORKERS", 5)):
                patched.setattr(ledger_module, name, value)
        whole = replay(Ledger(), requests)
        half = replay(Ledger(), requests[:cut])
        text = json.dumps(half.dump(), allow_nan=False)
        resumed = replay(Ledger.load(json.loads(text)), requests[cut:], 2 + len(requests[:cut]))
        assert json.dumps(resumed.dump()) == json.dumps(whole.dump())


def test_a_dump_holds_plain_json_values() -> None:
    ledger = with_seqs(2)
    commit(ledger, by_key("k", D2), 9)
    assert ledger.dump() == {
        "workers": [
            {
                "worker": "w1",
                "epoch": 1,
                "last_seq": 2,
                "results": [
                    {
                        "digest": "01" * 16,
                        "applied_version": v,
                        "lsn": v + 1,
                        "reply": {"version": v},
                        "seq": v,
                        "time": 0.0,
                    }
                    for v in (1, 2)
                ],
            }
        ],
        "keys": [
            {
                "key": "k",
                "digest": "ff" * 16,
                "applied_version": 8,
                "lsn": 9,
                "reply": {"version": 8},
                "seq": 0,
                "time": NOW,
            }
        ],
    }
