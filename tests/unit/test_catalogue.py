"""The catalogue: names, hyperparameters and their sentences, what is built, what is shown."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import jsonschema_rs
import pytest
import pytorch_optimizer
import torch

from optserve.optim import catalogue
from optserve.optim.catalogue import find
from optserve_client.errors import Invalid, OptserveError, TorchRefused

TORCHS = [
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam",
    "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam",
]  # fmt: skip
NAMED = [
    "SWATS", "Ranger", "Ranger21", "Lookahead", "AdaBelief", "Lion", "Lamb", "LARS", "Yogi", "SOAP",
    "Shampoo", "Prodigy", "ADOPT", "ScheduleFreeAdamW", "ScheduleFreeSGD", "ScheduleFreeRAdam",
    "Momentum", "Nesterov", "AMSGrad",
]  # fmt: skip
MINIMAL: dict[str, dict[str, Any]] = {
    "Ranger21": {"num_iterations": 10},
    "Lookahead": {"optimizer": {"name": "AdamW", "lr": 0.001}},
}


def leaf() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3, 2))


def test_every_class_of_torch_is_listed() -> None:
    own = {
        name
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name != "Optimizer"
    }
    assert own == set(TORCHS)
    assert own | set(NAMED) <= {entry.name for entry in catalogue.entries()}


@pytest.mark.parametrize(
    ("spelled", "name"),
    [("adamw", "AdamW"), ("adam_w", "AdamW"), ("sparse_adam", "SparseAdam"), ("rmsprop", "RMSprop"),
     ("schedule_free", "ScheduleFreeAdamW"), ("amsgrad", "AMSGrad"), ("soap", "SOAP")],
)  # fmt: skip
def test_lower_case_and_snake_case_are_accepted(spelled: str, name: str) -> None:
    assert find(spelled).name == name


def test_an_unknown_name_is_answered_with_the_closest() -> None:
    with pytest.raises(Invalid) as caught:
        find("AdamX")
    assert caught.value.detail.startswith(
        "optimizer.name: unknown optimizer 'AdamX'; closest: Adam"
    )


@pytest.mark.parametrize("entry", catalogue.entries(), ids=lambda entry: entry.name)
def test_what_is_described_is_strict_json_and_its_schema_takes_what_is_built(
    entry: catalogue.Entry,
) -> None:
    described = json.loads(json.dumps(catalogue.describe(entry), allow_nan=False))
    assert described["meaning"]
    validator = jsonschema_rs.validator_for(described["schema"])
    minimal = MINIMAL.get(entry.name, {})
    assert validator.is_valid({"name": entry.name, **minimal})
    assert not validator.is_valid({"name": entry.name, **minimal, "no_such": 1})
    entry.build([{"params": [leaf()]}], entry.normalise(minimal), "default")


@pytest.mark.parametrize("entry", catalogue.entries(), ids=lambda entry: entry.name)
def test_the_line_of_torch_builds_the_same_optimizer(entry: catalogue.Entry) -> None:
    hyper = entry.normalise(MINIMAL.get(entry.name, {"lr": 0.25}))
    impl = entry.pick_impl("auto", "cpu", "float32", sparse=False)
    served = entry.build([{"params": [leaf()]}], hyper, impl)
    line = entry.torch_line(hyper, impl)
    import optserve.optim.swats  # noqa: F401 - the line names it

    scope = {
        "torch": torch,
        "pytorch_optimizer": pytorch_optimizer,
        "optserve": sys.modules["optserve"],
        "params": [leaf()],
    }
    local = eval(line, scope)  # the test's own line, of a fixed table
    assert type(local) is type(served)
    plain = [{k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (served, local)]
    if entry.eval_weights:
        plain[0].pop("train_mode"), plain[1].pop("train_mode")
    assert plain[0] == plain[1]


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("Adam", {"lr": -1}, "optimizer.lr must be a number >= 0, got -1"),
    ("Adam", {"lr": True}, "optimizer.lr must be a number >= 0, got True"),
    ("Adam", {"lr": "0.1"}, "optimizer.lr must be a number >= 0, got '0.1'"),
    ("Adam", {"lr": float("inf")}, "optimizer.lr must be a number >= 0, got inf"),
    ("Adam", {"lr": None}, "optimizer.lr must be a number >= 0, got None"),
    ("Adam", {"betas": [0.9]}, "optimizer.betas must be a list of 2 numbers, got [0.9]"),
    ("Adam", {"betas": [1.2, 0.9]}, "optimizer.betas[0] must be a number in [0, 1), got 1.2"),
    ("Adam", {"amsgrad": 1}, "optimizer.amsgrad must be true or false, got 1"),
    ("Adam", {"lrr": 1}, "optimizer: unknown hyperparameter 'lrr' (did you mean 'lr'?)"),
    ("Adam", {"decoupled_weight_decay": "x"}, "optimizer.decoupled_weight_decay must be true or "
     "false, got 'x'"),
    ("AdamW", {"fused": True}, "optimizer.fused is not a hyperparameter: choose the implementation "
     "with impl"),
    ("LBFGS", {"line_search_fn": "weak"}, "optimizer.line_search_fn must be one of strong_wolfe, "
     "got 'weak'"),
    ("LBFGS", {"history_size": 1.5}, "optimizer.history_size must be an integer in [1, 10000], "
     "got 1.5"),
    ("SGD", {"dampening": 0.5}, "optimizer.dampening has no effect without momentum"),
    ("Ranger21", {}, "optimizer.num_iterations is missing: Ranger21 needs it"),
    ("Nesterov", {"nesterov": False}, "optimizer: unknown hyperparameter 'nesterov'"),
    ("Lookahead", {}, "optimizer.optimizer must be a name or an object with a name, got None"),
    ("Lookahead", {"optimizer": "LBFGS"}, "optimizer.optimizer: Lookahead does not wrap LBFGS"),
    ("Lookahead", {"optimizer": {"name": "Adam", "lr": -1}}, "optimizer.optimizer.lr must be a "
     "number >= 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "hyper", "sentence"), BAD)
def test_bad_hyperparameters_are_named(name: str, hyper: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Invalid) as caught:
        find(name).normalise(hyper)
    assert caught.value.detail == sentence


def test_what_torch_refuses_is_answered_with_its_sentence() -> None:
    with pytest.raises(TorchRefused, match="Nesterov momentum requires a momentum"):
        find("SGD").build([{"params": [leaf()]}], {"nesterov": True}, "default")


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("Adam", {"amsgrad": True}, "groups[0].amsgrad is fixed when the session is created: the "
         "state of Adam depends on it"),
        ("RMSprop", {"momentum": 0.9}, "groups[0].momentum is fixed when the session is created: "
         "the state of RMSprop depends on it"),
        ("Adam", {"betas": [0.9, 1.0]}, "groups[0].betas[1] must be a number in [0, 1), got 1.0"),
        ("Ranger21", {"beta0": 0.5}, "groups[0].beta0: Ranger21 has one beta0 for all groups"),
    ],
)  # fmt: skip
def test_changes_of_a_group_that_torch_would_not_look_at_are_checked(
    name: str, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(OptserveError) as caught:
        find(name).normalise_change(change, "groups[0]")
    assert caught.value.detail == sentence


@pytest.mark.parametrize(
    ("name", "impl", "device", "sparse", "picked"),
    [
        ("AdamW", "auto", "cpu", False, "fused"),
        ("AdamW", "auto", "cuda", False, "fused"),
        ("SGD", "auto", "cpu", True, "default"),
        ("RMSprop", "auto", "cpu", False, "default"),
        ("RMSprop", "foreach", "cpu", False, "foreach"),
        ("Lion", "auto", "cpu", False, "default"),
        ("Muon", "single", "cpu", False, "single"),
    ],
)
def test_auto_is_fused_where_there_is_such_a_thing(
    name: str, impl: str, device: str, sparse: bool, picked: str
) -> None:
    assert find(name).pick_impl(impl, device, "float32", sparse) == picked


def test_an_implementation_that_the_class_lacks_is_refused() -> None:
    with pytest.raises(Invalid, match="impl must be auto or one of single, foreach, got 'fused'"):
        find("RMSprop").pick_impl("fused", "cpu", "float32", sparse=False)
    with pytest.raises(Invalid, match="fused does not take sparse gradients"):
        find("SGD").pick_impl("fused", "cpu", "float32", sparse=True)


def test_eval_weights_leave_every_bit_of_the_live_ones() -> None:
    params = [leaf()]
    served = find("ScheduleFree").build([{"params": params}], {"lr": 0.1}, "default")
    twins = [leaf()]
    local = pytorch_optimizer.ScheduleFreeAdamW(twins, lr=0.1)
    local.train()
    for i in range(6):
        for param, optimizer in ((params[0], served), (twins[0], local)):
            param.grad = torch.full((3, 2), 0.1 * (i + 1))
            optimizer.step()
        shown = catalogue.eval_params(served, params)
        assert torch.equal(params[0], twins[0])
    local.eval()
    assert torch.equal(shown[0], twins[0])


def test_importing_the_catalogue_does_not_import_pytorch_optimizer() -> None:
    code = (
        "import sys; from optserve.optim import catalogue; catalogue.find('AdamW').hyperparameters;"
        "catalogue.entries(); sys.exit('pytorch_optimizer' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
