"""What an optimizer keeps for one parameter, read and written without torch's load_state_dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

import torch

class Wrapper(Protocol):
    """An optimizer around another one, with state of its own for each parameter."""

    optimizer: torch.optim.Optimizer

    def own_state(self, p: torch.Tensor) -> dict[str, Any]: ...


def read_state(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, Any]:
    return dict(optimizer.state.get(p, {}))

def write_state(optimizer: torch.optim.Optimizer, p: torch.Tensor, state: Mapping[str, Any]) -> None:
    if state:
        optimizer.state[p] = dict(state)
    else:
        optimizer.state.pop(p, None)
