"""The short way to torch's fused kernel takes the same steps as torch, down to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from optserve.optim.fused import FusedAdam

SHAPES = [(7, 3), (), (1000,), (0,), (2, 2, 2)]
CASES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"lr": 1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.Adam, {"maximize": True, "weight_decay": 0.1}),
    (torch.optim.Adam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"amsgrad": True, "weight_decay": 0.3}),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class Twins:
    """One optimizer that is stepped by torch, and one that is not."""

    def __init__(
        self, cls: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, **hyper: Any
    ) -> None:
        self.dtype = dtype
        self.noise = torch.Generator().manual_seed(1)
        start = [self._random(shape) for shape in SHAPES]
        self.params = [[torch.nn.Parameter(p.clone()) for p in start] for _ in range(2)]
        self.optimizers = [
            cls([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.5}], fused=True, **hyper)
            for ps in self.params
        ]
        self.short = FusedAdam(self.optimizers[1], self.optimizers[1].step)

    def _random(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.noise, dtype=torch.float64).to(self.dtype)

    def step(self, without: int | None = None) -> None:
        for i, (one, other) in enumerate(zip(*self.params, strict=True)):
            one.grad = other.grad = None if i == without else self._random(tuple(one.shape))
        self.optimizers[0].step()
        self.short()
        assert all(map(torch.equal, *self._tensors()))

    def change(self, **hyper: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.param_groups[0].update(hyper)

    def _tensors(self) -> Iterator[list[torch.Tensor]]:
        for params, optimizer in zip(self.params, self.optimizers, strict=True):
            states = [optimizer.state[p] for p in params if optimizer.state[p]]
            yield [*params, *(state[name] for state in states for name in sorted(state))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cls", "hyper"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_steps_are_torchs(
    cls: type[torch.optim.Optimizer], hyper: dict[str, Any], dtype: torch.dtype
) -> None:
    twins = Twins(cls, dtype, **hyper)
    for _ in range(5):
        twins.step()
    twins.change(lr=0.3, betas=(0.8, 0.99), weight_decay=0.01, maximize=True)
    twins.step()


def test_a_group_may_be_empty() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [torch.optim.Adam([{"params": []}, {"params": [p]}], fused=True) for p in params]
    short = FusedAdam(optimizers[1], optimizers[1].step)
    for number in range(3):
        for p in params:
            p.grad = torch.full((3,), float(number))
        optimizers[0].step()
        short()
    assert torch.equal(*params)


def test_a_param_without_a_gradient_stays_as_it_is_and_counts_no_step() -> None:
    twins = Twins(torch.optim.Adam, torch.float32)
    for without in (None, 1, None, 4, None, None):
        twins.step(without)
    counts = [twins.optimizers[1].state[p]["step"].item() for p in twins.params[1]]
    assert counts == [6, 5, 6, 6, 5]


def test_a_param_that_never_had_a_gradient_is_left_to_torch() -> None:
    twins = Twins(torch.optim.Adam, torch.float32)
    for _ in range(3):
        twins.step(without=0)
    twins.step()
    twins.step()


def test_amsgrad_that_begins_too_late_is_refused_as_torch_does() -> None:
    twins = Twins(torch.optim.Adam, torch.float32)
    twins.step()
    twins.step()
    twins.change(amsgrad=True)
    with pytest.raises(KeyError, match="max_exp_avg_sq"):
        twins.short()


@pytest.mark.parametrize(
    ("made", "fits"),
    [
        (partial(torch.optim.Adam, fused=True), True),
        (partial(torch.optim.AdamW, fused=True), True),
        (partial(torch.optim.Adam, foreach=True), False),
        (torch.optim.Adam, False),
        (partial(torch.optim.SGD, fused=True), False),
    ],
)
def test_only_fused_adams_are_taken(made: Callable[..., torch.optim.Optimizer], fits: bool) -> None:
    assert FusedAdam.fits(made([torch.nn.Parameter(torch.zeros(3))])) is fits
