"""SWATS with a tolerance of its own for its switch from Adam to SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import torch


class SWATS(pytorch_optimizer.SWATS):
    """Adam that switches to SGD (Keskar and Socher, arXiv:1712.07628): pytorch_optimizer's SWATS.

    The library compares its estimates of the SGD rate with ``rtol=eps``, and eps is Adam's
    denominator too: at its default the switch never happens on smooth problems. ``switch_tol`` is
    used in that comparison only; None: eps, as in the library.

    Args:
        switch_tol: Relative tolerance of the switch to SGD; None is eps, as in the library.

    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        weight_decouple: bool = False,
        fixed_decay: bool = False,
        ams_bound: bool = False,
        nesterov: bool = False,
        eps: float = 1e-6,
        maximize: bool = False,
        foreach: bool | None = None,
        switch_tol: float | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            weight_decouple=weight_decouple,
            fixed_decay=fixed_decay,
            ams_bound=ams_bound,
            nesterov=nesterov,
            eps=eps,
            maximize=maximize,
            foreach=foreach,
        )
        for group in self.param_groups:
            group.setdefault("switch_tol", switch_tol)
        self.defaults["switch_tol"] = switch_tol
        self._denominator_eps = 0.0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step one group at a time, with switch_tol where the library looks for eps."""
        groups, loss = self.param_groups, None
        try:
            for group in groups:
                self._denominator_eps = group["eps"]
                tolerance = group["switch_tol"]
                self.param_groups = [group]
                group["eps"] = self._denominator_eps if tolerance is None else tolerance
                try:
                    loss = super().step(closure)
                finally:
                    group["eps"] = self._denominator_eps
        finally:
            self.param_groups = groups
        return loss

    def apply_ams_bound(  # type: ignore[override]
        self, *args: Any, **named: Any
    ) -> torch.Tensor:
        """Divide by the group's own eps, whatever the comparison uses."""
        return pytorch_optimizer.SWATS.apply_ams_bound(
            *args, **{**named, "eps": self._denominator_eps}
        )

    def apply_ams_bound_foreach(  # type: ignore[override]
        self, *args: Any, **named: Any
    ) -> Any:
        return pytorch_optimizer.SWATS.apply_ams_bound_foreach(
            *args, **{**named, "eps": self._denominator_eps}
        )
