"""A binary step on its way in: its bytes go straight to where the update reads them.

The header comes first and is judged whole, before a buffer is leased: names, kinds, shapes, dtypes
and fields. After that whoever reads the socket asks for :meth:`StepIntake.room` and fills it, or
has bytes copied there by :meth:`StepIntake.feed`; the journal gets them from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from optserve.sentences import shown
from optserve.sessions import compressed
from optserve.sessions.fields import StepFields, load_object
from optserve.sessions.journaling import BEHIND_BYTES, Journaling, JournalingBehind, Writer
from optserve.sessions.passing import Passing
from optserve.sessions.step import (
    Expected,
    Lease,
    OpenWriter,
    Sparse,
    Step,
    check_indices,
    nothing,
    step_from_json,
)
from optserve.sessions.turn import Executor
from optserve_client import wire
from optserve_client.errors import Invalid, Malformed, TooLarge

if TYPE_CHECKING:
    from optserve.optim.arena import GradientBuffer

__all__ = ["Sparse", "Step", "StepIntake", "read_fields", "step_from_json"]

_PREFIX_BYTES = 8


class StepIntake:
    """Parses one safetensors body. Feed it, then finish or abort; whatever raises has aborted.

    Tensors: ``grad/<name>``, or ``delta/<name>`` as the session wants; ``sparse/<name>/indices``
    (int64 ``[n, nnz]``) and ``sparse/<name>/values``; those of
    :mod:`optserve.sessions.compressed`; ``param/<name>`` for those params that replace the
    session's. A gradient goes into place as it arrives; a narrower one waits there until the
    update wants it.
    """

    def __init__(
        self,
        *,
        expected: Expected,
        lease: Lease,
        writer: OpenWriter | None,
        limit_bytes: int | None = None,
        scribes: Executor | None = None,
        passes: bool = False,
    ) -> None:
        """``writer`` is None in a replay, which has the journal's bytes already; ``scribes`` write
        large bodies, else whoever feeds. ``passes``: dense gradients are for the journal alone."""
        self._expected = expected
        self._lease = lease
        self._writer = writer
        self._limit = limit_bytes
        self._scribes = scribes
        self._passes = passes
        self._passing: Passing | None = None
        #: Known once the header has arrived, as is ``frame_bytes``.
        self.fields: StepFields | None = None
        self.frame_bytes: int | None = None
        self._head = bytearray()
        self._head_bytes = _PREFIX_BYTES
        self._received = 0
        self._none: frozenset[str] = frozenset()
        #: Tensors that do not arrive in the buffer, by their name in the frame.
        self._staged: dict[str, wire.Tensor] = {}
        #: Where the bytes go, in the order of the frame; empty tensors are left out. A number: of
        #: bytes that get memory when they come, and lose it when the journal has them.
        self._targets: list[memoryview | int] = []
        self._target = 0
        self._filled = 0
        self._buffer: GradientBuffer | None = None
        self._journal: Journaling | None = None
        self._closed = False

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the body; ``chunk`` may be overwritten afterwards.

        Raises Malformed, TooLarge, Invalid or MissingGradient once the header is complete,
        Malformed for bytes after the frame's end, and what lease and writer raise.
        """
        self._check_open()
        try:
            piece = memoryview(chunk)
            if self.frame_bytes is None:
                piece = self._feed_head(piece)
            while piece:
                room = self._room()
                take = min(len(room), len(piece))
                room[:take] = piece[:take]
                self._take(take)
                piece = piece[take:]
        except BaseException:
            self.abort()
            raise

    def room(self) -> memoryview | None:
        """Return where the next bytes of the body go; None: feed them, more of the header is to
        come first. Raises Malformed if the frame is complete."""
        self._check_open()
        return None if self.frame_bytes is None else self._room()

    def filled(self, nbytes: int) -> None:
        """Take ``nbytes`` that the caller has put into :meth:`room`. Raises as :meth:`feed`."""
        self._check_open()
        try:
            self._take(nbytes)
        except BaseException:
            self.abort()
            raise

    def behind(self, tell: Callable[[], object]) -> bool:
        """Return whether no more should come for a while; then ``tell`` is called when it may, on
        another thread. A buffer that was leased has room for all."""
        journal = None if self._passing is None else self._journal
        return journal is not None and journal.behind(tell)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the intake is finished or aborted")

    def _feed_head(self, piece: memoryview) -> memoryview:
        """Take the prefix and the header; return what is left of ``piece``."""
        while piece and self.frame_bytes is None:
            take = self._head_bytes - len(self._head)
            self._head += piece[:take]
            piece = piece[take:]
            if len(self._head) < self._head_bytes:
                break
            if self._head_bytes == _PREFIX_BYTES:
                self._head_bytes += wire.header_length(self._head)
                self._check_size(self._head_bytes)
            else:
                self._begin()
        return piece

    def _check_size(self, size: int) -> None:
        if self._limit is not None and size > self._limit:
            raise TooLarge(
                f"the body has {size} bytes or more, the limit is {self._limit}", limit=self._limit
            )

    def _begin(self) -> None:
        """Judge the header, then lease the buffer and open the journal."""
        header = wire.parse_header(memoryview(self._head)[_PREFIX_BYTES:])
        self._check_size(header.frame_bytes)
        self.fields = StepFields.parse(read_fields(header.metadata))
        self._check(header)
        if self._passes and all(info.name.startswith(self._dense) for info in header.tensors):
            self._begin_passing(header)
        else:
            self._begin_placing(header)
        if self._journal is not None:
            self._journal.add(memoryview(self._head))
        self._received = len(self._head)
        self.frame_bytes = header.frame_bytes
        self._head = bytearray()

    @property
    def _dense(self) -> str:
        return f"{self._expected.kind}/"

    def _begin_passing(self, header: wire.Header) -> None:
        assert self._writer is not None
        self._passing = Passing(self._writer(header.frame_bytes), header)
        self._journal = self._journaling(self._passing, header)
        for at in range(0, header.data_bytes, BEHIND_BYTES):
            self._targets.append(min(BEHIND_BYTES, header.data_bytes - at))

    def _begin_placing(self, header: wire.Header) -> None:
        buffer = self._buffer = self._lease()
        for info in header.tensors:
            kind, _, name = info.name.partition("/")
            if kind == self._expected.kind:
                same = info.dtype == self._expected.layout.dtype
                target = buffer.view(name) if same else buffer.narrow(name, info.dtype)
            elif kind == "int8" and name.endswith("/values"):
                target = buffer.end_of(name.removesuffix("/values"), info.dtype)
            else:
                raw = np.empty(info.end - info.begin, np.uint8)
                self._staged[info.name] = wire.from_bytes(info.dtype, info.shape, raw.data)
                target = raw.data
            if target.nbytes:
                self._targets.append(target)
        if self._writer is not None:
            self._journal = self._journaling(self._writer(header.frame_bytes), header)

    def _journaling(self, writer: Writer, header: wire.Header) -> Journaling:
        if self._scribes is not None and header.frame_bytes > BEHIND_BYTES:
            return JournalingBehind(writer, self._scribes)
        return Journaling(writer)

    def _check(self, header: wire.Header) -> None:
        """Refuse what this session cannot take."""
        assert self.fields is not None
        expected, none = self._expected, self.fields.none
        usual = not none and self.fields.int8_block is None
        if usual and any(infos is header.tensors for infos in expected.known):
            return
        dense: set[str] = set()
        packed: list[wire.TensorInfo] = []
        halves: dict[str, dict[str, wire.TensorInfo]] = {}
        for info in header.tensors:
            what = shown(info.name)
            kind, _, name = info.name.partition("/")
            if kind == expected.kind:
                expected.check_dense(name, what)
                dense.add(name)
                self._check_tensor(info, expected.slot_shape(name, what), what)
            elif kind == "param":
                self._check_tensor(info, expected.slot_shape(name, what), what)
            elif kind == "sparse" and name.endswith(("/indices", "/values")):
                name, _, half = name.rpartition("/")
                expected.check_sparse(name, what)
                halves.setdefault(name, {})[half] = info
            elif compressed.split(info.name) is not None:
                packed.append(info)
            else:
                raise Invalid(
                    f"tensor {what} must be called {expected.kind}/<name>, param/<name>, "
                    "sparse/<name>/indices or values, topk/<name>/indices or values, or "
                    "int8/<name>/values or scales"
                )
        for name, pair in halves.items():
            self._check_sparse(name, pair)
        given = compressed.check(packed, dense, expected, self.fields, self._check_tensor)
        self._none = expected.check_complete(dense | halves.keys() | given, none)
        if usual:
            expected.known[:] = [header.tensors]

    def _check_tensor(self, info: wire.TensorInfo, shape: tuple[int, ...], what: str) -> None:
        if info.shape != shape:
            raise Invalid(f"{what} has shape {list(info.shape)}, expected {list(shape)}")
        dtype = self._expected.layout.dtype
        if info.dtype != dtype:
            # An empty tensor is refused for the same reasons as the one that is still to come.
            wire.widen(wire.from_bytes(info.dtype, (0,), b""), dtype, what)

    def _check_sparse(self, name: str, pair: dict[str, wire.TensorInfo]) -> None:
        for half in ("indices", "values"):
            if half not in pair:
                raise Invalid(
                    f"the sparse gradient of {shown(name)} lacks {shown(f'sparse/{name}/{half}')}"
                )
        indices, values = pair["indices"], pair["values"]
        if indices.dtype != "I64":
            have = wire.dtype_name(indices.dtype)
            raise Invalid(f"{shown(indices.name)} is {have}, expected int64")
        dims = self._expected.check_coo(name, indices.shape, shown(indices.name))
        self._check_tensor(values, dims, shown(values.name))

    def _room(self) -> memoryview:
        if self._target == len(self._targets):
            raise Malformed(f"the body goes on after the {self.frame_bytes} bytes of its frame")
        target = self._targets[self._target]
        if isinstance(target, int):
            target = self._targets[self._target] = np.empty(target, np.uint8).data
        return target[self._filled :]

    def _take(self, nbytes: int) -> None:
        target, begin = self._targets[self._target], self._filled
        assert not isinstance(target, int)
        self._received += nbytes
        self._filled += nbytes
        if self._filled == len(target):
            if self._passing is not None:
                self._targets[self._target] = 0
            self._target, self._filled = self._target + 1, 0
        if self._journal is not None:
            self._journal.add(target[begin : begin + nbytes])

    @property
    def prompt(self) -> bool:
        """Whether :meth:`finish` has nothing to do that takes long."""
        return not (self._staged or isinstance(self._journal, JournalingBehind))

    def finish(self) -> Step:
        """Return the step; it owns the buffer and the payload from now on.

        Waits for the journal, widens params and checks indices, so it may take a while for large
        tensors: any thread may call it.
        Raises Malformed if the body is not complete, Invalid for an index out of bounds.
        """
        if self._closed:
            raise ValueError("the intake is finished or aborted")
        try:
            return self._finish()
        except BaseException:
            self.abort()
            raise

    def _finish(self) -> Step:
        if self.frame_bytes is None:
            raise Malformed(f"the body ended after {len(self._head)} bytes, inside its header")
        if self._received < self.frame_bytes:
            raise Malformed(f"the body ended after {self._received} of {self.frame_bytes} bytes")
        assert self.fields is not None
        if self._journal is not None:
            self._journal.drain()  # before any of the bytes is changed
        dtype, slots = self._expected.layout.dtype, self._expected.layout.by_name
        params: dict[str, wire.Tensor] = {}
        sparse: dict[str, Sparse] = {}
        for full_name, tensor in self._staged.items():
            kind, _, name = full_name.partition("/")
            if kind == "param":
                params[name] = wire.widen(tensor, dtype, full_name)
            elif kind == "sparse" and name.endswith("/values"):
                name = name.removesuffix("/values")
                indices = self._staged[f"sparse/{name}/indices"]
                assert isinstance(indices, np.ndarray)
                shape = slots[name].shape
                check_indices(indices, shape, f"sparse/{name}/indices")
                values = wire.widen(tensor, dtype, full_name)
                sparse[name] = Sparse(indices=indices, values=values, shape=shape)
        if self._buffer is not None:
            compressed.unpack(self._staged, self._expected, self.fields, self._buffer)
        digest, payload = self._journal.seal() if self._journal is not None else (b"", None)
        step = Step(
            expected=self._expected,
            fields=self.fields,
            buffer=self._buffer or nothing(self._expected.layout),
            passed=self._passing,
            none=self._none,
            sparse=sparse,
            params=params or None,
            digest=digest,
            payload=payload,
        )
        self._buffer = self._journal = None
        self.abort()
        return step

    def abort(self) -> None:
        """Give the buffer back and forget the payload; does nothing after finish."""
        self._closed = True
        buffer, self._buffer = self._buffer, None
        journal, self._journal = self._journal, None
        self._targets.clear()
        self._staged.clear()
        release = buffer.release if buffer is not None else lambda: None
        if journal is not None:
            journal.abandon(release)
        else:
            release()


def read_fields(metadata: dict[str, str]) -> dict[str, Any]:
    """Return the JSON object of a frame's fields; empty if the frame brings none."""
    if (text := metadata.get(wire.META_KEY)) is None:
        return {}
    return load_object(text, f"__metadata__[{wire.META_KEY!r}]")
