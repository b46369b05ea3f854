"""Which weights a reply can hold, and how they are copied out of a session."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from optserve.optim.engine import Engine
from optserve.sessions.published import Published
from optserve.sessions.state import SessionState
from optserve_client import wire
from optserve_client.errors import Invalid

WEIGHTS = ("live", "eval", "ema", "best")


def publish(state: SessionState, weights: str) -> Published:
    """Return a read-only copy of the ``live``, ``eval``, ``ema``, ``best`` or ``trial`` weights."""
    data = _copied(state.engine, weights)
    return Published(
        generation=state.generation,
        version=state.version,
        weights=weights,
        revision="" if weights == "live" else f".{state.lsn}",
        layout=state.layout,
        data=data,
    )


def subtract(new: Published, old: Published) -> Published:
    """Return ``new`` minus ``old``, rounded once to the session's dtype."""
    data = np.empty_like(new.data)
    raw, before = data.data, old.arrays()
    for name, tensor in new.arrays().items():
        slot = new.layout.by_name[name]
        raw[slot.begin : slot.end] = wire.as_bytes(_minus(tensor, before[name]))
    data.flags.writeable = False
    return replace(new, weights="delta", data=data)


def _minus(new: wire.Tensor, old: wire.Tensor) -> wire.Tensor:
    if isinstance(new, wire.Bits) and isinstance(old, wire.Bits):
        return wire.Bits.bfloat16(new.to_float32() - old.to_float32())
    assert isinstance(new, np.ndarray)
    assert isinstance(old, np.ndarray)
    return np.subtract(new, old)


def _copied(engine: Engine, weights: str) -> np.ndarray:
    match weights:
        case "live":
            return engine.params.copy_bytes()
        case "eval":
            return engine.eval_bytes()
        case "ema":
            if engine.ema is None:
                raise Invalid("weights=ema: the session keeps no EMA; create it with ema")
            return engine.ema.arena.rounded(engine.params.flat.dtype).copy_bytes()
        case "best":
            if engine.best is None:
                raise Invalid("weights=best: the session keeps no best; create it with best")
            return engine.best.arena.copy_bytes()
        case "trial":
            assert engine.line_search is not None
            assert engine.line_search.trial is not None
            return engine.line_search.trial.copy_bytes()
        case _:
            raise Invalid(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r:.80}")
