"""The 15 schedulers of torch.optim.lr_scheduler: what each takes, and its bounds.

Defaults come from torch's own signatures; what stands here is the type, the bounds and the meaning.
The bounds keep every learning rate at or above zero, as torch's optimizers demand of their own, and
leave out the values at which torch divides by zero, some of them only many steps later.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

from torch.optim import lr_scheduler

from optserve.optim.expressions import shown
from optserve.optim.schedule_entry import INTEGER_LIMIT, Entry, Field
from optserve_client.errors import Invalid


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()


def find(name: Any, where: str = "name") -> Entry:
    """Return the scheduler of this name in any case or snake_case, or raise Invalid."""
    if not isinstance(name, str):
        raise Invalid(f"{where} must be the name of a scheduler, got {shown(name)}", field=where)
    if entry := _BY_NAME.get(_plain(name[:100])):
        return entry
    close = difflib.get_close_matches(_plain(name[:100]), _BY_NAME, n=3, cutoff=0.5)
    known = [_BY_NAME[key].name for key in close] or [entry.name for entry in entries()]
    hint = f"did you mean {' or '.join(known)}?" if close else f"there are {', '.join(known)}"
    raise Invalid(f"{where} {shown(name)} is not a scheduler: {hint}", field=where)


def entries() -> list[Entry]:
    """Return all schedulers, in torch's order."""
    return list(_BY_NAME.values())


def describe(entry: Entry) -> dict[str, Any]:
    """Return what the catalogue route answers for one scheduler."""
    return {
        "name": entry.name,
        "source": entry.source,
        "meaning": entry.meaning,
        "needs_metrics": entry.needs_metrics,
        "cycles_momentum": entry.cycles_momentum,
        "composite": entry.composite,
        "example": dict(entry.example),
        "schema": entry.schema(),
    }


def _number(
    doc: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    per_group: bool = False,
) -> Field:
    return Field(
        kind="number",
        doc=doc,
        least=least,
        above=above,
        most=most,
        below=below,
        per_group=per_group,
    )


def _integer(doc: str, least: int = 1, most: int = INTEGER_LIMIT) -> Field:
    return Field(kind="integer", doc=doc, least=least, most=most)


def _enum(doc: str, *choices: str) -> Field:
    return Field(kind="enum", doc=doc, choices=choices)


def _milestones(doc: str) -> Field:
    return Field(kind="milestones", doc=doc)


def _lambda(doc: str) -> Field:
    return Field(kind="function", doc=doc, variable="epoch", per_group=True)


_GAMMA = _number("Factor of each decay.", least=0)
_ETA_MIN = _number("Smallest learning rate.", least=0)
_MAX_LR = _number("Upper bound of the learning rate.", per_group=True, least=0)
_TOTAL_ITERS = _integer("Number of steps over which the schedule acts.")
_SCHEDULERS = Field(kind="schedulers", doc="Schedulers, each an object like this one, or a list.")
_CYCLE_MOMENTUM = {
    "cycle_momentum": Field(kind="boolean", doc="Move momentum or betas[0] against the lr."),
    "base_momentum": _number("Momentum at the highest lr.", per_group=True, least=0, below=1),
    "max_momentum": _number("Momentum at the lowest lr.", per_group=True, least=0, below=1),
}

