"""One gradient of several: mean, sum, weighted mean, median or trimmed mean, value by value.

The pushes are read side by side, a piece of each at a time, so that memory is one gradient and a
piece per push. All arithmetic is in the order in which the sources are given, in the session's
dtype, or in float32 where that is bfloat16, and is rounded once at the end. Where some have no
gradient for a parameter, theirs counts as zero; where none has one, the result has none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from optserve.optim.arena import GradientBuffer
from optserve.optim.gradients import Coo, to_coo
from optserve.optim.rounding import TORCH_DTYPES

#: Elements of all sources together that are read before they are combined.
_ELEMENTS = 2**20
_LEAST = 2**12
#: Of one source: what torch would divide among threads costs more than it saves, and ten times as
#: much where all processors are busy, because its threads wait for each other after each operation.
_MOST = 2**15


class Source(Protocol):
    """The gradient in one push. Its dense tensors are read in the order of the session."""

    @property
    def loss_scale(self) -> float | None:
        """What the gradient was multiplied by."""

    def has(self, name: str) -> bool:
        """Say whether the push has a gradient for this parameter."""

    def read(self, name: str, count: int) -> tuple[memoryview, str]:
        """Return the next ``count`` elements of a dense gradient, in memory that the caller may
        change, and their wire dtype."""

    def coo(self, name: str) -> Coo:
        """Return a sparse gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduction:
    """How gradients combine."""

    #: ``mean``, ``sum``, ``weighted_mean``, ``median`` or ``trimmed_mean``.
    name: str
    #: One per source, for ``weighted_mean``.
    weights: Sequence[float] = ()
    #: Values that ``trimmed_mean`` leaves out at either end.
    trim: int = 0


def combine(
    sources: Sequence[Source],
    names: Sequence[str],
    sparse: Collection[str],
    buffer: GradientBuffer,
    how: Reduction,
) -> dict[str, torch.Tensor]:
    """Return the combined gradient by name: views of ``buffer``, which is filled, and COO tensors.

    ``names`` are the session's in its order, ``sparse`` those of them with sparse gradients, for
    which there are no medians.
    """
    scales = [_inverse(source.loss_scale) for source in sources]
    grads: dict[str, torch.Tensor] = {}
    for name in names:
        present = [i for i, source in enumerate(sources) if source.has(name)]
        if not present:
            continue
        if name in sparse:
            parts = [(to_coo(sources[i].coo(name)), scales[i], i) for i in present]
            grads[name] = _combine_sparse(parts, len(sources), how)
            continue
        view = grads[name] = buffer.arena.views[name]
        flat, at = view.view(-1), 0
        wide = torch.float32 if flat.dtype == torch.bfloat16 else flat.dtype
        for count in _pieces(flat.numel(), len(sources)):
            read = {i: _values(*sources[i].read(name, count), wide, scales[i]) for i in present}
            flat[at : at + count].copy_(_combined(read, len(sources), how))
            at += count
    return grads


def _inverse(loss_scale: float | None) -> float | None:
    """Return what GradScaler multiplies by."""
    return None if loss_scale is None else float(np.float32(1.0 / loss_scale))


def _pieces(numel: int, sources: int) -> Iterator[int]:
    size = min(max(_LEAST, _ELEMENTS // sources), _MOST)
    for at in range(0, numel, size):
        yield min(size, numel - at)


def _values(raw: memoryview, tag: str, wide: torch.dtype, scale: float | None) -> torch.Tensor:
    values = torch.frombuffer(raw, dtype=TORCH_DTYPES[tag]).to(wide)
    return values if scale is None else values.mul_(scale)


def _combined(read: dict[int, torch.Tensor], count: int, how: Reduction) -> torch.Tensor:
    """Return one piece of the result; the values in ``read``, by source, may be changed."""
    if how.name in ("median", "trimmed_mean"):
        some = next(iter(read.values()))
        rows = [read[i] if i in read else torch.zeros_like(some) for i in range(count)]
        return _middle(torch.stack(rows).sort(dim=0).values, how)
    if how.name == "weighted_mean":
        for i, values in read.items():
            values.mul_(how.weights[i])
    total = _sum(list(read.values()))
    divisor = _divisor(count, how)
    return total if divisor is None else total.div_(divisor)


def _sum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add up in order, into the first one."""
    total = values[0]
    for more in values[1:]:
        total = total.add_(more)
    return total


def _divisor(count: int, how: Reduction) -> float | None:
    if how.name == "mean":
        return count
    return sum(how.weights) if how.name == "weighted_mean" else None


def _middle(ordered: torch.Tensor, how: Reduction) -> torch.Tensor:
    """Return numpy's median (of an even number: the mean of the middle two), or the mean of what
    the trimming leaves."""
    count = len(ordered)
    cut = how.trim if how.name == "trimmed_mean" else (count - 1) // 2
    kept = ordered[cut : count - cut]
    return _sum(list(kept)).div_(len(kept))


def _combine_sparse(
    parts: Sequence[tuple[torch.Tensor, float | None, int]], count: int, how: Reduction
) -> torch.Tensor:
    """Return the sum or mean of coalesced COO tensors; ``parts``: with their scales and sources."""
    first = parts[0][0]
    dtype = first.dtype
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    finest = max(coo.sparse_dim() for coo, _, _ in parts)
    values, where = [], []
    for coo, scale, i in parts:
        found, mine = _finer(coo, finest)
        where.append(found)
        mine = mine.to(wide)
        mine = mine if scale is None else mine * scale
        values.append(mine * how.weights[i] if how.name == "weighted_mean" else mine)
    total = torch.sparse_coo_tensor(
        torch.cat(where, dim=1), torch.cat(values), first.shape, check_invariants=False
    ).coalesce()
    divisor = _divisor(count, how)
    summed = total.values() if divisor is None else total.values() / divisor
    made: torch.Tensor = torch.sparse_coo_tensor(
        total.indices(),
        summed.to(dtype),
        first.shape,
        check_invariants=False,
        is_coalesced=True,
    )
    return made


def _finer(coo: torch.Tensor, sparse_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return indices and values with that many sparse dimensions: the same elements one by one."""
    indices, values = coo.indices(), coo.values()
    for size in coo.shape[coo.sparse_dim() : sparse_dim]:
        inner = torch.arange(size).repeat(indices.shape[1])
        indices = torch.cat([indices.repeat_interleave(size, dim=1), inner[None]])
        values = values.flatten(0, 1)
    return indices, values
