"""Compressed gradients through a whole session: the bits of the dense ones they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optserve.sessions.intake import Step
from optserve.sessions.registry import Registry
from optserve.sessions.replay import read_step
from optserve.sessions.session import Session
from optserve.store.opening import open_store
from optserve_client import Client, Half, Int8, TopK, wire
from optserve_client.compress import Compressor
from optserve_client.errors import Nonfinite
from tests.integration.api_client import BINARY, Api, asking, f32, frame
from tests.local import NOBODY, create, exported, read_back
from tests.serving import ServerProcess

BODY: dict[str, Any] = {"optimizer": {"name": "AdamW", "lr": 0.1}, "clip_grad_norm": 1.0}
#: Below and above what is parsed on the event loop, kept in the database, and written behind.
SIZES = {"inline": 60, "files": 300_000}
BLOCK = 100
DTYPES = ["float32", "float64", "bfloat16"]


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> int:
    return SIZES[request.param]


def registry(path: Path) -> Registry:
    return Registry(
        open_store(url=None, data_dir=path, files=None), threads=torch.get_num_threads()
    )


def params(size: int, dtype: str) -> dict[str, wire.Tensor]:
    rng = np.random.default_rng(0)
    shapes = {"w": (3, size), "v": (size,), "b": ()}
    tag = wire.dtype_tag(dtype)
    return {n: wire.narrow(np.asarray(rng.normal(size=s)), tag) for n, s in shapes.items()}


def compressed(seed: int, size: int) -> dict[str, wire.Tensor]:
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(3 * size, size // 5, replace=False))
    return {
        "topk/w/indices": chosen.astype(np.int32 if seed % 2 else np.int64),
        "topk/w/values": wire.Bits.bfloat16(rng.normal(size=len(chosen))),
        "int8/v/values": rng.integers(-127, 128, size, dtype=np.int8),
        "int8/v/scales": rng.exponential(size=-(-size // BLOCK)).astype(np.float32),
        "topk/b/indices": np.arange(seed % 2),
        "topk/b/values": wire.Bits.bfloat16(rng.normal(size=seed % 2)),
    }


def dense(named: dict[str, Any], size: int, dtype: str) -> dict[str, wire.Tensor]:
    """Return what ``named`` stands for, by numpy."""
    tag = wire.dtype_tag(dtype)
    wide: Any = np.float64 if dtype == "float64" else np.float32
    w, b = np.zeros(3 * size, wide), np.zeros(1, wide)
    w[named["topk/w/indices"]] = named["topk/w/values"].to_float32()
    b[named["topk/b/indices"]] = named["topk/b/values"].to_float32()
    scales = np.repeat(named["int8/v/scales"].astype(wide), BLOCK)[:size]
    grads = {"w": w.reshape(3, size), "v": named["int8/v/values"].astype(wide) * scales}
    return {f"grad/{n}": wire.narrow(g, tag) for n, g in {**grads, "b": b.reshape(())}.items()}


def taken(session: Session, body: bytes) -> Step:
    intake = session.intake(2**30)
    for at in range(0, len(body), 50_000):
        intake.feed(body[at : at + 50_000])
    return intake.finish()


def step(session: Session, named: dict[str, wire.Tensor], **fields: Any) -> Any:
    made = taken(session, frame(named, fields))
    return session.step(made, NOBODY).result(60)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_those_of_the_dense_gradients_and_come_back_from_the_journal(
    tmp_path: Path, size: int, dtype: str
) -> None:
    made = registry(tmp_path)
    try:
        small = create(made, BODY, params(size, dtype), "small")
        whole = create(made, BODY, params(size, dtype), "whole")
        for seed in range(4):
            named = compressed(seed, size)
            got = step(small, named, int8_block=BLOCK, loss=0.5)
            want = step(whole, dense(named, size, dtype), loss=0.5)
            assert bytes(got.params.data) == bytes(want.params.data)
            assert got.scalars["grad_norm"] == want.scalars["grad_norm"]
        before = exported(small)
        assert read_back(small) == before
    finally:
        made.close()
    made = registry(tmp_path)
    try:
        assert exported(made.get("default", "small")) == before
    finally:
        made.close()


def test_the_journal_holds_the_bytes_as_they_came(tmp_path: Path, size: int) -> None:
    made = registry(tmp_path)
    try:
        session = create(made, BODY, params(size, "float32"))
        body = frame(compressed(1, size), {"int8_block": BLOCK})
        session.step(taken(session, body), NOBODY).result(60)
        [event] = [e for e in session._store.events(session.key) if e.kind == "step"]
        assert event.payload is not None
        assert event.payload.read() == body
        again = session.run(lambda state: read_step(state, event)).result(60)
        assert again.fields.int8_block == BLOCK
        again.discard()
    finally:
        made.close()


def test_accumulated_gradients_may_be_of_different_kinds(tmp_path: Path) -> None:
    made = registry(tmp_path)
    try:
        body = {**BODY, "accumulate": {"steps": 3, "reduce": "mean"}}
        small = create(made, body, params(60, "float32"), "small")
        whole = create(made, body, params(60, "float32"), "whole")
        for seed in range(3):
            named = compressed(seed, 60)
            wide = dense(named, 60, "float32")
            got = step(
                small, wide if seed == 1 else named, **({} if seed == 1 else {"int8_block": BLOCK})
            )
            want = step(whole, wide)
        assert got.scalars["applied"]
        assert bytes(got.params.data) == bytes(want.params.data)
        assert read_back(small) == exported(small)
    finally:
        made.close()


def test_a_value_that_overflows_is_named_and_the_step_refused(tmp_path: Path) -> None:
    made = registry(tmp_path)
    try:
        session = create(made, BODY, {"w": np.zeros(3, "<f4")})
        before = exported(session)
        for named, where in [
            ({"topk/w/indices": np.array([2]), "topk/w/values": f32([np.nan])}, r"\[2\] is nan"),
            (
                {"int8/w/values": np.array([1, -2, 3], "i1"), "int8/w/scales": f32([3e38])},
                r"\[1\] is -inf",
            ),
        ]:
            with pytest.raises(Nonfinite, match=rf"grads\['w'\]{where}, must be finite"):
                step(session, named)
        assert exported(session) == before
    finally:
        made.close()


# --- over HTTP -----------------------------------------------------------------------------------


@pytest.fixture
def api(app: Any) -> Iterator[Api]:
    with asking(app) as api:
        yield api


def test_one_body_may_create_the_session_and_bring_a_compressed_gradient(api: Api) -> None:
    create_fields = {"id": "s", "optimizer": {"name": "SGD", "lr": 1.0}}
    named: dict[str, Any] = {
        "param/w": f32([1, 2, 3]),
        "topk/w/indices": np.array([1]),
        "topk/w/values": f32([4]),
    }
    for status in (201, 200):
        reply = api.post("/step", content=frame(named, {**create_fields}), headers=BINARY)
        assert reply.status_code == status, reply.text
        assert reply.json()["params"]["w"] == [1, -2, 3]


def test_a_repeat_is_a_duplicate_and_the_dense_one_under_its_number_is_not(api: Api) -> None:
    api.put("/v1/sessions/s", json={"optimizer": "SGD", "params": {"w": [1, 2, 3]}})
    who = {"worker": "a", "seq": 1}
    small = {"topk/w/indices": np.array([1]), "topk/w/values": f32([4])}
    first, again = (
        api.post("/v1/sessions/s/step", content=frame(small, who), headers=BINARY) for _ in range(2)
    )
    assert (first.json()["duplicate"], again.json()["duplicate"]) == (False, True)
    body = frame({"grad/w": f32([0, 4, 0])}, who)
    other = api.post("/v1/sessions/s/step", content=body, headers=BINARY)
    assert (other.status_code, other.json()["code"]) == (422, "key_reused")


def test_a_dry_run_shows_what_would_happen(api: Api) -> None:
    api.put("/v1/sessions/s", json={"optimizer": {"name": "SGD", "lr": 1}, "params": {"w": [1, 2]}})
    small = {"int8/w/values": np.array([1, -1], "i1"), "int8/w/scales": f32([0.5])}
    body = frame(small, {"dry_run": True})
    reply = api.post("/v1/sessions/s/step", content=body, headers=BINARY)
    assert reply.json()["params"]["w"] == [0.5, 2.5]
    assert api.get("/v1/sessions/s").json()["version"] == 0


def test_a_block_in_a_json_body_is_refused_because_it_would_do_nothing(api: Api) -> None:
    api.put("/v1/sessions/s", json={"optimizer": "SGD", "params": {"w": [1, 2]}})
    reply = api.post("/v1/sessions/s/step", json={"grads": {"w": [1, 2]}, "int8_block": 64})
    assert (reply.status_code, reply.json()["field"]) == (422, "int8_block")


# --- from the client -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "compressor",
    [TopK(0.05), TopK(0.2, dtype="bfloat16"), Int8(), Int8(block=50), Half()],
    ids=repr,
)
def test_the_server_makes_of_the_tensors_what_the_client_thinks(
    server: ServerProcess, compressor: Compressor, dtype: str
) -> None:
    tag = wire.dtype_tag(dtype)
    size, rng = 3000, np.random.default_rng(0)
    given: Any = np.zeros(size, np.float64)
    name = f"compressed-{dtype}-{id(compressor)}"
    with Client(server.url) as client:
        start: Any = wire.narrow(np.zeros(size), tag)
        session = client.create({"name": "SGD", "lr": 1.0}, {"w": start}, id=name)
        for _ in range(6):
            gradient = wire.narrow(np.rint(rng.normal(size=size) * 64) / 8, tag)
            before = -session.params()["w"] if dtype != "bfloat16" else None
            kept = client._lanes.unsent(name).left.get("w")
            encoded = compressor.encode("w", gradient, None if kept is None else kept[0])
            result = session.step({"w": gradient}, compress=compressor)
            wide: Any = gradient.to_float32() if isinstance(gradient, wire.Bits) else gradient
            given = given + wide
            assert encoded.unsent is not None
            kept_now = client._lanes.unsent(name).left["w"][0]
            np.testing.assert_array_equal(kept_now, encoded.unsent)
            if before is not None:  # what was applied is what is not unsent
                total = wide + (0 if kept is None else kept[0])
                applied = -result.params["w"] - before  # type: ignore[index, operator]
                np.testing.assert_allclose(applied, total - encoded.unsent, rtol=1e-5, atol=1e-5)
        session.delete()
