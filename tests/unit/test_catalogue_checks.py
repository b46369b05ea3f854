"""Hyperparameters that cannot be used: each is refused with its name, value and bound."""

from __future__ import annotations

import math
from typing import Any

import pytest

from optserve.optim import catalogue
from optserve.optim.catalogue import Entry, find
from optserve.optim.probing import stand_in
from optserve_client.errors import Invalid, OptserveError, TorchRefused

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("Adam", {"lr": -1}, "optimizer.lr must be >= 0, got -1"),
    ("Adam", {"lr": True}, "optimizer.lr must be a number, got true"),
    ("Adam", {"lr": "0.1"}, 'optimizer.lr must be a number, got "0.1"'),
    ("Adam", {"lr": math.inf}, "optimizer.lr must be a finite number, got Infinity"),
    ("Adam", {"lr": math.nan}, "optimizer.lr must be a finite number, got NaN"),
    ("Adam", {"lr": None}, "optimizer.lr must be a number, got null"),
    ("Adam", {"lr": [0.1]}, "optimizer.lr must be a number, got [0.1]"),
    ("Adam", {"lr": 10**400}, "optimizer.lr must be a finite number, got 1000000000"),
    ("Adam", {"betas": [0.9]}, "optimizer.betas must be a list of 2 values, got [0.9]"),
    ("Adam", {"betas": 0.9}, "optimizer.betas must be a list of 2 values, got 0.9"),
    ("Adam", {"betas": [1.2, 0.9]}, "optimizer.betas[0] must be in [0, 1), got 1.2"),
    ("Adam", {"betas": [0.9, True]}, "optimizer.betas[1] must be a number, got true"),
    ("Adam", {"betas": [0.9, None]}, "optimizer.betas[1] must be a number, got null"),
    ("Adam", {"amsgrad": 1}, "optimizer.amsgrad must be true or false, got 1"),
    ("Adam", {"lrr": 1}, "optimizer: 'lrr' is not a hyperparameter of Adam: did you mean lr?"),
    ("Adam", {"beta1": 1}, "optimizer: 'beta1' is not a hyperparameter of Adam: did you mean b"),
    ("Adam", {"learning_rate": 1}, "optimizer: 'learning_rate' is not a hyperparameter of Adam: "
     "did you mean lr?"),
    ("Adam", {"zzz": 1}, "optimizer: 'zzz' is not a hyperparameter of Adam: it has lr, betas, eps, "
     "weight_decay, amsgrad, maximize, decoupled_weight_decay"),
    ("Adam", {"params": []}, "optimizer: 'params' is not a hyperparameter of Adam: "),
    ("AdamW", {"fused": True}, "optimizer.fused is not set here: impl of the session chooses the "
     "implementation (auto, fused, foreach or single)"),
    ("Lion", {"foreach": True}, "optimizer.foreach is not set here: impl"),
    ("SparseAdam", {"lr": 0}, "optimizer.lr must be > 0, got 0"),
    ("Adafactor", {"beta2_decay": 0.1}, "optimizer.beta2_decay must be <= 0, got 0.1"),
    ("Adafactor", {"eps": [-1, 0.1]}, "optimizer.eps[0] must be >= 0, got -1"),
    ("Adafactor", {"eps": [None, None]}, "optimizer.eps[1] must be a number, got null"),
    ("Rprop", {"etas": [1.5, 1.2]}, "optimizer.etas[0] must be in (0, 1), got 1.5"),
    ("Rprop", {"etas": [0.5, 0.9]}, "optimizer.etas[1] must be > 1, got 0.9"),
    ("Muon", {"ns_steps": 1000}, "optimizer.ns_steps must be in [1, 99], got 1000"),
    ("Muon", {"adjust_lr_fn": "x"}, 'optimizer.adjust_lr_fn must be one of "original", '
     '"match_rms_adamw", null, got "x"'),
    ("LBFGS", {"line_search_fn": "weak"}, 'optimizer.line_search_fn must be one of "strong_wolfe", '
     'null, got "weak"'),
    ("LBFGS", {"history_size": 1.5}, "optimizer.history_size must be an integer, got 1.5"),
    ("LBFGS", {"max_iter": 10**9}, "optimizer.max_iter must be in [1, 10000], got 1000000000"),
    ("Ranger21", {}, "optimizer.num_iterations is missing: Ranger21 needs it (Total training "),
    ("Ranger21", {"num_iterations": 9, "warm_down_min_lr": -1}, "optimizer.warm_down_min_lr must "
     "be >= 0, got -1"),
    ("MARS", {"lr_1d": -1}, "optimizer.lr_1d must be >= 0, got -1"),
    ("MARS", {"mars_type": "x"}, 'optimizer.mars_type must be one of "adamw", "lion", "shampoo", '
     'got "x"'),
    ("Aida", {"k": 10**9}, "optimizer.k must be in [1, 1000], got 1000000000"),
    ("Adan", {"maximize": True}, "optimizer: 'maximize' is not a hyperparameter of Adan: it"),
    ("FedAdam", {"eps": 0}, "optimizer.eps must be > 0, got 0"),
    ("FedYogi", {"betas": [0.9, 1]}, "optimizer.betas[1] must be in [0, 1), got 1"),
    ("FedYogi", {"tau": 0.1}, "optimizer: 'tau' is not a hyperparameter of FedYogi: it has lr, "),
    ("FAdam", {"fim_dtype": "int8"}, 'optimizer.fim_dtype must be one of "float32", "float64"'),
    ("Nesterov", {"nesterov": False}, "optimizer: 'nesterov' is not a hyperparameter of Nesterov"),
    # What would have no effect.
    ("SGD", {"dampening": 0.5}, "optimizer.dampening has no effect while momentum is 0, got 0.5"),
    ("NAdam", {"decoupled_weight_decay": True}, "optimizer.decoupled_weight_decay has no effect "
     "while weight_decay is 0, got true"),
    ("Lion", {"weight_decouple": False}, "optimizer.weight_decouple has no effect while "
     "weight_decay is 0.0, got false"),
    ("SWATS", {"weight_decay": 0.1, "fixed_decay": True}, "optimizer.fixed_decay has no effect "
     "while weight_decouple is false, got true"),
    ("Lamb", {"max_grad_norm": 3}, "optimizer.max_grad_norm has no effect while pre_norm is false"),
    ("AdaBelief", {"n_sma_threshold": 4}, "optimizer.n_sma_threshold has no effect while rectify "
     "is false, got 4"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "hyper", "sentence"), BAD)