_ALL = (
    Entry(
        made_by=lr_scheduler.LambdaLR,
        meaning="The initial lr times a function of the epoch.",
        fields={"lr_lambda": _lambda("The factor at each epoch.")},
        example={"name": "LambdaLR", "lr_lambda": "0.95 ** epoch"},
    ),
    Entry(
        made_by=lr_scheduler.MultiplicativeLR,
        meaning="At each epoch, the current lr times a function of the epoch.",
        fields={"lr_lambda": _lambda("The factor by which each epoch changes the lr.")},
        example={"name": "MultiplicativeLR", "lr_lambda": "0.95 if epoch < 50 else 1"},
    ),
    Entry(
        made_by=lr_scheduler.StepLR,
        meaning="Decays the lr by gamma every step_size epochs.",
        fields={"step_size": _integer("Period of the decay."), "gamma": _GAMMA},
        example={"name": "StepLR", "step_size": 50, "gamma": 0.5},
    ),
    Entry(
        made_by=lr_scheduler.MultiStepLR,
        meaning="Decays the lr by gamma at each milestone.",
        fields={
            "milestones": _milestones("Epochs, in order; one given twice counts twice."),
            "gamma": _GAMMA,
        },
        example={"name": "MultiStepLR", "milestones": [30, 80], "gamma": 0.1},
    ),
    Entry(
        made_by=lr_scheduler.ConstantLR,
        meaning="The lr times factor until total_iters epochs have passed, then the whole lr.",
        # At 0 torch divides by zero when total_iters is reached.
        fields={
            "factor": _number("Factor until total_iters.", above=0, most=1),
            "total_iters": _TOTAL_ITERS,
        },
        example={"name": "ConstantLR", "factor": 0.5, "total_iters": 10},
    ),
    Entry(
        made_by=lr_scheduler.LinearLR,
        meaning="The lr times a factor that goes from start_factor to end_factor in a line.",
        fields={
            "start_factor": _number("Factor at the start.", above=0, most=1),
            "end_factor": _number("Factor at the end.", least=0, most=1),
            "total_iters": _TOTAL_ITERS,
        },
        example={"name": "LinearLR", "start_factor": 0.1, "total_iters": 10},
    ),
    Entry(
        made_by=lr_scheduler.ExponentialLR,
        meaning="Decays the lr by gamma every epoch.",
        fields={"gamma": _GAMMA},
        example={"name": "ExponentialLR", "gamma": 0.95},
    ),
    Entry(
        made_by=lr_scheduler.SequentialLR,
        meaning="One scheduler after the other; each milestone starts the next.",
        fields={
            "schedulers": _SCHEDULERS,
            "milestones": _milestones("Epochs at which the next scheduler starts."),
        },
        example={
            "name": "SequentialLR",
            "schedulers": [
                {"name": "LinearLR", "start_factor": 0.1, "total_iters": 10},
                {"name": "CosineAnnealingLR", "T_max": 90},
            ],
            "milestones": [10],
        },
    ),
    Entry(
        made_by=lr_scheduler.CosineAnnealingLR,
        meaning="Half a cosine from the initial lr to eta_min over T_max epochs.",
        fields={"T_max": _integer("Epochs down to eta_min."), "eta_min": _ETA_MIN},
        example={"name": "CosineAnnealingLR", "T_max": 100},
    ),
    Entry(
        made_by=lr_scheduler.ChainedScheduler,
        meaning="Several schedulers at once: each step makes one step of every one, in order.",
        fields={"schedulers": _SCHEDULERS},
        example={
            "name": "ChainedScheduler",
            "schedulers": [
                {"name": "ConstantLR", "factor": 0.1, "total_iters": 20},
                {"name": "ExponentialLR", "gamma": 0.9},
            ],
        },
    ),
    Entry(
        made_by=lr_scheduler.ReduceLROnPlateau,
        meaning="Reduces the lr by factor once a metric has not improved for over patience steps.",
        fields={
            "mode": _enum("Whether smaller or larger is better.", "min", "max"),
            "factor": _number("New lr = lr * factor.", least=0, below=1),
            "patience": _integer("Steps without improvement that are let pass.", 0),
            "threshold": _number("How much better counts as an improvement."),
            "threshold_mode": _enum("Whether threshold is a fraction of the best.", "rel", "abs"),
            "cooldown": _integer("Steps after a reduction that do not count.", 0),
            "min_lr": _number("Smallest learning rate.", per_group=True, least=0),
            "eps": _number("A reduction of at most this is not made.", least=0),
        },
        example={"name": "ReduceLROnPlateau", "factor": 0.5, "patience": 5},
    ),
    Entry(
        made_by=lr_scheduler.CyclicLR,
        meaning="The lr goes up and down between base_lr and max_lr; momentum against it.",
        fields={
            "base_lr": _number("Lower bound of the learning rate.", per_group=True, least=0),
            "max_lr": _MAX_LR,
            "step_size_up": _integer("Steps from base_lr to max_lr."),
            "step_size_down": _integer("Steps back; null is step_size_up.", 0),
            "mode": _enum("Scaling of the height.", "triangular", "triangular2", "exp_range"),
            "gamma": _number("exp_range: the height is times gamma ** step.", least=0),
            "scale_fn": Field(kind="function", doc="Scaling in place of mode.", variable="x"),
            "scale_mode": _enum("What scale_fn takes as x.", "cycle", "iterations"),
            **_CYCLE_MOMENTUM,
        },
        example={"name": "CyclicLR", "base_lr": 0.001, "max_lr": 0.1, "step_size_up": 20},
    ),
    Entry(
        made_by=lr_scheduler.CosineAnnealingWarmRestarts,
        meaning="Cosine annealing that starts again after T_0 epochs, then T_mult times longer.",
        fields={
            "T_0": _integer("Epochs until the first restart."),
            "T_mult": _integer("Factor of the period at each restart.", most=10**6),
            "eta_min": _ETA_MIN,
        },
        example={"name": "CosineAnnealingWarmRestarts", "T_0": 10, "T_mult": 2},
    ),
    Entry(
        made_by=lr_scheduler.OneCycleLR,
        meaning="One cycle: up to max_lr, then down far below the start; momentum against it.",
        fields={
            "max_lr": _MAX_LR,
            "total_steps": _integer("Steps of the cycle."),
            "epochs": _integer("With steps_per_epoch, in place of total_steps."),
            "steps_per_epoch": _integer("With epochs, in place of total_steps."),
            "pct_start": _number("Share of the steps that go up.", least=0, most=1),
            "anneal_strategy": _enum("Shape of the way up and down.", "cos", "linear"),
            **_CYCLE_MOMENTUM,
            "div_factor": _number("Initial lr = max_lr / div_factor.", above=0),
            "final_div_factor": _number("Last lr = initial lr / final_div_factor.", above=0),
            "three_phase": Field(kind="boolean", doc="Come down in the time of going up, then on."),
        },
        example={"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 100},
    ),
    Entry(
        made_by=lr_scheduler.PolynomialLR,
        meaning="The lr falls to zero over total_iters epochs as a power of what is left.",
        # A negative power divides by zero when total_iters is reached.
        fields={"total_iters": _TOTAL_ITERS, "power": _number("The power.", least=0)},
        example={"name": "PolynomialLR", "total_iters": 100, "power": 0.9},
    ),
)  # fmt: skip

_BY_NAME = {_plain(entry.name): entry for entry in _ALL}
