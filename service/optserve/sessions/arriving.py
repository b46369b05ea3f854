"""The gradient of one parameter on its way into a push.

For whoever reads the body it is a step of a session that has this parameter alone, and the same
code judges it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optserve.optim.arena import GradientBuffer, nobody
from optserve.optim.layout import Layout
from optserve.sentences import shown
from optserve.sessions.fields import unknown
from optserve.sessions.intake import StepIntake
from optserve.sessions.journaling import Unkept
from optserve.sessions.step import Expected, Step, step_from_json
from optserve_client import wire
from optserve_client.errors import Invalid, OptserveError

if TYPE_CHECKING:
    from optserve.sessions.push import Push

#: No gradient at all, as a buffer.
NOTHING = GradientBuffer(Layout("F32", ()), nobody)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradient:
    """The gradient of one parameter, or word that it is None."""

    #: As they arrived, by their names in a frame.
    tensors: Mapping[str, wire.Tensor]
    #: The step of a session that has this parameter alone.
    step: Step
    #: Its buffer is a part of the push's.
    in_place: bool

    @property
    def beside_bytes(self) -> int:
        """Memory that it takes beside the push's buffer."""
        if self.in_place:
            return 0
        return sum(wire.nbytes(wire.dtype_of(t), t.shape) for t in self.tensors.values())


class _Intake(StepIntake):
    """Reads a frame that holds one gradient and no fields."""

    def __init__(self, arrival: Arrival, expected: Expected, limit_bytes: int) -> None:
        super().__init__(expected=expected, lease=self._place, writer=None, limit_bytes=limit_bytes)
        self._arrival = arrival
        self._infos: tuple[wire.TensorInfo, ...] = ()

    def _check(self, header: wire.Header) -> None:
        assert self.fields is not None
        name = self._arrival.name
        for field in self.fields.to_json():
            raise Invalid(
                f"{field} is a field of the step: send it when the push is opened or committed",
                field=field,
            )
        for info in header.tensors:
            kind, _, rest = info.name.partition("/")
            if kind == "param" or not (rest == name or rest.startswith(f"{name}/")):
                raise Invalid(
                    f"tensor {shown(info.name)} is no gradient of {shown(name)}, which the address "
                    "names"
                )
        super()._check(header)
        self._infos = header.tensors

    def _place(self) -> GradientBuffer:
        return self._arrival.place(sum(info.end - info.begin for info in self._infos))

    def tensors(self) -> dict[str, wire.Tensor]:
        """Return what has arrived, where it lies."""
        # Those that are not empty; none is a number, which would be of bytes that only pass.
        full = iter([target for target in self._targets if not isinstance(target, int)])
        return {
            info.name: wire.from_bytes(
                info.dtype, info.shape, next(full) if info.end > info.begin else b""
            )
            for info in self._infos
        }


class Arrival:
    """A gradient whose body is being read: a sink for a frame, or else give it :meth:`text`.

    Its end is :meth:`settle` or :meth:`abort`. It may be revoked before: then it takes nothing
    more, and writes nowhere.
    """

    def __init__(
        self, push: Push, name: str, limit_bytes: int, allow: Callable[[int], None]
    ) -> None:
        """``allow`` is asked for memory beside the push's buffer, and raises if there is none.

        Raises Invalid if the session has no such parameter.
        """
        self.name = name
        #: The body is there; what is left to do may be done by another thread.
        self.finishing = False
        #: What of it does not lie in the push's buffer.
        self.beside_bytes = 0
        self._push, self._allow = push, allow
        self._revoked: OptserveError | None = None
        whole = push.expected
        slot = whole.layout.by_name.get(name)
        if slot is None:
            raise Invalid(unknown(name, whole.layout.by_name, "parameter"))
        self._expected = Expected(
            layout=Layout.pack(whole.layout.dtype, [(name, slot.shape)]),
            sparse=whole.sparse & {name},
            kind=whole.kind,
        )
        #: What it is called: ``grad`` or ``delta``.
        self.kind = whole.kind
        self._intake = _Intake(self, self._expected, limit_bytes)
        push.begin(self)

    def revoke(self, why: OptserveError) -> None:
        """Have whoever reads the body end with ``why``; for the thread that reads bodies."""
        self._revoked = why

    def _check(self) -> None:
        if self._revoked is not None:
            raise self._revoked

    def place(self, nbytes: int) -> GradientBuffer:
        """Return where the ``nbytes`` of the gradient go."""
        beside = nbytes if self.name in self._expected.sparse else 0
        if beside:
            self._allow(beside)
        return self._push.place(self, beside)

    # --- a sink ----------------------------------------------------------------------------------

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        self._check()
        self._intake.feed(chunk)

    def room(self) -> memoryview | None:
        self._check()
        return self._intake.room()

    def filled(self, nbytes: int) -> None:
        self._check()
        self._intake.filled(nbytes)

    def behind(self, tell: Callable[[], object]) -> bool:
        """Nothing waits to be written: its place has room for all."""
        return False

    # --- its end ---------------------------------------------------------------------------------

    @property
    def later_bytes(self) -> int:
        """What :meth:`whole` has to go through."""
        return 0 if self._intake.prompt else self._intake.frame_bytes or 0

    def whole(self) -> Gradient:
        """Return what the frame brought. Any thread may call it, once ``finishing`` is set."""
        tensors = self._intake.tensors()
        dense = self.name not in self._expected.sparse
        return Gradient(tensors=tensors, step=self._intake.finish(), in_place=dense)

    def read(self, body: Mapping[str, Any]) -> Gradient:
        """Return what a JSON body brings, in memory of its own. Any thread may call it."""
        kind = self.kind
        for name in body:
            if name != kind:
                raise Invalid(unknown(name, [kind]), field=name)
        if not body:
            raise Invalid(f"the body must have the field {kind}")
        dense = self._expected.layout.subset({self.name} - self._expected.sparse)
        step = step_from_json(
            {self._expected.plural: {self.name: body[kind]}},
            expected=self._expected,
            lease=lambda: GradientBuffer(dense, nobody),
            writer=lambda size: Unkept(),
            digest=b"",
        )
        tensors: dict[str, wire.Tensor] = {}
        if coo := step.sparse.get(self.name):
            tensors[f"sparse/{self.name}/indices"] = coo.indices
            tensors[f"sparse/{self.name}/values"] = coo.values
        elif not step.none:
            tensors[f"{kind}/{self.name}"] = step.buffer.array(self.name)
        return Gradient(tensors=tensors, step=step, in_place=False)

    def settle(self, gradient: Gradient) -> None:
        """Put what has arrived into the push."""
        self._check()
        if gradient.beside_bytes > self.beside_bytes:
            self._allow(gradient.beside_bytes - self.beside_bytes)
        self._push.settle(self, gradient)

    def abort(self, *, broken: bool = False) -> None:
        """Give it up. ``broken``: nobody refused it, but its body came to an end too early."""
        self._push.abort(self, broken=broken)
        self._intake.abort()
