"""One of several workers, of both kinds: when it registers, what it pushes, what it does then."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from optserve_client import AsyncClient, AsyncWorker, Client, Half, TopK, Worker, errors
from tests.unit.test_protocol_clients import QUICK, STEP, Wire, frame
from tests.unit.test_protocol_rounds import CLOSED, STALE, opened, refused, registered

GRADS = {"w": np.ones(2, np.float32)}
FAILED = errors.RoundFailed("round 1 failed", version=0, round=1)
NAMESAKE = errors.Fenced("worker 'w3' sent epoch 1, the current one is 2", epoch=2, last_seq=0)
REMOVED = errors.Fenced("worker 'w3' was removed", epoch=1, last_seq=1, removed=True)
UNKNOWN = errors.OutOfSequence("the highest given is 1", epoch=1, last_seq=0)
REWOUND = errors.SessionRewound("lost", generation="h", version=0)

Make = Callable[..., Any]


class Awaited:
    """An AsyncWorker whose methods are waited for."""

    def __init__(self, loop: asyncio.AbstractEventLoop, worker: AsyncWorker) -> None:
        self._loop, self._worker = loop, worker

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._worker, name)
        if not inspect.iscoroutinefunction(found):
            return found
        return lambda *args, **kwargs: self._loop.run_until_complete(found(*args, **kwargs))


@pytest.fixture(params=["blocking", "awaited"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Return ``make(net, **options)``, a worker w3 of session s over a network."""
    loop = asyncio.new_event_loop()

    def blocking(net: Any, name: str | None = "w3", **options: Any) -> Worker:
        client = Client("http://test", transport=httpx.MockTransport(net), retries=QUICK)
        return Worker(client, "s", name, **options)

    def awaited(net: Any, name: str | None = "w3", **options: Any) -> Awaited:
        client = AsyncClient("http://test", transport=httpx.MockTransport(net), retries=QUICK)
        return Awaited(loop, AsyncWorker(client, "s", name, **options))

    yield blocking if request.param == "blocking" else awaited
    loop.close()


def pulled(version: int, etag: str = "", generation: str = "g") -> httpx.Response:
    said = {"id": "s", "version": version, "generation": generation, "weights": "live"}
    response = frame(said, w=np.full(2, float(version), np.float32))
    response.headers["etag"] = etag or f'"{generation}.{version}"'
    return response


def pushed(version: int, **more: Any) -> httpx.Response:
    made = {**STEP, "version": version, "applied_version": version, "round": CLOSED, **more}
    return frame(made, w=np.full(2, float(version), np.float32))


def problem(error: errors.OptserveError) -> httpx.Response:
    return httpx.Response(error.status, json=error.problem())


def paths(net: Wire) -> list[str]:
    return [f"{r.method} {r.url.path.removeprefix('/v1/sessions/s')}" for r in net.requests]


def stamps(net: Wire) -> list[tuple[Any, ...]]:
    """Return who sent each push, as which of its requests, and of which version it was."""
    fields = [net.fields(i) for i, r in enumerate(net.requests) if r.url.path.endswith("/step")]
    return [(f["worker"], f["epoch"], f["seq"], f.get("base_version")) for f in fields]


# Registering, pulling, pushing -------------------------------------------------------------------


def test_it_registers_once_and_pushes_with_the_version_of_what_it_has(make: Make) -> None:
    net = Wire(registered("w3", 4), pulled(7), pushed(8), pushed(9))
    worker = make(net)
    assert (worker.name, worker.epoch, worker.version, worker.params) == ("w3", None, None, None)
    np.testing.assert_array_equal(worker.pull()["w"], [7, 7])
    result = worker.push(GRADS, loss=0.5, metrics={"acc": 1.0}, weight=3.0)
    worker.push(GRADS)
    assert paths(net) == ["POST /workers", "GET /params", "POST /step", "POST /step"]
    assert net.fields(0) == {"name": "w3"}
    assert stamps(net) == [("w3", 4, 1, 7), ("w3", 4, 2, 8)]
    sent = net.fields(2)
    assert (sent["loss"], sent["metrics"], sent["weight"]) == (0.5, {"acc": 1.0}, 3.0)
    assert (sent["generation"], sent["wait_s"], sent["return"]) == ("g", 55.0, "params")
    assert (result.version, result.round) == (8, CLOSED)
    assert (worker.version, worker.epoch) == (9, 4)
    np.testing.assert_array_equal(worker.params["w"], [9, 9])


