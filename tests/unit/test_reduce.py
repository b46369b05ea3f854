"""One gradient of several, against numpy: the same operations in the same order, the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optserve.optim import reduce as module
from optserve.optim.arena import GradientPool, to_wire
from optserve.optim.gradients import to_coo
from optserve.optim.layout import Layout
from optserve.optim.reduce import Reduction, combine
from optserve_client import wire

SHAPES: dict[str, tuple[int, ...]] = {"w": (5, 7), "b": (7,), "s": (), "e": (0, 3)}
NAMES = ["mean", "sum", "weighted_mean", "median", "trimmed_mean"]
DTYPES = ["F32", "F64", "BF16"]
Grads = dict[str, Any]


@dataclass
class Push:
    """A push in memory, read once from front to back."""

    grads: Grads
    loss_scale: float | None = None
    #: Elements of each read.
    reads: list[int] = field(default_factory=list)
    _at: dict[str, int] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return name in self.grads

    def read(self, name: str, count: int) -> tuple[memoryview, str]:
        raw, tag = bytes(wire.as_bytes(self.grads[name])), wire.dtype_of(self.grads[name])
        size, at = wire.itemsize(tag), self._at.get(name, 0)
        self._at[name] = at + count
        self.reads.append(count)
        return memoryview(bytearray(raw[at * size : (at + count) * size])), tag

    def coo(self, name: str) -> Any:
        return self.grads[name]


@dataclass
class Coo:
    """A sparse gradient."""

    indices: np.ndarray
    values: wire.Tensor
    shape: tuple[int, ...]


def drawn(seed: int, dtype: str = "F32", names: Sequence[str] = tuple(SHAPES)) -> Grads:
    """Return random gradients, of magnitudes whose sum depends on its order."""
    rng = np.random.default_rng(seed)
    made = {n: rng.normal(size=SHAPES[n]) * 10.0 ** rng.integers(-3, 4, SHAPES[n]) for n in names}
    return {n: tensor(values, dtype) for n, values in made.items()}


def tensor(values: Any, dtype: str = "F32") -> wire.Tensor:
    if dtype == "BF16":
        return wire.Bits.bfloat16(np.asarray(values, "f4"))
    return np.asarray(values, wire.numpy_dtype(dtype))


def combined(
    pushes: Sequence[Push],
    how: Reduction,
    dtype: str = "F32",
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    sparse: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    dense = [(name, shape) for name, shape in shapes.items() if name not in sparse]
    buffer = GradientPool(Layout.pack(dtype, dense)).lease()
    buffer.arena.flat.fill_(7.0)  # what an earlier gradient left
    return combine(pushes, list(shapes), sparse, buffer, how)


def how_of(name: str, count: int, trim: int = 1) -> Reduction:
    weights = [0.1 + 3 * i for i in range(count)] if name == "weighted_mean" else []
    return Reduction(name=name, weights=weights, trim=trim if name == "trimmed_mean" else 0)


# --- the oracle ----------------------------------------------------------------------------------


def wide(grad: wire.Tensor) -> np.ndarray:
    """Return a gradient as it is computed with: bfloat16 in float32."""
    return grad.to_float32() if isinstance(grad, wire.Bits) else np.asarray(grad)


def expected(pushes: Sequence[Push], name: str, how: Reduction, dtype: str) -> wire.Tensor | None:
    """Return one combined gradient; None if no push has it."""
    if not any(push.has(name) for push in pushes):
        return None
    real = np.float64 if dtype == "F64" else np.float32
    scaled = []
    for push in pushes:
        if not push.has(name):
            scaled.append(np.zeros(SHAPES[name], real))
            continue
        values = wide(push.grads[name]).astype(real)
        if push.loss_scale is not None:
            values = values * real(np.float32(1.0 / push.loss_scale))
        scaled.append(np.asarray(values, real))
    result = np.asarray(arithmetic(scaled, how, real), real)
    return wire.Bits.bfloat16(result) if dtype == "BF16" else result


def arithmetic(values: list[np.ndarray], how: Reduction, real: Any) -> np.ndarray:
    count = len(values)
    if how.name == "median":
        return np.asarray(np.median(np.stack(values), axis=0))
    if how.name == "trimmed_mean":
        kept = np.sort(np.stack(values), axis=0)[how.trim : count - how.trim]
        return np.asarray(reduce(np.add, list(kept)) / real(len(kept)))
    if how.name == "weighted_mean":
        weighted = [v * real(w) for v, w in zip(values, how.weights, strict=True)]
        return np.asarray(reduce(np.add, weighted) / real(sum(how.weights)))
    total = reduce(np.add, values)
    return np.asarray(total / real(count) if how.name == "mean" else total)


def assert_bits(got: torch.Tensor, want: wire.Tensor, what: str) -> None:
    have = to_wire(got)
    assert wire.dtype_of(have) == wire.dtype_of(want), what
    # A sum of nothing but negative zeros has a sign that a sum with a zero in it lacks.
    a, b = (t.array if isinstance(t, wire.Bits) else np.asarray(t) + 0.0 for t in (have, want))
    assert a.shape == b.shape, what
    assert a.tobytes() == b.tobytes(), f"{what}: {a} is not {b}"


def check(pushes: Sequence[Push], how: Reduction, dtype: str) -> None:
    got = combined(pushes, how, dtype)
    for name in SHAPES:
        want = expected(pushes, name, how, dtype)
        if want is None:
            assert name not in got
        else:
            assert_bits(got[name], want, f"{how.name} of {len(pushes)}, {dtype}, {name}")


# --- dense ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_reduction_has_the_bits_of_numpys(name: str, dtype: str, count: int) -> None:
    pushes = [Push(drawn(i, dtype)) for i in range(count)]
    check(pushes, how_of(name, count, trim=(count - 1) // 3), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_each_push_is_divided_by_its_own_loss_scale(name: str, dtype: str) -> None:
    scales = [None, 65536.0, 3.0, 0.1]
    check([Push(drawn(i, dtype), s) for i, s in enumerate(scales)], how_of(name, 4), dtype)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_gradient_counts_as_zero_and_none_at_all_makes_none(name: str) -> None:
    make = lambda: [Push(drawn(i, names=names)) for i, names in enumerate(("wb", "w", "wb"))]
    check(make(), how_of(name, 3), "F32")
    assert list(combined(make(), how_of(name, 3))) == ["w", "b"]


@pytest.mark.parametrize("have", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("want", ["F32", "F64"])
def test_a_narrower_wire_dtype_is_widened_first(have: str, want: str) -> None:
    if have == want:
        have = "F16"
    narrow = [Push({n: wire.narrow(t, have) for n, t in drawn(i).items()}) for i in range(3)]
    exact = [Push({n: wire.widen(t, want, n) for n, t in p.grads.items()}) for p in narrow]
    got, same = (combined(pushes, how_of("mean", 3), want) for pushes in (narrow, exact))
    assert all(torch.equal(got[n], same[n]) for n in SHAPES)


def test_pushes_in_different_dtypes_combine() -> None:
    values = drawn(0)
    pushes = [Push(values), Push({n: wire.narrow(t, "F16") for n, t in drawn(1).items()})]
    check(pushes, how_of("sum", 2), "F32")


def test_bfloat16_is_rounded_once_at_the_end() -> None:
    shapes = {"w": (1,)}
    # 1 + 2^-9 + 2^-9 is 1 + 2^-8 in float32; rounded after each addition it stays 1.
    pushes = [Push({"w": tensor([v], "BF16")}) for v in (1.0, 2.0**-8, 2.0**-8)]
    got = combined(pushes, Reduction(name="sum"), "BF16", shapes)["w"]
    assert got.dtype == torch.bfloat16
    assert float(got) == 1.0 + 2.0**-7


def test_the_order_of_the_sources_is_that_of_the_sum() -> None:
    shapes = {"w": (1,)}
    values = [1e8, 1.0, -1e8]
    for order in ([0, 1, 2], [0, 2, 1], [1, 2, 0]):
        pushes = [Push({"w": tensor([values[i]])}) for i in order]
        got = float(combined(pushes, Reduction(name="sum"), shapes=shapes)["w"])
        assert got == float(np.float32(values[order[0]] + values[order[1]]) + values[order[2]])
    sums = {
        float(combined([Push({"w": tensor([values[i]])}) for i in o], Reduction(name="sum"),
                       shapes=shapes)["w"])
        for o in ([0, 1, 2], [0, 2, 1])
    }  # fmt: skip
    assert sums == {0.0, 1.0}


@pytest.mark.parametrize(("count", "trim"), [(3, 1), (4, 1), (5, 2), (10, 4), (5, 0)])
def test_trimming_leaves_out_so_many_at_either_end(count: int, trim: int) -> None:
    shapes = {"w": (1,)}
    values = [float(2**i) for i in range(count)]
    pushes = [Push({"w": tensor([v])}) for v in reversed(values)]
    got = combined(pushes, Reduction(name="trimmed_mean", trim=trim), shapes=shapes)["w"]
    kept = values[trim : count - trim]
    assert float(got) == float(np.float32(sum(kept)) / np.float32(len(kept)))


def test_one_outlier_moves_neither_median_nor_trimmed_mean() -> None:
    shapes = {"w": (1,)}
    values = [1.0, 2.0, 3.0, 4.0, 1e30]
    pushes = lambda: [Push({"w": tensor([v])}) for v in values]
    assert float(combined(pushes(), Reduction(name="median"), shapes=shapes)["w"]) == 3.0
    how = Reduction(name="trimmed_mean", trim=1)
    assert float(combined(pushes(), how, shapes=shapes)["w"]) == 3.0


@pytest.mark.parametrize("least", [1, 3, 4, 5, 35, 36])
@pytest.mark.parametrize("name", NAMES)
def test_where_one_piece_ends_and_the_next_begins_changes_no_bit(
    name: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = lambda: [Push(drawn(i), 4.0 * i or None) for i in range(3)]
    whole = combined(make(), how_of(name, 3))
    monkeypatch.setattr(module, "_LEAST", least)
    monkeypatch.setattr(module, "_ELEMENTS", 3)
    pushes = make()
    pieces = combined(pushes, how_of(name, 3))
    assert all(torch.equal(whole[n], pieces[n]) for n in whole)
    assert max(pushes[0].reads) == min(least, 35)
    assert sum(pushes[0].reads) == 35 + 7 + 1


def test_all_pushes_together_have_so_many_elements_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_LEAST", 2)
    monkeypatch.setattr(module, "_ELEMENTS", 30)
    pushes = [Push(drawn(i)) for i in range(6)]
    combined(pushes, Reduction(name="mean"))
    assert {max(push.reads) for push in pushes} == {5}


@pytest.mark.parametrize("sources", [1, 2, 4, 1000])
def test_a_piece_is_too_small_to_be_divided_among_threads(sources: int) -> None:
    grain = 32_768  # of ATen: it takes threads for more
    assert max(module._pieces(1_000_000, sources)) <= grain


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_pushes_combine_as_in_numpy(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    count = data.draw(st.integers(1, 6))
    names = st.lists(st.sampled_from(sorted(SHAPES)), unique=True)
    scale = st.none() | st.floats(0.5, 1e4)
    pushes = [
        Push(drawn(data.draw(st.integers(0, 99)), dtype, data.draw(names)), data.draw(scale))
        for _ in range(count)
    ]
    how = how_of(data.draw(st.sampled_from(NAMES)), count, trim=(count - 1) // 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LEAST", data.draw(st.integers(1, 40)))
        patch.setattr(module, "_ELEMENTS", data.draw(st.integers(1, 40)))
        check(pushes, how, dtype)


# --- sparse --------------------------------------------------------------------------------------

ROWS: dict[str, tuple[int, ...]] = {"e": (6, 2)}


def rows(seed: int, dtype: str = "F32", nnz: int = 4) -> Push:
    """A push with a sparse gradient; some of its indices come twice."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, 6, (1, nnz))
    values = rng.normal(size=(nnz, 2)) * 10.0 ** rng.integers(-3, 4, (nnz, 2))
    return Push({"e": Coo(indices.astype("i8"), tensor(values, dtype), ROWS["e"])})


