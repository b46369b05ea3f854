"""Training loops as people write them, run with torch's optimizer and with RemoteOptimizer."""

from __future__ import annotations

import io
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from optserve_client import Client, TopK, errors
from optserve_client.torch import RemoteOptimizer
from tests.serving import ServerProcess

Make = Callable[..., torch.optim.Optimizer]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url) as connected:
        yield connected


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1, bias=False)
    ).to(dtype)


def loss_of(net: torch.nn.Module, i: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    data = torch.Generator().manual_seed(i)
    x = torch.randn(8, 5, generator=data).to(dtype)
    y = torch.randn(8, 1, generator=data).to(dtype)
    return torch.nn.functional.mse_loss(net(x), y)


def train_step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    optimizer.zero_grad()
    loss_of(net, i, next(net.parameters()).dtype).backward()
    optimizer.step()


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def pair(
    client: Client, name: str, params: Any = None, dtype: torch.dtype = torch.float32, **hyper: Any
) -> tuple[torch.nn.Module, Any, torch.nn.Module, RemoteOptimizer]:
    """Return a model with torch's optimizer and its double with ours; implementation ``single``."""
    params = params or (lambda net: net.parameters())
    local, served = model(dtype), model(dtype)
    one = getattr(torch.optim, name)(params(local), **hyper, **SINGLE.get(name, {"foreach": False}))
    other = RemoteOptimizer(params(served), name, client=client, session=IMPL.get(name), **hyper)
    return local, one, served, other


#: Without an implementation flag: LBFGS and SparseAdam have none, Muon neither.
SINGLE: dict[str, dict[str, Any]] = {"LBFGS": {}, "SparseAdam": {}}
HAVE_SINGLE = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Rprop"]
IMPL = {name: {"impl": "single"} for name in HAVE_SINGLE}


@pytest.mark.parametrize(
    "name, hyper",
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
        ("Adam", {"lr": 0.01, "amsgrad": True}),
        ("AdamW", {"lr": 0.01, "betas": (0.8, 0.95)}),
        ("RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.5}),
        ("Adagrad", {"lr": 0.1, "lr_decay": 0.01}),
        ("NAdam", {}),
        ("Rprop", {"etas": (0.4, 1.3)}),
    ],
)
def test_an_unchanged_loop_trains_bit_for_bit_the_same(
    client: Client, name: str, hyper: dict[str, Any]
) -> None:
    local, one, served, other = pair(client, name, **hyper)
    assert isinstance(other, torch.optim.Optimizer)
    for i in range(6):
        train_step(local, one, i)
        train_step(served, other, i)
        same(local, served)


def groups(net: Any) -> list[dict[str, Any]]:
    return [
        {"params": [net[0].weight, net[2].weight], "lr": 0.05, "name": "weights"},
        {"params": [net[0].bias], "weight_decay": 0.0},
    ]


def test_groups_have_their_own_hyperparameters(client: Client) -> None:
    local, one, served, other = pair(client, "AdamW", groups, lr=0.01, weight_decay=0.1)
    for i in range(4):
        train_step(local, one, i)
        train_step(served, other, i)
        same(local, served)
    shown = other.session.status()["groups"]
    assert [(g["lr"], g["weight_decay"]) for g in shown] == [(0.05, 0.1), (0.01, 0.0)]
    assert other.param_groups[0]["name"] == "weights"


def test_named_parameters_name_the_parameters_of_the_session(client: Client) -> None:
    local, one, served, other = pair(client, "SGD", lambda net: net.named_parameters(), lr=0.1)
    train_step(local, one, 0)
    train_step(served, other, 0)
    same(local, served)
    assert list(other.session.params()) == ["0.weight", "0.bias", "2.weight"]


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (epoch + 1)),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=True),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("name, hyper", [("SGD", {"momentum": 0.9}), ("AdamW", {})])
def test_torchs_own_schedulers_drive_it(
    client: Client, name: str, hyper: dict[str, Any], schedule: Callable[[Any], Any]
) -> None:
    local, one, served, other = pair(client, name, groups, lr=0.01, **hyper)
    first, second = schedule(one), schedule(other)
    metrics = [1.0] if isinstance(first, lr_scheduler.ReduceLROnPlateau) else []
    for i in range(7):
        train_step(local, one, i)
        train_step(served, other, i)
        first.step(*metrics)
        second.step(*metrics)
        assert [g["lr"] for g in one.param_groups] == [g["lr"] for g in other.param_groups]
        same(local, served)


