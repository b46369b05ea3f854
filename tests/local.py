"""A registry in this process, and the numbers to train on: what session-level tests share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from optserve.sessions import operations
from optserve.sessions.identity import Identity
from optserve.sessions.registry import Registry
from optserve.sessions.reply import Reply
from optserve.sessions.session import Session
from optserve.store import MemoryStore
from optserve_client import wire

Arrays = dict[str, np.ndarray]
NOBODY = Identity()
SHAPES: dict[str, tuple[int, ...]] = {"w": (5, 7), "b": (7,), "s": (), "e": (0, 3)}


@contextmanager
def registry() -> Iterator[Registry]:
    """A registry over a memory store, whose threads count like this one's."""
    made = Registry(MemoryStore(), threads=torch.get_num_threads())
    try:
        yield made
    finally:
        made.close()


def arrays(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: str = "f4") -> Arrays:
    """Return normal random arrays of these shapes."""
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def create(
    made: Registry, body: dict[str, Any], params: Mapping[str, wire.Tensor], name: str = "a"
) -> Session:
    made.create("default", name, body, params, None, NOBODY, exist_ok=False).result(60)
    return made.get("default", name)


def as_json(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors as a JSON body has them: base64, so that every bit is the same."""
    return {n: t if t is None else wire.tensor_to_json(t, "base64") for n, t in tensors.items()}


def step(
    session: Session, grads: Mapping[str, Any], identity: Identity = NOBODY, **fields: Any
) -> Reply:
    """Send one step and wait for the reply."""
    if session.cold:
        session.load().result(60)
    body = {"grads": as_json(grads), **fields}
    if "params" in fields:
        body["params"] = as_json(fields["params"])
    return session.step(session.step_from_json(body, identity.digest), identity).result(60)


def put_params(
    session: Session, params: Arrays, who: Identity = NOBODY, *, abandon: bool = False
) -> Future[Reply]:
    return session.change(operations.SetParams(params=params), who, abandon=abandon)


def patch(session: Session, fields: dict[str, Any], who: Identity = NOBODY) -> Future[Reply]:
    return session.change(operations.Patch.of_body(fields), who)


def patch_group(
    session: Session, index: int, hyper: dict[str, Any], who: Identity = NOBODY
) -> Future[Reply]:
    return session.change(operations.PatchGroup(index=index, hyper=hyper), who)


def add_group(
    session: Session, fields: dict[str, Any], params: Arrays, who: Identity = NOBODY
) -> Future[Reply]:
    return session.change(operations.AddGroup(fields=fields, params=params), who)


def put_scheduler(session: Session, spec: Any, who: Identity = NOBODY) -> Future[Reply]:
    return session.change(operations.SetScheduler(spec=spec), who)


def scheduler_step(
    session: Session, metrics: float | None, who: Identity = NOBODY
) -> Future[Reply]:
    return session.change(operations.AdvanceScheduler(metrics=metrics), who)


def put_metrics(
    session: Session, version: int, metrics: dict[str, float], who: Identity = NOBODY
) -> Future[Reply]:
    return session.change(operations.PutMetrics(version=version, metrics=metrics), who)


def params_of(reply: Reply) -> dict[str, wire.Tensor]:
    assert reply.params is not None
    return reply.params.arrays()


def exported(session: Session) -> bytes:
    """Return the session's state file."""
    return b"".join(session.export().result(60))


def read_back(session: Session) -> bytes:
    """Return the state file of the session as its journal gives it back."""
    session._held.drop()
    return exported(session)


def leaves(params: Mapping[str, np.ndarray], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return params as separate torch Parameters."""
    return {n: torch.nn.Parameter(torch.tensor(p).to(dtype)) for n, p in params.items()}


def set_grads(parameters: Mapping[str, Any], grads: Mapping[str, Any]) -> None:
    """Give each Parameter its own copy of a gradient."""
    for name, parameter in parameters.items():
        grad = grads[name]
        parameter.grad = None if grad is None else torch.tensor(grad).to(parameter.dtype)


def assert_equal(served: Mapping[str, wire.Tensor], local: Mapping[str, Any]) -> None:
    """Every tensor has the same bits."""
    assert list(served) == list(local)
    for name, tensor in served.items():
        want = local[name].detach()
        if isinstance(tensor, wire.Bits):
            got = torch.tensor(tensor.array.view(np.int16)).view(torch.bfloat16)
        else:
            got = torch.tensor(tensor)
        assert torch.equal(got, want), f"{name}: {got} is not {want}"