def sparse_expected(pushes: Sequence[Push], how: Reduction, dtype: str) -> Any:
    """Return the rows that any push has, and their combined values: by numpy, row by row."""
    real = np.float64 if dtype == "F64" else np.float32
    total: dict[int, np.ndarray] = {}
    for i, push in enumerate(pushes):
        if not push.has("e"):
            continue
        coo = to_coo(push.grads["e"])  # whose duplicates were summed: see test_update
        for row, values in zip(coo.indices()[0].tolist(), wide(to_wire(coo.values())), strict=True):
            mine = values.astype(real)
            if push.loss_scale is not None:
                mine = mine * real(np.float32(1.0 / push.loss_scale))
            if how.name == "weighted_mean":
                mine = mine * real(how.weights[i])
            total[row] = total[row] + mine if row in total else mine
    by = {"mean": len(pushes), "weighted_mean": sum(how.weights), "sum": 1}[how.name]
    found = sorted(total)
    values = np.stack([total[row] / real(by) for row in found])
    return found, wire.Bits.bfloat16(values) if dtype == "BF16" else values


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["mean", "sum", "weighted_mean"])
def test_sparse_gradients_combine_row_by_row(name: str, dtype: str, count: int) -> None:
    pushes = [rows(i, dtype) for i in range(count)]
    pushes[-1].loss_scale = 1024.0
    how = how_of(name, count)
    got = combined(pushes, how, dtype, ROWS, ["e"])["e"]
    found, values = sparse_expected(pushes, how, dtype)
    assert got.is_coalesced()
    assert got.shape == ROWS["e"]
    assert got.indices().tolist() == [found]
    assert_bits(got.values(), values, f"{name} of {count}, {dtype}")


