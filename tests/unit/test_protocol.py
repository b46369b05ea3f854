"""What is sent, sent again, and never sent: the pure half of the clients, without any I/O."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optserve_client import errors, wire
from optserve_client._exchange import Retry, Send, Sleep, Steps, Trail, exchange
from optserve_client._messages import CHUNK_BYTES, Answer, Draft, Request, to_json
from optserve_client._protocol import Call, Lane, Lanes, change, perform

LOST = errors.Timeout("lost")
REFUSED = errors.ConnectFailed("refused")
GET = Draft(method="GET", path="/x").request()
PUT = Draft(method="PUT", path="/s", fields={"a": 1})


def answer(status: int, body: Any = None, **headers: str) -> Answer:
    text = b"" if body is None else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status=status, headers=named, body=memoryview(text))


def problem(error: errors.OptserveError) -> Answer:
    return answer(error.status, error.problem())


@dataclass
class Played:
    """What an operation asked for while it ran."""

    sent: list[Request] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)


def play(steps: Steps[Any], outcomes: Iterable[Any]) -> tuple[Any, Played]:
    """Run ``steps``; each request ends in the next outcome, an Answer or an exception."""
    played, script = Played(), iter(outcomes)
    try:
        effect = next(steps)
        while True:
            if isinstance(effect, Sleep):
                played.slept.append(effect.seconds)
                effect = next(steps)
                continue
            assert isinstance(effect, Send)
            played.sent.append(effect.request)
            outcome = next(script)
            if isinstance(outcome, BaseException):
                effect = steps.throw(outcome)
            else:
                effect = steps.send(outcome)
    except StopIteration as done:
        return done.value, played


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def patient(retries: int = 5, **limits: Any) -> Retry:
    return Retry(retries=retries, clock=Clock(), jitter=lambda: 1.0, **limits)


def fields_of(request: Request) -> dict[str, Any]:
    return json.loads(b"".join(request.pieces))


# Retrying ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 507])
def test_a_failure_of_the_moment_is_tried_again(status: int) -> None:
    got, played = play(exchange(GET, patient(), Trail()), [answer(status), answer(200)])
    assert got.status == 200
    assert len(played.sent) == 2


@pytest.mark.parametrize("status", [200, 201, 304, 400, 401, 403, 404, 409, 412, 413, 421, 422])
def test_a_final_answer_is_not_tried_again(status: int) -> None:
    got, played = play(exchange(GET, patient(), Trail()), [answer(status)])
    assert got.status == status
    assert len(played.sent) == 1
    assert played.slept == []


def test_pauses_double_up_to_the_longest_and_carry_jitter() -> None:
    retry = patient(retries=7, first_s=0.1, longest_s=1.0)
    with pytest.raises(errors.Timeout):
        play(exchange(GET, retry, Trail()), [LOST] * 8)
    _, played = play(exchange(GET, retry, Trail()), [LOST] * 7 + [answer(200)])
    assert played.slept == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0])
    lazy = Retry(jitter=lambda: 0.0)
    assert lazy.pause_s(1, 0.0) == pytest.approx(0.1)  # half of 0.2


def test_retry_after_is_waited_for() -> None:
    busy = answer(503, retry_after="2.5")
    _, played = play(exchange(GET, patient(), Trail()), [busy, answer(200)])
    assert played.slept == [2.5]


def test_a_retry_after_beyond_the_total_ends_the_attempts_at_once() -> None:
    busy = answer(503, {"code": "unavailable", "detail": "later"}, retry_after="61")
    with pytest.raises(errors.Unavailable, match="later"):
        play(exchange(GET, patient(total_s=60), Trail()), [busy])


@pytest.mark.parametrize("value", ["", "soon", "-3", "Thu, 01 Jan 1970 00:00:00 GMT"])
def test_a_retry_after_that_says_nothing_is_no_wait(value: str) -> None:
    assert answer(503, retry_after=value).retry_after_s() == 0


def test_the_total_limit_ends_the_attempts_whatever_their_number() -> None:
    clock = Clock()
    retry = Retry(retries=100, total_s=10, clock=clock, jitter=lambda: 1.0)

    def slow() -> Iterable[Any]:
        for _ in range(100):
            clock.now += 4
            yield LOST

    with pytest.raises(errors.Timeout):
        play(exchange(GET, retry, Trail()), slow())
    assert clock.now == 16  # the first failure was at 4


def test_no_retries_means_one_attempt() -> None:
    with pytest.raises(errors.Timeout):
        play(exchange(GET, patient(retries=0), Trail()), [LOST])


def test_connect_failed_is_raised_only_if_nothing_was_ever_sent() -> None:
    write, once_more = PUT.request(), patient(retries=1)
    with pytest.raises(errors.ConnectFailed):
        play(exchange(write, once_more, Trail()), [REFUSED, REFUSED])
    with pytest.raises(errors.ConnectFailed):
        play(exchange(GET, once_more, Trail()), [LOST, REFUSED])
    with pytest.raises(errors.TransportError, match="refused; an earlier attempt may have worked"):
        play(exchange(write, once_more, Trail()), [LOST, REFUSED])


@pytest.mark.parametrize("status", [401, 403, 408, 421, 429])
def test_being_turned_away_says_nothing_about_an_earlier_attempt(status: int) -> None:
    write, once_more = PUT.request(), patient(retries=1)
    with pytest.raises(errors.TransportError, match="an earlier attempt may have worked"):
        play(exchange(write, once_more, Trail()), [LOST, answer(status)])
    script = [answer(status), answer(status)] if status in (408, 429) else [answer(status)]
    call = Call(draft=PUT, read=lambda a: a)
    with pytest.raises(errors.RequestError):
        play(perform(call, once_more, None), script)


# Sequence numbers --------------------------------------------------------------------------------


def lane() -> Lane:
    return Lane("w", 1)


def test_changes_are_numbered_from_1_and_a_repeat_carries_the_same_number_and_bytes() -> None:
    one = lane()
    _, first = play(change(one, PUT, patient()), [LOST, answer(503), answer(200)])
    _, second = play(change(one, PUT, patient()), [answer(200)])
    assert [fields_of(r)["seq"] for r in first.sent] == [1, 1, 1]
    assert first.sent[0].same_as(first.sent[2])
    assert fields_of(second.sent[0]) == {"a": 1, "worker": "w", "epoch": 1, "seq": 2}


def test_a_refused_change_gives_its_number_back() -> None:
    one = lane()
    play(change(one, PUT, patient()), [problem(errors.Invalid("no"))])
    assert (one.seq, one.unsettled) == (1, None)


def test_a_change_that_never_left_gives_its_number_back() -> None:
    one = lane()
    with pytest.raises(errors.ConnectFailed):
        play(change(one, PUT, patient(retries=0)), [REFUSED])
    assert (one.seq, one.unsettled) == (1, None)


def test_the_same_change_again_settles_the_open_one() -> None:
    one = lane()
    with pytest.raises(errors.Timeout):
        play(change(one, PUT, patient(retries=0)), [LOST])
    _, again = play(change(one, PUT, patient()), [answer(200)])
    assert [fields_of(r)["seq"] for r in again.sent] == [1]
    assert (one.seq, one.unsettled) == (2, None)


def test_another_change_first_sends_the_open_one_again() -> None:
    one = lane()
    with pytest.raises(errors.Timeout):
        play(change(one, PUT, patient(retries=0)), [LOST])
    other = Draft(method="PUT", path="/s", fields={"a": 2})
    _, played = play(change(one, other, patient()), [answer(200), answer(200)])
    assert [(fields_of(r)["a"], fields_of(r)["seq"]) for r in played.sent] == [(1, 1), (2, 2)]


def test_an_open_change_that_the_server_refuses_gives_its_number_to_the_next() -> None:
    one = lane()
    with pytest.raises(errors.Timeout):
        play(change(one, PUT, patient(retries=0)), [LOST])
    other = Draft(method="PUT", path="/s", fields={"a": 2})
    script = [problem(errors.Invalid("no")), answer(200)]
    _, played = play(change(one, other, patient()), script)
    assert [(fields_of(r)["a"], fields_of(r)["seq"]) for r in played.sent] == [(1, 1), (2, 1)]


@pytest.mark.parametrize("outcome", [LOST, REFUSED, answer(500), answer(401), answer(429)])
def test_an_open_change_that_stays_open_holds_the_next_one_back(outcome: Any) -> None:
    one = lane()
    with pytest.raises(errors.Timeout):
        play(change(one, PUT, patient(retries=0)), [LOST])
    other = Draft(method="PUT", path="/s", fields={"a": 2})
    with pytest.raises(errors.OptserveError):
        play(change(one, other, patient(retries=0)), [outcome])
    assert one.unsettled is not None
    assert one.seq == 1
    assert fields_of(one.unsettled)["a"] == 1


def test_an_open_change_keeps_its_bytes_when_the_caller_reuses_the_array() -> None:
    one, grad = lane(), np.ones(3)
    step = Draft(method="POST", path="/s", fields={}, tensors={"grad/w": grad})
    with pytest.raises(errors.Timeout):
        play(change(one, step, patient(retries=0)), [LOST])
    grad[:] = 7
    _, played = play(change(one, step, patient()), [answer(200), answer(200)])
    sent = [wire.decode(b"".join(r.pieces))[0]["grad/w"] for r in played.sent]
    np.testing.assert_array_equal(sent, [[1, 1, 1], [7, 7, 7]])


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, GeneratorExit])
def test_an_interrupted_change_is_open(interrupt: type[BaseException]) -> None:
    one = lane()
    with pytest.raises(interrupt):
        play(change(one, PUT, patient()), [interrupt()])
    assert one.unsettled is not None


def test_a_change_interrupted_while_it_waits_to_be_sent_again_is_open() -> None:
    one = lane()
    steps = change(one, PUT, patient())
    next(steps)
    assert isinstance(steps.throw(LOST), Sleep)
    steps.close()
    assert one.unsettled is not None


def test_the_generation_is_sent_with_guarded_requests_once_it_is_known() -> None:
    one = lane()
    guarded = Draft(method="POST", path="/s", fields={}, guarded=True)
    _, first = play(change(one, guarded, patient()), [answer(200, {"generation": "g1"})])
    _, second = play(change(one, guarded, patient()), [answer(200, {"generation": "g1"})])
    _, third = play(change(one, PUT, patient()), [answer(200)])
    assert "generation" not in fields_of(first.sent[0])
    assert fields_of(second.sent[0])["generation"] == "g1"
    assert "generation" not in fields_of(third.sent[0])


def test_resume_goes_on_after_the_last_number_that_the_server_knows() -> None:
    lanes = Lanes("w", 1, object)
    one, _ = lanes.get("s")
    one.seq, one.generation = 9, "old"
    rewound = problem(errors.SessionRewound("lost", last_seq=4, generation="new"))
    with pytest.raises(errors.SessionRewound):
        play(change(one, PUT, patient()), [rewound])
    assert one.seq == 9
    lanes.resume("s")
    assert (one.seq, one.generation, one.unsettled) == (5, "new", None)


def test_resume_gives_up_a_change_that_stays_open() -> None:
    one = lane()
    with pytest.raises(errors.ServerError):
        play(change(one, PUT, patient(retries=0)), [problem(errors.Internal("bug"))])
    assert one.unsettled is not None
    one.resume()
    assert (one.seq, one.unsettled) == (1, None)


def test_a_session_created_anew_is_numbered_from_1() -> None:
    lanes = Lanes(None, 1, object)
    lanes.get("s")[0].seq = 5
    lanes.opened({"id": "s", "created": False, "generation": "g"})
    assert (lanes.get("s")[0].seq, lanes.get("s")[0].generation) == (5, "g")
    lanes.opened({"id": "s", "created": True, "generation": "h"})
    assert (lanes.get("s")[0].seq, lanes.get("s")[0].generation) == (1, "h")


def test_an_imported_session_is_numbered_under_a_name_that_its_file_cannot_know() -> None:
    lanes = Lanes("w" * 128, 1, object)
    lanes.opened({"id": "s", "created": True, "generation": "g"}, imported=True)
    name = lanes.get("s")[0].worker
    assert name != lanes.worker
    wire.check_id("worker", name)


def test_workers_are_random_by_default_and_checked_otherwise() -> None:
    assert Lanes(None, 1, object).worker != Lanes(None, 1, object).worker
    with pytest.raises(errors.Invalid, match="worker must match"):
        Lanes("a b", 1, object)


# A server that keeps count, a network that does its worst -----------------------------------------


@dataclass
class CountingServer:
    """Applies each payload as the ledger of a session would."""

    applied: list[int] = field(default_factory=list)
    late: list[Request] = field(default_factory=list)
    reused: int = 0

    def take(self, request: Request) -> Answer:
        said = fields_of(request)
        last = len(self.applied)
        if said["seq"] == last + 1:
            if said["a"] % 5 == 0:
                return problem(errors.Invalid("multiples of five are refused"))
            self.applied.append(said["a"])
            return answer(200, {"duplicate": False})
        if said["seq"] == last and self.applied[-1] == said["a"]:
            return answer(200, {"duplicate": True})
        self.reused += 1
        return problem(errors.KeyReused("another payload"))

    def outcome(self, event: str, request: Request) -> Any:
        match event:
            case "ok":
                return self.take(request)
            case "reply lost":
                self.take(request)
                return LOST
            case "request lost":
                return LOST
            case "request late":
                self.late.append(request)
                return LOST
            case "no connection":
                return REFUSED
            case "busy":
                return answer(503)
            case "not allowed":
                return answer(401)
            case "broken":
                self.take(request)
                return answer(500)
        raise AssertionError(event)


EVENTS = st.sampled_from(
    [
        "ok",
        "reply lost",
        "request lost",
        "request late",
        "no connection",
        "busy",
        "not allowed",
        "broken",
    ]
)


@settings(deadline=None)
@given(st.lists(st.lists(EVENTS, max_size=3), max_size=12), st.lists(st.booleans(), min_size=12))
def test_every_change_happens_once_whatever_the_network_does(
    weather: list[list[str]], persistent: list[bool]
) -> None:
    server, one = CountingServer(), lane()
    done: list[int] = []
    unknown: list[int] = []
    value, is_open = 0, False
    for events, again in zip([*weather, ["ok", "ok"]], [*persistent, False], strict=False):
        if not (again and is_open):  # else the caller repeats the call that failed
            value += 1
        draft = Draft(method="PUT", path="/s", fields={"a": value})
        script = iter([*events, "ok", "ok", "ok"])
        steps = change(one, draft, patient(retries=1))
        try:
            effect = next(steps)
            while True:
                if isinstance(effect, Sleep):
                    effect = next(steps)
                    continue
                outcome = server.outcome(next(script), effect.request)
                if isinstance(outcome, Exception):
                    effect = steps.throw(outcome)
                else:
                    effect = steps.send(outcome)
        except StopIteration as end:
            is_open = False
            if end.value.ok:
                done.append(value)
        except errors.ConnectFailed:
            pass
        except errors.OptserveError:
            is_open = True
            unknown.append(value)
    reused_in_time = server.reused
    for request in server.late:  # whatever still lies in the network finds its number taken
        server.take(request)
    assert reused_in_time == 0
    assert server.applied == sorted(set(server.applied)), "out of order, or twice"
    assert set(done) <= set(server.applied) <= set(done) | set(unknown)


# Requests and answers ----------------------------------------------------------------------------


def test_identity_goes_into_the_fields_or_else_into_the_query() -> None:
    stamp = {"worker": "w", "epoch": 1, "seq": 3}
    with_fields = Draft(method="POST", path="/a", fields={"x": 1}).request(stamp)
    assert fields_of(with_fields) == {"x": 1, **stamp}
    assert with_fields.target == "/a"
    for draft in (
        Draft(method="DELETE", path="/a", query=(("abandon", "true"),)),
        Draft(method="PUT", path="/a", query=(("abandon", "true"),), frame=memoryview(b"frame")),
        Draft(method="PUT", path="/a", query=(("abandon", "true"),), text="[]"),
    ):
        assert draft.request(stamp).target == "/a?abandon=true&worker=w&epoch=1&seq=3"


def test_tensors_and_fields_make_one_frame_of_known_length() -> None:
    w = np.arange(6.0).reshape(2, 3)
    request = Draft(method="POST", path="/a", fields={"é": 1}, tensors={"grad/w": w}).request()
    body = b"".join(request.pieces)
    tensors, metadata = wire.decode(body)
    np.testing.assert_array_equal(tensors["grad/w"], w)
    assert json.loads(metadata[wire.META_KEY]) == {"é": 1}
    assert request.headers["Content-Type"] == wire.SAFETENSORS
    assert request.headers["Content-Length"] == str(len(body)) == str(request.length)


@pytest.mark.parametrize("sizes", [[], [0], [10], [70_000, 10, 10], [3_000_000], [1000] * 2500])
def test_chunks_are_the_body_in_pieces_of_one_write(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    pieces = tuple(memoryview(rng.integers(0, 256, n, np.uint8).data) for n in sizes)
    request = Request(method="PUT", target="/", headers={}, pieces=pieces)
    chunks = list(request.chunks())
    assert b"".join(chunks) == b"".join(pieces)
    assert all(0 < len(chunk) <= 2 * CHUNK_BYTES for chunk in chunks)
    assert len(chunks) <= 1 + request.length / 50_000


def test_large_tensors_are_not_copied_into_chunks() -> None:
    w = np.zeros(1_000_000)
    request = Draft(method="PUT", path="/", fields={}, tensors={"w": w}).request()
    views = [np.frombuffer(c, np.uint8) for c in request.chunks() if len(c) == CHUNK_BYTES]
    assert len(views) == 7
    assert all(np.shares_memory(view, w) for view in views)


def test_numpy_values_in_fields_are_sent_as_numbers_and_lists() -> None:
    value = {"loss": np.float32(0.5), "betas": (0.9, np.float64(0.999)), "t": np.arange(2)}
    assert json.loads(to_json(value)) == {"loss": 0.5, "betas": [0.9, 0.999], "t": [0, 1]}


@pytest.mark.parametrize(
    "value, sentence",
    [
        ({"metrics": float("nan")}, "metrics is nan, which JSON has not"),
        ({"optimizer": {"betas": (0.9, np.float64("inf"))}}, r"optimizer\.betas\[1\] is inf"),
        ({"groups": [{"lr": np.float32("-inf")}]}, r"groups\[0\]\.lr is -inf, which JSON has not"),
        (float("nan"), "a field is nan"),
        ({"x": object()}, "x: object cannot be sent as JSON"),
        (
            {"scheduler": {"name": "LambdaLR", "lr_lambda": [lambda epoch: 1.0]}},
            r"scheduler\.lr_lambda\[0\] is a Python function, which cannot be sent: write it as an "
            r'expression in epoch, such as "0\.95 \*\* epoch", or as a table',
        ),
    ],
)
def test_what_json_cannot_say_is_refused(value: Any, sentence: str) -> None:
    with pytest.raises(errors.Invalid, match=sentence):
        to_json(value)


def test_what_contains_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["x"] = [loop]
    with pytest.raises(errors.Invalid, match=r"x\[0\] contains itself"):
        to_json(loop)


def test_scalars_and_params_are_read_from_both_media() -> None:
    frame = b"".join(wire.encode({"param/w": np.ones(2)}, {wire.META_KEY: '{"version": 3}'}))
    binary = Answer(
        status=200, headers={"content-type": wire.SAFETENSORS}, body=memoryview(bytearray(frame))
    )
    assert binary.scalars == {"version": 3}
    assert list(binary.params) == ["w"]
    assert answer(200, {"version": 3, "params": {}}).scalars["version"] == 3
    assert answer(204).scalars == {}


@pytest.mark.parametrize(
    "kind, body",
    [("application/json", b"{"), (wire.SAFETENSORS, b"junk"), (wire.SAFETENSORS, bytes(9))],
)
def test_an_answer_that_cannot_be_read_is_the_servers_fault(kind: str, body: bytes) -> None:
    broken = Answer(status=200, headers={"content-type": kind}, body=memoryview(body))
    with pytest.raises(errors.ServerError, match="the answer cannot be read"):
        _ = broken.scalars


def test_an_error_is_read_back_as_its_class_with_its_members() -> None:
    original = errors.VersionConflict("base_version is 3, the version is 5", version=5)
    call = Call(draft=Draft(method="GET", path="/"), read=lambda a: a)
    with pytest.raises(errors.VersionConflict, match="base_version is 3") as caught:
        play(perform(call, patient(), None), [problem(original)])
    assert caught.value.extra == {"version": 5}


@pytest.mark.parametrize("status, kind", [(502, errors.ServerError), (404, errors.NotFound)])
def test_an_answer_of_a_proxy_is_an_error_of_its_status(
    status: int, kind: type[errors.OptserveError]
) -> None:
    page = Answer(status=status, headers={}, body=memoryview(b"<html>Bad Gateway</html>"))
    error = page.error()
    assert isinstance(error, kind)
    assert error.detail == f"HTTP {status}: <html>Bad Gateway</html>"


def test_a_deletion_whose_answer_was_lost_is_done() -> None:
    gone = problem(errors.SessionNotFound("no session 's'"))
    draft = Draft(method="DELETE", path="/s")
    call = Call(draft=draft, read=lambda _: "done", changes="s", deletes=True)
    got, _ = play(perform(call, patient(), lane()), [LOST, gone])
    assert got == "done"
    with pytest.raises(errors.SessionNotFound):
        play(perform(call, patient(), lane()), [gone])
