"""The ledger: which requests were committed before, and what they were answered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from optserve.sessions import ledger as ledger_module
from optserve.sessions.identity import Duplicate, Identity
from optserve.sessions.ledger import KEY_LIFE_S, Ledger
from optserve_client.errors import (
    Conflict,
    Fenced,
    Invalid,
    KeyReused,
    OptserveError,
    OutOfSequence,
    RoundFailed,
    WorkerNotFound,
)

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
                        "failed": False,
                    }
                    for v in (1, 2)
                ],
                "removed": False,
                "contributions": 0,
                "version": None,
                "seen": NOW,
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
                "failed": False,
            }
        ],
    }


# --- registration and removal --------------------------------------------------------------------


def test_a_registration_begins_an_epoch_and_fences_the_one_before() -> None:
    ledger = with_seqs(4)
    assert ledger.next_epoch("w1") == 2
    ledger.register("w1", 2, NOW + 1)
    assert ledger.position("w1") == (2, 0)
    with pytest.raises(Fenced) as refused:
        ledger.check(by_worker(5, epoch=1), NOW)
    assert refused.value.extra == {"epoch": 2, "last_seq": 0}
    assert ledger.check(by_worker(1, epoch=2, digest=D2), NOW) is None
    with pytest.raises(OutOfSequence):  # what an older one did is nothing that this one repeats
        ledger.check(by_worker(4, epoch=2), NOW)


def test_who_was_never_heard_of_registers_into_epoch_1() -> None:
    ledger = Ledger()
    assert ledger.next_epoch("w1") == 1
    ledger.register("w1", 1, NOW)
    assert ledger.position("w1") == (1, 0)
    assert ledger.check(by_worker(1, epoch=1), NOW) is None


def test_a_removed_worker_is_fenced_until_it_registers() -> None:
    ledger = with_seqs(4)
    ledger.remove("w1")
    for identity in (by_worker(4), by_worker(5), by_worker(5, epoch=1), by_worker(1, epoch=2)):
        with pytest.raises(Fenced) as refused:
            ledger.check(identity, NOW)
        assert refused.value.detail == "worker 'w1' was removed; it has to register again"
        assert refused.value.extra == {"epoch": 1, "last_seq": 4, "removed": True}
    assert list(ledger.workers()) == []
    assert ledger.next_epoch("w1") == 2
    ledger.register("w1", 2, NOW)
    assert ledger.check(by_worker(1, epoch=2), NOW) is None
    with pytest.raises(Fenced):
        ledger.check(by_worker(5, epoch=1), NOW)


def test_an_older_namesake_of_a_removed_worker_is_not_asked_to_register() -> None:
    ledger = with_seqs(4)
    ledger.register("w1", 2, NOW)
    ledger.remove("w1")
    with pytest.raises(Fenced, match="sent epoch 1, the current one is 2") as refused:
        ledger.check(by_worker(5, epoch=1), NOW)
    assert "removed" not in refused.value.extra


def test_only_who_is_there_can_be_removed() -> None:
    ledger = with_seqs(1)
    ledger.check_known("w1")
    ledger.remove("w1")
    for name in ("w1", "w2"):
        with pytest.raises(WorkerNotFound) as refused:
            ledger.check_known(name)
        assert refused.value.detail == f"no worker {name!r}"


def test_the_list_says_what_is_known_of_each_in_byte_order_of_the_names() -> None:
    ledger = Ledger()
    for lsn, name in enumerate(["w2", "w10", "W"], start=2):
        commit(ledger, by_worker(1, name), lsn, NOW + lsn)
    ledger.pushed("w10", 7)
    ledger.pushed("w10", None)
    ledger.register("w2", 2, NOW + 9)
    rows = list(ledger.workers())
    assert [row["worker"] for row in rows] == ["W", "w10", "w2"]
    assert rows[1] == {
        "worker": "w10",
        "epoch": 1,
        "last_seq": 1,
        "version": None,
        "contributions": 2,
        "last_seen": NOW + 3,
    }
    assert (rows[2]["epoch"], rows[2]["last_seq"], rows[2]["last_seen"]) == (2, 0, NOW + 9)


def test_a_new_epoch_does_not_lose_count_of_the_contributions() -> None:
    ledger = with_seqs(1)
    ledger.pushed("w1", 3)
    ledger.register("w1", 2, NOW)
    commit(ledger, by_worker(1), 9)
    ledger.pushed("w1", 4)
    assert [(row["contributions"], row["version"]) for row in ledger.workers()] == [(2, 4)]


def test_registrations_are_forgotten_too_with_what_they_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger_module, "WORKERS", 2)
    monkeypatch.setattr(ledger_module, "RESULTS", 2)
    ledger = with_seqs(1, "a")
    for name in "bcd":
        ledger.register(name, 1, NOW)
    assert [r["worker"] for r in ledger.dump()["workers"]] == ["c", "d"]
    for lsn, seq in enumerate((1, 2, 3), start=9):
        commit(ledger, by_worker(seq, "d"), lsn)
    assert ledger.check(by_worker(2, "d"), NOW) is not None


# --- rounds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Push:
    worker: str
    epoch: int
    seq: int


def test_a_push_is_answered_by_the_end_of_its_round() -> None:
    ledger = with_seqs(1)
    ledger.commit(by_worker(2), applied_version=None, lsn=3, reply={"applied": False}, time=NOW)
    waiting = ledger.check(by_worker(2), NOW)
    assert waiting == Duplicate(applied_version=None, reply={"applied": False}, lsn=3)
    ledger.resolve(Push("w1", 1, 2), applied_version=2, reply={"applied": True})
    assert ledger.check(by_worker(2), NOW) == Duplicate(
        applied_version=2, reply={"applied": True}, lsn=3
    )
    assert ledger.check(by_worker(3), NOW) is None


def test_the_number_of_a_push_whose_round_failed_can_be_used_again_with_any_payload() -> None:
    ledger = with_seqs(2)
    ledger.release(Push("w1", 1, 2))
    for digest in (D1, D2):
        assert ledger.check(by_worker(2, digest=digest), NOW) is None
    commit(ledger, by_worker(2, digest=D2), 9)
    assert ledger.position("w1") == (1, 2)
    duplicate = ledger.check(by_worker(2, digest=D2), NOW)
    assert duplicate is not None
    assert duplicate.lsn == 9
    with pytest.raises(KeyReused):
        ledger.check(by_worker(2, digest=D1), NOW)
    assert ledger.check(by_worker(1), NOW) is not None


def test_the_number_of_a_push_whose_round_failed_can_be_skipped() -> None:
    ledger = with_seqs(2)
    ledger.release(Push("w1", 1, 2))
    assert ledger.check(by_worker(3), NOW) is None
    commit(ledger, by_worker(3), 9)
    with pytest.raises(RoundFailed) as refused:
        ledger.check(by_worker(2), NOW)
    assert refused.value.detail == "the round of seq 2 of worker 'w1' failed"
    assert refused.value.extra == {"epoch": 1, "last_seq": 3}
    with pytest.raises(KeyReused):
        ledger.check(by_worker(2, digest=D2), NOW)


def test_two_numbers_after_a_failed_one_are_a_gap() -> None:
    ledger = with_seqs(2)
    ledger.release(Push("w1", 1, 2))
    with pytest.raises(OutOfSequence):
        ledger.check(by_worker(4), NOW)


@pytest.mark.parametrize("end", ["resolve", "release"])
def test_the_end_of_a_round_says_nothing_of_a_later_epoch(end: str) -> None:
    ledger = with_seqs(2)
    ledger.register("w1", 2, NOW)
    for seq in (1, 2):
        commit(ledger, by_worker(seq), 5 + seq)
    before = ledger.dump()
    _end(ledger, end, Push("w1", 1, 2))
    assert ledger.dump() == before


@pytest.mark.parametrize("end", ["resolve", "release"])
def test_the_end_of_a_round_passes_over_what_is_forgotten(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "RESULTS_PER_WORKER", 2)
    ledger = with_seqs(4)
    before = ledger.dump()
    for push in (Push("w1", 1, 2), Push("nobody", 1, 1)):
        _end(ledger, end, push)
    assert ledger.dump() == before


def test_the_push_of_a_removed_worker_is_resolved_all_the_same() -> None:
    ledger = with_seqs(2)
    ledger.remove("w1")
    ledger.release(Push("w1", 1, 2))
    assert ledger.dump()["workers"][0]["results"][-1]["failed"] is True


def _end(ledger: Ledger, end: str, push: Push) -> None:
    if end == "resolve":
        ledger.resolve(push, applied_version=9, reply={})
    else:
        ledger.release(push)


# --- dumps of workers ----------------------------------------------------------------------------


def test_a_dump_of_before_there_were_rounds_is_read() -> None:
    old = with_seqs(3).dump()
    for worker in old["workers"]:
        for name in ("removed", "contributions", "version", "seen"):
            del worker[name]
        for result in worker["results"]:
            del result["failed"]
    ledger = Ledger.load(old)
    assert ledger.check(by_worker(3), NOW) is not None
    assert ledger.check(by_worker(4), NOW) is None
    assert next(ledger.workers())["contributions"] == 0


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("removed", "false", "removed 'false'"),
        ("contributions", "3", "contributions '3'"),
        ("contributions", -1, f"seen {NOW}, -1 contributions"),
        ("contributions", True, "contributions True"),
        ("version", 1.5, "version 1.5"),
        ("seen", "nan", "seen 'nan'"),
        ("seen", float("inf"), "seen inf, 0 contributions"),
    ],
)
def test_a_dump_that_no_commits_can_have_made_is_refused(
    field: str, value: Any, fault: str
) -> None:
    dump = with_seqs(1).dump()
    dump["workers"][0][field] = value
    with pytest.raises(Invalid) as refused:
        Ledger.load(dump)
    assert refused.value.detail == f"the state file's ledger cannot be read: {fault}"


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [("failed", 1, "failed is a int"), ("time", float("inf"), "time is inf")],
)
def test_a_result_that_no_commit_can_have_made_is_refused(
    field: str, value: Any, fault: str
) -> None:
    dump = with_seqs(1).dump()
    dump["workers"][0]["results"][0][field] = value
    with pytest.raises(Invalid) as refused:
        Ledger.load(dump)
    assert refused.value.detail == f"the state file's ledger cannot be read: {fault}"


# --- against a model -----------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """Workers that push, repeat, register and go; a model that forgets nothing but what is bound
    to be forgotten."""

    RESULTS = 3

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(ledger_module, "RESULTS_PER_WORKER", self.RESULTS)
        self.ledger = Ledger()
        self.lsn = 1
        #: Epoch, removed, and of each seq digest, applied version and whether its round failed.
        self.known: dict[str, tuple[int, bool, list[tuple[bytes, int | None, bool]]]] = {}
        #: In the open round.
        self.open: dict[str, Push] = {}

    def teardown(self) -> None:
        self.patch.undo()

    def expected(self, name: str, epoch: int | None, seq: int, digest: bytes) -> str:
        current, removed, results = self.known.get(name, (1, False, []))
        if removed or (epoch is not None and epoch < current):
            return "fenced"
        if epoch is not None and epoch > current:
            return "out_of_sequence"
        if seq == len(results) + 1 or (seq == len(results) and results[-1][2]):
            return "new"
        if seq > len(results) or seq <= len(results) - self.RESULTS:
            return "out_of_sequence"
        before, _, failed = results[seq - 1]
        if before != digest:
            return "key_reused"
        return "round_failed" if failed else "duplicate"

    @rule(
        name=st.sampled_from("abc"),
        back=st.integers(-1, 4),
        older=st.sampled_from([None, None, 0, 0, 1, -1]),
        digest=st.sampled_from([D1, D1, D2]),
        pushes=st.booleans(),
    )
    def send(self, name: str, back: int, older: int | None, digest: bytes, pushes: bool) -> None:
        current, removed, results = self.known.get(name, (1, False, []))
        epoch, seq = None if older is None else current - older, len(results) + 1 - back
        if seq < 1 or (epoch is not None and epoch < 1):
            return
        identity = by_worker(seq, name, epoch, digest)
        want = self.expected(name, epoch, seq, digest)
        if want not in ("new", "duplicate"):
            with pytest.raises(OptserveError) as refused:
                self.ledger.check(identity, NOW)
            assert refused.value.code == want
            return
        duplicate = self.ledger.check(identity, NOW)
        if want == "duplicate":
            assert duplicate is not None
            assert duplicate.applied_version == results[seq - 1][1]
            return
        assert duplicate is None
        self.lsn += 1
        pushes = pushes and name not in self.open
        made = None if pushes else self.lsn
        self.ledger.commit(identity, applied_version=made, lsn=self.lsn, reply={}, time=NOW)
        self.known[name] = (current, removed, [*results[: seq - 1], (digest, made, False)])
        if pushes:
            self.open[name] = Push(name, current, seq)

    @rule(closes=st.booleans())
    def end_round(self, closes: bool) -> None:
        self.lsn += 1
        for push in self.open.values():
            if closes:
                self.ledger.resolve(push, applied_version=self.lsn, reply={})
            else:
                self.ledger.release(push)
            epoch, _, results = self.known[push.worker]
            if epoch == push.epoch and push.seq > len(results) - self.RESULTS:
                digest, _, _ = results[push.seq - 1]
                results[push.seq - 1] = (digest, self.lsn if closes else None, not closes)
        self.open = {}

    @rule(name=st.sampled_from("abc"))
    def register(self, name: str) -> None:
        epoch = self.ledger.next_epoch(name)
        assert epoch == (self.known[name][0] + 1 if name in self.known else 1)
        self.ledger.register(name, epoch, NOW)
        self.known[name] = (epoch, False, [])

    @rule(name=st.sampled_from("abc"))
    def remove(self, name: str) -> None:
        if name not in self.known or self.known[name][1]:
            with pytest.raises(WorkerNotFound):
                self.ledger.check_known(name)
            return
        self.ledger.check_known(name)
        self.ledger.remove(name)
        epoch, _, results = self.known[name]
        self.known[name] = (epoch, True, results)

    @rule()
    def read_back(self) -> None:
        text = json.dumps(self.ledger.dump(), allow_nan=False)
        self.ledger = Ledger.load(json.loads(text))
        assert json.dumps(self.ledger.dump()) == text

    @invariant()
    def lists_who_is_there(self) -> None:
        want = {
            name: (epoch, len(results))
            for name, (epoch, removed, results) in self.known.items()
            if not removed
        }
        rows = list(self.ledger.workers())
        assert {row["worker"]: (row["epoch"], row["last_seq"]) for row in rows} == want


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
