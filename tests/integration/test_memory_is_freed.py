"""What a session or a request held is free at once: no garbage collection has to come first."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from optserve.sessions.registry import Registry
from optserve.store.memory import MemoryStore
from optserve_client.errors import TooLarge
from tests import local
from tests.local import NOBODY, arrays, create
from tests.waiting import wait_until

SHAPES = {"w": (30, 4), "b": (4,)}
BODIES: dict[str, dict[str, Any]] = {
    "Adam": {"optimizer": {"name": "Adam"}},
    "Adafactor": {"optimizer": {"name": "Adafactor"}},
    "a schedule": {
        "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.5},
        "scheduler": {"name": "OneCycleLR", "max_lr": 1.0, "total_steps": 9},
    },
    "averages": {
        "optimizer": {"name": "SGD", "lr": 0.1},
        "ema": {"decay": 0.9},
        "best": {"monitor": "loss"},
        "accumulate": 2,
        "clip_grad_norm": 1.0,
    },
}


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("kind", BODIES)
def test_a_session_that_is_put_away_leaves_nothing(
    registry: Registry, no_collection: None, kind: str
) -> None:
    session = create(registry, BODIES[kind], arrays(0, SHAPES))
    for seed in (1, 2):
        local.step(session, arrays(seed, SHAPES))
    state = session._held._state
    assert state is not None
    engine = state.engine
    buffer = engine.pool.lease()
    parts = [engine, engine.params.flat, engine.optimizer, engine.pool, buffer.arena.flat]
    held = [weakref.ref(part) for part in parts]
    buffer.release()
    del state, engine, buffer, parts
    assert session.put_away()
    wait_until(lambda: all(ref() is None for ref in held), f"to free {kind}")


def test_a_refused_creation_leaves_nothing(no_collection: None) -> None:
    registry = Registry(MemoryStore(), device="cpu", memory_budget=1000)
    try:
        params = np.ones(10_000, np.float32)
        held = weakref.ref(params)
        body = {"optimizer": {"name": "SGD"}}
        made = registry.create("default", "s", body, {"w": params}, None, NOBODY, exist_ok=False)
        with pytest.raises(TooLarge):
            made.result(30)
        del params, made
        wait_until(lambda: held() is None, "to free the params")
    finally:
        registry.close()