def test_it_waits_for_its_round_however_long_that_is(make: Make) -> None:
    net = Wire(registered("w3", 1), pulled(0), opened(), opened(), pushed(1))
    worker = make(net)
    worker.pull()
    assert worker.push(GRADS).applied_version == 1
    assert stamps(net) == [("w3", 1, 1, 0)] * 3


def test_a_push_that_does_not_wait_leaves_its_params_as_they_are(make: Make) -> None:
    net = Wire(registered("w3", 1), pulled(0), opened(), pushed(1))
    worker = make(net)
    worker.pull()
    assert not worker.push(GRADS, wait_s=0).applied
    assert worker.version == 0
    worker.push(GRADS, base_version=5, returns="none")
    assert stamps(net) == [("w3", 1, 1, 0), ("w3", 1, 2, 5)]


def test_a_pull_of_what_it_has_moves_nothing(make: Make) -> None:
    same = httpx.Response(304, headers={"etag": '"g.3"'})
    net = Wire(registered("w3", 1), pulled(3), same, pushed(4), httpx.Response(304), pulled(6))
    worker = make(net)
    first = worker.pull()
    assert worker.pull() is first
    assert net.requests[2].headers["if-none-match"] == '"g.3"'
    worker.push(GRADS)
    held = worker.params
    assert worker.pull() is held
    assert net.requests[4].url.params["min_version"] == "5"
    assert worker.pull().version == worker.version == 6


def test_some_of_the_params_are_asked_for_by_name(make: Make) -> None:
    net = Wire(registered("w3", 1), pulled(3), pulled(3), pulled(4))
    worker = make(net)
    worker.pull()
    worker.pull(names=["w"])
    worker.pull()
    queries = [request.url.params.get("names") for request in net.requests[1:]]
    assert queries == [None, "w", None]
    assert not any("if-none-match" in request.headers for request in net.requests)


def test_deltas_are_pushed_like_gradients(make: Make) -> None:
    net = Wire(registered("w3", 1), pulled(3), pushed(4))
    worker = make(net)
    worker.pull()
    worker.push(deltas=GRADS)
    assert list(net.tensors()) == ["delta/w"]


def test_a_name_is_made_up_if_there_is_none_and_refused_if_it_is_none(make: Make) -> None:
    assert make(Wire(), None).name != make(Wire(), None).name
    with pytest.raises(errors.Invalid, match="worker"):
        make(Wire(), "a/b")
    with pytest.raises(errors.Invalid, match="on_stale must be 'raise' or 'drop', got 'damp'"):
        make(Wire(), on_stale="damp")


def test_it_takes_a_client_of_its_own_kind_or_a_url() -> None:
    with pytest.raises(TypeError, match="must be a Client or a URL"):
        Worker(AsyncClient(), "s")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be an AsyncClient or a URL"):
        AsyncWorker(Client(), "s")  # type: ignore[arg-type]


def test_only_a_client_that_it_made_is_closed_with_it() -> None:
    net = Wire(httpx.Response(200, json={}))
    with Client("http://test", transport=httpx.MockTransport(net)) as client:
        with Worker(client, "s"):
            pass
        client.healthz()
    with Worker("http://127.0.0.1:1", "s") as worker:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        worker.pull()


def test_who_leaves_is_removed_and_registers_again_at_its_next_use(make: Make) -> None:
    net = Wire(registered("w3", 1), pulled(0), httpx.Response(200, json={}), registered("w3", 2))
    net.outcomes.append(pushed(1))
    worker = make(net)
    worker.pull()
    worker.leave()
    worker.push(GRADS)
    assert paths(net)[2:] == ["DELETE /workers/w3", "POST /workers", "POST /step"]
    assert stamps(net) == [("w3", 2, 1, 0)]


