"""Sessions of many kinds, for tests that train all of them: optimizers, schedules and features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.oracle import Shapes

SMALL: Shapes = {"w": (5, 7), "b": (7,), "s": (), "e": (0, 3)}
#: 160 kB: payloads of this size are files.
LARGE: Shapes = {"w": (200, 200), "b": (200,)}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A kind of session, and what its owner does to it beside stepping."""

    name: str
    #: Of the create request, without params.
    body: Mapping[str, Any]
    shapes: Shapes = field(default_factory=lambda: SMALL)
    dtype: str = "float32"
    #: Kinds of changes, as methods of :class:`Owned`.
    more: tuple[str, ...] = ()


SPECS: tuple[Spec, ...] = (
    Spec(
        name="adamw",
        body={"optimizer": {"name": "AdamW", "lr": 0.01}, "impl": "fused", "clip_grad_norm": 1.0},
        more=("patch_group",),
    ),
    Spec(
        name="sgd",
        body={
            "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9, "nesterov": True},
            "scheduler": {"name": "StepLR", "step_size": 3, "gamma": 0.9},
            "ema": {"decay": 0.95},
        },
        more=("advance", "put_params"),
    ),
    Spec(
        name="lbfgs",
        body={"optimizer": {"name": "LBFGS", "lr": 1.0, "line_search_fn": "strong_wolfe"}},
        shapes={"x": (3,), "y": (), "z": (2, 2)},
    ),
    Spec(
        name="onecycle",
        body={
            "optimizer": {"name": "Adam", "lr": 0.01},
            "scheduler": {
                "name": "OneCycleLR",
                "max_lr": 0.1,
                "total_steps": 1_000_000,
                "advance": "step",
            },
        },
    ),
    Spec(
        name="plateau",
        body={
            "optimizer": {"name": "SGD", "lr": 0.5, "momentum": 0.5},
            "scheduler": {
                "name": "ReduceLROnPlateau",
                "factor": 0.9,
                "patience": 2,
                "monitor": "loss",
                "advance": "step",
            },
            "best": {"monitor": "loss"},
        },
        more=("put_loss",),
    ),
    Spec(
        name="accumulate",
        body={
            "optimizer": {"name": "Adam", "lr": 0.01},
            "accumulate": {"steps": 3, "reduce": "mean"},
            "clip_grad_norm": 0.5,
        },
        more=("patch_group",),
    ),
    Spec(
        name="bfloat16",
        body={"optimizer": {"name": "AdamW", "lr": 0.02}, "ema": {"decay": 0.9}},
        dtype="bfloat16",
        more=("put_params",),
    ),
    Spec(
        name="large",
        body={"optimizer": {"name": "Adam", "lr": 0.01}, "best": {"monitor": "loss"}},
        shapes=LARGE,
        more=("put_params", "put_loss"),
    ),
    Spec(
        name="lambda",
        body={
            "optimizer": {"name": "RMSprop", "lr": 0.01},
            "scheduler": {"name": "LambdaLR", "lr_lambda": "0.999 ** epoch", "advance": "step"},
        },
    ),
    Spec(
        name="groups",
        body={
            "optimizer": {"name": "NAdam", "lr": 0.01},
            "groups": [{"params": ["b"], "lr": 0.001}],
            "scheduler": {"name": "LambdaLR", "lr_lambda": "1 / (1 + epoch / 50)"},
        },
        dtype="float64",
        more=("patch_group", "advance"),
    ),
    Spec(
        name="swats",
        body={"optimizer": {"name": "SWATS", "lr": 0.01}},
        more=("patch_group",),
    ),
    Spec(
        name="lion",
        body={"optimizer": {"name": "Lion", "lr": 0.01}, "accumulate": 2, "ema": {"decay": 0.99}},
    ),
)

#: What several clients step, each with its own numbers.
SHARED = Spec(name="shared", body={"optimizer": {"name": "SGD", "lr": 0.01, "momentum": 0.9}})
