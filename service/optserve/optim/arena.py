"""Flat buffers: the params, a gradient, an average, each one allocation with a view per tensor.

One leaf Parameter per tensor that is a view at any offset steps bit-equal to separate tensors, and
a published copy, a snapshot or a reply is then a single memcpy in wire order.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from weakref import WeakSet

import numpy as np
import torch

from optserve.optim import compressed, rounding
from optserve.optim.layout import Layout
from optserve.optim.rounding import TORCH_DTYPES
from optserve_client import wire
from optserve_client.errors import Unavailable


def to_wire(tensor: torch.Tensor) -> wire.Tensor:
    """Return ``tensor`` for the layers that know numpy only; a CPU tensor's memory is shared."""
    host = tensor.detach().cpu().contiguous()
    if host.dtype == torch.bfloat16:
        return wire.Bits(host.view(torch.uint16).numpy(), "BF16")
    return host.numpy()


def from_wire(tensor: wire.Tensor) -> torch.Tensor:
    """Return a fresh torch tensor with the values of ``tensor``."""
    if isinstance(tensor, wire.Bits):
        if tensor.dtype != "BF16":
            raise TypeError(f"no torch tensor is made of {tensor.dtype}")
        return torch.from_numpy(np.array(tensor.array)).view(torch.bfloat16)
    return torch.from_numpy(np.array(tensor))


