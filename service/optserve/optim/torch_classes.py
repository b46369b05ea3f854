"""torch.optim's own classes, and the friendly names for three ways to use them."""

from __future__ import annotations

from optserve.optim.entry import Entry

TORCH: tuple[Entry, ...] = (
    Entry(
        name="SGD",
        source="torch.optim.SGD",
        meaning="Stochastic gradient descent, optionally with momentum",
        sparse="allowed",
    ),
    Entry(
        name="Adam",
        source="torch.optim.Adam",
        meaning="Step sizes from running averages of the gradient and its square",
        frozen=frozenset({"amsgrad"}),
    ),
    Entry(
        name="AdamW",
        source="torch.optim.AdamW",
        meaning="Adam whose weight decay acts on the params and not through the gradient",
        frozen=frozenset({"amsgrad"}),
    ),
    Entry(
        name="Adagrad",
        source="torch.optim.Adagrad",
        meaning="Step sizes that shrink with the sum of squared gradients so far",
        frozen=frozenset({"initial_accumulator_value"}),
        sparse="allowed",
    ),
    Entry(
        name="RMSprop",
        source="torch.optim.RMSprop",
        meaning="Step sizes from a running average of the squared gradient",
        frozen=frozenset({"centered", "momentum"}),
    ),
    Entry(
        name="Adadelta",
        source="torch.optim.Adadelta",
        meaning="Step sizes from running averages of squared gradients and squared updates",
    ),
    Entry(
        name="Adafactor",
        source="torch.optim.Adafactor",
        meaning="Adam with row and column sums in place of the matrix of second moments",
    ),
    Entry(
        name="Adamax",
        source="torch.optim.Adamax",
        meaning="Adam with the infinity norm in place of the second moment",
    ),
    Entry(name="NAdam", source="torch.optim.NAdam", meaning="Adam with Nesterov momentum"),
    Entry(
        name="RAdam",
        source="torch.optim.RAdam",
        meaning="Adam that waits until the variance of its step sizes is small enough",
    ),
    Entry(name="ASGD", source="torch.optim.ASGD", meaning="Averaged stochastic gradient descent"),
    Entry(
        name="Rprop",
        source="torch.optim.Rprop",
        meaning="Step sizes that grow and shrink with the sign of the gradient; "
        "lr is the first one, and later changes of it have no effect",
    ),
    Entry(
        name="Muon",
        source="torch.optim.Muon",
        meaning="Momentum made orthogonal by Newton-Schulz iterations; for matrices only",
    ),
    Entry(
        name="SparseAdam",
        source="torch.optim.SparseAdam",
        meaning="Adam for sparse gradients: only the rows that have one are touched",
        sparse="only",
    ),
    Entry(
        name="LBFGS",
        source="torch.optim.LBFGS",
        meaning="Limited-memory BFGS; one step takes loss and gradients at several params",
        needs_loss=True,
        groups=False,
    ),
)

FRIENDLY: tuple[Entry, ...] = (
    Entry(
        name="Momentum",
        source="torch.optim.SGD",
        meaning="SGD with momentum, which is 0.9 unless given",
        defaults={"momentum": 0.9},
        leave_out=frozenset({"nesterov"}),
        sparse="allowed",
    ),
    Entry(
        name="Nesterov",
        source="torch.optim.SGD",
        meaning="SGD with nesterov=True and momentum, which is 0.9 unless given",
        defaults={"momentum": 0.9},
        fixed={"nesterov": True},
        leave_out=frozenset({"dampening"}),
        sparse="allowed",
    ),
    Entry(
        name="AMSGrad",
        source="torch.optim.Adam",
        meaning="Adam with amsgrad=True",
        fixed={"amsgrad": True},
    ),
)
