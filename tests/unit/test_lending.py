"""Live params that are lent: whoever reads them sees one version, whatever happens meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from optserve.optim import rounding
from optserve.optim.layout import Layout
from optserve.sessions.lending import PIECE_BYTES, Loan, Rounded
from optserve.sessions.published import Published

N = 3 * PIECE_BYTES + 1000


def live() -> Any:
    return np.random.default_rng(1).integers(0, 255, N, np.uint8)


def read(part: Any) -> bytes:
    """Return everything, piece by piece."""
    pieces: list[bytes] = []

    def keep(piece: memoryview) -> int:
        pieces.append(bytes(piece))
        return len(piece)

    at = 0
    while at < part.nbytes:
        at += part.use(at, keep)
    assert max(map(len, pieces)) <= PIECE_BYTES
    return b"".join(pieces)


def test_a_loan_shows_live_memory_and_copies_nothing() -> None:
    memory = live()
    loan = Loan(memory)
    assert read(loan) == memory.tobytes()
    assert loan.use(5, lambda piece: int(np.shares_memory(np.frombuffer(piece, "u1"), memory))) == 1


def test_a_settled_loan_stays_as_it_was() -> None:
    memory = live()
    loan, before = Loan(memory), memory.tobytes()
    copy = loan.settle()
    memory[:] = 0
    assert read(loan) == copy.tobytes() == before
    assert loan.settle() is copy
    with pytest.raises(ValueError, match="read-only"):
        copy[0] = 1


@pytest.mark.parametrize("attempt", range(20))
def test_readers_of_a_loan_that_is_settled_meanwhile_see_one_version(attempt: int) -> None:
    memory = live()
    loan, before, seen = Loan(memory), memory.tobytes(), list[bytes]()
    readers = [threading.Thread(target=lambda: seen.append(read(loan))) for _ in range(3)]
    for reader in readers:
        reader.start()
    loan.settle()
    memory[:] = 0  # the update
    for reader in readers:
        reader.join(10)
    assert seen == [before] * 3


def test_a_piece_is_not_changed_while_it_is_used() -> None:
    memory = live()
    loan = Loan(memory)
    inside, settled = threading.Event(), threading.Event()

    def settle() -> None:
        inside.wait(10)
        loan.settle()
        settled.set()

    thread = threading.Thread(target=settle)
    thread.start()

    def use(piece: memoryview) -> int:
        inside.set()
        assert not settled.wait(0.2), "settled under our hands"
        return len(piece)

    loan.use(0, use)
    thread.join(10)
    assert settled.is_set()


@pytest.mark.parametrize("want", ["F16", "BF16", "F64", "F32"])
def test_a_rounded_loan_is_what_torch_makes_of_it(want: str) -> None:
    values = torch.randn(PIECE_BYTES // 2, generator=torch.Generator().manual_seed(1)) * 1e4
    values[:3] = torch.tensor([1e30, -1e30, 1e-42])
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}.get(want)
    rounded = Rounded(Loan(values.view(torch.uint8).numpy()), "F32", want)
    made = values.to(dtype) if dtype else values
    assert rounded.nbytes == made.nbytes
    pieces: list[bytes] = []

    def keep_some(piece: memoryview) -> int:  # as a socket takes it
        pieces.append(bytes(piece[:70_001]))
        return len(pieces[-1])

    at = 0
    while at < rounded.nbytes:
        at += rounded.use(at, keep_some)
    assert b"".join(pieces) == bytes(made.view(torch.uint8).numpy())


def published(memory: Any) -> Published:
    layout = Layout.pack("F32", [("w", (memory.nbytes // 4 - 1,)), ("b", ())])
    return Published(
        generation="g", version=1, weights="live", layout=layout, loan=Loan(memory.view(np.uint8))
    )


@pytest.mark.parametrize(("tag", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
@pytest.mark.parametrize("settled", [False, True])
def test_much_is_rounded_in_one_go_and_stays_as_it_was(
    tag: str, dtype: torch.dtype, settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "_COPIED", 100_003)
    values = torch.randn(PIECE_BYTES, generator=torch.Generator().manual_seed(1))
    values[:3] = torch.tensor([1e30, torch.nan, 1e-42])
    whole = published(values.numpy())
    if settled:
        whole.loan.settle()
    narrow = whole.narrowed(tag)
    made = values.to(dtype)
    values.zero_()  # the next update
    assert [slot.shape for slot in narrow.layout.slots] == [(PIECE_BYTES - 1,), ()]
    assert read(narrow.part(tag)) == bytes(made.view(torch.uint8).numpy())


def test_what_is_small_or_grows_is_left_to_the_reader() -> None:
    small, large = published(np.zeros(1000, "<f4")), published(np.zeros(PIECE_BYTES, "<f4"))
    assert small.narrowed("BF16") is small
    assert large.narrowed("F32") is large
    assert large.narrowed("F64") is large
