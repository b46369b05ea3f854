"""Memory for the bodies of large answers, used again when nobody looks at the last one any more.

The first touch of new memory costs as much as receiving into it. A program that steps in a loop
lets go of the params of one step for those of the next, so there is memory to be had.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from optserve_client._tensors import Array

#: Smaller bodies come and go without the system's help.
LEAST_BYTES = 2**20
#: Blocks are multiples of this: the length of an answer changes a little from step to step.
_GRAIN_BYTES = 2**16

#: Returns memory of so many bytes for the body of an answer.
Take: TypeAlias = Callable[[int], memoryview]


class Memory:
    """Blocks of one client, of which at most one waits for its next use. Threads may share it.

    What is lent is a view of a block. Arrays, slices, tensors and memoryviews made from it keep it
    alive, whoever has them, and its end brings the block back.
    """

    def __init__(self) -> None:
        # Its methods are atomic. A lock would not do: the garbage collector brings blocks back too,
        # at any time, also while this thread holds the lock.
        self._spare: deque[Array] = deque(maxlen=1)
        #: By the identity of the reference to the view: an array has no hash. With the number of
        #: references to the block while there is only that view.
        self._lent: dict[int, tuple[weakref.ref[Array], Array, int]] = {}
        self._closed = False

    def take(self, nbytes: int) -> memoryview:
        """Return memory for ``nbytes``, whose content is undefined."""
        if nbytes < LEAST_BYTES or self._closed:
            return np.empty(nbytes, np.uint8).data
        try:
            block = self._spare.pop()
        except IndexError:
            block = None
        if block is None or not nbytes <= block.nbytes <= 2 * nbytes:
            del block  # before there is another one
            block = np.empty(-(-nbytes // _GRAIN_BYTES) * _GRAIN_BYTES, np.uint8)
        lent = block[:nbytes]
        ref, references = weakref.ref(lent, self._back), sys.getrefcount(block)
        self._lent[id(ref)] = ref, block, references
        return lent.data

    def close(self) -> None:
        """Keep nothing any more. What is lent stays with who has it."""
        self._closed = True
        self._lent.clear()
        self._spare.clear()

    def _back(self, ended: weakref.ref[Array]) -> None:
        if id(ended) not in self._lent:  # closed
            return
        _, block, references = self._lent.pop(id(ended))
        if sys.getrefcount(block) > references:  # somebody went round the view to the block itself
            return
        self._spare.append(block)
        if self._closed:
            self._spare.clear()
