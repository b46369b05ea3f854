"""FedAdam and FedYogi: server optimizers of federated learning, which torch does not have.

The gradient is minus the pseudo-gradient, which is the mean of what the workers' params moved by.
The other two of the paper are torch's: FedAvgM is SGD with momentum, FedAdagrad is Adagrad with
``initial_accumulator_value=tau**2`` and ``eps=tau``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from optserve.optim.entry import Entry


class _FedOpt(torch.optim.Optimizer):
    """Algorithm 2 of Reddi et al., arXiv 2003.00295, but for how ``v`` is averaged.

    ``m = beta1 * m + (1 - beta1) * g``, ``v`` as the class says, ``x = x - lr * m / (sqrt(v) +
    eps)``. No bias is corrected. ``m`` starts at 0 and ``v`` at ``eps**2``, the least that the
    paper allows. State is in the parameter's dtype.

    Args:
        lr: Learning rate of the server; the paper tunes it for each problem.
        betas: Coefficients of the running averages of the gradient and of its square.
        eps: tau of the paper, added to the root of ``v``; ``v`` starts at its square.
        maximize: Climb instead of descend.

    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-3,
        *,
        maximize: bool = False,
    ) -> None:
        if not lr >= 0.0:
            raise ValueError(f"lr must be >= 0, got {lr}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"betas[{i}] must be in [0, 1), got {beta}")
        if not eps > 0.0:
            raise ValueError(f"eps must be > 0, got {eps}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "maximize": maximize})

    def _average(self, v: torch.Tensor, square: torch.Tensor, beta: float) -> None:
        """Take the squared gradient into ``v``, in place."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; params without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), eps = group["betas"], group["eps"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = -param.grad if group["maximize"] else param.grad
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.full_like(param, eps**2)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(beta1).add_(grad, alpha=1 - beta1)
                self._average(v, grad.square(), beta2)
                param.addcdiv_(m, v.sqrt().add_(eps), value=-group["lr"])
        return loss


class FedAdam(_FedOpt):
    """FedAdam (Reddi et al., arXiv 2003.00295): ``v = beta2 * v + (1 - beta2) * g**2``.

    torch's Adam is another: it corrects the bias of both averages and starts ``v`` at 0.
    """

    def _average(self, v: torch.Tensor, square: torch.Tensor, beta: float) -> None:
        v.mul_(beta).add_(square, alpha=1 - beta)


class FedYogi(_FedOpt):
    """FedYogi (Reddi et al., arXiv 2003.00295): ``v -= (1 - beta2) * g**2 * sign(v - g**2)``.

    pytorch_optimizer's Yogi is another: it corrects the bias of both averages.
    """

    def _average(self, v: torch.Tensor, square: torch.Tensor, beta: float) -> None:
        v.addcmul_(square, (v - square).sign_(), value=beta - 1)


#: eps is what v was started with: another one would hold for half of what it does.
FEDOPT: tuple[Entry, ...] = tuple(
    Entry(
        name=name,
        source=f"optserve.optim.fedopt.{name}",
        meaning=meaning,
        frozen=frozenset({"eps"}),
    )
    for name, meaning in {
        "FedAdam": "Adam for the mean of what workers moved: without its bias correction",
        "FedYogi": "FedAdam whose second moment moves by (1 - betas[1]) g², towards g²",
    }.items()
)
