"""Gradients that arrive in a narrower dtype are widened where they lie."""

from __future__ import annotations

import pytest
import torch

from optserve.optim.arena import GradientBuffer, GradientPool
from optserve.optim.layout import Layout
from optserve.optim.rounding import _LAST

NARROW = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@pytest.mark.parametrize(("have", "want"), [("F16", "F32"), ("BF16", "F32")])
@pytest.mark.parametrize("numel", [0, 1, 7, _LAST - 1, _LAST, _LAST + 1, 11 * _LAST + 5])
def test_widening_in_place_is_exact(have: str, want: str, numel: int) -> None:
    check(have, want, numel)


@pytest.mark.parametrize("have", NARROW)
def test_widening_to_float64_is_exact(have: str) -> None:
    check(have, "F64", 7 * _LAST + 3)


def check(have: str, want: str, numel: int) -> None:
    layout = Layout.pack(want, [("before", (3,)), ("w", (numel,)), ("after", (2,))])
    buffer = GradientPool(layout).lease()
    for name in ("before", "after"):
        buffer.arena.views[name].fill_(7.0)
    narrow = random(numel, have)
    put(buffer, narrow, have)
    buffer.widen()
    views = buffer.arena.views
    assert torch.equal(views["w"], narrow.to(views["w"].dtype))
    assert views["before"].tolist() == [7.0] * 3
    assert views["after"].tolist() == [7.0] * 2


def random(numel: int, tag: str) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(3)).to(NARROW[tag])


def put(buffer: GradientBuffer, narrow: torch.Tensor, tag: str) -> None:
    buffer.narrow("w", tag)[:] = bytes(narrow.view(torch.uint8).numpy())


def test_a_gradient_is_widened_once() -> None:
    buffer = GradientPool(Layout.pack("F32", [("w", (5,))])).lease()
    narrow = random(5, "F16")
    put(buffer, narrow, "F16")
    buffer.widen()
    buffer.widen()
    assert torch.equal(buffer.arena.views["w"], narrow.float())


def test_what_was_given_back_is_not_widened_for_the_next_one() -> None:
    pool = GradientPool(Layout.pack("F32", [("w", (5,))]))
    buffer = pool.lease()
    put(buffer, random(5, "F16"), "F16")
    buffer.release()
    again = pool.lease()
    assert again is buffer
    again.arena.views["w"].fill_(7.0)
    again.widen()
    assert again.arena.views["w"].tolist() == [7.0] * 5
