"""Steps that come tensor by tensor, without a server: what is kept, what ends, what is limited."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from optserve.optim.arena import LEASED_BYTES, GradientPool
from optserve.optim.layout import Layout
from optserve.sessions import pushes as module
from optserve.sessions.arriving import Arrival
from optserve.sessions.holding import Shape
from optserve.sessions.intake import StepIntake
from optserve.sessions.journaling import Unkept
from optserve.sessions.push import REMEMBERED_S, Push
from optserve.sessions.pushes import MOST_OPEN, MOST_SPENT, Pushes, most_open
from optserve.sessions.step import Expected, Step
from optserve.store.payloads import Spool
from optserve_client import wire
from optserve_client.errors import (
    Conflict,
    Invalid,
    KeyReused,
    Malformed,
    MissingGradient,
    OptserveError,
    OutOfSpace,
    PushNotFound,
    TooLarge,
    Unavailable,
)

SHAPES: dict[str, tuple[int, ...]] = {"a/b": (2, 3), "w": (5,), "s": (), "e": (0, 4), "emb": (4, 2)}
DTYPES = {"float32": "<f4", "float16": "<f2", "float64": "<f8"}
TTL_S = 60.0
SPOOLS: list[Spool] = []


@pytest.fixture(autouse=True)
def spool() -> Iterator[None]:
    SPOOLS.append(Spool())
    yield
    SPOOLS.pop().close()


class Clock:
    """Stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def shape(tag: str = "F32", sparse: frozenset[str] = frozenset({"emb"})) -> Shape:
    layout = Layout.pack(tag, SHAPES.items())
    dense = layout.subset(name for name in SHAPES if name not in sparse)
    return Shape(Expected(layout=layout, sparse=sparse), GradientPool(dense))


class Bench:
    """The pushes of a session that is not there, and somebody who sends to them."""

    def __init__(self, like: Shape | None = None) -> None:
        self.clock = Clock()
        self.shape = like or shape()
        self.pushes = Pushes(self.clock)
        self.spool = SPOOLS[-1]

    def open(self, **fields: Any) -> Push:
        return self.pushes.open(self.shape, fields, ttl_s=TTL_S)[0]

    def arrival(self, push: Push, name: str, limit: int = 10**6) -> Arrival:
        return self.pushes.arrival(push, name, self.shape.expected, limit)

    def put(self, push: Push, name: str, tensors: Mapping[str, Any], fields: Any = None) -> None:
        arrival = self.arrival(push, name)
        try:
            arrival.feed(frame(tensors, fields))
            arrival.finishing = True
            arrival.settle(arrival.whole())
        except OptserveError:
            arrival.abort()
            raise

    def put_json(self, push: Push, name: str, body: dict[str, Any]) -> None:
        arrival = self.arrival(push, name)
        try:
            arrival.settle(arrival.read(body))
        except OptserveError:
            arrival.abort()
            raise

    def fill(self, push: Push, grads: Mapping[str, Mapping[str, Any]]) -> None:
        for name, tensors in grads.items():
            self.put(push, name, tensors)

    def commit(self, push: Push, **fields: Any) -> Step:
        push.close(push.joined(fields))
        step = push.step(lambda size: self.spool.writer(size))
        self.pushes.spend(push)
        return step


def frame(tensors: Mapping[str, Any], fields: Any = None) -> bytes:
    metadata = None if fields is None else {wire.META_KEY: json.dumps(fields)}
    return b"".join(wire.encode(tensors, metadata))


def gradients(seed: int, dtype: str = "<f4") -> dict[str, dict[str, Any]]:
    """Return the tensors of each parameter's gradient; ``emb`` is sparse."""
    rng = np.random.default_rng(seed)
    made: dict[str, dict[str, Any]] = {
        name: {f"grad/{name}": np.asarray(rng.normal(size=size), dtype)}
        for name, size in SHAPES.items()
        if name != "emb"
    }
    values = np.asarray(rng.normal(size=(3, 2)), dtype)
    made["emb"] = {"sparse/emb/indices": np.array([[3, 0, 3]]), "sparse/emb/values": values}
    return made


def whole(bench: Bench, tensors: Mapping[str, Any], fields: Any) -> Step:
    """Return the step that one body makes of ``tensors``."""
    intake = StepIntake(
        expected=bench.shape.expected,
        lease=bench.shape.pool.lease,
        writer=lambda size: bench.spool.writer(size),
    )
    intake.feed(frame(tensors, fields))
    return intake.finish()


