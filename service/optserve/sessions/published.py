"""A session's weights at one version, shared by every reply that wants them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from optserve.optim.layout import Layout
from optserve.sessions.lending import PIECE_BYTES, Loan, Rounded
from optserve.store.base import SessionRow
from optserve_client import wire
from optserve_client.errors import Invalid


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Weights of one version, in the layout's order and dtype."""

    generation: str
    version: int
    #: ``live``, ``eval``, ``ema``, ``best``; ``trial`` and ``delta`` in replies only.
    weights: str
    #: What else tells these weights from others: ``best`` changes without a version.
    revision: str = ""
    layout: Layout
    #: Their bytes, ``layout.nbytes`` of them.
    loan: Loan

    @property
    def data(self) -> np.ndarray:
        """The bytes as uint8, read-only, in a copy: to send them, use :attr:`loan`."""
        return self.loan.settle()

    def part(self, dtype: str) -> Loan | Rounded:
        """Return the bytes as a reply sends them, in the wire dtype ``dtype``."""
        if dtype == self.layout.dtype:
            return self.loan
        return Rounded(self.loan, self.layout.dtype, dtype)

    def narrowed(self, dtype: str) -> Published:
        """Return the same in ``dtype`` if that is narrower and there is much to convert, in a copy;
        else leave that to :meth:`part`. In the session's turn only."""
        have = self.layout.dtype
        if wire.itemsize(dtype) >= wire.itemsize(have) or self.loan.nbytes <= PIECE_BYTES:
            return self
        layout = Layout.pack(dtype, ((slot.name, slot.shape) for slot in self.layout.slots))
        return replace(self, layout=layout, loan=Loan.of_copy(self.loan.converted(have, dtype)))

    def arrays(self) -> dict[str, wire.Tensor]:
        """Return the tensors by name: views of ``data``."""
        raw = self.data.data
        return {
            slot.name: wire.from_bytes(self.layout.dtype, slot.shape, raw[slot.begin : slot.end])
            for slot in self.layout.slots
        }

    def subset(self, names: Iterable[str]) -> Published:
        """Return only the tensors in ``names``, in the session's order; Invalid if unknown."""
        wanted = list(names)
        for name in wanted:
            if name not in self.layout.by_name:
                raise Invalid(f"names: the session has no parameter {name!r:.80}")
        smaller = self.layout.subset(wanted)
        data, whole = np.empty(smaller.nbytes, np.uint8), self.data
        for slot in smaller.slots:
            source = self.layout.by_name[slot.name]
            data[slot.begin : slot.end] = whole[source.begin : source.end]
        return replace(self, layout=smaller, loan=Loan.of_copy(data))

    def etag(self, encoding: str, dtype: str) -> str:
        """Return the strong ETag of this representation."""
        at = f"{self.generation}.{self.version}-{self.weights}{self.revision}"
        return _etag(at, self.layout, encoding, dtype)


def revision(weights: str, lsn: int) -> str:
    """Return :attr:`Published.revision` of weights at a place in the journal."""
    return "" if weights == "live" else f".{lsn}"


def etag_at(row: SessionRow, weights: str, layout: Layout, encoding: str, dtype: str) -> str:
    """Return the ETag that weights have as of ``row``, without making them."""
    at = f"{row.about['generation']}.{row.version}-{weights}{revision(weights, row.last_lsn)}"
    return _etag(at, layout, encoding, dtype)


def _etag(at: str, layout: Layout, encoding: str, dtype: str) -> str:
    names = xxhash.xxh3_64_hexdigest("\0".join(layout.names).encode())
    return f'"{at}-{names}-{encoding}-{dtype}"'
