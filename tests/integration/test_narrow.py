"""Large tensors in a narrower dtype, both ways, over a real socket: as torch converts and steps."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
import torch

from optserve.api.app import create_app
from optserve.api.connection import Connection
from optserve.sessions.registry import Registry
from optserve.settings import Settings
from optserve.store.memory import MemoryStore
from optserve_client import wire
from optserve_client.wire import SAFETENSORS
from tests.integration.api_client import frame, unframe
from tests.integration.api_uvicorn import Wire, served

N = 600_000
NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
STEP = "POST /v1/sessions/s/step"


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    registry = Registry(MemoryStore())
    try:
        with served(create_app(registry, Settings()), http=Connection, loop="uvloop") as address:
            zeros = {"param/w": np.zeros(N, "<f4"), "param/b": np.zeros(7, "<f4")}
            body = frame(zeros, {"optimizer": {"name": "Adam", "lr": 0.1}})
            with Wire(address) as connection:
                connection.send(head(body, "PUT /v1/sessions/s") + body)
                assert connection.answer()[0] == 201
            yield address
    finally:
        registry.close()


def gradients(dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w in ``dtype``, and b in float32."""
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(N, generator=generator)
    return wide.to(NARROW[dtype]), torch.randn(7, generator=generator)


def as_wire(tensor: torch.Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        return wire.Bits(tensor.view(torch.uint16).numpy(), "BF16")
    return tensor.numpy()


def after(steps: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what torch makes of zeros."""
    params = [torch.nn.Parameter(torch.zeros(N)), torch.nn.Parameter(torch.zeros(7))]
    adam = torch.optim.Adam(params, lr=0.1, fused=True)
    for parameter, grad in zip(params, gradients(dtype), strict=True):
        parameter.grad = grad.float()
    for _ in range(steps):
        adam.step()
    return params[0].detach(), params[1].detach()


def body_of(dtype: str, **fields: Any) -> bytes:
    w, b = gradients(dtype)
    return frame({"grad/w": as_wire(w), "grad/b": as_wire(b)}, fields)


def head(body: bytes, target: str = STEP, accept: str = SAFETENSORS) -> bytes:
    lines = f"Content-Type: {SAFETENSORS}\r\nAccept: {accept}\r\nContent-Length: {len(body)}"
    return f"{target} HTTP/1.1\r\nHost: x\r\n{lines}\r\n\r\n".encode()


def assert_equal(answered: bytes, want: tuple[torch.Tensor, torch.Tensor], dtype: str) -> None:
    tensors, _ = unframe(answered)
    for name, tensor in zip(("w", "b"), want, strict=True):
        expected = as_wire(tensor.to(NARROW[dtype]))
        assert bytes(wire.as_bytes(tensors[f"param/{name}"])) == bytes(wire.as_bytes(expected))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", [7_777, 65_537, 2**30])
def test_narrow_steps_are_torchs_whatever_the_pieces(
    address: tuple[str, int], dtype: str, size: int
) -> None:
    body = body_of(dtype, return_dtype=dtype)
    with Wire(address) as connection:
        for version in (1, 2):
            connection.send(head(body))
            for at in range(0, len(body), size):
                connection.send(body[at : at + size])
            status, _, answered = connection.answer()
            assert status == 200, answered[:300]
            assert_equal(answered, after(version, dtype), dtype)


@pytest.mark.parametrize("left", [1, N, len(body_of("bfloat16")) - 2000])
def test_a_narrow_gradient_that_ends_early_leaves_nothing_behind(
    address: tuple[str, int], left: int
) -> None:
    body = body_of("bfloat16")
    for _ in range(4):  # more than there are gradient buffers
        with Wire(address) as connection:
            connection.send(head(body) + body[:-left])
    w, b = gradients("bfloat16")
    wide = frame({"grad/w": as_wire(w.float()), "grad/b": as_wire(b)}, {"return_dtype": "bfloat16"})
    with Wire(address) as connection:
        connection.send(head(wide) + wide)
        status, _, answered = connection.answer()
    assert status == 200, answered[:300]
    assert_equal(answered, after(1, "bfloat16"), "bfloat16")


def test_a_narrow_nan_is_named(address: tuple[str, int]) -> None:
    w, b = gradients("bfloat16")
    w[N - 2] = torch.nan
    body = frame({"grad/w": as_wire(w), "grad/b": as_wire(b)}, {})
    with Wire(address) as connection:
        connection.send(head(body) + body)
        status, _, answered = connection.answer()
    assert status == 422
    assert b"grads['w'][599998] is nan" in answered


def test_json_is_rounded_alike(address: tuple[str, int]) -> None:
    body = body_of("bfloat16", return_dtype="bfloat16", return_encoding="base64")
    with Wire(address) as connection:
        connection.send(head(body, accept="application/json") + body)
        status, _, answered = connection.answer()
    assert status == 200, answered[:300]
    params = orjson.loads(answered)["params"]
    for name, tensor in zip(("w", "b"), after(1, "bfloat16"), strict=True):
        assert params[name]["dtype"] == "bfloat16"
        expected = as_wire(tensor.bfloat16())
        assert base64.b64decode(params[name]["data"]) == bytes(wire.as_bytes(expected))


def test_a_delta_is_rounded_alike(address: tuple[str, int]) -> None:
    fields = {"return": "delta", "return_dtype": "float16"}
    first, second = body_of("float16"), body_of("float16", **fields)
    with Wire(address) as connection:
        for body in (first, second):
            connection.send(head(body) + body)
            status, _, answered = connection.answer()
            assert status == 200, answered[:300]
    new, old = after(2, "float16"), after(1, "float16")
    assert_equal(answered, (new[0] - old[0], new[1] - old[1]), "float16")