def test_a_scheduler_of_the_server_shows_in_the_param_groups(client: Client) -> None:
    net = model()
    schedule = {"name": "ExponentialLR", "gamma": 0.5, "advance": "step"}
    remote = RemoteOptimizer(
        net.parameters(), "SGD", lr=1.0, client=client, session={"scheduler": schedule}
    )
    seen = []
    for i in range(3):
        seen.append(remote.param_groups[0]["lr"])
        train_step(net, remote, i)
    assert seen == [1.0, 0.5, 0.25]
    assert [row["lr"] for row in remote.session.history()] == [[1.0], [0.5], [0.25]]


def test_a_checkpoint_goes_on_bit_for_bit_in_another_optimizer(client: Client) -> None:
    local, one, served, other = pair(client, "AdamW", groups, lr=0.01)
    first, second = lr_scheduler.StepLR(one, 2, 0.5), lr_scheduler.StepLR(other, 2, 0.5)
    for i in range(3):
        train_step(local, one, i)
        train_step(served, other, i)
        first.step()
        second.step()
    file = io.BytesIO()
    torch.save({"model": served.state_dict(), "optimizer": other.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    net = model()
    resumed = RemoteOptimizer(groups(net), "AdamW", lr=0.5, client=client, session=IMPL["AdamW"])
    net.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    again = lr_scheduler.StepLR(resumed, 2, 0.5)
    again.load_state_dict(second.state_dict())
    for i in range(3, 8):
        train_step(local, one, i)
        train_step(net, resumed, i)
        first.step()
        again.step()
        same(local, net)


def test_loading_only_the_optimizer_keeps_the_models_parameters_as_torch_does(
    client: Client,
) -> None:
    local, one, served, other = pair(client, "Adam", lr=0.01)
    saved = [one.state_dict(), other.state_dict()]
    for i in range(3):
        train_step(local, one, i)
        train_step(served, other, i)
        saved = [one.state_dict(), other.state_dict()] if i == 1 else saved
        if i == 1:
            saved = [pickle.loads(pickle.dumps(state)) for state in saved]
    one.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for i in range(3, 6):
        train_step(local, one, i)
        train_step(served, other, i)
        same(local, served)


def test_a_state_dict_of_something_else_is_refused(client: Client) -> None:
    _, one, served, other = pair(client, "Adam", lr=0.01)
    with pytest.raises(ValueError, match="this is not the state_dict of a RemoteOptimizer"):
        other.load_state_dict(one.state_dict())
    named = RemoteOptimizer(served.named_parameters(), "Adam", client=client)
    with pytest.raises(ValueError, match="the state_dict has other parameters: '0' is not in both"):
        named.load_state_dict(other.state_dict())


def test_the_state_of_another_optimizer_is_refused_before_the_server_is_touched(
    client: Client,
) -> None:
    def remote(name: Any, *shapes: tuple[int, ...], groups: bool = False) -> RemoteOptimizer:
        ps = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        params: Any = [{"params": [p]} for p in ps] if groups else ps
        return RemoteOptimizer(params, name, lr=0.1, client=client)

    other = remote("Adam", (2,), (3,))
    before = other.session.status()
    wrapped = {"name": "Lookahead", "optimizer": {"name": "SGD"}}
    for state, sentence in [
        (remote("AdamW", (2,), (3,)), "the state_dict is of AdamW, this optimizer is Adam"),
        (remote("Adam", (2,), (4,)), r"has '1' in the shape \[4\], the optimizer in \[3\]"),
        (remote("Adam", (2,)), "has other parameters: '1' is not in both"),
        (remote("Adam", (2,), (3,), groups=True), r"groups of \[1, 1\].*the optimizer of \[2\]"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            other.load_state_dict(state.state_dict())
    ps = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    ahead = RemoteOptimizer(ps, wrapped, client=client)
    with pytest.raises(ValueError, match=r"is of Lookahead\(SGD\), this optimizer is Adam"):
        other.load_state_dict(ahead.state_dict())
    assert other.session.status() == before


def test_a_group_is_added_in_the_middle(client: Client) -> None:
    local, one, served, other = pair(client, "Adam", lambda net: [net[2].weight], lr=0.01)
    for i in range(6):
        if i == 2:
            one.add_param_group({"params": local[0].parameters(), "lr": 0.05})
            other.add_param_group({"params": served[0].parameters(), "lr": 0.05})
        train_step(local, one, i)
        train_step(served, other, i)
        same(local, served)
    assert len(other.session.params()) == 3


def test_a_group_that_the_server_refuses_is_not_added(client: Client) -> None:
    _, _, served, other = pair(client, "Adam", lambda net: [net[2].weight], lr=0.01)
    with pytest.raises(errors.Invalid, match="is float64"):
        other.add_param_group({"params": torch.nn.Linear(2, 2).double().parameters()})
    assert len(other.param_groups) == 1
    train_step(served, other, 0)


def test_a_closure_gives_the_loss(client: Client) -> None:
    local, one, served, other = pair(client, "SGD", lr=0.1)

    def closure(net: torch.nn.Module, optimizer: Any, i: int) -> Callable[[], torch.Tensor]:
        def evaluate() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, i)
            loss.backward()
            return loss

        return evaluate

    for i in range(3):
        ours, theirs = other.step(closure(served, other, i)), one.step(closure(local, one, i))
        assert ours == theirs
        same(local, served)
    assert other.session.history()[-1]["loss"] == float(theirs.detach())


def test_a_loss_is_reported_without_a_closure(client: Client) -> None:
    net = model()
    plateau = {"name": "ReduceLROnPlateau", "patience": 0, "advance": "step", "monitor": "loss"}
    session = {"scheduler": plateau, "best": {"monitor": "loss"}}
    optimizer = RemoteOptimizer(net.parameters(), "SGD", lr=0.1, client=client, session=session)
    given: list[Any] = [3.0, torch.tensor(1.0), torch.tensor([2.0], requires_grad=True)]
    for i, loss in enumerate(given):
        loss_of(net, i).backward()
        assert optimizer.step(loss=loss, metrics={"acc": torch.tensor(0.5 * i)}) is None
    history = optimizer.session.history()
    assert [row["loss"] for row in history] == [3.0, 1.0, 2.0]
    assert [row["metrics"] for row in history] == [{"acc": 0.0}, {"acc": 0.5}, {"acc": 1.0}]
    assert optimizer.session.status()["best"] == {"value": 1.0, "version": 1}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_loss_goes_through_the_wrappers_of_torchs_scheduler_and_grad_scaler(
    client: Client,
) -> None:
    net = model()
    optimizer = RemoteOptimizer(net.parameters(), "SGD", lr=0.1, client=client)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i, factor in enumerate((1.0, float("inf"), 1.0)):  # torch skips the second one here
        optimizer.zero_grad()
        loss = loss_of(net, i) * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer, loss=loss)
        scaler.update()
    optimizer.step(loss=float("nan"))
    scheduler.step()
    losses = [row["loss"] for row in optimizer.session.history()]
    assert len(losses) == 3
    assert None not in losses[:2]
    assert losses[2] is None


def test_a_loss_of_another_kind_is_refused(client: Client) -> None:
    optimizer: Any = RemoteOptimizer(model().parameters(), "SGD", lr=0.1, client=client)
    with pytest.raises(TypeError, match=r"loss must be a number or a tensor with one.*\[2\]"):
        optimizer.step(loss=torch.ones(2))
    with pytest.raises(TypeError, match=r"metrics\['a'\] must be a number or a tensor"):
        optimizer.step(metrics={"a": torch.ones(2)})
    with pytest.raises(TypeError, match="the loss is given twice"):
        optimizer.step(lambda: 1.0, loss=1.0)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_calls_the_closure_as_often_as_torch_does(
    client: Client, line_search: str | None
) -> None:
    local, one, served, other = pair(client, "LBFGS", lr=0.5, line_search_fn=line_search)
    calls = {"local": 0, "served": 0}

    def closure(key: str, net: torch.nn.Module, optimizer: Any) -> Callable[[], torch.Tensor]:
        def evaluate() -> torch.Tensor:
            calls[key] += 1
            optimizer.zero_grad()
            loss = loss_of(net, 0)
            loss.backward()
            return loss

        return evaluate

    for _ in range(3):
        theirs = one.step(closure("local", local, one))
        ours = other.step(closure("served", served, other))
        assert ours == theirs
        same(local, served)
    assert calls["local"] == calls["served"]


def test_lbfgs_wants_a_closure(client: Client) -> None:
    _, _, _, other = pair(client, "LBFGS")
    with pytest.raises(TypeError, match=r"LBFGS needs a closure: step\(closure\)"):
        other.step()


def test_a_line_search_that_a_closure_broke_off_is_abandoned(client: Client) -> None:
    local, one, served, other = pair(client, "LBFGS", lr=0.5)
    left = 3

    def breaks() -> torch.Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError("no more")
        other.zero_grad()
        loss = loss_of(served, 0)
        loss.backward()
        return loss

    def evaluate(net: torch.nn.Module, optimizer: Any) -> Callable[[], torch.Tensor]:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, 0)
            loss.backward()
            return loss

        return closure

    with pytest.raises(RuntimeError, match="no more"):
        other.step(breaks)
    with torch.no_grad():
        for p, q in zip(local.parameters(), served.parameters(), strict=True):
            p.copy_(q)
    for _ in range(2):
        one.step(evaluate(local, one))
        other.step(evaluate(served, other))
        same(local, served)


def test_parameters_without_a_gradient_are_left_alone(client: Client) -> None:
    local, one, served, other = pair(client, "Adam", lr=0.1)
    for i in range(4):
        for net, optimizer in ((local, one), (served, other)):
            optimizer.zero_grad()
            loss_of(net, i).backward()
            if i % 2:
                net[0].weight.grad = None
            optimizer.step()
        same(local, served)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name, sparse", [("SparseAdam", None), ("SGD", ["0"]), ("Adagrad", ["0"])])
def test_sparse_gradients_of_an_embedding(
    client: Client, name: str, sparse: list[str] | None
) -> None:
    def embedding() -> torch.nn.Embedding:
        torch.manual_seed(0)
        return torch.nn.Embedding(11, 4, sparse=True)

    local, served = embedding(), embedding()
    flags = {} if name == "SparseAdam" else {"foreach": False}
    one = getattr(torch.optim, name)(local.parameters(), lr=0.1, **flags)
    other = RemoteOptimizer(
        served.parameters(), name, lr=0.1, client=client, sparse=sparse, session=IMPL.get(name)
    )
    for i in range(4):
        for net, optimizer in ((local, one), (served, other)):
            optimizer.zero_grad()
            net(torch.tensor([i, 3, 3, 10])).square().sum().backward()
            assert net.weight.grad is not None
            net.weight.grad = net.weight.grad.coalesce()  # the server sums duplicates first
            optimizer.step()
        same(local, served)


def test_bfloat16_parameters(client: Client) -> None:
    local, one, served, other = pair(client, "AdamW", dtype=torch.bfloat16, lr=0.01)
    for i in range(4):
        train_step(local, one, i)
        train_step(served, other, i)
        same(local, served)


def test_bfloat16_parameters_with_float32_on_the_server_keep_the_precision(client: Client) -> None:
    master, one, served, other = *pair(client, "SGD", lr=1e-4)[:2], None, None
    served = model().to(torch.bfloat16)
    with torch.no_grad():
        for p, q in zip(master.parameters(), served.parameters(), strict=True):
            p.copy_(q)
    other = RemoteOptimizer(
        served.parameters(),
        "SGD",
        lr=1e-4,
        client=client,
        session={"dtype": "float32", "impl": "single"},
    )
    for i in range(20):
        other.zero_grad()
        loss_of(served, i, torch.bfloat16).backward()
        for p, q in zip(master.parameters(), served.parameters(), strict=True):
            assert q.grad is not None
            p.grad = q.grad.float()
        one.step()
        other.step()
        for p, q in zip(master.parameters(), served.parameters(), strict=True):
            assert torch.equal(p.to(torch.bfloat16), q)


EDITS: dict[str, Callable[[Any, Any], None]] = {
    "load_state_dict": lambda net, other: net.load_state_dict(other.state_dict()),
    "in place": lambda net, _: net[0].weight.detach().mul_(0.5),
    "clamped as data": lambda net, _: net[0].weight.data.clamp_(-0.1, 0.1),
    "replaced as data": lambda net, _: setattr(
        net[0].weight, "data", torch.full_like(net[0].weight, 0.25)
    ),
}


#: The version counter does not see the one that is left out, so it is not the default.
SEEN = [("content", name) for name in EDITS]
SEEN += [("version", name) for name in EDITS if name != "clamped as data"]


@pytest.mark.parametrize("edits, name", SEEN)
def test_what_is_changed_between_steps_counts(client: Client, edits: Any, name: str) -> None:
    edit = EDITS[name]
    donor = torch.nn.Sequential(*model()).double().float()
    with torch.no_grad():
        for p in donor.parameters():
            p.mul_(2)
    local, served = model(), model()
    one = torch.optim.Adam(local.parameters(), lr=0.1, foreach=False)
    other = RemoteOptimizer(
        served.parameters(), "Adam", lr=0.1, client=client, edits=edits, session=IMPL["Adam"]
    )
    for i in range(6):
        if i in (0, 3):
            edit(local, donor)
            edit(served, donor)
        train_step(local, one, i)
        train_step(served, other, i)
        same(local, served)


def test_training_goes_on_from_the_session_of_another_program(client: Client) -> None:
    name = f"shared-{random.getrandbits(60)}"
    local, one, served, _ = pair(client, "Adam", lr=0.1)
    first = RemoteOptimizer(
        served.parameters(), "Adam", lr=0.1, client=client, session_id=name, session=IMPL["Adam"]
    )
    for i in range(3):
        train_step(local, one, i)
        train_step(served, first, i)
    other = model()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    with Client(client._server) as another:
        second = RemoteOptimizer(
            other.parameters(),
            "Adam",
            lr=0.1,
            client=another,
            session_id=name,
            session=IMPL["Adam"],
        )
        same(local, other)
        for i in range(3, 6):
            train_step(local, one, i)
            train_step(other, second, i)
            same(local, other)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "Lookahead", "optimizer": {"name": "AdamW", "lr": 0.1}, "k": 2},
        {"name": "Lion", "lr": 0.1},
        {"name": "SWATS", "lr": 0.1},
    ],
    ids=lambda spec: spec["name"],
)
def test_optimizers_that_torch_does_not_have_are_driven_too(
    client: Client, spec: dict[str, Any]
) -> None:
    net = model()
    remote = RemoteOptimizer(net.parameters(), spec, client=client)
    schedule = lr_scheduler.StepLR(remote, 1, 0.5)
    for i in range(3):
        train_step(net, remote, i)
        schedule.step()
    assert [row["lr"] for row in remote.session.history()] == [[0.1], [0.05], [0.025]]
    served = remote.session.params()
    assert all(
        torch.equal(p, torch.from_numpy(served[str(i)])) for i, p in enumerate(net.parameters())
    )


