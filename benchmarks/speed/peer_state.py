"""What the servers of the peers keep: float32 parameters under torch's fused Adam."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.speed.shapes import Shapes
from benchmarks.speed.worker import LR


class Model:
    """Zeros of these shapes, stepped with one gradient for each."""

    def __init__(self, shapes: Shapes) -> None:
        self.params = [torch.nn.Parameter(torch.zeros(tuple(shape))) for shape in shapes]
        # Without parameters torch makes none.
        self._adam = torch.optim.Adam(self.params, lr=LR, fused=True) if self.params else None

    def step(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the parameters after a step; they are the live ones."""
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        assert self._adam is not None
        self._adam.step()
        for param in self.params:
            param.grad = None
        return [param.detach() for param in self.params]
