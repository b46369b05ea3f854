"""Which weights a reply can hold, and how they get out of a session."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from optserve.optim.engine import Engine
from optserve.sessions.lending import Loan
from optserve.sessions.published import Published, revision
from optserve.sessions.state import SessionState
from optserve_client import wire
from optserve_client.errors import Invalid

WEIGHTS = ("live", "eval", "ema", "best")
#: Live params up to this size are copied for replies, larger ones are lent.
COPIED_BYTES = 64 * 2**10


def publish(state: SessionState, weights: str, loan: Loan | None = None) -> Published:
    """Return the ``live``, ``eval``, ``ema``, ``best`` or ``trial`` weights; ``loan``: which has
    them already."""
    return Published(
        generation=state.generation,
        version=state.version,
        weights=weights,
        revision=revision(weights, state.lsn),
        layout=state.layout,
        loan=loan or _loan(state.engine, weights),
    )


def subtract(new: Published, old: Published) -> Published:
    """Return ``new`` minus ``old``, rounded once to the session's dtype."""
    data = np.empty_like(new.data)
    raw, before = data.data, old.arrays()
    for name, tensor in new.arrays().items():
        slot = new.layout.by_name[name]
        raw[slot.begin : slot.end] = wire.as_bytes(_minus(tensor, before[name]))
    return replace(new, weights="delta", loan=Loan.of_copy(data))


def _minus(new: wire.Tensor, old: wire.Tensor) -> wire.Tensor:
    if isinstance(new, wire.Bits) and isinstance(old, wire.Bits):
        return wire.Bits.bfloat16(new.to_float32() - old.to_float32())
    assert isinstance(new, np.ndarray)
    assert isinstance(old, np.ndarray)
    return np.subtract(new, old)


def _loan(engine: Engine, weights: str) -> Loan:
    live = engine.params
    if weights == "live" and live.on_cpu and live.layout.nbytes > COPIED_BYTES:
        return Loan(live.bytes)
    return Loan.of_copy(_copied(engine, weights))


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
