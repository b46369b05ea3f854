"""Gradients that arrive in a narrower dtype are widened where they lie."""

from __future__ import annotations

import pytest
import torch

from optserve.optim.arena import WIDENED, GradientPool
from optserve.optim.layout import Layout

NARROW = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@pytest.mark.parametrize(("have", "want"), [("F16", "F32"), ("BF16", "F32")])
@pytest.mark.parametrize("numel", [0, 1, 7, WIDENED - 1, WIDENED, 3 * WIDENED + 5])
def test_widening_in_place_is_exact(have: str, want: str, numel: int) -> None:
    check(have, want, numel)


@pytest.mark.parametrize("have", NARROW)
def test_widening_to_float64_is_exact(have: str) -> None:
    check(have, "F64", 2 * WIDENED + 3)


def check(have: str, want: str, numel: int) -> None:
    layout = Layout.pack(want, [("before", (3,)), ("w", (numel,)), ("after", (2,))])
    buffer = GradientPool(layout).lease()
    for name in ("before", "after"):
        buffer.arena.views[name].fill_(7.0)
    narrow = torch.randn(numel, generator=torch.Generator().manual_seed(3)).to(NARROW[have])
    raw = bytes(narrow.view(torch.uint8).numpy())
    buffer.end("w", len(raw))[:] = raw
    buffer.widen("w", have)
    views = buffer.arena.views
    assert torch.equal(views["w"], narrow.to(views["w"].dtype))
    assert views["before"].tolist() == [7.0] * 3
    assert views["after"].tolist() == [7.0] * 2
