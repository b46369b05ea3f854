"""What the clients make of a server that is killed at any moment, and of what it then says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optserve_client import errors
from optserve_client._exchange import Retry, Sleep, Trail, exchange
from optserve_client._messages import Answer, Draft, Request
from optserve_client._protocol import Call, Lane, Lanes, change, perform
from tests.unit.test_protocol import (
    GET,
    LOST,
    PUT,
    REFUSED,
    Clock,
    answer,
    fields_of,
    lane,
    patient,
    play,
    problem,
)

STARTING = answer(503, {"code": "unavailable", "detail": "starting"}, retry_after="1")
FULL = answer(507, {"code": "out_of_space", "detail": "the disk is full"}, retry_after="5")
DAMAGED = problem(errors.Damaged("session 's' cannot be read back"))
REWOUND = problem(errors.SessionRewound("lost", last_seq=4, generation="new", version=7))
OTHER = Draft(method="PUT", path="/s", fields={"a": 2})
#: A transport failure in the middle of an answer, as of a server that is killed while it writes.
CUT = errors.TransportError("peer closed connection without sending complete message body")


def moving(retry: Retry, clock: Clock) -> Callable[..., Any]:
    """Return ``play`` for which sleeping takes time."""

    def run(steps: Any, outcomes: Iterable[Any]) -> list[Request]:
        sent: list[Request] = []
        script = iter(outcomes)
        effect = next(steps)
        try:
            while True:
                if isinstance(effect, Sleep):
                    clock.now += effect.seconds
                    effect = next(steps)
                    continue
                sent.append(effect.request)
                outcome = next(script)
                failed = isinstance(outcome, BaseException)
                effect = steps.throw(outcome) if failed else steps.send(outcome)
        except StopIteration:
            return sent

    return run


# How long it is waited for ------------------------------------------------------------------------


def test_a_server_that_is_away_for_most_of_a_minute_costs_nothing_but_time() -> None:
    clock = Clock()
    run = moving(Retry(), clock)

    def away() -> Iterable[Any]:
        yield CUT
        while clock.now < 40:
            yield REFUSED
        yield STARTING
        yield answer(200)

    one = lane()
    sent = run(change(one, PUT, Retry(clock=clock)), away())
    assert {fields_of(request)["seq"] for request in sent} == {1}
    assert (one.seq, one.unsettled) == (2, None)


def test_a_server_that_stays_away_is_given_up_after_a_minute() -> None:
    clock = Clock()
    with pytest.raises(errors.ConnectFailed, match="limit 60 s"):
        moving(Retry(), clock)(exchange(GET, Retry(clock=clock), Trail()), iter(lambda: REFUSED, 0))
    assert 50 < clock.now <= 60


def test_an_attempt_that_took_the_whole_minute_to_fail_is_made_again() -> None:
    clock = Clock()

    def frozen() -> Iterable[Any]:
        clock.now += 60
        yield LOST
        yield answer(200)

    sent = moving(Retry(), clock)(exchange(GET, Retry(clock=clock), Trail()), frozen())
    assert len(sent) == 2


def test_that_it_takes_long_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    script = [REFUSED] * 10 + [answer(200)]
    moving(Retry(), clock)(exchange(GET, Retry(clock=clock), Trail()), script)
    assert [record.message for record in caplog.records] == ["refused; trying again for 60 s"]


def test_the_number_of_attempts_can_be_limited_and_the_pause_stays_a_number() -> None:
    with pytest.raises(errors.ConnectFailed):
        play(exchange(GET, patient(retries=3), Trail()), [REFUSED] * 4)
    assert Retry().pause_s(10_000, 0.0) <= 2


# A disk that is full, a session that is damaged ---------------------------------------------------


def test_a_full_disk_is_waited_for_as_long_as_the_server_asks() -> None:
    one = lane()
    _, played = play(change(one, PUT, patient()), [FULL, FULL, answer(200)])
    assert played.slept == [5.0, 5.0]
    assert one.seq == 2


def test_a_disk_that_stays_full_has_changed_nothing_and_gives_the_number_back() -> None:
    one = lane()
    with pytest.raises(errors.OutOfSpace, match=r"the disk is full$"):
        play(change(one, PUT, patient(retries=1)), [FULL, FULL])
    assert (one.seq, one.unsettled) == (1, None)
    _, played = play(change(one, OTHER, patient()), [answer(200)])
    assert [fields_of(r)["a"] for r in played.sent] == [2]


def test_a_full_disk_says_nothing_about_an_earlier_attempt() -> None:
    one = lane()
    with pytest.raises(errors.OutOfSpace, match="full; an earlier attempt may have worked"):
        play(change(one, PUT, patient(retries=1)), [LOST, FULL])
    assert one.unsettled is not None


def test_a_damaged_session_is_told_at_once_with_the_cure() -> None:
    one = lane()
    call = Call(draft=PUT, read=lambda a: a, changes="s")
    with pytest.raises(errors.Damaged, match=r"cannot be read back$"):
        play(perform(call, patient(), one), [DAMAGED])
    assert one.unsettled is None
    with pytest.raises(errors.Damaged, match="back; an earlier attempt may have worked"):
        play(perform(call, patient(), one), [LOST, DAMAGED])
    assert one.unsettled is not None


def test_a_damaged_session_can_be_deleted_although_a_change_of_it_is_open() -> None:
    one = lane()
    with pytest.raises(errors.Damaged):
        play(change(one, PUT, patient()), [CUT, DAMAGED])
    call = Call(draft=Draft(method="DELETE", path="/s"), read=lambda _: "gone", deletes=True)
    with pytest.raises(errors.TransportError):
        play(perform(call, patient(retries=0), one), [LOST])
    gone = problem(errors.SessionNotFound("no session 's'"))
    got, played = play(perform(call, patient(), one), [gone])
    assert got == "gone"
    assert [(r.method, r.target) for r in played.sent] == [("DELETE", "/s")]


def test_a_server_that_fails_on_a_request_for_ever_is_not_asked_for_a_minute() -> None:
    with pytest.raises(errors.Internal):
        play(change(lane(), PUT, Retry(clock=Clock())), [problem(errors.Internal("bug"))] * 6)


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b'{"version": '])
def test_an_answer_that_cannot_be_read_is_asked_for_again(body: bytes) -> None:
    kind = {"content-type": "application/json"}
    garbled = Answer(status=200, headers=kind, body=memoryview(body))
    one = lane()
    got, played = play(change(one, PUT, patient()), [garbled, answer(200, {"version": 1})])
    if body:
        assert got.scalars == {"version": 1}
        assert played.sent[0].same_as(played.sent[1])
    assert one.seq == 2


# History that is lost -----------------------------------------------------------------------------


def test_after_a_rewind_nothing_is_sent_until_the_program_says_so() -> None:
    one = lane()
    one.seq, one.generation = 9, "old"
    for draft in (PUT, OTHER, PUT):
        with pytest.raises(errors.SessionRewound) as caught:
            play(change(one, draft, patient()), [REWOUND] if draft is PUT and one.seq == 9 else [])
        assert caught.value.extra == {"last_seq": 4, "generation": "new", "version": 7}
        one.seq = 10  # only the first time anything is sent
    call = Call(draft=Draft(method="DELETE", path="/s"), read=lambda a: a, deletes=True)
    with pytest.raises(errors.SessionRewound):
        play(perform(call, patient(), one), [])
    one.resume()
    guarded = Draft(method="POST", path="/s", fields={}, guarded=True)
    _, played = play(change(one, guarded, patient()), [answer(200)])
    [request] = played.sent
    assert (fields_of(request)["seq"], fields_of(request)["generation"]) == (5, "new")


def test_a_rewind_that_an_open_change_learns_of_holds_the_next_one_back() -> None:
    one = lane()
    one.seq = 9
    with pytest.raises(errors.TransportError):
        play(change(one, PUT, patient(retries=0)), [LOST])
    with pytest.raises(errors.SessionRewound):
        _, played = play(change(one, OTHER, patient()), [REWOUND])
    with pytest.raises(errors.SessionRewound):
        play(change(one, OTHER, patient()), [])
    one.resume()
    _, played = play(change(one, OTHER, patient()), [answer(200)])
    assert [(fields_of(r)["a"], fields_of(r)["seq"]) for r in played.sent] == [(2, 5)]


def test_a_change_without_a_guard_does_not_take_over_a_new_generation_in_silence() -> None:
    one = lane()
    one.generation = "old"
    play(change(one, PUT, patient()), [answer(200, {"generation": "new"})])
    guarded = Draft(method="POST", path="/s", fields={}, guarded=True)
    assert fields_of(one.stamped(guarded))["generation"] == "old"


def test_neither_does_opening_the_session_again() -> None:
    lanes = Lanes("w", 1, object)
    lanes.opened({"id": "s", "created": True, "generation": "old"})
    lanes.get("s")[0].seq = 4
    lanes.opened({"id": "s", "created": False, "generation": "new"})
    assert (lanes.get("s")[0].seq, lanes.get("s")[0].generation) == (4, "old")


def test_a_lane_that_was_never_used_takes_over_what_it_finds() -> None:
    lanes = Lanes("w", 1, object)
    lanes.opened({"id": "s", "created": True, "generation": "old"})
    lanes.opened({"id": "s", "created": False, "generation": "new"})
    assert lanes.get("s")[0].generation == "new"


def test_a_creation_whose_answer_was_lost_still_begins_anew() -> None:
    lanes = Lanes("w", 1, object)
    lanes.opened({"id": "s", "created": True, "generation": "old"})
    lanes.get("s")[0].seq = 4
    lanes.opened({"id": "s", "created": False, "duplicate": True, "generation": "new"})
    assert (lanes.get("s")[0].seq, lanes.get("s")[0].generation) == (1, "new")
    lanes.get("s")[0].seq = 2  # another thread was faster than the answer
    lanes.opened({"id": "s", "created": True, "generation": "new"})
    assert lanes.get("s")[0].seq == 2


def test_a_repeat_of_what_is_too_long_ago_to_tell_says_so_until_resume() -> None:
    one = lane()
    too_old = problem(errors.OutOfSequence("too long ago to tell what it did", last_seq=18))
    with pytest.raises(errors.OutOfSequence, match="tell what it did; an earlier copy of this req"):
        play(change(one, PUT, patient()), [LOST, too_old])
    with pytest.raises(errors.OutOfSequence, match="an earlier copy"):
        play(change(one, OTHER, patient()), [])
    one.resume()
    assert (one.seq, one.unsettled) == (19, None)


def test_a_gap_says_nothing_was_applied() -> None:
    one = lane()
    one.seq = 5
    gap = problem(errors.OutOfSequence("sent seq 5, expected 1", epoch=1, last_seq=0))
    got, _ = play(change(one, PUT, patient()), [LOST, gap])
    assert not got.ok
    assert (one.blocked, one.unsettled) == (None, None)


def test_a_worker_that_was_fenced_in_between_cannot_know() -> None:
    fenced = problem(errors.Fenced("the current epoch is 2", epoch=2, last_seq=3))
    with pytest.raises(errors.Fenced, match="an earlier copy of this request may have been"):
        play(change(lane(), PUT, patient()), [LOST, fenced])
    got, _ = play(change(lane(), PUT, patient()), [fenced])
    assert not got.ok


# A server with a journal, killed again and again --------------------------------------------------


@dataclass
class Journal:
    """A session as its journal keeps it; ``lose`` forgets the last events, as ``memory`` does."""

    #: Payload of each event, by place; the seq of event i is i + 1.
    applied: list[int] = field(default_factory=list)
    generation: int = 0
    #: In which generation something was applied, for all that ever was.
    when: list[int] = field(default_factory=list)

    def take(self, request: Request) -> Answer:
        said = fields_of(request)
        seq, last = said["seq"], len(self.applied)
        at = {"last_seq": last, "generation": str(self.generation)}
        if seq <= last - 16:
            return problem(errors.OutOfSequence("too long ago to tell", **at))
        if seq <= last:
            if self.applied[seq - 1] != said["a"]:
                return problem(errors.KeyReused("another payload", **at))
            return answer(200, {"generation": str(self.generation), "duplicate": True})
        if seq > last + 1:
            kind = errors.SessionRewound if self.generation else errors.OutOfSequence
            return problem(kind("a gap", **at))
        if said["generation"] != str(self.generation):
            return problem(errors.SessionRewound("that generation is over", **at))
        if said["a"] % 7 == 0:
            return problem(errors.Invalid("multiples of seven are refused"))
        self.applied.append(said["a"])
        self.when.append(self.generation)
        return answer(200, {"generation": str(self.generation), "duplicate": False})

    def lose(self, count: int) -> None:
        if count and self.applied:
            del self.applied[-count:]
            self.generation += 1


class Network:
    """Carries requests to a journal as a script of events says, one event for each attempt."""

    def __init__(self, journal: Journal, script: Iterable[str]) -> None:
        self.journal = journal
        self.script = deque(script)
        self.late: list[Request] = []
        self.down = 0

    def __call__(self, request: Request) -> Any:
        if self.down:
            self.down -= 1
            return REFUSED
        event = self.script.popleft() if self.script else "ok"
        match event:
            case "ok":
                return self.journal.take(request)
            case "killed before" | "killed after" | "killed in mid answer":
                if event != "killed before":
                    self.journal.take(request)
                self.down = 3
                return CUT
            case "killed and rewound":
                self.journal.take(request)
                self.journal.lose(2)
                self.down = 1
                return CUT
            case "starting":
                return STARTING
            case "full":
                return FULL
            case "late":
                self.late.append(request)
                return LOST
            case "the late one comes":
                if self.late:
                    self.journal.take(self.late.pop(0))
                return self.journal.take(request)
            case "broken":
                self.journal.take(request)
                return problem(errors.Internal("bug"))
            case "garbled":
                self.journal.take(request)
                return Answer(status=200, headers={}, body=memoryview(b'{"genera'))
        raise AssertionError(event)


def drive(steps: Any, network: Network) -> Answer:
    effect = next(steps)
    try:
        while True:
            if isinstance(effect, Sleep):
                effect = next(steps)
                continue
            outcome = network(effect.request)
            failed = isinstance(outcome, BaseException)
            effect = steps.throw(outcome) if failed else steps.send(outcome)
    except StopIteration as end:
        done: Answer = end.value
        return done


KEPT = ["ok", "killed before", "killed after", "killed in mid answer", "starting", "full"]
KEPT += ["late", "the late one comes", "broken", "garbled"]


def draft(value: int) -> Draft:
    return Draft(method="POST", path="/s", fields={"a": value}, guarded=True)


@settings(deadline=None)
@given(st.lists(st.sampled_from(KEPT), max_size=40))
def test_whoever_waits_long_enough_sees_every_change_applied_once(script: list[str]) -> None:
    journal = Journal()
    network, one = Network(journal, script), Lane("w", 1, generation="0")
    accepted = []
    for value in range(1, 15):
        # The window is a minute; here its clock stands still, and only what is stuck ends it.
        retry = Retry(clock=Clock(), jitter=lambda: 1.0, first_s=0, longest_s=0)
        for _ in range(20):
            try:
                answered = drive(change(one, draft(value), retry), network)
            except errors.ServerError:  # six failures in a row
                continue
            accepted += [value] if answered.ok else []
            break
    assert journal.applied == accepted == [value for value in range(1, 15) if value % 7]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([*KEPT, "killed and rewound", "killed and rewound"]), max_size=40),
    st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_what_is_lost_is_told_and_nothing_is_applied_twice(
    script: list[str], patience: list[bool]
) -> None:
    journal = Journal()
    network, one = Network(journal, script), Lane("w", 1, generation="0")
    acknowledged: list[int] = []
    known = 0  # the generation that the program knows
    value = 1
    for again in patience:
        began = len(journal.when)
        try:
            answered = drive(change(one, draft(value), patient(retries=2)), network)
        except errors.SessionRewound as exc:
            assert set(journal.when[began:]) <= {known}, "applied before the program resumed"
            assert known < journal.generation
            one.resume()
            known = int(exc.extra["generation"])
            acknowledged = [a for a in acknowledged if a in journal.applied]
            value += 1
            continue
        except errors.OptserveError:
            value += not again
            continue
        acknowledged += [value] if answered.ok else []
        value += 1
    assert journal.applied == sorted(set(journal.applied)), "out of order, or twice"
    told = known == journal.generation
    assert not told or set(acknowledged) <= set(journal.applied)
