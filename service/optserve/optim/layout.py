"""Where each named tensor of a session lies in its flat buffers, and on the wire."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from optserve_client import wire


@dataclass(frozen=True, slots=True)
class Slot:
    """One named tensor: ``[begin, end)`` in bytes from the start of the buffer."""

    name: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The tensors of a session in their order, packed without holes.

    The same bytes are the params arena, a gradient buffer, a published copy and the data part of a
    safetensors body whose tensors come in this order.
    """

    #: Wire tag of the session's dtype: ``F32``, ``F64`` or ``BF16``.
    dtype: str
    slots: tuple[Slot, ...]

    @classmethod
    def pack(cls, dtype: str, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Layout:
        """Lay out ``(name, shape)`` pairs one after the other."""
        slots, at, size = [], 0, wire.itemsize(dtype)
        for name, shape in shapes:
            end = at + math.prod(shape) * size
            slots.append(Slot(name, tuple(shape), at, end))
            at = end
        return cls(dtype, tuple(slots))

    @cached_property
    def by_name(self) -> dict[str, Slot]:
        return {slot.name: slot for slot in self.slots}

    @cached_property
    def params(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names in a frame, and shapes."""
        return tuple((f"param/{slot.name}", slot.shape) for slot in self.slots)

    @property
    def names(self) -> list[str]:
        return [slot.name for slot in self.slots]

    @cached_property
    def numel(self) -> int:
        return sum(slot.numel for slot in self.slots)

    @property
    def nbytes(self) -> int:
        return self.slots[-1].end if self.slots else 0

    def subset(self, names: Iterable[str]) -> Layout:
        """Return the layout of only these tensors, in this layout's order, packed anew."""
        wanted = set(names)
        return Layout.pack(self.dtype, ((s.name, s.shape) for s in self.slots if s.name in wanted))