def test_bad_hyperparameters_are_named(name: str, hyper: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Invalid) as caught:
        find(name).normalise(hyper)
    assert caught.value.detail.startswith(sentence)
    assert caught.value.extra["field"].startswith("optimizer.")


def test_what_has_its_effect_in_a_group_is_taken() -> None:
    sgd = find("SGD")
    hyper = sgd.normalise({"dampening": 0.5}, groups=[{}, {"momentum": 0.9}])
    assert hyper == {"dampening": 0.5}
    assert find("Momentum").normalise({"dampening": 0.5}) == {"dampening": 0.5}
    assert sgd.normalise({"dampening": 0, "nesterov": False}) == {"dampening": 0, "nesterov": False}


def bounded() -> list[tuple[Entry, str, dict[str, Any]]]:
    return [
        (entry, name, hyper.schema)
        for entry in catalogue.entries()
        for name, hyper in entry.hyperparameters.items()
        if entry.name != "Lookahead" and {"minimum", "exclusiveMinimum"} & hyper.schema.keys()
    ]


@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps"])
def test_what_the_bounds_refuse_the_class_refuses(name: str) -> None:
    tried = 0
    for entry, key, _ in bounded():
        if key == name:
            tried += 1
            with pytest.raises(TorchRefused):
                entry.build([{"params": [stand_in()]}], {**entry.example, key: -1.0}, "default")
    assert tried > 30


