"""Hyperparameters that do something only beside others: alone they are refused, not ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optserve.optim.expressions import shown
from optserve_client.errors import Invalid

#: (hyperparameter, one without which it does nothing).
_NEEDS: tuple[tuple[str, str], ...] = (
    ("beta_softplus", "use_softplus"),
    ("dampening", "momentum"),
    ("decoupled_weight_decay", "weight_decay"),
    ("degenerated_to_sgd", "rectify"),
    ("fixed_decay", "weight_decay"),
    ("fixed_decay", "weight_decouple"),
    ("gc_conv_only", "use_gc"),
    ("grokfast_after_step", "grokfast"),
    ("grokfast_alpha", "grokfast"),
    ("grokfast_lamb", "grokfast"),
    ("max_grad_norm", "pre_norm"),
    ("n_sma_threshold", "rectify"),
    ("nesterov", "momentum"),
    ("normalize_lr", "grokfast"),
    ("stable_weight_decay", "weight_decay"),
    ("steps_before_using_centered", "centered"),
    ("wd_ratio", "weight_decay"),
    ("weight_decouple", "weight_decay"),
)
#: Where it does something all the same, or the class says so itself.
_EXCEPT: frozenset[tuple[str, str]] = frozenset(
    {
        ("MARS", "fixed_decay"),
        ("MARS", "weight_decouple"),
        ("SGD", "nesterov"),
        ("SGDP", "dampening"),
    }
)


def rules(name: str, known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs (hyperparameter, what it needs) of the class ``name``."""
    return [
        (key, needed)
        for key, needed in _NEEDS
        if key in known and needed in known and (name, key) not in _EXCEPT
    ]


def check(
    name: str,
    given: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
    where: str,
) -> None:
    """Raise Invalid for what was ``given`` and has no effect in any of the ``cases``.

    A case is the complete hyperparameters of one group. A given default is not a wish.
    """
    for key, needed in rules(name, defaults):
        if key in given and given[key] != defaults[key] and not any(case[needed] for case in cases):
            raise Invalid(
                f"{where}.{key} has no effect while {needed} is {shown(cases[0][needed])}, "
                f"got {shown(given[key])}",
                field=f"{where}.{key}",
            )
