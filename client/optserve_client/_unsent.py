"""What compressed steps of one session left out, until a later one sends it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from optserve_client import errors
from optserve_client._messages import Answer
from optserve_client.compress import Compressor
from optserve_client.wire import Array, Tensor


class Unsent:
    """What one worker has not sent to one session, by parameter."""

    def __init__(self) -> None:
        #: With the loss scale that it was multiplied by.
        self.left: dict[str, tuple[Array, float]] = {}
        #: What was left before that: memory for what comes next.
        self.spare: dict[str, Array] = {}
        self.lock = threading.Lock()

    def of(self, name: str, scale: float) -> Array | None:
        """Return what is unsent of a gradient that is multiplied by ``scale``, flat."""
        if name not in self.left:
            return None
        array, before = self.left[name]
        return array if scale == before else array * array.dtype.type(scale / before)


class Packed:
    """The dense gradients of one step, compressed when it goes out.

    That may be after an earlier step, whose outcome was not known, has turned out to be applied:
    only then is it known what was unsent before this one. Until it is applied itself, it comes out
    as the same bytes each time.
    """

    def __init__(
        self,
        compressor: Compressor,
        unsent: Unsent,
        gradients: Mapping[str, Tensor],
        scale: float = 1.0,
        kind: str = "grad",
    ) -> None:
        """``scale``: what the gradients were multiplied by; ``kind``: what whole ones are called in
        the frame, ``grad`` or ``delta``."""
        self._compressor = compressor
        self._unsent = unsent
        self._gradients = gradients
        self._scale = scale
        self._kind = kind
        self._left: dict[str, Array] = {}

    def made(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and fields of the frame; what this returned before goes out no more."""
        tensors: dict[str, Tensor] = {}
        fields: dict[str, Any] = {}
        feedback, unsent = self._compressor.error_feedback, self._unsent
        with unsent.lock:
            unsent.spare |= self._left
            self._left = {}
            for name, gradient in self._gradients.items():
                before = unsent.of(name, self._scale) if feedback else None
                size = int(np.prod(gradient.shape))
                if before is not None and before.size != size:
                    raise errors.Invalid(
                        f"grads[{name!r}] has {size} elements, "
                        f"what earlier steps left of it has {before.size}"
                    )
                room = unsent.spare.pop(name, None)
                encoded = self._compressor.encode(name, gradient, before, room=room)
                for full, tensor in encoded.tensors.items():
                    tensors[f"{self._kind}/{name}" if full == f"grad/{name}" else full] = tensor
                fields |= encoded.fields
                if encoded.unsent is not None:
                    self._left[name] = encoded.unsent
            if not feedback:
                unsent.spare |= self._left
                self._left = {}
        return tensors, fields

    def acknowledged(self, answer: Answer) -> None:
        """Take note that the server has done what was :meth:`made` last."""
        if answer.scalars.get("skipped"):
            return
        with self._unsent.lock:
            for name, array in self._left.items():
                if before := self._unsent.left.get(name):
                    self._unsent.spare[name] = before[0]
                self._unsent.left[name] = array, self._scale
            self._left = {}
