"""What a request says: its fields, its tensors and who sent it, from JSON and binary alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

import xxhash
from fastapi import Depends, Header, Query
from starlette.requests import Request

from optserve.api.bodies import Body, Kind, body_kind, headers_of, settings_of
from optserve.api.json_text import loads, loads_object
from optserve.api.long_lists import loads_tensors
from optserve.api.waiting import off_loop
from optserve.optim import devices
from optserve.optim.layout import Layout
from optserve.sentences import shown
from optserve.sessions.fields import MAX_INT, unknown
from optserve.sessions.identity import KEY_LENGTH, Identity, check_identity
from optserve_client import wire
from optserve_client.errors import Invalid, Malformed
from optserve_client.wire import META_KEY, BytesLike, Tensor

#: Query parameters that say who sent a request, not what it asks for.
_CLAIMS = ("worker", "epoch", "seq")
_PARAM = "param/"
_VISIBLE = re.compile(r"[\x21-\x7e]+")


# --- who sent it ---------------------------------------------------------------------------------


async def read_claim(
    worker: Annotated[
        str | None,
        Query(description="Who sends this; also as a field of a JSON object body."),
    ] = None,
    epoch: Annotated[int | None, Query(ge=1, description="The worker's epoch.")] = None,
    seq: Annotated[
        int | None, Query(ge=1, description="Number of this request among the worker's.")
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=KEY_LENGTH,
            pattern=f"^{_VISIBLE.pattern}$",
            description="Instead of worker and seq: a repeat with this key is not applied twice.",
        ),
    ] = None,
) -> Identity:
    """Return what query and header say about the sender; the digest comes with the body."""
    return Identity(worker=worker, epoch=epoch, seq=seq, key=idempotency_key)


Claim = Annotated[Identity, Depends(read_claim)]


def identify(claim: Identity, fields: dict[str, Any], digest: bytes) -> Identity:
    """Take worker, epoch and seq out of ``fields``, and join what query and header said."""
    found: dict[str, Any] = {}
    for name, kind in (("worker", str), ("epoch", int), ("seq", int)):
        value = fields.pop(name, None)
        claimed = getattr(claim, name)
        if value is not None and claimed is not None:
            raise Invalid(f"{name} is in the body and in the query; send it once", field=name)
        if value is not None and type(value) is not kind:
            what = "a string" if kind is str else "an integer"
            raise Invalid(f"{name} must be {what}, got {shown(value)}", field=name)
        found[name] = claimed if value is None else value
        if type(found[name]) is int and found[name] > MAX_INT:
            raise Invalid(f"{name} must be <= {MAX_INT}, got {found[name]}", field=name)
    identity = Identity(**found, key=claim.key, digest=digest)
    check_identity(identity)
    return identity


def header_key(request: Request) -> str | None:
    """Return the Idempotency-Key header, checked; for routes without FastAPI's machinery."""
    key = headers_of(request).get("idempotency-key")
    if key is not None and not (1 <= len(key) <= KEY_LENGTH and _VISIBLE.fullmatch(key)):
        raise Invalid(
            f"Idempotency-Key must be 1 to {KEY_LENGTH} visible ASCII characters, got {key!r:.80}",
            field="Idempotency-Key",
        )
    return key


def digest_of(request: Request, what: str, body: BytesLike) -> bytes:
    """Return XXH3-128 over all that decides what a request does: method, route, query and body."""
    # A step may come by three addresses; what creates or changes names its session in the path.
    where = what if what == "step" else request.url.path
    hasher = xxhash.xxh3_128(f"{request.method} {where}\n".encode())
    if query := request.url.query:
        kept = sorted(pair for pair in parse_qsl(query, True) if pair[0] not in _CLAIMS)
        hasher.update(urlencode(kept).encode())
    hasher.update(b"\n")
    hasher.update(body)
    return hasher.digest()


def list_dtype(fields: Mapping[str, Any]) -> str | None:
    """Return the wire tag that lists of numbers in a create body become: the session's, if said.

    A dtype that no session has is refused later, with those that it can have.
    """
    dtype = fields.get("dtype")
    return wire.dtype_tag(dtype) if dtype in devices.DTYPES else None


