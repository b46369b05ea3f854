"""The catalogue: names, what is built, and what is shown."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import jsonschema_rs
import pytest
import pytorch_optimizer
import torch

import optserve.optim.adabound
import optserve.optim.fedopt
import optserve.optim.swats  # the lines of torch name them
from optserve.optim import catalogue
from optserve.optim.catalogue import Entry, find
from optserve_client.errors import Invalid, TorchRefused

TORCHS = {
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam",
    "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam",
}  # fmt: skip
NAMED = {
    "SWATS", "Ranger", "Ranger21", "Lookahead", "AdaBelief", "Lion", "Lamb", "LARS", "Yogi", "SOAP",
    "Shampoo", "Prodigy", "ADOPT", "ScheduleFreeAdamW", "ScheduleFreeSGD", "ScheduleFreeRAdam",
    "Momentum", "Nesterov", "AMSGrad", "FedAdam", "FedYogi",
}  # fmt: skip
every_entry = pytest.mark.parametrize("entry", catalogue.entries(), ids=lambda entry: entry.name)


def leaf() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3, 2))


def test_every_class_of_torch_and_every_promised_name_is_listed() -> None:
    own = {
        name
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name != "Optimizer"
    }
    assert own == TORCHS
    names = [entry.name for entry in catalogue.entries()]
    assert own | NAMED <= set(names)
    assert len(names) == len({name.lower() for name in names})


@pytest.mark.parametrize(
    ("spelled", "name"),
    [("adamw", "AdamW"), ("adam_w", "AdamW"), ("sparse_adam", "SparseAdam"), ("rmsprop", "RMSprop"),
     ("Schedule-Free SGD", "ScheduleFreeSGD"), ("ams_grad", "AMSGrad"), ("soap", "SOAP"),
     ("schedule_free", "ScheduleFreeAdamW"), ("fed_yogi", "FedYogi")],
)  # fmt: skip
def test_lower_case_and_snake_case_are_accepted(spelled: str, name: str) -> None:
    assert find(spelled).name == name


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("AdamX", 'optimizer.name "AdamX" is not an optimizer: did you mean Adam'),
        ("", 'optimizer.name "" is not an optimizer: GET /v1/optimizers lists them'),
        ("Fromage", 'optimizer.name "Fromage" is not an optimizer: '),
        ("x" * 9999, 'optimizer.name "xxxx'),
        (7, "optimizer.name must be the name of an optimizer, got 7"),
        (None, "optimizer.name must be the name of an optimizer, got null"),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest(name: Any, sentence: str) -> None:
    with pytest.raises(Invalid) as caught:
        find(name)
    assert caught.value.detail.startswith(sentence)
    assert len(caught.value.detail) < 200


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (7, "optimizer must be a name or an object with a name"),
        ([], "optimizer must be a name or an object with a name"),
        ({}, "optimizer.name is missing; GET /v1/optimizers lists the names"),
        ({"name": 7, "lr": 0.1}, "optimizer.name is missing"),
    ],
)
def test_a_spec_without_a_name_is_refused(spec: Any, sentence: str) -> None:
    with pytest.raises(Invalid, match=sentence):
        catalogue.parse(spec)


def test_a_spec_is_a_name_or_an_object() -> None:
    assert catalogue.parse("adam_w") == (find("AdamW"), {})
    entry, hyper = catalogue.parse({"name": "SGD", "lr": 1, "momentum": 0.9})
    assert (entry.name, hyper) == ("SGD", {"lr": 1.0, "momentum": 0.9})
    assert isinstance(hyper["lr"], float)


@every_entry
def test_what_is_described_is_strict_json_and_says_something_of_everything(entry: Entry) -> None:
    described = json.loads(json.dumps(catalogue.describe(entry), allow_nan=False))
    assert described["meaning"]
    assert described["source"] == entry.source
    properties = described["schema"]["properties"]
    unsaid = {n for n, p in properties.items() if n != "name" and not p["description"]}
    assert unsaid == set()


@every_entry
def test_the_published_schema_takes_what_is_built(entry: Entry) -> None:
    described = catalogue.describe(entry)
    schema = json.loads(json.dumps(described["schema"]))
    validator = jsonschema_rs.validator_for(schema)
    example = described["example"]
    assert validator.is_valid(example)
    assert not validator.is_valid({**example, "no_such": 1})
    defaults = {n: p["default"] for n, p in schema["properties"].items() if "default" in p}
    unlimited = {n for n, value in defaults.items() if value == "Infinity"}
    for name in unlimited:
        del defaults[name]
    assert validator.is_valid({**defaults, **example})
    hyper = entry.normalise({**defaults, **entry.example})
    made = entry.build([{"params": [leaf()]}], hyper, "default")
    assert isinstance(made, torch.optim.Optimizer)


@every_entry
def test_normalising_twice_is_normalising_once_also_through_json(entry: Entry) -> None:
    known = entry.hyperparameters.items()
    given = {n: h.json_default for n, h in known if not h.required and h.default != math.inf}
    once = entry.normalise({**given, **entry.example})
    assert entry.normalise(json.loads(json.dumps(once))) == once


@every_entry
def test_every_default_is_within_the_bounds_that_are_shown(entry: Entry) -> None:
    for name, hyper in entry.hyperparameters.items():
        if not hyper.required and hyper.default != math.inf:
            assert hyper.check(hyper.json_default, name) == (
                hyper.json_default if isinstance(hyper.default, torch.dtype) else hyper.default
            )


@every_entry
@pytest.mark.parametrize("impl", ["auto", "single"])
def test_the_line_of_torch_builds_the_same_optimizer(entry: Entry, impl: str) -> None:
    given = {**entry.example, **({"lr": 0.25} if "lr" in entry.hyperparameters else {})}
    hyper = entry.normalise(given)
    impl = entry.pick_impl(impl, "cpu", "float32", sparse=False)
    served = entry.build([{"params": [leaf()]}], hyper, impl)
    scope = {
        "torch": torch,
        "pytorch_optimizer": pytorch_optimizer,
        "optserve": optserve,
        "params": [leaf()],
    }
    local = eval(entry.torch_line(hyper, impl), scope)  # a line of our own
    if entry.eval_weights:
        local.train()
    assert type(local) is type(served)
    made = [{k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (served, local)]
    assert made[0] == made[1]
    assert served.defaults == local.defaults


def test_the_line_of_torch_holds_what_was_given_and_the_implementation() -> None:
    entry, hyper = catalogue.parse({"name": "AdamW", "lr": 1e-3})
    assert entry.torch_line(hyper, "fused") == "torch.optim.AdamW(params, lr=0.001, fused=True)"
    assert entry.torch_line(hyper, "single") == "torch.optim.AdamW(params, lr=0.001, foreach=False)"
    assert find("Nesterov").torch_line({}, "default") == (
        "torch.optim.SGD(params, momentum=0.9, nesterov=True)"
    )


@pytest.mark.parametrize(
    ("name", "twin", "hyper"),
    [
        ("Momentum", "SGD", {"momentum": 0.9}),
        ("Nesterov", "SGD", {"momentum": 0.9, "nesterov": True}),
        ("AMSGrad", "Adam", {"amsgrad": True}),
    ],
)
def test_a_friendly_name_is_the_class_that_its_meaning_says(
    name: str, twin: str, hyper: dict[str, Any]
) -> None:
    described = catalogue.describe(find(name))
    assert twin in described["meaning"]
    ours = find(name).build([{"params": [leaf()]}], {"lr": 0.1}, "default")
    theirs = getattr(torch.optim, twin)([leaf()], lr=0.1, **hyper)
    assert type(ours) is type(theirs)
    assert ours.defaults == theirs.defaults


@pytest.mark.parametrize(
    ("name", "impl", "device", "dtype", "sparse", "picked"),
    [
        ("AdamW", "auto", "cpu", "float32", False, "fused"),
        ("AdamW", "auto", "cuda:1", "bfloat16", False, "fused"),
        ("AdamW", "auto", "mps", "float32", False, "default"),
        ("SGD", "auto", "cpu", "float32", True, "default"),
        ("SGD", "foreach", "cpu", "float32", True, "foreach"),
        ("RMSprop", "auto", "cpu", "float64", False, "default"),
        ("RMSprop", "foreach", "cpu", "float64", False, "foreach"),
        ("Lion", "auto", "cpu", "float32", False, "default"),
        ("FlashAdamW", "auto", "cpu", "float32", False, "default"),
        ("Muon", "single", "cpu", "float32", False, "single"),
    ],
)
def test_auto_is_fused_where_there_is_such_a_thing(
    name: str, impl: str, device: str, dtype: str, sparse: bool, picked: str
) -> None:
    assert find(name).pick_impl(impl, device, dtype, sparse) == picked


@pytest.mark.parametrize(
    ("name", "device", "sparse", "sentence"),
    [
        (
            "RMSprop",
            "cpu",
            False,
            "impl must be auto or single or foreach with RMSprop, got 'fused'",
        ),
        ("SGD", "cpu", True, "impl: fused does not take sparse gradients"),
        ("SGD", "meta", False, "impl: fused is not there for float32 on meta"),
    ],
)
def test_an_implementation_that_is_not_there_is_refused(
    name: str, device: str, sparse: bool, sentence: str
) -> None:
    with pytest.raises(Invalid) as caught:
        find(name).pick_impl("fused", device, "float32", sparse)
    assert caught.value.detail == sentence


def test_what_a_class_refuses_is_answered_with_its_sentence() -> None:
    with pytest.raises(TorchRefused, match=r"^Nesterov momentum requires a momentum and zero"):
        find("SGD").build([{"params": [leaf()]}], {"nesterov": True}, "default")
    with pytest.raises(TorchRefused, match=r"^learning rate must be positive"):
        find("Lion").build([{"params": [leaf()]}], {"lr": -1.0}, "default")


def test_dtypes_are_given_by_name() -> None:
    made = find("FAdam").build([{"params": [leaf()]}], {"momentum_dtype": "float64"}, "default")
    assert made.momentum_dtype is torch.float64  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name", ["ScheduleFreeAdamW", "ScheduleFreeSGD", "ScheduleFreeRAdam", "SPlus"]
)
def test_eval_weights_are_the_librarys_and_leave_every_bit_of_the_live_ones(name: str) -> None:
    assert find(name).eval_weights
    params, twins = [leaf(), leaf()], [leaf(), leaf()]
    served = find(name).build([{"params": params}], {"lr": 0.1}, "default")
    local = getattr(pytorch_optimizer, name)(twins, lr=0.1)
    local.train()
    assert torch.equal(catalogue.eval_params(served, params)[0], torch.ones(3, 2))
    for i in range(6):
        for (param, _), optimizer in ((params, served), (twins, local)):
            param.grad = torch.linspace(-1, 1, 6).view(3, 2) * (i + 1)
            optimizer.step()
        shown = catalogue.eval_params(served, params)
        assert torch.equal(params[0], twins[0])
    assert not torch.equal(shown[0], params[0])
    assert torch.equal(shown[1], params[1])  # it never had a gradient
    assert [p is q for p, q in zip(served.param_groups[0]["params"], params, strict=True)] == [1, 1]
    local.param_groups[0]["params"] = twins[:1]
    local.eval()
    assert torch.equal(shown[0], twins[0])


def test_importing_the_catalogue_does_not_import_pytorch_optimizer() -> None:
    code = (
        "import sys; from optserve.optim import catalogue; catalogue.find('Lion');"
        "catalogue.describe(catalogue.find('AdamW')); catalogue.entries();"
        "sys.exit('pytorch_optimizer' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