def test_a_sparse_gradient_that_a_push_lacks_counts_as_zero() -> None:
    pushes = [rows(0), Push({}), rows(1)]
    got = combined(pushes, Reduction(name="mean"), shapes=ROWS, sparse=["e"])["e"]
    found, values = sparse_expected(pushes, Reduction(name="mean"), "F32")
    assert got.indices().tolist() == [found]
    assert_bits(got.values(), values, "mean of 3, of which one has nothing")
    assert combined([Push({})], Reduction(name="mean"), shapes=ROWS, sparse=["e"]) == {}


def test_a_sparse_gradient_without_entries_is_one() -> None:
    push = Push({"e": Coo(np.zeros((1, 0), "i8"), np.zeros((0, 2), "f4"), ROWS["e"])})
    got = combined([push, push], Reduction(name="sum"), shapes=ROWS, sparse=["e"])["e"]
    assert got._nnz() == 0


def test_sparse_gradients_that_are_sparse_in_different_dimensions_combine() -> None:
    by_row = Coo(np.array([[4, 1]]), tensor([[1, 2], [3, 4]]), ROWS["e"])
    by_element = Coo(np.array([[1, 5], [0, 1]]), tensor([10, 20]), ROWS["e"])
    for pushes in ([Push({"e": by_row}), Push({"e": by_element})],
                   [Push({"e": by_element}), Push({"e": by_row})]):  # fmt: skip
        got = combined(pushes, Reduction(name="sum"), shapes=ROWS, sparse=["e"])["e"]
        want = np.zeros((6, 2), "f4")
        want[4], want[1], want[5] = [1, 2], [13, 4], [0, 20]
        assert got.to_dense().numpy().tolist() == want.tolist()


def test_dense_and_sparse_gradients_combine_side_by_side() -> None:
    shapes = {"w": (5, 7), **ROWS}
    pushes = [Push({**drawn(i, names="w"), **rows(i).grads}) for i in range(2)]
    got = combined(pushes, Reduction(name="mean"), shapes=shapes, sparse=["e"])
    assert list(got) == ["w", "e"]
    want = expected(pushes, "w", Reduction(name="mean"), "F32")
    assert want is not None
    assert_bits(got["w"], want, "the dense one")