class Arena:
    """One flat tensor and its views, in the order of a layout."""

    def __init__(
        self,
        layout: Layout,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        flat: torch.Tensor | None = None,
    ) -> None:
        """``flat``: memory of the layout's size that is there already."""
        self.layout = layout
        dtype = dtype or TORCH_DTYPES[layout.dtype]
        size = wire.itemsize(layout.dtype)
        if flat is None:
            flat = torch.empty(layout.nbytes // size, dtype=dtype, device=device)
        self.flat = flat
        self.on_cpu = self.flat.device.type == "cpu"
        #: The tensors by name: views of ``flat``.
        self.views = {
            slot.name: self.flat[slot.begin // size : slot.end // size].view(slot.shape)
            for slot in layout.slots
        }

    @cached_property
    def bytes(self) -> np.ndarray:
        """The buffer as uint8, shared with ``flat`` (CPU only)."""
        raw: np.ndarray = self.flat.view(torch.uint8).numpy()
        return raw

    def fill(self, tensors: Mapping[str, wire.Tensor]) -> None:
        """Copy tensors of the layout's dtype and shapes in; those not named stay as they are."""
        if not self.on_cpu or self.flat.dtype != TORCH_DTYPES[self.layout.dtype]:
            for name, tensor in tensors.items():
                self.views[name].copy_(from_wire(tensor))
            return
        raw = self.bytes
        for name, tensor in tensors.items():
            slot = self.layout.by_name[name]
            raw[slot.begin : slot.end] = np.frombuffer(wire.as_bytes(tensor), np.uint8)

    def copy_bytes(self) -> np.ndarray:
        """Return a read-only uint8 copy of the whole buffer, in wire order."""
        if not self.on_cpu:
            copied: np.ndarray = self.flat.cpu().view(torch.uint8).numpy()
        else:
            copied = self.bytes.copy()
        copied.flags.writeable = False
        return copied

    def clone(self) -> Arena:
        """Return an independent arena with the same values."""
        twin = Arena(self.layout, str(self.flat.device), self.flat.dtype)
        twin.flat.copy_(self.flat)
        return twin

    def rounded(self, dtype: torch.dtype) -> Arena:
        """Return this arena if it has ``dtype``, else a rounded copy."""
        if self.flat.dtype == dtype:
            return self
        copy = Arena(self.layout, str(self.flat.device), dtype)
        copy.flat.copy_(self.flat)
        return copy

    def grown(self, layout: Layout) -> Arena:
        """Return an arena of ``layout``, whose first tensors are this one's."""
        bigger = Arena(layout, str(self.flat.device), self.flat.dtype)
        bigger.flat[: self.flat.numel()].copy_(self.flat)
        return bigger


class GradientBuffer:
    """One gradient of a session, filled by whoever reads the body, then stepped on.

    Leased with :meth:`GradientPool.lease`; give it back with :meth:`release`, once.
    """

    def __init__(
        self,
        layout: Layout,
        give_back: Callable[[GradientBuffer], None],
        arena: Arena | None = None,
    ) -> None:
        #: The dense tensors of the session; sparse ones travel apart.
        self.layout = layout
        self.arena = Arena(layout) if arena is None else arena
        self._raw = self.arena.bytes.data
        #: What is still to be done to gradients that did not come as the update reads them.
        self._undone: list[Callable[[], None]] = []
        self._give_back = give_back

    def view(self, name: str) -> memoryview:
        """Return the writable bytes of one gradient, in the session's dtype."""
        slot = self.layout.by_name[name]
        return self._raw[slot.begin : slot.end]

    def array(self, name: str) -> wire.Tensor:
        """Return one gradient as a writable view."""
        slot = self.layout.by_name[name]
        return wire.from_bytes(self.layout.dtype, slot.shape, self.view(name))

    def narrow(self, name: str, tag: str) -> memoryview:
        """Return where one gradient goes in the narrower wire dtype ``tag``: to the end of its
        place, until :meth:`widen`."""
        place = self.end_of(name, tag)
        self._undone.append(partial(rounding.widen, self.arena.views[name], place, tag))
        return place

    def end_of(self, name: str, tag: str) -> memoryview:
        """Return the end of the place of one gradient, as large as it is in the wire dtype
        ``tag``."""
        slot = self.layout.by_name[name]
        return self._raw[slot.end - slot.numel * wire.itemsize(tag) : slot.end]

    def scatter(self, name: str, indices: np.ndarray, values: wire.Tensor) -> None:
        """Have :meth:`widen` make one gradient of ``values`` at flat ``indices``, zero elsewhere.

        The indices are in bounds and different, the values in the session's dtype.
        """
        self._undone.append(partial(compressed.scatter, self.arena.views[name], indices, values))

    def scale(self, name: str, scales: np.ndarray, block: int) -> None:
        """Have :meth:`widen` make one gradient of the int8 values at the :meth:`end_of` its place,
        each ``block`` of them times their own of the float32 ``scales``."""
        view, place = self.arena.views[name], self.end_of(name, "I8")
        self._undone.append(partial(compressed.scale, view, place, scales, block))

    def part(self, name: str) -> GradientBuffer:
        """Return the place of one gradient as a buffer by itself."""
        slot, size = self.layout.by_name[name], wire.itemsize(self.layout.dtype)
        layout = Layout.pack(self.layout.dtype, [(name, slot.shape)])
        flat = self.arena.flat[slot.begin // size : slot.end // size]
        return GradientBuffer(layout, nobody, Arena(layout, flat=flat))

    def adopt(self, part: GradientBuffer) -> None:
        """Take over what is still to be widened in a :meth:`part` of this buffer."""
        self._undone += part._undone

    def widen(self) -> None:
        """Convert what came in a narrower dtype or compressed, where it lies. For a thread that
        computes, once all of it is there and nobody needs its bytes any more."""
        for do in self._undone:
            do()
        self._undone.clear()

    def release(self) -> None:
        """Give the buffer back; its content is lost."""
        self._undone.clear()
        self._give_back(self)


def nobody(buffer: GradientBuffer) -> None:
    """Take back a buffer that is no pool's."""


#: Gradients of one session that may be under way at a time, in bytes; two always may.
LEASED_BYTES = 2 * 2**30


class GradientPool:
    """Gradient buffers of one layout; one stays warm, so that a step allocates nothing."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._warm: deque[GradientBuffer] = deque(maxlen=1)  # pop and append are atomic
        self._out: WeakSet[GradientBuffer] = WeakSet()
        #: Of these, what was leased for long.
        self._kept: WeakSet[GradientBuffer] = WeakSet()

    def lease(self) -> GradientBuffer:
        """Return a buffer that nobody else has; Unavailable where too many are under way."""
        try:
            return self._warm.pop()
        except IndexError:
            pass
        count = len(self._out)
        passing = count - len(self._kept)
        if passing >= 2 and (count + 1) * self.layout.nbytes > LEASED_BYTES:
            raise Unavailable(
                f"{count} gradients of {self.layout.nbytes} bytes are under way, "
                f"the limit is {LEASED_BYTES} bytes",
                retry_after=1,
            )
        return self._made()

    def keep(self) -> GradientBuffer:
        """Return a buffer for a gradient that takes its time.

        However many there are, two more can be leased; how many there may be is not known here.
        """
        try:
            buffer = self._warm.pop()
        except IndexError:
            buffer = self._made()
        self._kept.add(buffer)
        return buffer

    def _made(self) -> GradientBuffer:
        buffer = GradientBuffer(self.layout, partial(_back, weakref.ref(self)))
        self._out.add(buffer)
        return buffer


def _back(pool: weakref.ref[GradientPool], buffer: GradientBuffer) -> None:
    """Take a buffer back. It does not keep its pool: both go with the session, at once."""
    if (found := pool()) is not None:
        found._kept.discard(buffer)
        found._warm.append(buffer)
