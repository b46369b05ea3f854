"""torch's fused Adam, called without what Python does around the kernel.

``torch.optim.Adam.step`` gathers state, sorts it by device and dtype and checks flags anew in each
step: of a small session that takes many times as long as the kernel. Nothing of it can change
between two steps here. The parity tests hold every number of this against torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_CLASSES = (torch.optim.Adam, torch.optim.AdamW)


@dataclass(frozen=True, slots=True)
class _State:
    """One param_group's tensors, as the kernel takes them."""

    params: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    #: Empty without amsgrad.
    max_exp_avg_sqs: list[torch.Tensor]
    steps: list[torch.Tensor]
    #: The memory of ``steps``, in one piece.
    counts: np.ndarray


class FusedAdam:
    """``optimizer.step()`` of a fused Adam or AdamW on the CPU.

    Made anew where params or state become other tensors.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> None:
        """``step`` is torch's own: it makes the state, and takes steps that this cannot take."""
        self._optimizer = optimizer
        self._step = step
        self._states: list[_State] | None = None

    @staticmethod
    def fits(optimizer: torch.optim.Optimizer) -> bool:
        return type(optimizer) in _CLASSES and all(
            group["fused"] and all(p.device.type == "cpu" for p in group["params"])
            for group in optimizer.param_groups
        )

    def __call__(self) -> None:
        groups = self._optimizer.param_groups
        grads = [[p.grad for p in group["params"]] for group in groups]
        if not self._ready(groups, grads):
            self._step()
            return
        assert self._states is not None
        for group, state, of_group in zip(groups, self._states, grads, strict=True):
            if not of_group:
                continue
            beta1, beta2 = group["betas"]
            np.add(state.counts, 1, out=state.counts)
            kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
            kernel(
                state.params,
                of_group,
                state.exp_avgs,
                state.exp_avg_sqs,
                state.max_exp_avg_sqs if group["amsgrad"] else [],
                state.steps,
                amsgrad=group["amsgrad"],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )

    def _ready(self, groups: list[dict[str, Any]], grads: list[list[Any]]) -> bool:
        """Say whether the kernel can be called: it believes what it is given."""
        if any(grad is None for of_group in grads for grad in of_group):
            return False
        if self._states is None:
            if not all(self._optimizer.state.get(p) for g in groups for p in g["params"]):
                return False
            self._states = [self._gathered(group["params"]) for group in groups]
        return all(
            len(state.max_exp_avg_sqs) == len(state.params)
            for group, state in zip(groups, self._states, strict=True)
            if group["amsgrad"]
        )

    def _gathered(self, params: Sequence[torch.Tensor]) -> _State:
        states: list[dict[str, Any]] = [self._optimizer.state[p] for p in params]
        counts = np.array([float(state["step"]) for state in states], np.float32)
        steps = list(torch.from_numpy(counts).unbind())
        for state, step in zip(states, steps, strict=True):
            state["step"] = step
        return _State(
            params=[p.detach() for p in params],
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[s["max_exp_avg_sq"] for s in states if "max_exp_avg_sq" in s],
            steps=steps,
            counts=counts,
        )
