"""A push on its way to the journal, which alone keeps it; its numbers are looked at on the way."""

from __future__ import annotations

import numpy as np

from optserve.sessions.journaling import Writer
from optserve.store.base import BytesLike, Payload
from optserve_client import wire

#: Bits of a 16-bit float's exponent: all of them are set in NaN and Infinity.
_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80}


class Passing:
    """Writes a frame of dense tensors, piece by piece, and finds the first NaN or Infinity."""

    def __init__(self, writer: Writer, header: wire.Header) -> None:
        self._writer = writer
        #: Sentence about what is not finite.
        self.fault: str | None = None
        self._tensors = [info for info in header.tensors if info.end > info.begin]
        #: Bytes of the frame that come before the tensors, and of these, that were looked at.
        self._before = header.data_start
        self._at = 0
        #: The first bytes of an element whose last ones have not come.
        self._carry = b""

    def write(self, chunk: BytesLike) -> None:
        self._writer.write(chunk)
        piece = memoryview(chunk)
        skipped = min(self._before, len(piece))
        self._before -= skipped
        piece = piece[skipped:]
        while piece and self.fault is None:
            info = self._tensors[0]
            count = min(len(piece), info.end - self._at)
            self._look(info, piece[:count])
            piece, self._at = piece[count:], self._at + count
            if self._at == info.end:
                del self._tensors[0]

    def digest(self) -> bytes:
        return self._writer.digest()

    def seal(self) -> Payload | None:
        return self._writer.seal()

    def discard(self) -> None:
        self._writer.discard()

    def _look(self, info: wire.TensorInfo, piece: memoryview) -> None:
        begin = self._at - info.begin - len(self._carry)
        raw: BytesLike = self._carry + bytes(piece) if self._carry else piece
        size = wire.itemsize(info.dtype)
        whole = len(raw) // size * size
        self._carry = bytes(raw[whole:])
        bad = _nonfinite(raw[:whole], info.dtype)
        if not bad.any():
            return
        at = int(bad.argmax())
        one = wire.from_bytes(info.dtype, (1,), raw[at * size : (at + 1) * size])
        value = one.to_float32()[0] if isinstance(one, wire.Bits) else one[0]
        index = [int(i) for i in np.unravel_index(begin // size + at, info.shape)]
        _, _, name = info.name.partition("/")
        self.fault = f"grads[{name!r}]{index or ''} is {float(value)}, must be finite"


def _nonfinite(raw: BytesLike, dtype: str) -> np.ndarray:
    found: np.ndarray
    if (exponent := _EXPONENT.get(dtype)) is not None:
        found = np.frombuffer(raw, np.uint16) & exponent == exponent
        return found
    found = ~np.isfinite(np.frombuffer(raw, wire.numpy_dtype(dtype)))
    return found