GROUPS: list[tuple[str, dict[str, Any], dict[str, Any] | None, str]] = [
    ("Adam", {"lr": -1}, None, "groups[1].lr must be >= 0, got -1"),
    (
        "Adam",
        {"lrr": 1},
        None,
        "groups[1]: 'lrr' is not a hyperparameter of Adam: did you mean lr?",
    ),
    ("Lion", {"maximize": True}, None, "groups[1].maximize: Lion has one maximize for all groups"),
    ("Ranger21", {"num_iterations": 3}, None, "groups[1].num_iterations: Ranger21 has one"),
    ("SGD", {"dampening": 0.5}, {"lr": 0.1}, "groups[1].dampening has no effect while momentum"),
    ("SGD", {"nesterov": True}, {"lr": 0.1}, "groups[1]: Nesterov momentum requires a momentum"),
]


@pytest.mark.parametrize(("name", "overrides", "hyper", "sentence"), GROUPS)
def test_what_a_group_cannot_set_is_refused(
    name: str, overrides: dict[str, Any], hyper: dict[str, Any] | None, sentence: str
) -> None:
    with pytest.raises(OptserveError) as caught:
        find(name).normalise_group(overrides, "groups[1]", hyper)
    assert caught.value.detail.startswith(sentence)


def test_a_group_is_checked_beside_the_sessions_own_hyperparameters() -> None:
    taken = find("SGD").normalise_group({"nesterov": True}, "groups[0]", {"momentum": 0.9})
    assert taken == {"nesterov": True}
    assert find("SGD").normalise_group({"dampening": 0.5}, "groups[0]") == {"dampening": 0.5}


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("Adam", {"lr": -1}, "groups[0].lr must be >= 0, got -1"),
    ("Adam", {"betas": [0.9, 1.0]}, "groups[0].betas[1] must be in [0, 1), got 1.0"),
    ("Adam", {"weight_decay": math.nan}, "groups[0].weight_decay must be a finite number, got NaN"),
    ("Adam", {"amsgrad": True}, "groups[0].amsgrad is fixed when the session is created: the state "
     "of Adam was made with it"),
    ("Adam", {"step": 3}, "groups[0]: 'step' is not a hyperparameter of Adam"),
    ("RMSprop", {"momentum": 0.9}, "groups[0].momentum is fixed when the session is created"),
    ("Adagrad", {"initial_accumulator_value": 1}, "groups[0].initial_accumulator_value is fixed"),
    ("FedAdam", {"eps": 0.1}, "groups[0].eps is fixed when the session is created: the state of "
     "FedAdam was made with it"),
    ("AggMo", {"betas": [0, 0.5, 0.9]}, "groups[0].betas is fixed when the session is created"),
    ("SOAP", {"precondition_1d": True}, "groups[0].precondition_1d is fixed"),
    ("SWATS", {"phase": "sgd"}, "groups[0]: 'phase' is not a hyperparameter of SWATS"),
    ("Ranger21", {"beta0": 0.5}, "groups[0].beta0: Ranger21 has one beta0 for all groups, fixed "
     "when the session is created"),
    ("SGD", {"nesterov": True}, "groups[0]: Nesterov momentum requires a momentum"),
    ("SGD", {"dampening": 0.1}, "groups[0].dampening has no effect while momentum is 0, got 0.1"),
    ("AccSGD", {"xi": 0.0}, "groups[0]: float division by zero"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "sentence"), CHANGES)
def test_changes_of_a_live_group_that_torch_would_not_look_at_are_checked(
    name: str, change: dict[str, Any], sentence: str
) -> None:
    entry = find(name)
    live = entry.build([{"params": [stand_in()]}], entry.example, "default")
    before = dict(live.param_groups[0])
    with pytest.raises(OptserveError) as caught:
        entry.normalise_change(change, "groups[0]", live.param_groups[0])
    assert caught.value.detail.startswith(sentence)
    assert live.param_groups[0] == before


def test_a_change_is_normalised_like_a_create_body() -> None:
    assert find("Adam").normalise_change({"lr": 1, "betas": [0, 0.5]}, "groups[0]") == {
        "lr": 1.0,
        "betas": (0.0, 0.5),
    }
    assert find("Momentum").normalise_change({"momentum": 0}, "groups[0]") == {"momentum": 0.0}
