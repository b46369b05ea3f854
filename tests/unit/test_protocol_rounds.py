"""A step that waits for other workers: what is sent, how long it takes, what its answers mean."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
import numpy as np
import pytest

from optserve_client import AsyncClient, Client, Retry, Sparse, errors, wire
from optserve_client._exchange import Trail, exchange
from optserve_client._messages import Answer, Draft
from tests.unit.test_protocol import LOST, Clock, answer, play, problem
from tests.unit.test_protocol_clients import STEP, Wire, client, frame
from tests.unit.test_transport import OK, Peer, Server

ROUND = {"number": 1, "base_version": 0, "contributed": ["w"], "count": 2, "deadline_at": 9.0}
CLOSED = {"number": 1, "base_version": 0, "workers": ["a", "w"], "missing": 0, "closed_by": "count"}
STALE = errors.StaleGradient("late", version=4, base_version=2, updates=4)
GRADS = {"w": np.ones(2, np.float32)}
PUSH = Draft(method="POST", path="/step", fields={"a": 1}, wait_s=5.0, patient=True)


def opened() -> httpx.Response:
    """Return the answer to a push whose round stays open."""
    still = {**STEP, "applied": False, "applied_version": None, "version": 0, "round": ROUND}
    response = frame(still)
    response.status_code = 202
    return response


def refused(error: errors.OptserveError, **params: Any) -> httpx.Response:
    """Return a refusal as a frame with params."""
    response = frame(error.problem(), **params)
    response.status_code = error.status
    return response


# What is sent ------------------------------------------------------------------------------------


def test_a_gradient_of_a_version_waits_and_wants_params_even_if_it_is_late() -> None:
    net = Wire(frame(STEP), frame(STEP), frame(STEP))
    with client(net) as c:
        session = c.session("s")
        session.step(GRADS, base_version=0)
        session.step(GRADS, base_version=1, wait_s=0, returns="none", weight=3)
        session.step(GRADS)
    one, two, three = (net.fields(i) for i in range(3))
    assert {k: one[k] for k in ("base_version", "wait_s", "return")} == {
        "base_version": 0,
        "wait_s": 55.0,
        "return": "params",
    }
    assert {k: two[k] for k in ("base_version", "wait_s", "return", "weight")} == {
        "base_version": 1,
        "wait_s": 0,
        "return": "none",
        "weight": 3,
    }
    assert not {"wait_s", "return", "weight"} & three.keys()


@pytest.mark.parametrize(
    "timeout, wait_s", [(60.0, 55.0), (10.0, 5.0), (5.5, 1.0), (0.1, 1.0), (1e9, 3600.0)]
)
def test_it_waits_for_a_little_less_than_the_timeout(timeout: float, wait_s: float) -> None:
    net = Wire(frame(STEP))
    with client(net, timeout=timeout) as c:
        c.session("s").step(GRADS, base_version=0)
    assert net.fields()["wait_s"] == wait_s


def test_deltas_go_under_their_own_name() -> None:
    net = Wire(frame(STEP))
    indices, values = np.array([[1]]), np.ones((1, 2), np.float32)
    sparse = Sparse(indices=indices, values=values, shape=(3, 2))
    with client(net) as c:
        c.session("s").step(deltas={**GRADS, "emb": sparse, "b": None})
    assert list(net.tensors()) == ["delta/w", "sparse/emb/indices", "sparse/emb/values"]
    assert net.fields()["none"] == ["b"]


@pytest.mark.parametrize("given", [{}, {"grads": GRADS, "deltas": GRADS}])
def test_a_step_takes_either_gradients_or_deltas(given: dict[str, Any]) -> None:
    with client(Wire()) as c, pytest.raises(TypeError, match=r"takes grads, or.*deltas="):
        c.session("s").step(**given)


@pytest.mark.parametrize("bad", ["soon", [1.0]])
def test_a_wait_that_is_no_number_is_never_sent(bad: Any) -> None:
    with client(Wire()) as c, pytest.raises(TypeError, match="wait_s must be a number of seconds"):
        c.session("s").step(GRADS, wait_s=bad)


# A round that stays open -------------------------------------------------------------------------


def test_a_push_is_sent_again_until_its_round_has_ended_and_returns_then() -> None:
    net = Wire(
        opened(), opened(), frame({**STEP, "duplicate": True, "round": CLOSED}, w=np.ones(2))
    )
    with client(net) as c:
        result = c.session("s").step(GRADS, base_version=0)
    assert len({request.content for request in net.requests}) == 1
    assert len(net.requests) == 3
    assert (result.applied, result.applied_version, result.round) == (True, 1, CLOSED)
    assert result.params is not None


def test_who_says_how_long_to_wait_is_told_that_the_round_is_open() -> None:
    net = Wire(opened(), frame(STEP))
    with client(net) as c:
        result = c.session("s").step(GRADS, base_version=0, wait_s=0)
        c.session("s").step(GRADS, base_version=0, wait_s=0)
    assert (result.applied, result.applied_version, result.params) == (False, None, None)
    assert (result.returned, result.round, result.raw["round"]) == (None, ROUND, ROUND)
    assert net.fields(1)["seq"] == 2, "the first one is with the server"


def test_waiting_uses_up_no_attempt_and_no_time_to_give_up() -> None:
    clock = Clock()
    retry = Retry(retries=1, total_s=10, clock=clock, jitter=lambda: 1.0)
    waits, done = answer(202, {}), answer(200, {})

    def outcomes() -> Any:
        for _ in range(20):
            yield LOST
            clock.now += 55
            yield waits
        yield done

    got, played = play(exchange(PUSH.request(), retry, Trail()), outcomes())
    assert (got.status, got.doubtful) == (200, True)
    assert len(played.sent) == 41


def test_a_push_whose_answer_stays_away_while_it_waits_may_have_been_done() -> None:
    trail = Trail()
    with pytest.raises(errors.Timeout):
        play(exchange(PUSH.request(), Retry(retries=0), trail), [answer(202, {}), LOST])
    assert trail.maybe_done
    trail = Trail()
    with pytest.raises(errors.TransportError, match="an earlier attempt may have worked"):
        play(
            exchange(PUSH.request(), Retry(retries=0), trail),
            [answer(202, {}), errors.ConnectFailed("refused")],
        )
    assert trail.maybe_done


def test_an_interrupted_wait_is_settled_before_the_next_change() -> None:
    net = Wire(opened(), KeyboardInterrupt(), frame({**STEP, "duplicate": True}), frame(STEP))
    with client(Interrupting(net)) as c:
        session = c.session("s")
        with pytest.raises(KeyboardInterrupt):
            session.step(GRADS, base_version=0)
        session.step(GRADS, base_version=1)
    assert [net.fields(i)["seq"] for i in range(4)] == [1, 1, 1, 2]
    assert net.requests[2].content == net.requests[0].content


class Interrupting:
    """Raises what is no Exception, too."""

    def __init__(self, net: Wire) -> None:
        self._net = net

    def __call__(self, request: httpx.Request) -> httpx.Response:
        outcome = self._net.outcomes[0]
        if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
            self._net.requests.append(request)
            self._net.outcomes.pop(0)
            raise outcome
        return self._net(request)


@pytest.mark.parametrize(
    "error", [STALE, errors.RoundFailed("failed", version=4), errors.Conflict("twice")]
)
def test_a_push_that_is_refused_leaves_its_number_unused(error: errors.OptserveError) -> None:
    net = Wire(opened(), httpx.Response(409, json=error.problem()), frame(STEP))
    with client(net) as c:
        with pytest.raises(type(error)):
            c.session("s").step(GRADS, base_version=0)
        c.session("s").step({"w": np.zeros(2, np.float32)}, base_version=4)
    assert [net.fields(i)["seq"] for i in range(3)] == [1, 1, 1]


# How long it may take ----------------------------------------------------------------------------

STEPPED = json.dumps(STEP).encode()
ANSWER = OK.replace(b" 7\r", b" %d\r" % len(STEPPED)) + STEPPED


@pytest.mark.parametrize("awaited", [False, True], ids=["blocking", "awaited"])
@pytest.mark.parametrize("over", ["sockets", "httpx"])
def test_an_answer_that_has_to_wait_has_so_much_longer(over: str, awaited: bool) -> None:
    late = threading.Event()

    def slow(peer: Peer) -> None:
        peer.request()
        late.wait(0.6)  # longer than the timeout
        peer.say(ANSWER)

    def options() -> dict[str, Any]:
        kind = httpx.AsyncHTTPTransport if awaited else httpx.HTTPTransport
        return {"timeout": 0.2, "retries": 0} | ({"transport": kind()} if over == "httpx" else {})

    async def run(**wait: Any) -> Any:
        async with AsyncClient(server.url, **options()) as c:
            return await c.session("s").step(GRADS, **wait)

    def step(**wait: Any) -> Any:
        if awaited:
            return asyncio.run(run(**wait))
        with Client(server.url, **options()) as c:
            return c.session("s").step(GRADS, **wait)

    with Server(slow) as server:
        assert step(wait_s=5.0).version == 1
        with pytest.raises(errors.Timeout, match=r"in time, 0\.2 s"):
            step()
        with pytest.raises(errors.Timeout, match=r"in time, 0\.3 s"):
            step(wait_s=0.1)
        late.set()


# Refusals that bring params ----------------------------------------------------------------------


def test_a_late_push_brings_the_params_that_it_asked_for() -> None:
    net = Wire(refused(STALE, w=np.full(2, 7.0)), refused(STALE), frame(STEP))
    with client(net) as c:
        with pytest.raises(errors.StaleGradient, match="late") as caught:
            c.session("s").step(GRADS, base_version=2)
        with pytest.raises(errors.StaleGradient) as without:
            c.session("s").step(GRADS, base_version=2, returns="none")
        c.session("s").step(GRADS, base_version=4)
    assert caught.value.extra == {"version": 4, "base_version": 2, "updates": 4}
    assert caught.value.params is not None
    np.testing.assert_array_equal(caught.value.params["w"], [7.0, 7.0])
    assert without.value.params is None
    assert [net.fields(i)["seq"] for i in range(3)] == [1, 1, 1]


def test_a_refusal_as_json_or_as_no_frame_at_all_is_read_as_well() -> None:
    error = problem(STALE).error()
    assert isinstance(error, errors.StaleGradient)
    assert error.params is None
    headers = {"content-type": wire.SAFETENSORS}
    broken = Answer(status=409, headers=headers, body=memoryview(b"oops"))
    assert type(broken.error()) is errors.Conflict
    assert broken.error().detail == "HTTP 409: oops"
    empty = Answer(status=502, headers={}, body=memoryview(b""))
    assert empty.error().detail == "HTTP 502"


def test_an_asynchronous_push_says_how_stale_it_was() -> None:
    with client(Wire(frame({**STEP, "staleness": 3, "weight": 0.25}))) as c:
        result = c.session("s").step(GRADS, base_version=0)
    assert (result.staleness, result.raw["weight"], result.round) == (3, 0.25, None)


# Workers by name ---------------------------------------------------------------------------------


def registered(name: str, epoch: int) -> httpx.Response:
    said = {"id": "s", "worker": name, "epoch": epoch, "last_seq": 0, "generation": "g"}
    return httpx.Response(200, json={**said, "version": 0})


def test_registering_itself_gives_a_client_a_new_epoch_and_numbers() -> None:
    net = Wire(frame(STEP), registered("w", 2), frame(STEP), registered("x", 5), frame(STEP))
    with client(net) as c:
        session = c.session("s")
        session.step(GRADS)
        assert session.register()["epoch"] == 2
        session.step(GRADS)
        assert session.register("x")["epoch"] == 5
        session.step(GRADS)
    stamps = [(net.fields(i)["epoch"], net.fields(i)["seq"]) for i in (0, 2, 4)]
    assert stamps == [(1, 1), (2, 1), (2, 2)]
    assert [net.fields(i) for i in (1, 3)] == [{"name": "w"}, {"name": "x"}]
    assert all("idempotency-key" in net.requests[i].headers for i in (1, 3))


def test_workers_are_listed_and_removed_without_a_number() -> None:
    net = Wire(httpx.Response(200, json={"workers": []}), httpx.Response(200, json={"id": "s"}))
    with client(net) as c:
        assert c.session("s").workers() == {"workers": []}
        c.session("s").remove_worker("w3")
        with pytest.raises(errors.Invalid, match="worker"):
            c.session("s").remove_worker("a/b")
    sent = [(r.method, r.url.raw_path) for r in net.requests]
    assert sent == [
        ("GET", b"/v1/sessions/s/workers"),
        ("DELETE", b"/v1/sessions/s/workers/w3"),
    ]
    assert "idempotency-key" in net.requests[1].headers