# --- what it says --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Incoming:
    """A decoded request. ``fields`` lacks what became part of ``identity``."""

    #: JSON of the body, or of a binary body's metadata; None for an empty body.
    value: Any
    #: Tensors of a binary body, as named in it; None if the body is JSON.
    tensors: dict[str, Tensor] | None
    identity: Identity
    nbytes: int

    @property
    def fields(self) -> dict[str, Any]:
        """What is left of the object in the body; empty if there is none."""
        return self.value if isinstance(self.value, dict) else {}

    def take_flag(self, name: str) -> bool:
        """Take a boolean out of the fields; False if it is not there."""
        value = self.fields.pop(name, False)
        if not isinstance(value, bool):
            raise Invalid(f"{name} must be true or false, got {shown(value)}", field=name)
        return value

    def check_empty(self, *known: str) -> None:
        """Refuse fields that nobody took; ``known`` are those that there are."""
        for name in self.fields:
            raise Invalid(unknown(name, known), field=name)

    async def take_params(
        self, dtype: str | None = None, layout: Layout | None = None
    ) -> dict[str, Tensor] | None:
        """Take the params out of the body, lists as ``dtype`` (a wire tag); None if it has none."""
        return await off_loop(self.nbytes, self._take_params, dtype, layout)

    def _take_params(self, dtype: str | None, layout: Layout | None) -> dict[str, Tensor] | None:
        given = self.fields.pop("params", None)
        if self.tensors is None:
            return None if given is None else tensors_from_json(given, "params", dtype, layout)
        if given is not None:
            raise Invalid("params of a binary body are its tensors 'param/<name>', not a field")
        return params_of_frame(self.tensors) or None


def tensors_from_json(
    given: Any, field: str, dtype: str | None, layout: Layout | None
) -> dict[str, Tensor]:
    """Return the tensors of a JSON object by name; ``layout`` says the shapes of those it has."""
    if not isinstance(given, dict):
        raise Invalid(
            f"{field} must be an object of tensors by name, got {shown(given)}", field=field
        )
    slots = layout.by_name if layout else {}
    return {
        name: wire.tensor_from_json(
            value, f"{field}[{shown(name)}]", dtype, slots[name].shape if name in slots else None
        )
        for name, value in given.items()
    }


def params_of_frame(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the params of a binary body, which has no other tensors."""
    for name in tensors:
        if not name.startswith(_PARAM):
            raise Invalid(f"tensor {shown(name)} is not called param/<name>")
    return {name.removeprefix(_PARAM): tensor for name, tensor in tensors.items()}


async def read_request(
    request: Request,
    claim: Identity,
    what: str,
    accepted: tuple[Kind, ...] = ("json",),
    *,
    needs: str | None = "an object",
) -> Incoming:
    """Read and decode the body. ``what`` names the route for the digest.

    ``needs``: ``"an object"``; ``"a value"`` for any JSON; None if an object may be missing.
    """
    kind = body_kind(request, accepted)
    raw: BytesLike = b""
    if kind is not None:
        settings = settings_of(request)
        limit = settings.max_json_bytes if kind == "json" else settings.max_body_bytes
        raw = await Body(request, limit).read()
    elif needs is not None:
        raise Malformed(f"the body is empty, expected {needs}")
    read: Callable[[BytesLike], Any] = loads if needs == "a value" else loads_object
    if "safetensors" in accepted:  # the other routes take no tensors
        read = _read_params
    return await off_loop(len(raw), _decode, request, claim, what, raw, kind, read)


def _read_params(text: BytesLike) -> dict[str, Any]:
    return loads_tensors(text, "params")


def _decode(
    request: Request,
    claim: Identity,
    what: str,
    raw: BytesLike,
    kind: Kind | None,
    read: Callable[[BytesLike], Any],
) -> Incoming:
    value: Any = None
    tensors = None
    if kind == "safetensors":
        tensors, metadata = wire.decode(raw)
        value = frame_fields(metadata)
    elif kind == "json":
        value = read(raw)
    digest = digest_of(request, what, raw)
    identity = identify(claim, value if isinstance(value, dict) else {}, digest)
    return Incoming(value=value, tensors=tensors, identity=identity, nbytes=len(raw))


def frame_fields(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that a binary body carries beside its tensors."""
    text = metadata.get(META_KEY)
    return {} if text is None else loads_object(text.encode(), f"__metadata__[{META_KEY!r}]")
