"""Copies of the params that are kept beside the live ones: EMA and best."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from optserve.optim.arena import Arena
from optserve.optim.layout import Layout


class Ema:
    """torch's AveragedModel with get_ema_multi_avg_fn: the first update copies the params."""

    def __init__(self, params: Arena, decay: float) -> None:
        #: In float32 for bfloat16 params, whose few bits would soon stop moving.
        self.arena = widened(params)
        self.updates = 0
        self._average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(self, params: Arena) -> None:
        """Take one applied update in."""
        if self.updates == 0:
            self.arena.flat.copy_(params.flat)
        else:
            live = widened(params) if params.flat.dtype == torch.bfloat16 else params
            self._average(list(self.arena.views.values()), list(live.views.values()), self.updates)
        self.updates += 1


class Best:
    """The params at which the monitored value was best."""

    def __init__(self, params: Arena, mode: str) -> None:
        self.arena = params.clone()
        self._sign = 1.0 if mode == "min" else -1.0
        self.value: float | None = None
        self.version: int | None = None

    def offer(self, value: float | None, params: Arena, version: int) -> None:
        """Keep ``params`` of ``version``, which have ``value``, if nothing before was better."""
        if value is None or math.isnan(value):
            return
        if self.value is None or self._sign * value < self._sign * self.value:
            self.value, self.version = value, version
            self.arena.flat.copy_(params.flat)


class Window:
    """Gradients summed in commit order until enough of them make one update.

    float32 and float64 sum in their own dtype, as torch's ``.grad`` does; bfloat16 sums in float32.
    """

    def __init__(self, steps: int, reduce: str) -> None:
        self.steps = steps
        self._mean = reduce == "mean"
        self.count = 0
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, grads: Mapping[str, torch.Tensor]) -> None:
        """Add one contribution; names that are absent have no gradient in it."""
        for name, grad in grads.items():
            wide = grad.float() if grad.dtype == torch.bfloat16 else grad
            if name in self.sums:
                self.sums[name] = self.sums[name].add_(wide)
            else:
                self.sums[name] = wide.clone()
        self.count += 1

    @property
    def full(self) -> bool:
        return self.count >= self.steps

    def close(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the combined gradients and start the next window."""
        sums, self.sums, self.count = self.sums, {}, 0
        if self._mean:
            for total in sums.values():
                total.div_(self.steps)
        return {name: total.to(dtype) for name, total in sums.items()}


def widened(params: Arena) -> Arena:
    """Return a copy that averages: float32 for bfloat16, else the same dtype."""
    dtype = params.flat.dtype
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    copy = Arena(params.layout, str(params.flat.device), wide)
    copy.flat.copy_(params.flat)
    return copy


def arena_of(
    layout: Layout,
    device: str,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype | None = None,
) -> Arena:
    """Return an arena that holds copies of ``tensors``."""
    arena = Arena(layout, device, dtype)
    for name, view in arena.views.items():
        view.copy_(tensors[name])
    return arena
