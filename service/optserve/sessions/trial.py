"""What a step would do."""

from __future__ import annotations

from optserve.sessions import stepping
from optserve.sessions.reply import Reply, counters, step_reply
from optserve.sessions.state import SessionState
from optserve.sessions.step import Step
from optserve.sessions.weights import publish


def try_out(session_id: str, state: SessionState, step: Step) -> Reply:
    """Step a copy that is thrown away; neither journal nor ledger hear of it."""
    copy = state.clone()
    change = stepping.apply(copy, stepping.prepare(copy, step))
    copy.version += int(change.moves)
    copy.updates += change.updates
    made = copy.version if change.moves else None
    scalars = {**counters(session_id, copy, made), **change.reply, "dry_run": True}
    weights = "trial" if change.reply.get("need") else "live"
    return step_reply(step.fields, scalars, lambda: publish(copy, weights))