# Late pushes, failed rounds ----------------------------------------------------------------------


def test_a_late_push_is_told_and_the_next_one_is_of_the_params_of_now(make: Make) -> None:
    net = Wire(registered("w3", 1), pulled(2), refused(STALE, w=np.full(2, 4.0)), pushed(5))
    worker = make(net)
    worker.pull()
    with pytest.raises(errors.StaleGradient) as caught:
        worker.push(GRADS)
    assert caught.value.params["w"] is worker.params["w"]
    assert worker.version == 4
    worker.push(GRADS)
    assert stamps(net) == [("w3", 1, 1, 2), ("w3", 1, 1, 4)]


def test_a_late_push_is_dropped_without_an_exception_if_that_is_wanted(make: Make) -> None:
    net = Wire(registered("w3", 1), pulled(2), refused(STALE, w=np.full(2, 4.0)), pushed(5))
    worker = make(net, on_stale="drop")
    worker.pull()
    result = worker.push(GRADS)
    assert (result.applied, result.applied_version, result.skipped) == (
        False,
        None,
        "stale_gradient",
    )
    assert (result.version, result.updates, result.staleness) == (4, 4, 2)
    np.testing.assert_array_equal(result.params["w"], [4, 4])
    assert worker.push(GRADS).applied


def test_a_failed_round_is_told_and_the_number_is_used_again(make: Make) -> None:
    net = Wire(registered("w3", 1), pulled(0), problem(FAILED), pushed(1))
    worker = make(net)
    worker.pull()
    with pytest.raises(errors.RoundFailed):
        worker.push(GRADS)
    worker.push({"w": np.zeros(2, np.float32)})
    assert stamps(net) == [("w3", 1, 1, 0)] * 2


def test_a_push_goes_into_the_next_rounds_as_often_as_is_wanted(make: Make) -> None:
    net = Wire(registered("w3", 1), pulled(0), *[problem(FAILED) for _ in range(3)])
    net.outcomes += [problem(FAILED), problem(FAILED), pushed(1)]
    worker = make(net, retry_rounds=2)
    worker.pull()
    with pytest.raises(errors.RoundFailed):
        worker.push(GRADS)
    assert worker.push(GRADS).applied
    assert stamps(net) == [("w3", 1, 1, 0)] * 6
    assert len({r.content for r in net.requests[2:]}) == 1


# Who it is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [REMOVED, UNKNOWN], ids=["removed", "unknown"])
def test_who_is_not_known_any_more_registers_again_and_pushes_again(
    make: Make, error: errors.OptserveError
) -> None:
    net = Wire(registered("w3", 1), pulled(3), problem(error), registered("w3", 2), pushed(4))
    worker = make(net)
    worker.pull()
    assert worker.push(GRADS).version == 4
    assert stamps(net) == [("w3", 1, 1, 3), ("w3", 2, 1, 3)]


def test_who_is_not_known_right_after_it_registered_is_told(make: Make) -> None:
    net = Wire(registered("w3", 1), pulled(3), problem(UNKNOWN), registered("w3", 2))
    net.outcomes += [problem(UNKNOWN), registered("w3", 3), pushed(4)]
    worker = make(net)
    worker.pull()
    with pytest.raises(errors.OutOfSequence):
        worker.push(GRADS)
    assert worker.push(GRADS).version == 4
    assert worker.epoch == 3


def test_what_may_count_already_is_not_pushed_again_in_a_new_epoch(make: Make) -> None:
    net = Wire(registered("w3", 1), pulled(3), httpx.ReadError("reset"), problem(REMOVED))
    net.outcomes += [registered("w3", 2), pushed(5)]
    worker = make(net)
    worker.pull()
    with pytest.raises(errors.Fenced, match="an earlier copy of this request may have been"):
        worker.push(GRADS)
    assert worker.push(GRADS).version == 5
    assert stamps(net) == [("w3", 1, 1, 3), ("w3", 1, 1, 3), ("w3", 2, 1, 3)]