def content(step: Step) -> dict[str, Any]:
    """Return everything in a step, as the update reads it."""
    step.buffer.widen()
    dense = {
        name: bytes(step.buffer.view(name))
        for name in step.buffer.layout.names
        if name not in step.none
    }
    sparse = {
        name: (coo.indices.tolist(), bytes(wire.as_bytes(coo.values)), coo.shape)
        for name, coo in step.sparse.items()
    }
    return {"dense": dense, "sparse": sparse, "none": step.none, "fields": step.fields.to_json()}


# --- what comes of it ----------------------------------------------------------------------------


@pytest.mark.parametrize("wire_dtype", ["<f4", "<f2", "bfloat16"])
@pytest.mark.parametrize("tag", ["F32", "F64", "BF16"])
def test_a_push_makes_the_same_step_as_one_body(tag: str, wire_dtype: str) -> None:
    grads = gradients(1, "<f4" if wire_dtype == "bfloat16" or tag == "BF16" else wire_dtype)
    if wire_dtype == "bfloat16" or tag == "BF16":
        grads = {
            name: {
                full: t if full.endswith("/indices") else wire.Bits.bfloat16(t)
                for full, t in tensors.items()
            }
            for name, tensors in grads.items()
        }
    bench, fields = Bench(shape(tag)), {"loss": 0.5, "none": ["s"], "worker": "a", "seq": 3}
    del grads["s"]
    push = bench.open(**fields)
    bench.fill(push, dict(reversed(grads.items())))
    step = bench.commit(push)
    want = whole(bench, {full: t for one in grads.values() for full, t in one.items()}, fields)
    assert content(step) == content(want)


def test_the_journal_has_a_frame_that_makes_the_same_step_again() -> None:
    bench = Bench()
    push = bench.open(loss=0.5)
    bench.fill(push, {n: g for n, g in gradients(2, "<f2").items() if n != "w"})
    bench.put_json(push, "w", {"grad": None})
    step = bench.commit(push)
    assert step.payload is not None
    tensors, metadata = wire.decode(step.payload.read())
    assert list(tensors) == [
        "grad/a/b",
        "grad/s",
        "grad/e",
        "sparse/emb/indices",
        "sparse/emb/values",
    ]
    assert content(whole(bench, tensors, json.loads(metadata["optserve"]))) == content(step)


def test_the_digest_is_that_of_fields_and_tensors_in_whatever_order_they_came() -> None:
    bench, grads = Bench(), gradients(3)
    first, second = bench.open(loss=1.0, worker="a", seq=1), bench.open(worker="a")
    bench.fill(first, grads)
    bench.fill(second, dict(reversed(grads.items())))
    digest = bench.commit(first).digest
    assert bench.commit(second, seq=1, loss=1.0).digest == digest
    for change in ({"seq": 2}, {"loss": 2.0}, {"metrics": {"a": 1.0}}):
        third = bench.open(**{"loss": 1.0, "worker": "a", "seq": 1} | change)
        bench.fill(third, grads)
        assert bench.commit(third).digest != digest
    fourth = bench.open(loss=1.0, worker="a", seq=1)
    bench.fill(fourth, grads | {"w": {"grad/w": np.zeros(5, "<f4")}})
    assert bench.commit(fourth).digest != digest


def test_json_and_binary_bring_the_same_bits() -> None:
    bench, grads = Bench(), gradients(4)
    one, other = bench.open(), bench.open()
    bench.fill(one, grads)
    for name, tensors in grads.items():
        if name != "emb":
            bench.put_json(other, name, {"grad": tensors[f"grad/{name}"].tolist()})
    halves = grads["emb"]
    coo = {"indices": halves["sparse/emb/indices"].tolist(), "shape": [4, 2]}
    coo["values"] = wire.tensor_to_json(halves["sparse/emb/values"], "base64")
    bench.put_json(other, "emb", {"grad": coo})
    a, b = bench.commit(one), bench.commit(other)
    assert a.digest == b.digest
    assert content(a) == content(b)


