"""The pushes of a round as they are read when it closes: any order, any compression."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optserve.optim.arena import GradientPool
from optserve.optim.layout import Layout
from optserve.sessions import contributed
from optserve.sessions.contributed import opened
from optserve.sessions.replay import decode
from optserve.sessions.round import Contribution
from optserve.sessions.step import Expected
from optserve.store.base import Payload
from optserve.store.payloads import INLINE_BYTES, Spool
from optserve_client import wire
from optserve_client.errors import Damaged

Named = Mapping[str, wire.Tensor]
#: Exact in each session's dtype.
FROM = {"F32": ["F32", "F16", "BF16"], "F64": ["F64", "F32", "BF16"], "BF16": ["BF16"]}


@dataclass
class Bytes:
    """A payload whose medium gives few bytes at once."""

    data: bytes
    nbytes: int = 0
    digest: bytes = b""
    #: How often all of it was read.
    whole: int = 0

    def chunks(self, size: int = 7) -> Iterator[memoryview]:
        self.whole += 1
        for at in range(0, len(self.data), 7):
            yield memoryview(self.data)[at : at + min(size, 7)]

    def pread(self, nbytes: int, at: int) -> bytes:
        return self.data[at : at + min(nbytes, 11)]

    def read(self) -> bytes:
        raise AssertionError("nobody needs all of it at once")

    def discard(self) -> None: ...


def pushed(payload: Payload, worker: str = "w") -> Contribution:
    return Contribution(worker=worker, epoch=1, seq=1, time=0.0, payload=payload, request={})


def frame(named: Named, **fields: Any) -> bytes:
    return b"".join(wire.encode(named, {wire.META_KEY: json.dumps(fields)}))


@st.composite
def pushes(draw: st.DrawFn) -> tuple[Expected, bytes, list[int]]:
    """Return what a session expects, a push, and how many elements of each parameter are read."""
    dtype = draw(st.sampled_from(list(FROM)))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    names = [f"p/{i}" for i in range(len(sizes))]
    shape = dict(zip(names, sizes, strict=True))
    sparse = draw(st.sets(st.sampled_from(names), max_size=1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    block = draw(st.integers(1, 50))
    tensors: dict[str, wire.Tensor] = {}
    for name, numel in shape.items():
        values = rng.normal(size=numel).astype("<f4")
        sent = draw(st.sampled_from(FROM[dtype]))
        kind = "sparse" if name in sparse else draw(st.sampled_from(["grad", "topk", "int8"]))
        if kind == "grad":
            tensors[f"grad/{name}"] = wire.narrow(values, sent)
        elif kind == "int8":
            tensors[f"int8/{name}/values"] = rng.integers(-127, 128, numel).astype(np.int8)
            tensors[f"int8/{name}/scales"] = np.abs(values[: -(-numel // block)])
        else:
            where = np.flatnonzero(rng.random(numel) < draw(st.sampled_from([0.0, 0.3, 1.0])))
            tensors[f"{kind}/{name}/values"] = wire.narrow(values[where], sent)
            index = where[None] if kind == "sparse" else where
            tensors[f"{kind}/{name}/indices"] = index.astype(np.int64)
    order = draw(st.permutations(list(tensors)))
    fields = {"int8_block": block} if any(n.startswith("int8/") for n in tensors) else {}
    body = frame({name: tensors[name] for name in order}, **fields)
    layout = Layout.pack(dtype, [(name, (numel,)) for name, numel in shape.items()])
    reads = draw(st.lists(st.integers(1, 17), min_size=1, max_size=5))
    return Expected(layout=layout, sparse=frozenset(sparse)), body, reads


@given(pushes())
def test_a_push_read_in_pieces_is_the_step_that_it_stands_for(
    drawn: tuple[Expected, bytes, list[int]],
) -> None:
    expected, body, reads = drawn
    whole = decode([body], expected, GradientPool(expected.dense).lease)
    whole.buffer.widen()
    payload = Bytes(body)
    with (
        patch.object(contributed, "_ENTRIES", 3),
        opened([pushed(payload)], expected) as [source],
    ):
        for name, slot in expected.layout.by_name.items():
            assert source.has(name)
            if name in expected.sparse:
                coo, want = source.coo(name), whole.sparse[name]
                assert np.array_equal(coo.indices, want.indices)
                assert bytes(wire.as_bytes(coo.values)) == bytes(wire.as_bytes(want.values))
                continue
            got, at, turn = b"", 0, 0
            while at < slot.numel:
                count = min(reads[turn % len(reads)], slot.numel - at)
                raw, tag = source.read(name, count)
                assert not raw.readonly
                tensor = wire.from_bytes(tag, (count,), raw)
                got += bytes(wire.as_bytes(wire.widen(tensor, expected.layout.dtype, name)))
                at, turn = at + count, turn + 1
            assert got == bytes(whole.buffer.view(name)), name
    assert payload.whole == 1, "all bytes were compared with their digest, once"


#: Of each of two parameters, float32.
NUMEL = 2**21
#: Half a parameter; a mebibyte or two is what the digest is compared with.
LIMIT = 2 * NUMEL


def two_parameters(kind: str) -> Named:
    values = np.random.default_rng(0).normal(size=NUMEL).astype("<f4")
    if kind == "another order":
        return {"grad/b": values, "grad/a": values}
    where = np.arange(0, NUMEL, 2)
    each: Named = {"topk/{}/indices": where, "topk/{}/values": values[where]}
    if kind == "int8":
        scales = np.ones(NUMEL // 256, np.float32)
        each = {"int8/{}/values": values.astype(np.int8), "int8/{}/scales": scales}
    return {key.format(name): value for name in "ab" for key, value in each.items()}


@pytest.mark.parametrize("kind", ["another order", "topk", "int8"])
def test_a_piece_of_each_push_is_all_that_is_in_memory(kind: str) -> None:
    layout = Layout.pack("F32", [("a", (NUMEL,)), ("b", (NUMEL,))])
    expected = Expected(layout=layout, sparse=frozenset())
    spool, contributions = Spool(), []
    for worker in "xy":
        writer = spool.writer()
        writer.write(frame(two_parameters(kind)))
        contributions.append(pushed(writer.seal(), worker))
    tracemalloc.start()
    try:
        with opened(contributions, expected) as sources:
            for name in layout.names:
                for _ in range(NUMEL // 2**15):
                    for source in sources:
                        assert len(source.read(name, 2**15)[0]) == 2**17
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        spool.close()
    assert peak < LIMIT, f"{peak} bytes for two pushes of {8 * NUMEL}"


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_push_that_changed_in_the_journal_is_damaged_before_the_update(order: str) -> None:
    layout = Layout.pack("F32", [("a", (INLINE_BYTES,)), ("b", (3,))])
    expected = Expected(layout=layout, sparse=frozenset())
    values = {"a": np.zeros(INLINE_BYTES, "<f4"), "b": np.zeros(3, "<f4")}
    spool = Spool()
    writer = spool.writer()
    writer.write(frame({f"grad/{name}": values[name] for name in order}))
    payload = writer.seal()
    payload.digest = b"\0" * 16  # type: ignore[misc]
    with (
        pytest.raises(Damaged, match="does not have its digest"),
        opened([pushed(payload)], expected) as [source],
    ):
        for name in layout.names:
            source.read(name, layout.by_name[name].numel)
    spool.close()


@pytest.mark.parametrize("body", [b"", b"\x02", frame({})[:9], frame({}, seq="one")])
def test_a_header_that_cannot_be_read_is_damage_and_no_fault_of_the_caller(body: bytes) -> None:
    expected = Expected(layout=Layout.pack("F32", [("a", (1,))]), sparse=frozenset())
    with (
        pytest.raises(Damaged, match="a push in the journal "),
        opened([pushed(Bytes(body))], expected),
    ):
        pass