def test_the_older_of_two_namesakes_stops_for_good(make: Make) -> None:
    net = Wire(registered("w3", 1), pulled(3), problem(NAMESAKE), registered("w3", 3), pushed(4))
    worker = make(net)
    worker.pull()
    for call in (lambda: worker.push(GRADS), lambda: worker.push(GRADS), worker.pull):
        with pytest.raises(errors.Fenced, match="the current one is 2"):
            call()
    assert len(net.requests) == 3
    assert worker.register()["epoch"] == 3
    assert worker.push(GRADS).version == 4


def test_lost_history_is_told_once_and_what_was_pulled_is_void(make: Make) -> None:
    net = Wire(registered("w3", 2), pulled(3), problem(REWOUND))
    again = registered("w3", 1)
    net.outcomes += [again, pulled(0, generation="h"), pushed(1, generation="h")]
    worker = make(net)
    worker.pull()
    with pytest.raises(errors.SessionRewound):
        worker.push(GRADS)
    assert worker.params is None
    assert worker.pull().version == 0
    assert "if-none-match" not in net.requests[-1].headers
    worker.push(GRADS)
    assert stamps(net) == [("w3", 2, 1, 3), ("w3", 1, 1, 0)]


def test_a_push_that_stays_open_is_settled_before_the_next_one(make: Make) -> None:
    net = Wire(registered("w3", 1), pulled(0), *[httpx.ReadTimeout("late")] * 3)
    net.outcomes += [pushed(1, duplicate=True), problem(STALE)]
    worker = make(net)
    worker.pull()
    with pytest.raises(errors.Timeout):
        worker.push(GRADS)
    with pytest.raises(errors.StaleGradient):
        worker.push({"w": np.zeros(2, np.float32)})
    assert stamps(net) == [("w3", 1, 1, 0)] * 4 + [("w3", 1, 2, 0)]
    assert len({r.content for r in net.requests[2:6]}) == 1


def sizes(*values: tuple[int, float]) -> Any:
    """Return 100 numbers, all but these 0."""
    array = np.zeros(100, np.float32)
    for at, value in values:
        array[at] = value
    return array


def test_what_a_compressed_push_left_out_stays_with_the_worker(make: Make) -> None:
    """Also from one epoch to the next, and it is not lost with a push that was refused."""
    net = Wire(registered("w3", 1), pulled(0), pushed(1), problem(FAILED), problem(REMOVED))
    net.outcomes += [registered("w3", 2), pushed(2)]
    worker, one = make(net), TopK(0.01)
    worker.pull()
    worker.push({"w": sizes((0, 4.0), (1, 1.0))}, compress=one)
    second = {"w": sizes((1, 0.5), (2, 1.0))}
    with pytest.raises(errors.RoundFailed):
        worker.push(second, compress=one)
    worker.push(second, compress=one)
    sent = [net.tensors(i) for i in (2, 3, 4, 6)]
    assert [s["topk/w/values"].tolist() for s in sent] == [[4.0], [1.5], [1.5], [1.5]]
    assert [s["topk/w/indices"].tolist() for s in sent] == [[0], [1], [1], [1]]


@pytest.mark.parametrize(
    "compress, names",
    [
        (TopK(0.01), ["topk/w/indices", "topk/w/values", "delta/b"]),
        (Half(), ["delta/w", "delta/b"]),
    ],
)
def test_deltas_can_be_compressed_too(make: Make, compress: Any, names: list[str]) -> None:
    net = Wire(registered("w3", 1), pulled(0), pushed(1))
    worker = make(net)
    worker.pull()
    deltas = {"w": sizes((0, 4.0)), "b": np.ones(1, np.float32)}  # b is too small to gain by it
    worker.push(deltas=deltas, compress=compress)
    assert list(net.tensors()) == names
