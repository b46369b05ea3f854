"""What is refused for having no effect truly has none, and what may be changed does not break."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from optserve.optim import catalogue, effects
from optserve.optim.entry import Entry
from optserve.optim.hyperparameters import Hyper
from optserve_client.errors import OptserveError
from tests.unit.conformance import Gate, same

TRIED = [e for e in catalogue.entries() if not e.needs_loss and e.sparse != "only"]
PAIRS = [(e, k, n) for e in TRIED for k, n in effects.rules(e.name, e.hyperparameters)]
STEPS = 8


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(before)


def other(hyper: Hyper, value: Any) -> Any:
    """Return another value than ``value``; None if there is none to try."""
    kind = hyper.schema.get("type")
    if "enum" in hyper.schema:
        return next(choice for choice in hyper.schema["enum"] if choice != value)
    if kind == "boolean":
        return not value
    if kind == "array":
        return tuple(v if v is None else v * 0.9 for v in value)
    if kind == "integer":
        return value + 1
    return 0.5 if value is None else value * 0.5 + 0.01


@pytest.mark.parametrize(("entry", "key", "needed"), PAIRS, ids=lambda v: getattr(v, "name", v))
def test_a_hyperparameter_that_is_refused_as_without_effect_has_none(
    entry: Entry, key: str, needed: str
) -> None:
    known = entry.hyperparameters
    off = False if known[needed].schema["type"] == "boolean" else 0.0
    base = {**entry.example, needed: off}
    changed = {key: other(known[key], known[key].default)}
    gate = Gate(entry, base)
    assert same(gate.trial().run(0, STEPS), gate.trial(changed).run(0, STEPS))
    with pytest.raises(OptserveError, match="has no effect while"):
        entry.normalise({**base, **changed})


@pytest.mark.parametrize("entry", TRIED, ids=lambda entry: entry.name)
def test_a_change_that_is_allowed_does_not_break_the_next_steps(entry: Entry) -> None:
    gate = Gate(entry, entry.example)
    tried = 0 if entry.name != "Lookahead" else 1  # its groups are those of what it wraps
    for key in sorted(entry.per_group - entry.frozen):
        trial = gate.trial().run(0, 2)
        group = trial.optimizer.param_groups[0]
        if key not in entry.hyperparameters:
            continue
        value = other(entry.hyperparameters[key], group[key])
        try:
            change = entry.normalise_change({key: value}, "groups[0]", group)
        except OptserveError:
            continue
        group.update(change)
        trial.run(2, 5)
        tried += 1
    assert tried