def test_server_options_of_the_session_work(client: Client) -> None:
    net = model()
    remote = RemoteOptimizer(
        net.parameters(),
        "SGD",
        lr=0.1,
        client=client,
        session={"clip_grad_norm": 0.01, "ema": {"decay": 0.9}, "name": "mine"},
    )
    before = torch.nn.utils.parameters_to_vector(net.parameters()).clone()
    train_step(net, remote, 0)
    moved = torch.nn.utils.parameters_to_vector(net.parameters()) - before
    assert float(moved.detach().norm()) == pytest.approx(0.001, rel=1e-3)
    assert remote.session.status()["name"] == "mine"
    assert remote.session.params("ema").version == 1


def test_repr_names_optimizer_and_session(client: Client) -> None:
    remote = RemoteOptimizer(model().parameters(), "AdamW", lr=0.5, client=client)
    text = repr(remote)
    assert text.startswith(
        f"RemoteOptimizer[AdamW, session {remote.session.id!r}] (\nParameter Group 0"
    )
    assert "lr: 0.5" in text


def test_it_cannot_be_pickled(client: Client) -> None:
    remote = RemoteOptimizer(model().parameters(), "SGD", client=client)
    with pytest.raises(TypeError, match=r"cannot be pickled: save its state_dict\(\)"):
        pickle.dumps(remote)


