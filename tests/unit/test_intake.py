"""Step bodies on their way in: binary ones in chunks, JSON ones parsed, both to the same Step."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from optserve.optim.layout import Layout
from optserve.sessions.fields import Fields, StepFields, load_object
from optserve.sessions.intake import Step, StepIntake, step_from_json
from optserve.sessions.step import Expected
from optserve.store.payloads import Spool
from optserve_client import wire
from optserve_client.errors import (
    Invalid,
    Malformed,
    MissingGradient,
    OptserveError,
    TooLarge,
    Unavailable,
)

SHAPES: dict[str, tuple[int, ...]] = {
    "w": (2, 3),
    "b": (),
    "none": (0, 4),
    "emb": (5, 2),
    "a/b": (3,),
}
SPARSE = frozenset({"emb"})


class FakeBuffer:
    """A gradient buffer of numpy; starts full of garbage."""

    def __init__(self, pool: FakePool) -> None:
        self.layout = pool.layout
        self.pool = pool
        self.raw = np.full(self.layout.nbytes, 0xAA, np.uint8)
        self.narrowed: dict[str, tuple[str, memoryview]] = {}

    def view(self, name: str) -> memoryview:
        slot = self.layout.by_name[name]
        return memoryview(self.raw)[slot.begin : slot.end]

    def array(self, name: str) -> wire.Tensor:
        return wire.from_bytes(self.layout.dtype, self.layout.by_name[name].shape, self.view(name))

    def narrow(self, name: str, tag: str) -> memoryview:
        view = self.view(name)
        place = view[len(view) - wire.nbytes(tag, self.layout.by_name[name].shape) :]
        self.narrowed[name] = tag, place
        return place

    def widen(self) -> None:
        for name, (tag, place) in self.narrowed.items():
            narrow = wire.from_bytes(tag, self.layout.by_name[name].shape, bytes(place))
            self.view(name)[:] = wire.as_bytes(wire.widen(narrow, self.layout.dtype, name))
        self.narrowed.clear()

    def release(self) -> None:
        self.pool.leased -= 1


class FakePool:
    """What a session lends; counts what is out."""

    def __init__(self, dtype: str = "F32", shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> None:
        self.session = Layout.pack(dtype, shapes.items())
        self.layout = self.session.subset(n for n in shapes if n not in SPARSE)
        self.leased = 0

    def lease(self) -> Any:
        self.leased += 1
        return FakeBuffer(self)


class CountingSpool:
    """A spool that knows how many of its writers are still open."""

    def __init__(self) -> None:
        self.spool = Spool()
        self.writers: list[Any] = []

    def writer(self, size_hint: int | None = None) -> Any:
        self.writers.append(self.spool.writer(size_hint))
        return self.writers[-1]

    @property
    def open(self) -> int:
        return sum(writer._open for writer in self.writers)


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@pytest.fixture(scope="module")
def module_spool() -> Iterator[CountingSpool]:
    made = CountingSpool()
    yield made
    made.spool.close()


@pytest.fixture
def spool(module_spool: CountingSpool) -> Iterator[CountingSpool]:
    module_spool.writers.clear()
    yield module_spool
    assert module_spool.open == 0, "a writer was left open"


def tensors() -> dict[str, wire.Tensor]:
    """A complete step of the session above, not in its order."""
    return {
        "grad/a/b": np.array([7, 8, 9], np.float32),
        "sparse/emb/values": np.array([[1, 2], [3, 4], [5, 6]], np.float32),
        "sparse/emb/indices": np.array([[4, 0, 4]]),
        "grad/none": np.zeros((0, 4), np.float32),
        "grad/w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "param/b": np.array(3.5, np.float32),
        "grad/b": np.array(-1.5, np.float32),
    }


def frame(named: Mapping[str, wire.Tensor], fields: Any = None) -> bytes:
    metadata = None
    if fields is not None:
        text = fields if isinstance(fields, str) else json.dumps(fields)
        metadata = {wire.META_KEY: text}
    return b"".join(wire.encode(named, metadata))


def expected(pool: FakePool) -> Expected:
    return Expected(layout=pool.session, sparse=SPARSE & pool.session.by_name.keys())


def intake(pool: FakePool, spool: CountingSpool | None, **options: Any) -> StepIntake:
    return StepIntake(
        expected=expected(pool),
        lease=pool.lease,
        writer=spool.writer if spool else None,
        **options,
    )


def take(pool: FakePool, spool: CountingSpool | None, body: bytes, **options: Any) -> Step:
    made = intake(pool, spool, **options)
    made.feed(body)
    return made.finish()


def from_json(pool: FakePool, spool: CountingSpool, body: dict[str, Any]) -> Step:
    return step_from_json(
        body,
        expected=expected(pool),
        lease=pool.lease,
        writer=spool.writer,
        digest=b"d" * 16,
    )


def content(step: Step) -> dict[str, Any]:
    """Everything that a step says, in comparable form."""
    dense = [n for n in step.buffer.layout.names if n not in step.none]
    return {
        "fields": step.fields.to_json(),
        "grads": {n: bytes(step.buffer.view(n)) for n in dense},
        "none": step.none,
        "sparse": {
            n: (s.indices.tolist(), bytes(wire.as_bytes(s.values)), s.values.shape, s.shape)
            for n, s in step.sparse.items()
        },
        "params": step.params
        and {
            n: (wire.dtype_of(t), t.shape, bytes(wire.as_bytes(t))) for n, t in step.params.items()
        },
    }


def replayed(pool: FakePool, step: Step) -> Step:
    again = intake(pool, None)
    assert step.payload is not None
    for chunk in step.payload.chunks(11):
        again.feed(chunk)
    return again.finish()


# --- binary bodies -------------------------------------------------------------------------------


def test_a_step_arrives_in_the_buffer_whatever_the_order_of_its_tensors(
    pool: FakePool, spool: CountingSpool
) -> None:
    body = frame(tensors(), {"loss": 0.5, "worker": "w1", "seq": 1})
    step = take(pool, spool, body)
    sent = tensors()
    for name in ("w", "b", "none", "a/b"):
        got = step.buffer.array(name)
        assert isinstance(got, np.ndarray)
        np.testing.assert_array_equal(got, sent[f"grad/{name}"], strict=True)
    coo = step.sparse["emb"]
    np.testing.assert_array_equal(coo.indices, [[4, 0, 4]])
    np.testing.assert_array_equal(coo.values, sent["sparse/emb/values"])
    assert coo.shape == (5, 2)
    assert step.params is not None
    assert step.params["b"] == np.float32(3.5)
    assert step.none == frozenset()
    assert (step.fields.loss, step.fields.worker, step.fields.seq) == (0.5, "w1", 1)
    assert step.digest == xxhash.xxh3_128(body).digest()
    assert step.payload is not None
    assert step.payload.read() == body
    assert pool.leased == 1
    step.discard()
    assert pool.leased == 0


@settings(max_examples=150, deadline=None)
@given(cuts=st.lists(st.integers(0, 800), max_size=20), empty=st.booleans())
def test_any_split_of_the_body_gives_the_same_step(
    module_spool: CountingSpool, cuts: list[int], empty: bool
) -> None:
    body = frame({**tensors(), "grad/w": np.full((2, 3), 2.5, np.float16)}, {"loss": 1.0})
    pool = FakePool()
    whole = take(pool, module_spool, body)
    parts = intake(pool, module_spool)
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    for begin, end in pairwise(edges):
        if end > begin or empty:
            chunk = bytearray(body[begin:end])
            parts.feed(memoryview(chunk))
            chunk[:] = b"\xee" * len(chunk)  # the caller's again
    step = parts.finish()
    assert content(step) == content(whole)
    assert step.digest == whole.digest
    assert step.payload is not None
    assert step.payload.read() == body


def test_a_body_may_come_byte_by_byte(pool: FakePool, spool: CountingSpool) -> None:
    body = frame(tensors(), {"loss": 1.0})
    parts = intake(pool, spool)
    for i in range(len(body)):
        parts.feed(body[i : i + 1])
    assert content(parts.finish()) == content(take(pool, spool, body))


def test_a_replay_of_the_journal_gives_the_same_step(pool: FakePool, spool: CountingSpool) -> None:
    fields = {"loss": 0.25, "none": ["b"], "groups": [{"lr": 0.1}], "metrics": {"acc": 0.5}}
    named = {k: v for k, v in tensors().items() if k != "grad/b"}
    step = take(pool, spool, frame(named, fields))
    again = replayed(pool, step)
    assert content(again) == content(step)
    assert (again.payload, again.digest) == (None, b"")


def test_foreign_metadata_is_left_alone(pool: FakePool, spool: CountingSpool) -> None:
    body = b"".join(wire.encode(tensors(), {"format": "pt"}))
    assert take(pool, spool, body).fields == StepFields()


@pytest.mark.parametrize(
    "session, sent", [("F32", "F16"), ("F32", "BF16"), ("F64", "F32"), ("F64", "BF16")]
)
def test_a_narrower_dtype_is_widened_exactly(spool: CountingSpool, session: str, sent: str) -> None:
    pool = FakePool(session, {"w": (2, 3), "emb": (5, 2)})
    values = np.array([[0.5, -1.5, 3], [2**-14, np.inf, 1e4]], np.float32)
    rows = np.array([[1.5, 2]], np.float32)
    named = {
        "grad/w": wire.narrow(values, sent),
        "param/w": wire.narrow(values, sent),
        "sparse/emb/indices": np.array([[3]]),
        "sparse/emb/values": wire.narrow(rows, sent),
    }
    step = take(pool, spool, frame(named))
    want = wire.narrow(wire.narrow(values, sent), session)
    step.buffer.widen()
    assert step.params is not None
    for got in (step.buffer.array("w"), step.params["w"]):
        assert wire.dtype_of(got) == session
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(step.sparse["emb"].values, rows.astype(wire.numpy_dtype(session)))
    assert step.payload is not None
    assert step.payload.read() == frame(named)  # the journal holds what came


def test_a_bfloat16_session_takes_bfloat16_bits(spool: CountingSpool) -> None:
    pool = FakePool("BF16", {"w": (3,)})
    sent = wire.Bits.bfloat16(np.array([1.1, -2.2, np.nan], np.float32))
    step = take(pool, spool, frame({"grad/w": sent}))
    assert bytes(step.buffer.view("w")) == bytes(wire.as_bytes(sent))


@pytest.mark.parametrize("sparse_dim", [1, 2])
def test_sparse_gradients_may_be_hybrid_or_not(
    pool: FakePool, spool: CountingSpool, sparse_dim: int
) -> None:
    indices = np.array([[4, 0], [1, 0]][:sparse_dim])
    values = np.ones((2, *(5, 2)[sparse_dim:]), np.float32)
    named = tensors() | {"sparse/emb/indices": indices, "sparse/emb/values": values}
    step = take(pool, spool, frame(named))
    assert step.sparse["emb"].indices.shape == (sparse_dim, 2)
    assert step.sparse["emb"].values.shape == values.shape


def test_a_sparse_gradient_may_be_empty(pool: FakePool, spool: CountingSpool) -> None:
    empty = {
        "sparse/emb/indices": np.empty((1, 0), np.int64),
        "sparse/emb/values": np.empty((0, 2), np.float32),
    }
    step = take(pool, spool, frame(tensors() | empty))
    assert step.sparse["emb"].values.shape == (0, 2)


def test_a_large_body_goes_through_in_network_sized_chunks(spool: CountingSpool) -> None:
    pool = FakePool("F32", {"w": (3_000_000,), "v": (1_000,)})
    rng = np.random.default_rng(0)
    w, v = (rng.standard_normal(n).astype(np.float32) for n in (3_000_000, 1_000))
    body = memoryview(frame({"grad/v": v, "grad/w": w}))
    made = intake(pool, spool)
    for at in range(0, len(body), 65_536):
        made.feed(body[at : at + 65_536])
    step = made.finish()
    np.testing.assert_array_equal(step.buffer.array("w"), w)
    np.testing.assert_array_equal(step.buffer.array("v"), v)


# --- bad binary bodies ---------------------------------------------------------------------------


def without(*names: str, **more: wire.Tensor) -> dict[str, wire.Tensor]:
    return {k: v for k, v in tensors().items() if k not in names} | more


f32 = lambda *shape: np.zeros(shape, np.float32)
i64 = lambda rows: np.array(rows, np.int64)

BAD_FRAMES: list[tuple[bytes, type[OptserveError], str]] = [
    (b"", Malformed, "the body ended after 0 bytes, inside its header"),
    (b"\x10\0\0", Malformed, "the body ended after 3 bytes, inside its header"),
    (frame(tensors())[:50], Malformed, "the body ended after 50 bytes, inside its header"),
    (
        frame(tensors())[:-1],
        Malformed,
        f"the body ended after {len(frame(tensors())) - 1} of {len(frame(tensors()))} bytes",
    ),
    (
        frame(tensors()) + b"x",
        Malformed,
        f"the body goes on after the {len(frame(tensors()))} bytes of its frame",
    ),
    (b"\xff" * 8, Malformed, "the header length must be in"),
    (b"\x10" + b"\0" * 7 + b"x" * 16, Malformed, "the header must begin with '{'"),
    (frame({}), MissingGradient, "parameter 'w' has no gradient (and 4 more)"),
    (
        frame(without("grad/b")),
        MissingGradient,
        "parameter 'b' has no gradient; where torch has grad is None, send null or name it in none",
    ),
    (
        frame(without("sparse/emb/indices", "sparse/emb/values")),
        MissingGradient,
        "parameter 'emb' has no gradient",
    ),
    (
        frame(without(**{"grad/ww": f32(2, 3)})),
        Invalid,
        "'grad/ww': unknown parameter 'ww' (did you mean 'w'?)",
    ),
    (frame(without(**{"param/x": f32()})), Invalid, "'param/x': unknown parameter 'x'"),
    (frame(without(w=f32(2, 3))), Invalid, "tensor 'w' must be called grad/<name>"),
    (frame(without(**{"state/w": f32(2)})), Invalid, "tensor 'state/w' must be called grad/<name>"),
    (frame(without(**{"sparse/emb": f32(2)})), Invalid, "tensor 'sparse/emb' must be called"),
    (
        frame(without(**{"grad/w": f32(3, 2)})),
        Invalid,
        "'grad/w' has shape [3, 2], expected [2, 3]",
    ),
    (frame(without(**{"grad/b": f32(1)})), Invalid, "'grad/b' has shape [1], expected []"),
    (frame(without(**{"param/b": f32(1)})), Invalid, "'param/b' has shape [1], expected []"),
    (
        frame(without(**{"grad/w": np.zeros((2, 3))})),
        Invalid,
        "'grad/w' is float64 and the session is float32: that would round",
    ),
    (
        frame(without(**{"grad/w": np.zeros((2, 3), np.int32)})),
        Invalid,
        "'grad/w' is int32 and the session is float32: that is no floating-point dtype",
    ),
    (
        frame(without(**{"param/b": np.zeros(())})),
        Invalid,
        "'param/b' is float64 and the session is float32",
    ),
    (
        frame(without(**{"sparse/emb/values": np.zeros((3, 2))})),
        Invalid,
        "'sparse/emb/values' is float64 and the session is float32",
    ),
    (
        frame(without(**{"grad/emb": f32(5, 2)})),
        Invalid,
        "'grad/emb' is dense, but 'emb' was declared sparse",
    ),
    (
        frame(without(**{"sparse/w/indices": i64([[0]]), "sparse/w/values": f32(1, 3)})),
        Invalid,
        "'sparse/w/indices' is sparse, but 'w' was not declared sparse at creation",
    ),
    (
        frame(without("sparse/emb/values")),
        Invalid,
        "the sparse gradient of 'emb' lacks 'sparse/emb/values'",
    ),
    (
        frame(without("sparse/emb/indices")),
        Invalid,
        "the sparse gradient of 'emb' lacks 'sparse/emb/indices'",
    ),
    (
        frame(without(**{"sparse/emb/indices": np.zeros((1, 3), np.int32)})),
        Invalid,
        "'sparse/emb/indices' is int32, expected int64",
    ),
    (
        frame(without(**{"sparse/emb/indices": i64([0, 1, 2])})),
        Invalid,
        "'sparse/emb/indices' has shape [3], expected [n, nnz] with n in [1, 2]",
    ),
    (
        frame(without(**{"sparse/emb/indices": np.zeros((3, 3), np.int64)})),
        Invalid,
        "'sparse/emb/indices' has shape [3, 3], expected [n, nnz] with n in [1, 2]",
    ),
    (
        frame(without(**{"sparse/emb/values": f32(3, 1)})),
        Invalid,
        "'sparse/emb/values' has shape [3, 1], expected [3, 2]",
    ),
    (
        frame(without(**{"sparse/emb/indices": i64([[0, 5, 1]])})),
        Invalid,
        "sparse/emb/indices[0, 1] must be in [0, 5), got 5",
    ),
    (
        frame(
            without(**{"sparse/emb/indices": i64([[0, 1], [0, -1]]), "sparse/emb/values": f32(2)})
        ),
        Invalid,
        "sparse/emb/indices[1, 1] must be in [0, 2), got -1",
    ),
    (
        frame(tensors(), {"none": ["w"]}),
        Invalid,
        "none: parameter 'w' has a gradient too",
    ),
    (frame(tensors(), {"none": ["x"]}), Invalid, "none: unknown parameter 'x'"),
    (
        frame(tensors(), {"lrr": 1}),
        Invalid,
        "unknown field 'lrr'",
    ),
    (
        frame(tensors(), "{"),
        Malformed,
        "__metadata__['optserve'] is not JSON: Expecting property name",
    ),
    (frame(tensors(), "[]"), Malformed, "__metadata__['optserve'] must be a JSON object, got []"),
    (
        frame(tensors(), '{"loss": 1, "loss": 2}'),
        Malformed,
        "__metadata__['optserve'] has the key 'loss' twice in one object",
    ),
    (
        frame(tensors(), '{"loss": NaN}'),
        Malformed,
        "__metadata__['optserve'] is not JSON: NaN is no JSON number",
    ),
    (
        frame(tensors(), '{"none": ["\\ud800"]}'),
        Malformed,
        "__metadata__['optserve'] holds the lone surrogate U+D800",
    ),
    (
        frame(tensors(), '{"groups": ' + "[" * 100_000),
        Malformed,
        "__metadata__['optserve'] is nested too deeply",
    ),
    (
        frame(tensors(), '{"loss": 1' + "0" * 5_000 + "}"),
        Malformed,
        "__metadata__['optserve'] is not JSON: a number of 5001 digits is too large",
    ),
    (
        frame(tensors(), '{"generation": "' + "x" * 2**20 + '"}'),
        TooLarge,
        "__metadata__['optserve'] has 1048594 characters, the limit is 1048576",
    ),
]


@pytest.mark.parametrize("pieces", [1, 50])
@pytest.mark.parametrize("body, error, sentence", BAD_FRAMES, ids=range(len(BAD_FRAMES)))
def test_a_bad_body_is_refused_with_a_sentence_and_leaves_nothing_behind(
    pool: FakePool,
    spool: CountingSpool,
    body: bytes,
    error: type[OptserveError],
    sentence: str,
    pieces: int,
) -> None:
    made, size = intake(pool, spool), len(body) // pieces + 1
    with pytest.raises(error) as refused:
        for at in range(0, len(body), size):
            made.feed(body[at : at + size])
        made.finish()
    assert type(refused.value) is error
    assert sentence in refused.value.detail
    assert len(refused.value.detail) < 400
    assert pool.leased == 0
    assert spool.open == 0
    refused.value.detail.encode()


def test_a_body_above_the_limit_is_refused_before_a_buffer_is_leased(
    pool: FakePool, spool: CountingSpool
) -> None:
    body = frame(tensors())
    made = intake(pool, spool, limit_bytes=len(body) - 1)
    with pytest.raises(TooLarge) as refused:
        made.feed(body[: len(body) // 2])
        made.feed(body[len(body) // 2 :])
    assert str(len(body) - 1) in refused.value.detail
    assert pool.leased == 0
    take(pool, spool, body, limit_bytes=len(body)).discard()


def test_a_header_above_the_limit_is_refused_before_it_is_read(pool: FakePool) -> None:
    made = intake(pool, None, limit_bytes=100)
    with pytest.raises(TooLarge, match="the body has 1008 bytes or more, the limit is 100"):
        made.feed((1000).to_bytes(8, "little"))


def test_an_aborted_intake_gives_everything_back_and_takes_no_more(
    pool: FakePool, spool: CountingSpool
) -> None:
    made = intake(pool, spool)
    made.feed(frame(tensors())[:-3])
    assert (pool.leased, spool.open) == (1, 1)
    made.abort()
    made.abort()
    assert (pool.leased, spool.open) == (0, 0)
    for call in (lambda: made.feed(b"x"), made.finish):
        with pytest.raises(ValueError, match="finished or aborted"):
            call()


def test_abort_after_finish_leaves_the_step_alone(pool: FakePool, spool: CountingSpool) -> None:
    made = intake(pool, spool)
    made.feed(frame(tensors()))
    step = made.finish()
    before = content(step)
    made.abort()
    assert pool.leased == 1
    assert content(step) == before


def test_a_journal_that_fails_gives_the_buffer_back(pool: FakePool, spool: CountingSpool) -> None:
    made = intake(pool, spool)
    body = frame(tensors())
    made.feed(body[:-40])

    def full(chunk: object) -> None:
        raise Unavailable("the spool takes no more bytes")

    spool.writers[0].write = full
    with pytest.raises(Unavailable):
        made.feed(body[-40:])
    assert (pool.leased, spool.open) == (0, 0)


def test_no_buffer_free_is_told_as_it_is(spool: CountingSpool, pool: FakePool) -> None:
    def none_left() -> Any:
        raise Unavailable("no gradient buffer is free", retry_after=1)

    made = StepIntake(expected=expected(pool), lease=none_left, writer=spool.writer)
    with pytest.raises(Unavailable, match="no gradient buffer is free"):
        made.feed(frame(tensors()))
    assert spool.writers == []


# --- JSON bodies ---------------------------------------------------------------------------------


def json_body(**more: Any) -> dict[str, Any]:
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    return {
        "grads": {
            "emb": {"indices": [[4, 0, 4]], "values": [[1, 2], [3, 4], [5, 6]], "shape": [5, 2]},
            "w": wire.tensor_to_json(w, "base64"),
            "b": -1.5,
            "none": [],
            "a/b": [7, 8, 9],
        },
        "params": {"b": 3.5},
        **more,
    }


def test_a_json_body_and_a_frame_of_the_same_numbers_give_the_same_step(
    pool: FakePool, spool: CountingSpool
) -> None:
    given = {"loss": 0.5, "metrics": {"acc": 1.0}, "none": []}
    step = from_json(pool, spool, json_body(**given))
    assert content(step) == content(take(pool, spool, frame(tensors(), given)))
    assert step.digest == b"d" * 16


def test_a_replay_of_a_json_step_gives_the_same_step(pool: FakePool, spool: CountingSpool) -> None:
    body = json_body(loss=0.5, groups=[{"lr": 0.1}])
    body["grads"]["b"] = None
    step = from_json(pool, spool, body)
    assert step.none == {"b"}
    assert content(replayed(pool, step)) == content(step)


def test_null_and_none_both_leave_a_parameter_alone(pool: FakePool, spool: CountingSpool) -> None:
    body = json_body(none=["emb"])
    del body["grads"]["emb"]
    body["grads"]["w"] = None
    step = from_json(pool, spool, body)
    assert step.none == {"w", "emb"}
    assert step.sparse == {}


def test_a_json_body_is_not_changed(pool: FakePool, spool: CountingSpool) -> None:
    body = json_body(loss=1)
    before = json.dumps(body)
    from_json(pool, spool, body)
    assert json.dumps(body) == before


def test_lists_are_read_in_the_session_dtype(spool: CountingSpool) -> None:
    for dtype, value in (("F64", 0.1), ("F32", np.float32(0.1))):
        pool = FakePool(dtype, {"b": ()})
        step = from_json(pool, spool, {"grads": {"b": 0.1}})
        assert step.buffer.array("b") == value


def b64(array: np.ndarray, **more: Any) -> dict[str, Any]:
    return {
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "data": base64.b64encode(array.tobytes()).decode(),
        **more,
    }


def grads(**more: Any) -> dict[str, Any]:
    body = json_body()
    return {**body, "grads": {**body["grads"], **more}}


def sparse(**more: Any) -> dict[str, Any]:
    return grads(emb={**json_body()["grads"]["emb"], **more})


BAD_JSON: list[tuple[dict[str, Any], type[OptserveError], str]] = [
    ({}, MissingGradient, "parameter 'w' has no gradient (and 4 more)"),
    ({"grads": None}, MissingGradient, "parameter 'w' has no gradient (and 4 more)"),
    ({"grads": [1]}, Invalid, "grads must be an object of named tensors, got [1]"),
    ({**json_body(), "params": 3}, Invalid, "params must be an object of named tensors, got 3"),
    (grads(x=1), Invalid, "grads['x']: unknown parameter 'x'"),
    (grads(x=None), Invalid, "grads['x']: unknown parameter 'x'"),
    (grads(w=[1, 2]), Invalid, "grads['w'] has shape [2], expected [2, 3]"),
    (grads(w="abc"), Invalid, "grads['w'] must be a number, got 'abc'"),
    (grads(b=True), Invalid, "grads['b'] must be a number, got true"),
    (grads(w=[[1, 2, 3], [1]]), Invalid, "grads['w'] is ragged"),
    (grads(b=1e300), Invalid, "grads['b'] is 1e+300, too large for float32"),
    (grads(b=b64(np.zeros(()))), Invalid, "grads['b'] is float64 and the session is float32"),
    (grads(w={"data": ""}), Invalid, "grads['w'] must have exactly the keys dtype, shape and data"),
    (grads(emb=[[0, 0]] * 5), Invalid, "grads['emb'] is dense, but 'emb' was declared sparse"),
    (
        grads(b={"indices": [], "values": [], "shape": []}),
        Invalid,
        "grads['b'] is sparse, but 'b' was not declared sparse at creation",
    ),
    (
        sparse(extra=1),
        Invalid,
        "grads['emb'] must have exactly the keys indices, values and shape",
    ),
    (sparse(shape=[5, 3]), Invalid, "grads['emb'].shape must be [5, 2], got [5, 3]"),
    (sparse(shape="x" * 999), Invalid, "grads['emb'].shape must be [5, 2], got 'xxx"),
    (
        sparse(indices=[[0, 1.5, 2]]),
        Invalid,
        "grads['emb'].indices[0, 1] must be an integer, got 1.5",
    ),
    (
        sparse(indices=b64(np.zeros((1, 3), np.int32))),
        Invalid,
        "grads['emb'].indices must be int64, got int32",
    ),
    (
        sparse(indices=b64(np.zeros((1, 3)))),
        Invalid,
        "grads['emb'].indices must be int64, got float64",
    ),
    (
        sparse(indices=[0, 1, 2]),
        Invalid,
        "grads['emb'].indices has shape [3], expected [n, nnz] with n in [1, 2]",
    ),
    (
        sparse(indices=[[0, 7, 1]]),
        Invalid,
        "grads['emb'].indices[0, 1] must be in [0, 5), got 7",
    ),
    (
        sparse(values=[[1, 2]]),
        Invalid,
        "grads['emb'].values has shape [1, 2], expected [3, 2]",
    ),
    ({**json_body(), "params": {"q": 1}}, Invalid, "params['q']: unknown parameter 'q'"),
    (
        {**json_body(), "params": {"b": [1]}},
        Invalid,
        "params['b'] has shape [1], expected []",
    ),
    ({**json_body(), "params": {"b": None}}, Invalid, "params['b'] must be a number, got null"),
    (json_body(none=["b"]), Invalid, "none: parameter 'b' has a gradient too"),
    (json_body(los=1), Invalid, "unknown field 'los' (did you mean 'loss'?)"),
]


@pytest.mark.parametrize("body, error, sentence", BAD_JSON, ids=range(len(BAD_JSON)))
def test_a_bad_json_body_is_refused_with_a_sentence_and_leaves_nothing_behind(
    pool: FakePool,
    spool: CountingSpool,
    body: dict[str, Any],
    error: type[OptserveError],
    sentence: str,
) -> None:
    with pytest.raises(error) as refused:
        from_json(pool, spool, body)
    assert type(refused.value) is error
    assert sentence in refused.value.detail
    assert pool.leased == 0


# --- fields --------------------------------------------------------------------------------------

BAD_FIELDS: list[tuple[Any, str]] = [
    ([], "the body must be an object, got []"),
    ({"lrr": 1}, "unknown field 'lrr'"),
    ({"return_": "none"}, "unknown field 'return_' (did you mean 'return'?)"),
    ({"x" * 500: 1}, f"unknown field '{'x' * 76}..."),
    ({"\ud800": 1}, "unknown field '\\ud800'"),
    ({"loss": "1"}, "loss must be a number, got '1'"),
    ({"loss": True}, "loss must be a number, got true"),
    ({"loss": float("nan")}, "loss must be a finite number, got nan"),
    ({"loss": float("-inf")}, "loss must be a finite number, got -inf"),
    ({"loss": 10**400}, "loss must be a number, got an integer of 1329 bits"),
    ({"loss": [1, 2]}, "loss must be a number, got [1, 2]"),
    ({"loss_scale": 0}, "loss_scale must be > 0, got 0"),
    ({"loss_scale": float("inf")}, "loss_scale must be a finite number, got inf"),
    ({"metrics": [1]}, "metrics must be an object, got [1]"),
    ({"metrics": {"acc": "x"}}, "metrics.acc must be a number, got 'x'"),
    ({"metrics": {"Acc": float("inf")}}, "metrics.Acc must be a finite number, got inf"),
    ({"metrics": {"a b": None}}, "metrics['a b'] must be a number, got null"),
    ({"metrics": {"": 1}}, "a metric's name must be 1 to 256 printable characters, got ''"),
    ({"metrics": {"a\n": 1}}, "a metric's name must be 1 to 256 printable characters, got 'a\\n'"),
    (
        {"metrics": {f"m{i}": 1 for i in range(101)}},
        "metrics must have at most 100 entries, got 101",
    ),
    ({"worker": "a/b"}, "worker must match [A-Za-z0-9._-]{1,128}, got 'a/b'"),
    ({"worker": 7}, "worker must be a string, got 7"),
    ({"seq": 0}, "seq must be >= 1, got 0"),
    ({"seq": 1.0}, "seq must be an integer, got 1.0"),
    ({"seq": "1"}, "seq must be an integer, got '1'"),
    ({"seq": True}, "seq must be an integer, got true"),
    ({"seq": 2**63}, "seq must be <= 9223372036854775807, got 9223372036854775808"),
    ({"epoch": -1}, "epoch must be >= 1, got -1"),
    ({"base_version": -1}, "base_version must be >= 0, got -1"),
    ({"generation": "x" * 129}, "generation must have at most 128 characters, got 129"),
    ({"none": "w"}, "none must be a list, got 'w'"),
    ({"none": [1]}, "none[0] must be a string, got 1"),
    ({"groups": {}}, "groups must be a list, got {}"),
    ({"groups": [1]}, "groups[0] must be an object, got 1"),
    ({"dry_run": 1}, "dry_run must be true or false, got 1"),
    ({"return": "all"}, "return must be 'params', 'delta' or 'none', got 'all'"),
    ({"return": ["params"]}, "return must be 'params', 'delta' or 'none', got ['params']"),
    ({"return_encoding": "hex"}, "return_encoding must be 'list' or 'base64', got 'hex'"),
    ({"return_dtype": "int64"}, "return_dtype must be float64, float32, float16 or bfloat16"),
    ({"return_dtype": "float"}, "return_dtype must be float64, float32, float16 or bfloat16"),
    ({"loss": "y" * 10**6}, f"loss must be a number, got '{'y' * 76}..."),
]


@pytest.mark.parametrize("given_fields, sentence", BAD_FIELDS, ids=range(len(BAD_FIELDS)))
def test_a_bad_field_is_refused_with_a_sentence(given_fields: Any, sentence: str) -> None:
    with pytest.raises(Invalid) as refused:
        StepFields.parse(given_fields)
    assert sentence in refused.value.detail
    assert len(refused.value.detail) < 250
    json.dumps(refused.value.problem(), ensure_ascii=False).encode()


def test_a_fault_names_the_object_that_it_is_in() -> None:
    with pytest.raises(Invalid) as refused:
        StepFields.parse({"groups": [3]}, "step")
    assert refused.value.detail == "step.groups[0] must be an object, got 3"
    assert refused.value.extra == {"field": "step.groups[0]"}


def test_a_null_is_the_same_as_leaving_the_field_out() -> None:
    nulls = dict.fromkeys(["loss", "none", "metrics", "return", "dry_run", "worker"])
    assert StepFields.parse(nulls) == StepFields()
    assert StepFields.parse(nulls).to_json() == {}


def test_fields_come_back_from_their_json() -> None:
    given_fields = {
        "none": ["w"],
        "groups": [{"lr": 0.1, "betas": [0.9, 0.99]}, {}],
        "loss": 1,
        "metrics": {"acc": 0.5},
        "worker": "w1",
        "epoch": 1,
        "seq": 2**63 - 1,
        "base_version": 0,
        "generation": "g",
        "loss_scale": 65536.0,
        "dry_run": True,
        "return": "delta",
        "return_encoding": "base64",
        "return_dtype": "float16",
        "abandon": True,
    }
    fields = StepFields.parse(given_fields)
    assert fields.to_json() == given_fields
    assert StepFields.parse(json.loads(json.dumps(fields.to_json()))) == fields
    assert fields.return_ == "delta"


def test_an_object_of_unicode_text_is_loaded() -> None:
    assert load_object('{"n": "\\u00fc \\ud83d\\ude00 ü"}', "x") == {"n": "ü 😀 ü"}


class Window(Fields):
    steps: Annotated[int, Field(ge=1)]
    reduce: Literal["sum", "mean"] = "sum"


class Example(Fields):
    accumulate: Annotated[int, Field(ge=1)] | Window = 1
    scheduler: dict[str, Any] | list[Any] | None = None
    tags: dict[str, str] = {}
    ratio: Annotated[float, Field(ge=0, lt=0.5)] | None = None


@pytest.mark.parametrize(
    "body, sentence",
    [
        ({"accumulate": 0}, "accumulate must be >= 1, got 0"),
        ({"accumulate": "x"}, "accumulate must be an integer or an object, got 'x'"),
        ({"accumulate": {"steps": 0}}, "accumulate.steps must be >= 1, got 0"),
        ({"accumulate": {}}, "accumulate.steps is missing"),
        (
            {"accumulate": {"steps": 2, "redude": "mean"}},
            "accumulate: unknown field 'redude' (did you mean 'reduce'?)",
        ),
        ({"scheduler": 3}, "scheduler must be an object or a list, got 3"),
        ({"tags": {"A": 1, "B": 2}}, "tags.A must be a string, got 1"),
        ({"ratio": 0.5}, "ratio must be < 0.5, got 0.5"),
        ({"ratio": -1}, "ratio must be >= 0, got -1"),
    ],
)
def test_a_fault_in_a_union_is_told_without_pydantics_words(
    body: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(Invalid) as refused:
        Example.parse(body)
    assert refused.value.detail == sentence
