"""One step as the session takes it, what its tensors must be, and how a JSON body becomes one."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from optserve.optim.arena import GradientBuffer
from optserve.optim.layout import Layout
from optserve.sentences import shown
from optserve.sessions.fields import StepFields, unknown
from optserve.sessions.journaling import Unkept
from optserve.sessions.passing import Passing
from optserve.store import Payload, PayloadWriter
from optserve_client import wire
from optserve_client.errors import Invalid, MissingGradient

#: Of a tensor, as it is written at once.
PIECE_BYTES = 2**20
#: Takes a gradient buffer of the session's dense tensors.
Lease = Callable[[], "GradientBuffer"]
#: ``Store.writer``, or nothing that keeps anything: takes the number of bytes to come.
OpenWriter = Callable[[int], PayloadWriter | Unkept]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparse:
    """A sparse gradient in torch's hybrid COO form; duplicate indices are still to be summed."""

    #: int64 ``[sparse_dim, nnz]``, each within ``shape``.
    indices: np.ndarray
    #: ``[nnz, *shape[sparse_dim:]]`` in the session's dtype.
    values: wire.Tensor
    shape: tuple[int, ...]


def nothing(layout: Layout) -> GradientBuffer:
    """Return a buffer without room, for a gradient that nobody keeps."""
    return GradientBuffer(layout.subset(()), lambda _: None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A checked step: each parameter has a gradient in buffer or sparse, or is in none."""

    fields: StepFields
    #: The session's shape that it was checked against.
    expected: Expected
    #: Leased; whoever holds the step gives it back, once.
    buffer: GradientBuffer
    #: The gradient is not in the buffer, it went to the journal: what was found on the way.
    passed: Passing | None = None
    #: Parameters whose gradient is None; the buffer holds nothing of meaning for them.
    none: frozenset[str]
    sparse: dict[str, Sparse]
    #: Those that replace the session's before the update, in its dtype; None: none were sent.
    params: dict[str, wire.Tensor] | None
    #: XXH3-128 of the whole body; empty in a replay.
    digest: bytes
    #: The journal's bytes: one safetensors frame. None in a replay, which has it already, and where
    #: none is kept.
    payload: Payload | None

    def discard(self) -> None:
        """Give the buffer and the payload up, where no event took the step."""
        self.buffer.release()
        if self.payload is not None:
            self.payload.discard()


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What the tensors of a step must be, for one session."""

    layout: Layout
    sparse: frozenset[str]
    #: What dense tensors are: ``grad`` or, where workers push what they changed, ``delta``.
    kind: str = "grad"
    #: Tensors of the last body that was found to be complete: from step to step they are the same.
    known: list[tuple[wire.TensorInfo, ...]] = field(default_factory=list, compare=False)

    @property
    def dense(self) -> Layout:
        """The layout of a gradient buffer."""
        return self.layout.subset(n for n in self.layout.names if n not in self.sparse)

    @property
    def plural(self) -> str:
        """What a JSON body calls them all."""
        return f"{self.kind}s"

    def slot_shape(self, name: str, what: str) -> tuple[int, ...]:
        slot = self.layout.by_name.get(name)
        if slot is None:
            raise Invalid(f"{what}: {unknown(name, self.layout.by_name, 'parameter')}")
        return slot.shape

    def check_dense(self, name: str, what: str) -> None:
        """Refuse a dense gradient for a parameter that is unknown or was declared sparse."""
        self.slot_shape(name, what)
        if name in self.sparse:
            raise Invalid(
                f"{what} is dense, but {name!r} was declared sparse: send its indices and values"
            )

    def check_sparse(self, name: str, what: str) -> None:
        self.slot_shape(name, what)
        if name not in self.sparse:
            raise Invalid(f"{what} is sparse, but {name!r} was not declared sparse at creation")

    def check_compressed(self, name: str, what: str) -> None:
        """Refuse a compressed gradient for a parameter that is unknown or was declared sparse."""
        self.slot_shape(name, what)
        if name in self.sparse:
            raise Invalid(
                f"{what} stands for a dense gradient, but {name!r} was declared sparse: send "
                f"{shown(f'sparse/{name}/indices')} and {shown(f'sparse/{name}/values')}"
            )

    def check_coo(self, name: str, indices: tuple[int, ...], what: str) -> tuple[int, ...]:
        """Refuse impossible dimensions of ``indices``; return the shape that values must have."""
        shape = self.layout.by_name[name].shape
        if len(indices) != 2 or not 1 <= indices[0] <= len(shape):
            bound = f"[n, nnz] with n in [1, {len(shape)}]" if shape else "none: it is a scalar"
            raise Invalid(f"{what} has shape {list(indices)}, expected {bound}")
        return (indices[1], *shape[indices[0] :])

    def check_complete(self, given: Collection[str], none: Iterable[str]) -> frozenset[str]:
        """Refuse a step in which not every parameter has a gradient or is in ``none``, not both."""
        left_out = frozenset(none)
        for name in left_out:
            self.slot_shape(name, "none")
            if name in given:
                raise Invalid(f"none: parameter {shown(name)} has a gradient too")
        missing = [n for n in self.layout.names if n not in given and n not in left_out]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise MissingGradient(
                f"parameter {missing[0]!r} has no gradient{more}; where torch has grad is None, "
                "send null or name it in none",
                missing=missing[:100],
            )
        return left_out


def check_indices(indices: np.ndarray, shape: tuple[int, ...], what: str) -> None:
    """Refuse an index outside ``shape``, which torch's SGD would take without a word."""
    for dim, row in enumerate(indices):
        bad = (row < 0) | (row >= shape[dim])
        if bad.any():
            at = int(bad.argmax())
            raise Invalid(f"{what}[{dim}, {at}] must be in [0, {shape[dim]}), got {int(row[at])}")


def no_int8(block: int) -> Invalid:
    """Return the refusal of an ``int8_block`` that has no effect."""
    return Invalid(
        f"int8_block is {block}, but the body has no int8/<name>/values", field="int8_block"
    )


def step_from_json(
    body: Mapping[str, Any],
    *,
    expected: Expected,
    lease: Lease,
    writer: OpenWriter,
    digest: bytes,
) -> Step:
    """Return the step in a parsed JSON body: ``grads`` (or ``deltas``), ``params`` and StepFields.

    Numbers are decoded into the leased buffer, and a frame of the same content is written for the
    journal. Raises Invalid and MissingGradient; a buffer that was leased is given back then.
    """
    layout, plural = expected.layout, expected.plural
    for other in {"grads", "deltas"} - {plural}:
        if other in body:
            raise Invalid(f"{other}: the session takes {plural}", field=other)
    grads = _named_tensors(body, plural)
    fields = StepFields.parse({k: v for k, v in body.items() if k not in {plural, "params"}})
    if fields.int8_block is not None:
        raise no_int8(fields.int8_block)
    given = {name: value for name, value in grads.items() if value is not None}
    for name, value in grads.items():
        what = f"{plural}[{shown(name)}]"
        if isinstance(value, dict) and "indices" in value:
            expected.check_sparse(name, what)
        elif value is None:
            expected.slot_shape(name, what)
        else:
            expected.check_dense(name, what)
    nulls = (name for name, value in grads.items() if value is None)
    none = expected.check_complete(given, (*fields.none, *nulls))
    params = {
        name: _read(value, f"params[{shown(name)}]", layout.dtype, expected, name)
        for name, value in _named_tensors(body, "params").items()
    }
    coos = {n: _read_sparse(v, n, expected) for n, v in given.items() if n in expected.sparse}
    buffer = lease()
    try:
        frame: dict[str, wire.Tensor] = {}
        for name, value in given.items():
            if name not in expected.sparse:
                tensor = _read(value, f"{plural}[{shown(name)}]", layout.dtype, expected, name)
                buffer.view(name)[:] = wire.as_bytes(tensor)
                frame[f"{expected.kind}/{name}"] = buffer.array(name)
        for name, coo in coos.items():
            frame[f"sparse/{name}/indices"] = coo.indices
            frame[f"sparse/{name}/values"] = coo.values
        frame |= {f"param/{name}": tensor for name, tensor in params.items()}
        complete = fields.model_copy(update={"none": sorted(none)})
        _, payload = write_frame(frame, complete, writer)
    except BaseException:
        buffer.release()
        raise
    return Step(
        fields=complete,
        expected=expected,
        buffer=buffer,
        none=none,
        sparse=coos,
        params=params or None,
        digest=digest,
        payload=payload,
    )


def _named_tensors(body: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    named = body.get(field)
    if named is None:
        return {}
    if not isinstance(named, Mapping):
        raise Invalid(
            f"{field} must be an object of named tensors, got {shown(named)}", field=field
        )
    return named


def _read(value: Any, what: str, dtype: str, expected: Expected, name: str) -> wire.Tensor:
    shape = expected.slot_shape(name, what)
    return wire.widen(wire.tensor_from_json(value, what, dtype, shape), dtype, what)


def _read_sparse(value: Mapping[str, Any], name: str, expected: Expected) -> Sparse:
    what, shape = f"{expected.plural}[{shown(name)}]", expected.layout.by_name[name].shape
    if value.keys() != {"indices", "values", "shape"}:
        raise Invalid(
            f"{what} must have exactly the keys indices, values and shape, got {shown(list(value))}"
        )
    if value["shape"] != list(shape):
        raise Invalid(f"{what}.shape must be {list(shape)}, got {shown(value['shape'])}")
    indices = wire.tensor_from_json(value["indices"], f"{what}.indices", "I64")
    if not isinstance(indices, np.ndarray) or indices.dtype != np.int64:
        raise Invalid(
            f"{what}.indices must be int64, got {wire.dtype_name(wire.dtype_of(indices))}"
        )
    dims = expected.check_coo(name, indices.shape, f"{what}.indices")
    dtype = expected.layout.dtype
    values = wire.tensor_from_json(value["values"], f"{what}.values", dtype, dims)
    check_indices(indices, shape, f"{what}.indices")
    return Sparse(indices=indices, values=wire.widen(values, dtype, f"{what}.values"), shape=shape)


def write_frame(
    tensors: Mapping[str, wire.Tensor], fields: StepFields, writer: OpenWriter
) -> tuple[bytes, Payload | None]:
    """Write the journal's frame of a step; return its digest, and the payload if one is kept."""
    text = json.dumps(fields.to_json(), allow_nan=False, separators=(",", ":"))
    pieces = [memoryview(piece) for piece in wire.encode(tensors, {wire.META_KEY: text})]
    journal = writer(sum(piece.nbytes for piece in pieces))
    try:
        for piece in pieces:
            for at in range(0, piece.nbytes, PIECE_BYTES):  # hashed, and written while in the cache
                journal.write(piece[at : at + PIECE_BYTES])
        return journal.digest(), journal.seal()
    finally:
        journal.discard()
