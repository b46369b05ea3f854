"""Two small nets on the digits, in torch: equal params and an equal batch give equal bits.

Everything that torch computes with is copied into memory of its own first, because the last bits of
a product can depend on alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch.nn import functional

from examples.demo_digits import Batch, Digits

Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]

SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "mlp": {
        "hidden.weight": (128, 64),
        "hidden.bias": (128,),
        "output.weight": (10, 128),
        "output.bias": (10,),
    },
    "conv": {
        "first.weight": (12, 1, 3, 3),
        "first.bias": (12,),
        "second.weight": (24, 12, 3, 3),
        "second.bias": (24,),
        "output.weight": (10, 96),
        "output.bias": (10,),
    },
}


def _mlp(p: Tensors, x: torch.Tensor) -> torch.Tensor:
    hidden = functional.relu(functional.linear(x, p["hidden.weight"], p["hidden.bias"]))
    return functional.linear(hidden, p["output.weight"], p["output.bias"])


def _conv(p: Tensors, x: torch.Tensor) -> torch.Tensor:
    image = x.view(-1, 1, 8, 8)
    for layer in ("first", "second"):
        image = functional.conv2d(image, p[f"{layer}.weight"], p[f"{layer}.bias"], padding=1)
        image = functional.max_pool2d(functional.relu(image), 2)
    return functional.linear(image.flatten(1), p["output.weight"], p["output.bias"])


_FORWARD: Mapping[str, Callable[[Tensors, torch.Tensor], torch.Tensor]] = {
    "mlp": _mlp,
    "conv": _conv,
}


@cache
def digits() -> Digits:
    return Digits.load()


def initial(net: str) -> Arrays:
    """Return the params that every training begins with: He's normal, biases zero."""
    rng = np.random.default_rng(7)
    made = {}
    for name, shape in SHAPES[net].items():
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.0
        made[name] = rng.normal(0, scale, shape).astype(np.float32)
    return made


def gradient(net: str, params: Mapping[str, np.ndarray], batch: Batch) -> tuple[float, Arrays]:
    """Return the mean cross entropy of ``batch`` at ``params`` and its gradient."""
    x, y = (torch.tensor(part) for part in batch)
    leaves = {name: torch.tensor(params[name], requires_grad=True) for name in SHAPES[net]}
    loss = functional.cross_entropy(_FORWARD[net](leaves, x), y)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return float(loss.detach()), {n: g.numpy() for n, g in zip(leaves, grads, strict=True)}


def descended(
    net: str, params: Mapping[str, np.ndarray], batches: list[Batch], lr: float
) -> tuple[float, Arrays]:
    """Return the last loss of a plain descent, one step for each batch, and what it changed."""
    here, loss = {name: np.array(params[name]) for name in SHAPES[net]}, 0.0
    for batch in batches:
        loss, grads = gradient(net, here, batch)
        here = {name: here[name] - np.float32(lr) * grads[name] for name in here}
    return loss, {name: here[name] - params[name] for name in here}


def accuracy(net: str, params: Mapping[str, np.ndarray]) -> float:
    """Return the share of the test scans that ``params`` tell."""
    data = digits()
    with torch.no_grad():
        tensors = {name: torch.tensor(params[name]) for name in SHAPES[net]}
        told = _FORWARD[net](tensors, torch.tensor(data.test_x)).argmax(dim=1).numpy()
    return float((told == data.test_y).mean())


class Shard:
    """What one of several workers trains on: every ``of``-th scan from ``index`` on."""

    def __init__(self, index: int, of: int, size: int) -> None:
        """``size``: of a batch."""
        data = digits()
        self._x, self._y = data.train_x[index::of], data.train_y[index::of]
        self._seed, self._size = index, size

    def batch(self, number: int) -> Batch:
        """Return batch ``number``, from 0: shuffled anew when all scans were had."""
        epoch, at = divmod(number, len(self._x) // self._size)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._x))
        chosen = order[at * self._size : (at + 1) * self._size]
        return self._x[chosen], self._y[chosen]
