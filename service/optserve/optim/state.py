"""What an optimizer keeps for its parameters, read and written bit for bit.

torch's load_state_dict casts moments to the parameter's dtype; here tensors stay as they are, and
nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

#: Where the state of an optimizer around another one stands, beside the other's.
_WRAPPER = "lookahead"


def wrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """Return the optimizer that Lookahead steps, or None."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else None


def read_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    """Return what the optimizer keeps for one parameter; tensors are live."""
    own = dict(optimizer.state.get(parameter, {}))
    inner = wrapped(optimizer)
    return own if inner is None else {**read_state(inner, parameter), _WRAPPER: own}


def write_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, state: Mapping[str, Any]
) -> None:
    """Put back what :func:`read_state` returned; an empty state is that of no step yet."""
    kept = dict(state)
    if (inner := wrapped(optimizer)) is not None:
        optimizer.state[parameter] = kept.pop(_WRAPPER)
        optimizer = inner
    if kept:
        optimizer.state[parameter] = kept
    else:
        optimizer.state.pop(parameter, None)


def read_extra(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what the class keeps beside groups and state, as its own state_dict says."""
    inner = wrapped(optimizer)
    saved = (inner or optimizer).state_dict()
    return {name: value for name, value in saved.items() if name not in ("state", "param_groups")}


def write_extra(optimizer: torch.optim.Optimizer, extra: Mapping[str, Any]) -> None:
    """Put back what :func:`read_extra` returned; call it before :func:`write_state`."""
    if taken := {"state", "param_groups"} & extra.keys():
        raise ValueError(f"extra holds {', '.join(sorted(taken))}, which have places of their own")
    if extra:
        inner = wrapped(optimizer) or optimizer
        inner.load_state_dict({**inner.state_dict(), **extra})


def eval_params(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]
) -> list[torch.Tensor]:
    """Return copies of the weights to evaluate with; the live ones keep every bit.

    ``eval`` and ``train`` of these classes change the params in place, and back only up to
    rounding. They are called for parameters that have been stepped; the others are as they are.
    """
    live = list(parameters)
    before = [parameter.detach().clone() for parameter in live]
    groups = optimizer.param_groups
    members = [group["params"] for group in groups]
    try:
        for group in groups:
            group["params"] = [p for p in group["params"] if optimizer.state.get(p)]
        optimizer.param_groups = [group for group in groups if group["params"]]
        optimizer.eval()  # type: ignore[attr-defined]
        evaluated = [parameter.detach().clone() for parameter in live]
        optimizer.train()  # type: ignore[attr-defined]
    finally:
        optimizer.param_groups = groups
        for group, params in zip(groups, members, strict=True):
            group["params"] = params
    with torch.no_grad():
        for parameter, value in zip(live, before, strict=True):
            parameter.copy_(value)
    return evaluated
