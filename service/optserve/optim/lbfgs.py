"""torch's LBFGS without a closure: the caller evaluates, one request each, and nothing waits.

``LBFGS.step(closure)`` calls the closure up to ``max_eval`` times at trial params of its choosing.
Here each request brings the loss and gradient of one such call. torch's own step is run again from
the start with a closure that answers from the record; when the record ends, the params at that
moment are the next trial params, everything is put back, and the caller is asked to evaluate there.
So the last run is exactly the one that torch would have made.
"""

from __future__ import annotations

from typing import Any

import torch

from optserve.optim.arena import Arena
from optserve.optim.refusals import torchs_refusals


class _NeedEvaluation(BaseException):
    """The record ended: torch wants loss and gradient at the params as they are now.

    No Exception, which on its way out of torch's step would be taken for a refusal.
    """


class LineSearch:
    """The evaluations of the step that is under way."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        #: Loss and flat gradient of every closure call so far, in order.
        self.record: list[tuple[float, torch.Tensor]] = []
        #: Where the step starts, if the caller brought params with its first evaluation.
        self.start: Arena | None = None
        #: Where the next evaluation is wanted; None between steps.
        self.trial: Arena | None = None
        self._behind = False

    @property
    def open(self) -> bool:
        return bool(self.record)

    def abandon(self) -> None:
        """Forget the step that is under way; params and history are as before it."""
        self.record = []
        self.start = self.trial = None
        self._behind = False

    def evaluate(self, loss: float, flat_grad: torch.Tensor, params: Arena) -> bool:
        """Add one evaluation and run torch's step over the record; True when the step is complete.

        ``params`` changes only then; until then :attr:`trial` holds the params to evaluate at.
        """
        self.record.append((loss, flat_grad.clone()))
        return self._run(params)

    def remember(self, loss: float, flat_grad: torch.Tensor) -> None:
        """Add an evaluation that is known not to complete the step; :meth:`catch_up` is due.

        A journal that is replayed would else run torch's step once per evaluation.
        """
        self.record.append((loss, flat_grad.clone()))
        self._behind = True

    def catch_up(self, params: Arena) -> None:
        """Find the trial params after what was only remembered."""
        if self._behind:
            self._run(params)

    def _run(self, params: Arena) -> bool:
        self._behind = False
        live = params.flat.clone()
        if self.start is not None:
            params.flat.copy_(self.start.flat)
        parameters: list[torch.nn.Parameter] = self._optimizer.param_groups[0]["params"]
        state = self._optimizer.state
        saved = dict(state.get(parameters[0], {}))
        state[parameters[0]] = _detached(saved)
        calls = iter(self.record)

        def closure() -> float:
            entry = next(calls, None)
            if entry is None:
                raise _NeedEvaluation
            offset = 0
            for parameter in parameters:
                parameter.grad = entry[1][offset : offset + parameter.numel()].view_as(parameter)
                offset += parameter.numel()
            return entry[0]

        try:
            with torchs_refusals():
                self._optimizer.step(closure)
        except _NeedEvaluation:
            self.trial = params.clone()
            params.flat.copy_(live)
            state[parameters[0]] = saved
            return False
        finally:
            for parameter in parameters:
                parameter.grad = None
        self.abandon()
        return True


def _detached(state: dict[str, Any]) -> dict[str, Any]:
    """Copy what torch's step changes in place: its lists, ``d`` and ``prev_flat_grad``."""
    copied: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, list):
            copied[key] = list(value)
        elif isinstance(value, torch.Tensor):
            copied[key] = value.clone()
        else:
            copied[key] = value
    return copied