@pytest.mark.parametrize("first", ["<f4", "<f2", "json", "null"])
@pytest.mark.parametrize("second", ["<f4", "<f2", "json"])
def test_the_same_name_again_replaces(first: str, second: str) -> None:
    bench, push = Bench(), None
    push = bench.open()
    bench.fill(push, gradients(5))
    for kind, seed in ((first, 6), (second, 7)):
        value = gradients(seed, kind if kind.startswith("<") else "<f4")["w"]["grad/w"]
        if kind.startswith("<"):
            bench.put(push, "w", {"grad/w": value})
        else:
            bench.put_json(push, "w", {"grad": value.tolist() if kind == "json" else None})
    want = gradients(7, second if second == "<f2" else "<f4")["w"]["grad/w"].astype("<f4")
    assert push.beside_bytes == 3 * 8 + 3 * 2 * 4 + (20 if second == "json" else 0)
    assert content(bench.commit(push))["dense"]["w"] == want.tobytes()


def test_a_parameter_may_have_no_gradient_by_null_or_by_name() -> None:
    bench = Bench()
    push = bench.open(none=["a/b"])
    bench.fill(push, {n: g for n, g in gradients(8).items() if n not in ("a/b", "w", "emb")})
    bench.put_json(push, "w", {"grad": None})
    assert push.progress()["missing"] == 1
    with pytest.raises(MissingGradient, match="'emb' has no gradient"):
        push.close(push.joined({}))
    with pytest.raises(Invalid, match="none came when the push was opened"):
        push.joined({"none": ["emb"]})
    bench.put_json(push, "emb", {"grad": None})
    step = bench.commit(push)
    assert step.none == {"a/b", "w", "emb"}
    assert step.fields.none == ["a/b", "emb", "w"]  # one order, for the digest


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, tensors, fields, sentence",
    [
        ("w", {"grad/w": np.zeros(4, "<f4")}, None, "'grad/w' has shape [4], expected [5]"),
        ("w", {"grad/w": np.zeros(5, "<f8")}, None, "would round"),
        ("w", {"grad/s": np.zeros((), "<f4")}, None, "'grad/s' is no gradient of 'w'"),
        ("w", {"param/w": np.zeros(5, "<f4")}, None, "'param/w' is no gradient of 'w'"),
        ("w", {"grad/w": np.zeros(5, "<f4")}, {"loss": 1.0}, "loss is a field of the step"),
        ("w", {"sparse/w/indices": np.zeros((1, 1), "<i8")}, None, "was not declared sparse"),
        ("emb", {"grad/emb": np.zeros((4, 2), "<f4")}, None, "was declared sparse"),
        ("emb", {"sparse/emb/indices": np.zeros((1, 1), "<i8")}, None, "lacks"),
        ("nobody", {"grad/nobody": np.zeros(5, "<f4")}, None, "unknown parameter 'nobody'"),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused_and_the_one_before_stays(
    name: str, tensors: dict[str, Any], fields: Any, sentence: str
) -> None:
    bench = Bench()
    push = bench.open()
    bench.fill(push, gradients(9))
    with pytest.raises(Invalid) as caught:
        bench.put(push, name, tensors, fields)
    assert sentence in caught.value.detail
    assert content(bench.commit(push)) == content(filled(gradients(9)))


def filled(grads: Mapping[str, Mapping[str, Any]]) -> Step:
    bench = Bench()
    push = bench.open()
    bench.fill(push, grads)
    return bench.commit(push)


def test_an_index_outside_is_refused() -> None:
    bench = Bench()
    push = bench.open()
    halves = {**gradients(1)["emb"], "sparse/emb/indices": np.array([[3, 0, 4]])}
    with pytest.raises(Invalid, match=r"must be in \[0, 4\), got 4"):
        bench.put(push, "emb", halves)
    assert push.told()["arriving"] == []


def test_a_frame_without_tensors_and_a_body_that_is_too_long_are_refused() -> None:
    bench = Bench()
    push = bench.open()
    with pytest.raises(MissingGradient, match="'w' has no gradient"):
        bench.put(push, "w", {})
    arrival = bench.arrival(push, "w", limit=90)
    with pytest.raises(TooLarge, match="the limit is 90"):
        arrival.feed(frame({"grad/w": np.zeros(5, "<f4")}))
    arrival.abort()
    arrival = bench.arrival(push, "w")
    with pytest.raises(Malformed, match="goes on after"):
        arrival.feed(frame({"grad/w": np.zeros(5, "<f4")}) + b"x")
    arrival.abort()
    assert push.progress()["missing"] == 5


@pytest.mark.parametrize(
    "body, sentence",
    [
        ({}, "the body must have the field grad"),
        ({"grads": [1]}, "unknown field 'grads' (did you mean 'grad'?)"),
        ({"grad": [1.0], "loss": 1}, "unknown field 'loss'"),
        ({"grad": [1.0]}, "grads['w'] has shape [1], expected [5]"),
        ({"grad": "x"}, "grads['w']"),
    ],
)
def test_a_json_body_that_is_no_gradient_is_refused(body: Any, sentence: str) -> None:
    bench = Bench()
    push = bench.open()
    with pytest.raises(Invalid) as caught:
        bench.put_json(push, "w", body)
    assert sentence in caught.value.detail
    assert push.progress()["missing"] == 5


@pytest.mark.parametrize(
    "body, sentence",
    [
        ({"lss": 1.0}, "unknown field 'lss' (did you mean 'loss'?)"),
        ({"grads": {}}, "grads: a push is opened with fields only"),
        ({"params": {}}, "params: a push is opened with fields only"),
        ({"none": ["v"]}, "none: unknown parameter 'v'"),
        ({"loss_scale": 0}, "loss_scale must be > 0, got 0"),
    ],
)
def test_fields_are_checked_when_it_is_opened(body: Any, sentence: str) -> None:
    bench = Bench()
    with pytest.raises(Invalid) as caught:
        bench.open(**body)
    assert sentence in caught.value.detail
    assert len(bench.shape.pool._out) == 0


def test_a_field_comes_once() -> None:
    push = Bench().open(loss=0.5, metrics=None)
    assert push.joined({"loss": None, "metrics": {"a": 1.0}}).loss == 0.5
    with pytest.raises(Invalid, match="loss came when the push was opened and comes again"):
        push.joined({"loss": 0.5})


# --- bodies that do not end as they should -------------------------------------------------------


def half(bench: Bench, push: Push, name: str = "w") -> Arrival:
    """Return an arrival whose header and first element have come."""
    arrival = bench.arrival(push, name)
    tensor = np.full(SHAPES[name], 7, "<f4")
    arrival.feed(frame({f"grad/{name}": tensor})[: 4 - tensor.nbytes])
    return arrival


def test_a_gradient_whose_replacement_broke_off_is_not_there() -> None:
    bench = Bench()
    push = bench.open()
    bench.fill(push, gradients(10))
    half(bench, push).abort(broken=True)
    assert push.told()["missing"] == ["w"]
    # Also where not even the header came, or it came as JSON.
    bench.arrival(push, "s").abort(broken=True)
    assert push.told()["missing"] == ["w", "s"]
    bench.arrival(push, "a/b").abort()
    assert push.told()["missing"] == ["w", "s"]


def test_a_body_that_is_too_short_is_malformed_and_its_gradient_not_there() -> None:
    bench = Bench()
    push = bench.open()
    bench.fill(push, gradients(10))
    arrival = half(bench, push)
    with pytest.raises(Malformed, match="the body ended after"):
        arrival.whole()
    arrival.abort()
    assert push.told()["missing"] == ["w"]


def test_a_later_body_stops_an_earlier_one_of_the_same_name() -> None:
    bench = Bench()
    push = bench.open()
    bench.fill(push, gradients(11))
    slow = half(bench, push)
    room = slow.room()
    assert room is not None
    bench.put(push, "w", gradients(12)["w"])
    for call in (slow.room, lambda: slow.feed(b"x"), lambda: slow.filled(1)):
        with pytest.raises(Unavailable, match="another body of 'w' came meanwhile"):
            call()
    slow.abort(broken=True)
    assert push.told()["arriving"] == []
    assert push.told()["missing"] == []
    want = gradients(12)["w"]["grad/w"].tobytes()
    assert content(bench.commit(push))["dense"]["w"] == want


def test_a_body_that_is_just_being_stored_is_not_stopped() -> None:
    bench = Bench()
    push = bench.open()
    first = half(bench, push)
    first.finishing = True
    with pytest.raises(Unavailable, match="the last body of 'w' is just being stored"):
        bench.put(push, "w", gradients(12)["w"])


def test_nothing_is_committed_while_a_body_arrives() -> None:
    bench = Bench()
    push = bench.open()
    bench.fill(push, gradients(13))
    arrival = half(bench, push, "a/b")
    assert push.told()["arriving"] == ["a/b"]
    with pytest.raises(Conflict, match="the body of 'a/b' is still arriving"):
        push.close(push.joined({}))
    arrival.abort(broken=True)
    bench.put(push, "a/b", gradients(13)["a/b"])
    assert content(bench.commit(push)) == content(filled(gradients(13)))


def test_a_push_that_is_committed_takes_nothing_more() -> None:
    bench = Bench()
    push = bench.open()
    bench.fill(push, gradients(14))
    push.close(push.joined({}))
    with pytest.raises(Conflict, match="is being committed"):
        bench.arrival(push, "w")
    with pytest.raises(Conflict, match="is being committed"):
        bench.pushes.give_up(push.id)
    push.step(lambda size: Unkept())
    bench.pushes.spend(push)
    for call in (push.told, lambda: bench.arrival(push, "w"), push.give_up):
        with pytest.raises(PushNotFound, match="is over"):
            call()


def test_a_step_that_could_not_be_written_can_be_committed_again() -> None:
    class Full(Unkept):
        def write(self, chunk: Any) -> None:
            raise OutOfSpace

    bench = Bench()
    push = bench.open()
    bench.fill(push, gradients(15, "<f2"))
    push.close(push.joined({"loss": 1.0}))
    made = push.made
    with pytest.raises(OutOfSpace) as caught:
        push.step(lambda size: Full())
    push.reopen(caught.value)
    assert made is not None
    assert isinstance(made.exception(), OutOfSpace)
    bench.put(push, "w", gradients(15, "<f2")["w"])
    assert (
        content(bench.commit(push, loss=1.0))["dense"]
        == content(filled(gradients(15, "<f2")))["dense"]
    )


# --- how it ends ---------------------------------------------------------------------------------


def test_a_push_expires_after_its_last_byte_and_gives_its_buffer_back() -> None:
    bench = Bench()
    push = bench.open()
    bench.clock.now += 50
    bench.put(push, "w", gradients(16)["w"])
    bench.clock.now += 50
    assert bench.pushes.get(push.id) is push
    assert push.left_s == 10
    arrival = half(bench, push)
    bench.clock.now += 50
    bench.pushes.expire()  # not while it arrives
    assert bench.pushes.get(push.id) is push
    arrival.abort(broken=True)
    bench.clock.now += TTL_S - 1
    assert bench.pushes.get(push.id) is push
    bench.clock.now += 1
    with pytest.raises(PushNotFound, match="no push"):
        bench.pushes.get(push.id)
    pool = bench.shape.pool
    assert (len(pool._out), len(pool._kept), len(pool._warm)) == (1, 0, 1)


def test_looking_is_no_byte() -> None:
    bench = Bench()
    push = bench.open()
    for _ in range(2):
        bench.clock.now += TTL_S / 2
        bench.pushes.expire()
        with pytest.raises(Invalid):
            bench.arrival(push, "nobody") if bench.pushes._open else invalid()
    with pytest.raises(PushNotFound):
        bench.pushes.get(push.id)


def invalid() -> None:
    raise Invalid


def test_a_push_that_is_given_up_takes_back_the_place_of_what_arrives() -> None:
    bench = Bench()
    push = bench.open()
    arrival = half(bench, push)
    bench.pushes.give_up(push.id)
    with pytest.raises(PushNotFound, match="was given up"):
        arrival.room()
    arrival.abort(broken=True)
    with pytest.raises(PushNotFound, match="no push"):
        bench.pushes.give_up(push.id)
    # Somebody may have been writing there: nobody gets that buffer.
    assert len(bench.shape.pool._warm) == 0


def test_a_committed_push_is_known_for_a_while_by_its_step_alone() -> None:
    bench = Bench()
    push = bench.open(worker="a", seq=1)
    bench.fill(push, gradients(17))
    step = bench.commit(push)
    assert push.made is not None
    assert push.made.done()
    again = bench.pushes.get(push.id).spent_step()
    assert (again.digest, again.fields) == (step.digest, step.fields)
    assert again.payload is None
    bench.clock.now += REMEMBERED_S
    with pytest.raises(PushNotFound):
        bench.pushes.get(push.id)


def test_not_many_committed_pushes_are_known() -> None:
    bench = Bench()
    first = last = None
    for _ in range(MOST_SPENT + 1):
        last = bench.open(none=list(SHAPES))
        first = first or last
        bench.commit(last).discard()
    assert first is not None
    assert last is not None
    with pytest.raises(PushNotFound):
        bench.pushes.get(first.id)
    assert bench.pushes.get(last.id) is last


def test_the_same_key_finds_the_same_push_as_long_as_it_is_open() -> None:
    bench = Bench()

    def opened(key: str, digest: bytes) -> tuple[Push, bool]:
        return bench.pushes.open(bench.shape, {}, ttl_s=TTL_S, key=key, digest=digest)

    push, new = opened("k", b"1")
    assert new
    assert opened("k", b"1") == (push, False)
    assert opened("l", b"1")[0] is not push
    with pytest.raises(KeyReused):
        opened("k", b"2")
    bench.pushes.give_up(push.id)
    assert opened("k", b"1")[1]


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nbytes, most",
    [
        (0, MOST_OPEN),
        (1000, MOST_OPEN),
        (100 * 2**20, 18),
        (LEASED_BYTES // 4, 2),
        (LEASED_BYTES // 3, 1),
        (LEASED_BYTES, 1),
        (100 * LEASED_BYTES, 1),
    ],
)
def test_how_many_may_be_open_depends_on_the_size(nbytes: int, most: int) -> None:
    assert most_open(nbytes) == most


def test_open_pushes_leave_two_buffers_to_ordinary_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    nbytes = bench.shape.pool.layout.nbytes
    for place in (module, __import__("optserve.optim.arena", fromlist=["arena"])):
        monkeypatch.setattr(place, "LEASED_BYTES", nbytes)
    push = bench.open()
    with pytest.raises(Unavailable, match="1 pushes are open, the limit of this session is 1"):
        bench.open()
    held = [bench.shape.pool.lease(), bench.shape.pool.lease()]
    with pytest.raises(Unavailable, match="are under way"):
        bench.shape.pool.lease()
    bench.pushes.give_up(push.id)
    bench.open()
    held.pop().release()
    held.append(bench.shape.pool.lease())


def test_a_buffer_that_was_kept_counts_as_any_other_afterwards() -> None:
    bench = Bench()
    push = bench.open()
    bench.fill(push, gradients(18))
    step = bench.commit(push)
    assert len(bench.shape.pool._kept) == 1
    step.discard()
    assert len(bench.shape.pool._kept) == 0
    assert bench.shape.pool.lease() is step.buffer


def test_what_lies_beside_the_buffers_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    monkeypatch.setattr(module, "LEASED_BYTES", 100)
    monkeypatch.setattr(module, "most_open", lambda nbytes: 2)
    first, second = bench.open(), bench.open()
    halves = gradients(19)["emb"]  # 48 bytes
    bench.put(first, "emb", halves)
    bench.put(second, "emb", halves)
    with pytest.raises(Unavailable, match="96 bytes beside their buffers, 20 come, the limit is"):
        bench.put_json(second, "w", {"grad": [0.0] * 5})
    with pytest.raises(Unavailable, match="96 bytes beside their buffers, 48 come"):
        bench.put(second, "emb", halves)
    assert second.told()["arrived"] == ["emb"]
    bench.put(second, "w", gradients(19)["w"])  # lies in the buffer
    bench.pushes.give_up(first.id)
    bench.put_json(second, "w", {"grad": [0.0] * 5})


def test_a_session_whose_params_changed_takes_no_more_of_a_push() -> None:
    bench = Bench()
    push = bench.open()
    bench.shape = shape()  # read back: equal, but another
    bench.put(push, "w", gradients(20)["w"])
    bench.shape = shape(sparse=frozenset())
    with pytest.raises(Conflict, match="params changed after push"):
        bench.arrival(push, "w")


def test_many_threads_may_look_and_expire_while_one_fills() -> None:
    bench, over = Bench(), threading.Event()

    def look() -> None:
        while not over.is_set():
            bench.pushes.expire()
            bench.pushes.get(push.id).told()

    push = bench.open()
    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for seed in range(100):
        bench.fill(push, gradients(seed))
    over.set()
    for thread in threads:
        thread.join()
    assert content(bench.commit(push)) == content(filled(gradients(99)))