@pytest.mark.parametrize(
    "name, hyper, sentence",
    [
        ("Adamm", {}, "Adam"),
        ("AdamW", {"lr": -1.0}, r"-1\.0"),
        ("AdamW", {"learning_rate": 1.0}, "learning_rate"),
        ("AdamW", {"fused": True}, "impl"),
    ],
)
def test_what_the_server_refuses_is_refused_by_the_constructor(
    client: Client, name: str, hyper: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(errors.RequestError, match=sentence):
        RemoteOptimizer(model().parameters(), name, client=client, **hyper)


def test_an_unknown_optimizer_is_the_same_error_as_in_create(client: Client) -> None:
    with pytest.raises(errors.Invalid) as one:
        RemoteOptimizer(model().parameters(), "Adamm", client=client)
    with pytest.raises(errors.Invalid) as other:
        client.create("Adamm", {"w": [1.0]})
    assert one.value.detail == other.value.detail


@pytest.mark.parametrize(
    "field, value",
    [("clip_grad_norm", 1.0), ("scheduler", {"name": "ExponentialLR"}), ("tags", {"a": "b"})],
)
def test_a_field_of_the_session_among_the_hyperparameters_is_pointed_out(
    client: Client, field: str, value: Any
) -> None:
    sentence = rf"{field} is a field of the session and no .* of Adam: use session=\{{'{field}': "
    with pytest.raises(errors.Invalid, match=sentence):
        RemoteOptimizer(model().parameters(), "Adam", client=client, **{field: value})


@pytest.mark.parametrize("wrong", ["http://127.0.0.1:8000", None])
def test_a_client_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"client must be an optserve_client\.Client.*, got "):
        RemoteOptimizer(model().parameters(), "Adam", client=wrong)


