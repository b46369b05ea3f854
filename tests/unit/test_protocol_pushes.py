"""Both clients and a push over a bad network, to a server that forgets every push when it restarts.

The server is a few lines here: what it keeps of a push, and what its ledger knows. Whatever gets
lost on the way, each step that the client says was taken was taken once.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optserve_client import AsyncClient, Client, Retry, Sparse, errors, wire

QUICK = Retry(retries=2, first_s=0.0, longest_s=0.0)
STEP = {"id": "s", "generation": "g", "updates": 1, "applied": True, "groups": []}
#: What may happen to one request.
PASS, LOSE, DROP, RESTART, RESTART_AND_LOSE, BUSY = range(6)
ONE = np.ones(3, np.float32)
TWO = np.full(2, 2, np.float32)


class Fake:
    """Takes pushes and patches; :attr:`faults` says what becomes of each request in turn."""

    def __init__(self, names: tuple[str, ...] = ("w", "b")) -> None:
        self.names = names
        self.faults: Iterator[int] = iter(())
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[Any] = []
        self.pushes: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, str] = {}
        #: Digest by seq; what was applied, in order.
        self.ledger: dict[int, Any] = {}
        self.applied: list[Any] = []
        self.opened = 0
        self.refuse: errors.OptserveError | None = None
        self.refuse_put: errors.OptserveError | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        fault = next(self.faults, PASS)
        if fault == DROP:
            raise httpx.ConnectError("no route")
        if fault == BUSY:
            return problem(errors.Unavailable("busy", retry_after=0))
        if fault == RESTART:
            self.restart()
        path = unquote(request.url.raw_path.decode())
        self.requests.append((request.method, request.url.raw_path.decode()))
        try:
            reply = self.answer(request, path)
        except errors.OptserveError as exc:
            reply = problem(exc)
        if fault == RESTART_AND_LOSE:
            self.restart()
        if fault in (LOSE, RESTART_AND_LOSE):
            raise httpx.ReadError("lost")
        return reply

    def restart(self) -> None:
        self.pushes.clear()
        self.keys.clear()

    def answer(self, request: httpx.Request, path: str) -> httpx.Response:
        fields, tensors = read(request)
        self.bodies.append(fields)
        assert path.startswith("/v1/sessions/s")
        rest = path.removeprefix("/v1/sessions/s").removeprefix("/pushes")
        if path == "/v1/sessions/s":
            return self.change(fields, ("patch", stripped(fields)))
        if not rest:
            return self.open(fields, request.headers["idempotency-key"])
        _, push_id, *more = rest.split("/", 2)
        if push_id not in self.pushes:
            raise errors.PushNotFound(f"no push {push_id!r}")
        push = self.pushes[push_id]
        if request.method == "DELETE":
            del self.pushes[push_id]
            return httpx.Response(200, json={"id": "s"})
        if request.method == "PUT":
            assert more[0] in self.names
            if self.refuse_put is not None:
                raise self.refuse_put
            push["tensors"][more[0]] = tensors or fields
            return httpx.Response(200, json={"id": "s"})
        assert more == ["commit"]
        said = push["fields"] | fields
        none = set(said.get("none", ()))
        if missing := set(self.names) - push["tensors"].keys() - none:
            raise errors.MissingGradient(f"{min(missing)} has no gradient")
        if said.get("dry_run"):
            return httpx.Response(200, json=STEP | {"version": 1})
        return self.change(said, ("step", stripped(said), sorted(push["tensors"].items())))

    def open(self, fields: Any, key: str) -> httpx.Response:
        if key not in self.keys:
            self.opened += 1
            self.keys[key] = f"p-{self.opened}"
            self.pushes[self.keys[key]] = {"fields": fields, "tensors": {}}
        return httpx.Response(201, json={"id": "s", "push": self.keys[key]})

    def change(self, fields: Any, digest: Any) -> httpx.Response:
        seq, last = fields["seq"], len(self.ledger)
        if seq > last + 1:
            raise errors.OutOfSequence("a gap", last_seq=last)
        if seq <= last and self.ledger[seq] != digest:
            raise errors.KeyReused("another payload", last_seq=last)
        duplicate = seq <= last
        if not duplicate and self.refuse is not None:
            raise self.refuse
        if not duplicate:
            self.ledger[seq] = digest
            self.applied.append(digest)
        told = {"version": len(self.ledger), "applied_version": seq, "duplicate": duplicate}
        return httpx.Response(200, json=STEP | told)


def stripped(fields: Any) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if k not in ("worker", "epoch", "seq", "generation")}


def read(request: httpx.Request) -> tuple[Any, dict[str, Any]]:
    if not request.content:
        return {}, {}
    if request.headers["content-type"] != wire.SAFETENSORS:
        return json.loads(request.content), {}
    tensors, metadata = wire.decode(request.content)
    plain = {name: bytes(wire.as_bytes(tensor)) for name, tensor in tensors.items()}
    return json.loads(metadata.get("optserve", "{}")), plain


def problem(exc: errors.OptserveError) -> httpx.Response:
    return httpx.Response(exc.status, json=exc.problem())


class Both:
    """The blocking or the awaited client, called in one way."""

    def __init__(self, kind: str, fake: Fake) -> None:
        self._loop = asyncio.new_event_loop() if kind == "awaited" else None
        options: dict[str, Any] = {"retries": QUICK, "worker": "me"}
        transport = httpx.MockTransport(fake)
        made: Any = AsyncClient if self._loop else Client
        self.client = made("http://test", transport=transport, **options)
        self.session = self.client.session("s")

    def do(self, result: Any) -> Any:
        return self._loop.run_until_complete(result) if self._loop else result

    def close(self) -> None:
        self.do(self.client.close())
        if self._loop:
            self._loop.close()


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture(params=["blocking", "awaited"])
def both(request: Any, fake: Fake) -> Iterator[Both]:
    made = Both(request.param, fake)
    yield made
    made.close()


def step_of(fake: Fake, index: int = -1) -> dict[str, bytes]:
    """Return the tensors of a step that was applied."""
    kind, _, tensors = fake.applied[index]
    assert kind == "step"
    return {full: data for _, one in tensors for full, data in one.items()}


GRADS = {"grad/b": TWO.tobytes(), "grad/w": ONE.tobytes()}


# What is sent ------------------------------------------------------------------------------------


def test_a_push_is_opened_put_and_committed(both: Both, fake: Fake) -> None:
    push = both.session.push(loss=0.5, returns="none")
    assert fake.requests == []
    both.do(push.put("w", ONE))
    both.do(push.put("b", [2.0, 2.0]))
    result = both.do(push.commit(metrics={"acc": 1.0, "bad": float("nan")}))
    assert [method for method, _ in fake.requests] == ["POST", "PUT", "PUT", "POST"]
    assert fake.bodies[0] == {"loss": 0.5, "return": "none"}
    stamp = {"worker": "me", "epoch": 1, "seq": 1}
    assert fake.bodies[-1] == {"metrics": {"acc": 1.0}, **stamp}
    assert step_of(fake) == GRADS
    assert (result.applied_version, result.params) == (1, None)
    both.do(push.close())
    assert len(fake.requests) == 4


@pytest.mark.parametrize(
    "name, segment", [("a/b", "a%2Fb"), ("..", "%2E%2E"), (".a", ".a"), ("%é ?", "%25%C3%A9%20%3F")]
)
def test_every_name_fits_into_an_address(name: str, segment: str) -> None:
    fake = Fake((name,))
    with Client("http://t", transport=httpx.MockTransport(fake), worker="me") as client:
        push = client.session("s").push()
        push.put(name, ONE)
        push.commit()
    assert fake.requests[1] == ("PUT", f"/v1/sessions/s/pushes/p-1/{segment}")
    assert step_of(fake) == {f"grad/{name}": ONE.tobytes()}


def test_sparse_gradients_none_and_bits_are_sent_as_in_a_step(both: Both, fake: Fake) -> None:
    fake.names = ("w", "b", "c", "d")
    push = both.session.push(none=["d"])
    coo = Sparse(indices=np.array([[1]]), values=ONE[:1], shape=(3,))
    both.do(push.put("w", coo))
    both.do(push.put("b", wire.Bits.bfloat16(TWO)))
    both.do(push.put("c", None))
    both.do(push.commit())
    tensors = dict(fake.applied[0][2])
    assert set(tensors["w"]) == {"sparse/w/indices", "sparse/w/values"}
    assert tensors["b"] == {"grad/b": bytes(wire.as_bytes(wire.Bits.bfloat16(TWO)))}
    assert tensors["c"] == {"grad": None}
    assert fake.applied[0][1] == {"none": ["d"]}


def test_other_changes_go_on_and_the_commit_has_the_next_number(both: Both, fake: Fake) -> None:
    push = both.session.push()
    both.do(push.put("w", ONE))
    both.do(both.session.patch(notes="n"))
    both.do(push.put("b", TWO))
    both.do(push.commit())
    both.do(both.session.patch(notes="m"))
    assert [digest[0] for digest in fake.applied] == ["patch", "step", "patch"]


def test_a_dry_run_has_no_number(both: Both, fake: Fake) -> None:
    push = both.session.push(dry_run=True, none=["w", "b"])
    both.do(push.commit())
    assert "seq" not in fake.bodies[-1]
    assert fake.applied == []


def test_what_is_not_committed_is_given_up(both: Both, fake: Fake) -> None:
    async def awaited() -> None:
        with pytest.raises(ZeroDivisionError):
            async with both.session.push() as push:
                await push.put("w", ONE)
                1 / 0  # noqa: B018

    if both._loop:
        both.do(awaited())
    else:
        with pytest.raises(ZeroDivisionError), both.session.push() as push:
            push.put("w", ONE)
            1 / 0  # noqa: B018
    assert fake.requests[-1] == ("DELETE", "/v1/sessions/s/pushes/p-1")
    assert fake.pushes == {}


def test_giving_up_is_tried_once_and_never_fails(both: Both, fake: Fake) -> None:
    both.do(both.session.push().close())
    assert fake.requests == []
    push = both.session.push()
    both.do(push.put("w", ONE))
    fake.faults = iter([LOSE] * 5)
    both.do(push.close())
    assert [method for method, _ in fake.requests].count("DELETE") == 1


def test_a_push_that_is_over_takes_nothing_more(both: Both, fake: Fake) -> None:
    push, other = both.session.push(none=["w", "b"]), both.session.push()
    both.do(push.commit())
    both.do(other.close())
    for over, word in ((push, "committed"), (other, "given up")):
        for call in (over.commit, lambda over=over: over.put("w", ONE)):
            with pytest.raises(RuntimeError, match=f"this push was {word}"):
                both.do(call())
    assert len(fake.applied) == 1


# What is lost ------------------------------------------------------------------------------------


def test_an_opening_whose_answer_is_lost_leaves_no_second_push(both: Both, fake: Fake) -> None:
    fake.faults = iter([LOSE])
    both.do(both.session.push().put("w", ONE))
    assert list(fake.pushes) == ["p-1"]


def test_a_gradient_is_sent_again_until_it_is_there(both: Both, fake: Fake) -> None:
    fake.faults = iter([PASS, LOSE, BUSY])
    push = both.session.push(none=["b"])
    both.do(push.put("w", ONE))
    both.do(push.commit())
    assert step_of(fake) == {"grad/w": ONE.tobytes()}


@pytest.mark.parametrize("when", range(5))
def test_after_a_restart_everything_is_sent_again_and_taken_once(
    both: Both, fake: Fake, when: int
) -> None:
    fake.faults = iter([PASS] * when + [RESTART])
    push = both.session.push(loss=0.5)
    both.do(push.put("w", ONE))
    both.do(push.put("b", TWO))
    assert both.do(push.commit()).duplicate is False
    assert len(fake.applied) == 1
    assert step_of(fake) == GRADS
    assert fake.opened == (2 if 0 < when < 4 else 1)


def test_a_step_that_was_taken_before_the_restart_is_a_duplicate(both: Both, fake: Fake) -> None:
    fake.faults = iter([PASS, PASS, PASS, RESTART_AND_LOSE])
    push = both.session.push(loss=0.5)
    both.do(push.put("w", ONE))
    both.do(push.put("b", TWO))
    result = both.do(push.commit())
    assert (result.duplicate, result.applied_version) == (True, 1)
    assert (len(fake.applied), fake.opened) == (1, 2)
    assert both.do(both.session.patch(notes="n"))["applied_version"] == 2


def test_a_server_that_forgets_every_push_is_given_up(both: Both, fake: Fake) -> None:
    push = both.session.push()
    both.do(push.put("w", ONE))
    fake.faults = iter([RESTART] * 100)
    with pytest.raises(errors.PushNotFound):
        both.do(push.put("b", TWO))
    with pytest.raises(errors.PushNotFound):
        both.do(push.commit())
    fake.faults = iter(())
    both.do(push.put("b", TWO))
    assert both.do(push.commit()).applied_version == 1


def open_commit(both: Both, fake: Fake, last: int) -> Any:
    """Return a push whose commit was applied, unless ``last`` says else, and never answered."""
    push = both.session.push(loss=0.5)
    w, b = ONE.copy(), TWO.copy()
    both.do(push.put("w", w))
    both.do(push.put("b", b))
    fake.faults = iter([last] * 3)
    with pytest.raises(errors.TransportError):
        both.do(push.commit())
    both.do(push.close())
    assert "DELETE" not in {method for method, _ in fake.requests}
    return push, w, b


@pytest.mark.parametrize("last", [LOSE, RESTART_AND_LOSE])
def test_a_commit_that_is_open_may_be_called_again(both: Both, fake: Fake, last: int) -> None:
    push, *_ = open_commit(both, fake, last)
    result = both.do(push.commit())
    assert (result.duplicate, result.applied_version) == (True, 1)
    assert len(fake.applied) == 1


@pytest.mark.parametrize("last", [LOSE, RESTART_AND_LOSE])
def test_any_other_change_settles_an_open_commit_first(both: Both, fake: Fake, last: int) -> None:
    _, w, b = open_commit(both, fake, last)
    w[:] = b[:] = 7  # the caller goes on
    both.do(both.session.patch(notes="n"))
    assert [digest[0] for digest in fake.applied] == ["step", "patch"]
    assert step_of(fake, 0) == GRADS


def test_an_open_commit_that_was_not_applied_is_applied_with_what_was_put(
    both: Both, fake: Fake
) -> None:
    _, w, b = open_commit(both, fake, LOSE)
    fake.ledger.clear()  # it had never come
    fake.applied.clear()
    fake.restart()
    w[:] = b[:] = 7
    both.do(both.session.patch(notes="n"))
    assert [digest[0] for digest in fake.applied] == ["step", "patch"]
    assert step_of(fake, 0) == GRADS


def test_a_server_that_was_never_reached_leaves_nothing_open(both: Both, fake: Fake) -> None:
    push = both.session.push()
    both.do(push.put("w", ONE))
    both.do(push.put("b", TWO))
    fake.faults = iter([DROP] * 3)
    with pytest.raises(errors.ConnectFailed):
        both.do(push.commit())
    assert both.do(both.session.patch(notes="n"))["applied_version"] == 1
    assert both.do(push.commit()).applied_version == 2


def test_what_fails_while_everything_is_sent_again_says_that_it_may_have_worked(
    both: Both, fake: Fake
) -> None:
    push = both.session.push()
    both.do(push.put("w", ONE))
    both.do(push.put("b", TWO))
    # Committed; the answer and the push are lost; the second push cannot be opened.
    fake.faults = iter([RESTART_AND_LOSE, PASS, DROP, DROP, DROP])
    with pytest.raises(errors.TransportError, match="an earlier attempt may have worked"):
        both.do(push.commit())
    result = both.do(push.commit())
    assert (result.duplicate, len(fake.applied)) == (True, 1)


# What is refused ---------------------------------------------------------------------------------


def test_a_refused_commit_leaves_its_number_free(both: Both, fake: Fake) -> None:
    push = both.session.push()
    both.do(push.put("w", ONE))
    both.do(push.put("b", TWO))
    fake.refuse = errors.VersionConflict("another version")
    with pytest.raises(errors.VersionConflict):
        both.do(push.commit())
    fake.refuse = None
    assert both.do(both.session.patch(notes="n"))["applied_version"] == 1
    both.do(push.close())
    assert fake.requests[-1][0] == "DELETE"


def test_a_missing_gradient_can_still_be_put(both: Both, fake: Fake) -> None:
    push = both.session.push()
    both.do(push.put("w", ONE))
    with pytest.raises(errors.MissingGradient, match="b has no gradient"):
        both.do(push.commit())
    both.do(push.put("b", TWO))
    assert both.do(push.commit()).applied_version == 1
    assert fake.opened == 1


def test_what_was_refused_was_not_put_and_what_was_there_stays(both: Both, fake: Fake) -> None:
    push = both.session.push()
    both.do(push.put("b", TWO))
    for before in ({}, {"w": ONE}):
        for name, grad in before.items():
            both.do(push.put(name, grad))
        fake.refuse_put = errors.Invalid("no")
        with pytest.raises(errors.Invalid, match="no"):
            both.do(push.put("w", TWO))
        fake.refuse_put = None
    fake.restart()
    both.do(push.commit())
    assert step_of(fake) == GRADS


def test_what_was_put_twice_is_sent_as_it_was_put_last(both: Both, fake: Fake) -> None:
    push = both.session.push()
    both.do(push.put("w", TWO))
    both.do(push.put("b", TWO))
    both.do(push.put("w", ONE))
    fake.restart()
    both.do(push.commit())
    assert step_of(fake) == GRADS


# Any of it ---------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    faults=st.lists(st.sampled_from([PASS, PASS, PASS, LOSE, DROP, RESTART, RESTART_AND_LOSE])),
    kind=st.sampled_from(["blocking", "blocking", "awaited"]),
)
def test_whatever_gets_lost_each_step_is_taken_once(faults: list[int], kind: str) -> None:
    fake = Fake()
    both = Both(kind, fake)
    fake.faults = iter(faults)
    done: list[str] = []
    for number in range(4):
        push = both.session.push(loss=float(number))
        persist(both, lambda push=push, n=number: push.put("w", ONE + n))
        if number % 2:
            persist(both, lambda n=number: both.session.patch(notes=str(n)))
            done.append("patch")
        persist(both, lambda push=push: push.put("b", TWO))
        result = persist(both, push.commit)
        done.append("step")
        assert result.applied_version == len(done)
        both.do(push.close())
    both.close()
    assert [digest[0] for digest in fake.applied] == done
    steps = [digest for digest in fake.applied if digest[0] == "step"]
    assert [fields for _, fields, _ in steps] == [{"loss": float(n)} for n in range(4)]
    for number, (_, _, tensors) in enumerate(steps):
        assert dict(tensors)["w"] == {"grad/w": (ONE + number).tobytes()}


def persist(both: Both, call: Callable[[], Any]) -> Any:
    """Call until there is an answer, as a program may that was told to."""
    while True:
        try:
            return both.do(call())
        except (errors.TransportError, errors.ServerError, errors.PushNotFound):
            continue