def test_hooks_of_torch_run(client: Client) -> None:
    net, calls = model(), []
    remote = RemoteOptimizer(net.parameters(), "SGD", lr=0.1, client=client)
    remote.register_step_pre_hook(lambda *_: calls.append("before"))
    remote.register_step_post_hook(lambda *_: calls.append("after"))
    train_step(net, remote, 0)
    assert calls == ["before", "after"]


def test_without_torch_the_import_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "try:\n    import optserve_client.torch\n"
        "except ModuleNotFoundError as exc:\n    print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("pip install 'optserve-client[torch]'"), done.stderr


@pytest.mark.parametrize("lr", [np.float64(0.5), torch.tensor(0.5), 0.5])
def test_hyperparameters_of_any_kind_of_number_are_sent(client: Client, lr: Any) -> None:
    net = model()
    remote = RemoteOptimizer(net.parameters(), "SGD", lr=lr, client=client)
    remote.param_groups[0]["momentum"] = lr
    train_step(net, remote, 0)
    [group] = remote.session.status()["groups"]
    assert (group["lr"], group["momentum"]) == (0.5, 0.5)


def test_gradients_are_sent_compressed_and_what_is_not_sent_is_not_lost(client: Client) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(100, 50)
    start = {name: p.detach().numpy().copy() for name, p in net.named_parameters()}
    session = client.create("SGD", start, lr=0.1)
    optimizer = RemoteOptimizer(
        net.named_parameters(), "SGD", lr=0.1, client=client, compress=TopK(0.1)
    )
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(8, 100)).square().mean().backward()
        optimizer.step()
        grads: dict[str, Any] = {name: p.grad for name, p in net.named_parameters()}
        whole = {name: grad.numpy() for name, grad in grads.items()}
        result = session.step(whole, compress=TopK(0.1))
    assert result.params is not None
    for name, p in net.named_parameters():
        np.testing.assert_array_equal(p.detach().numpy(), result.params[name])
