"""Training loops of several workers, each with a replica of the model, beside one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from optserve_client import Client, Worker, errors
from optserve_client.torch import RemoteOptimizer
from tests.serving import ServerProcess

NAMES = ["w1", "w10", "w2"]  # in byte order
ROUNDS = 6

Loop = Callable[[Client, int], Any]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url) as connected:
        yield connected


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    # Not by torch's own generator: the workers are threads here.
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))
    values = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=values) / 2)
    return net.to(dtype)


def loss_of(net: torch.nn.Module, *seed: int) -> torch.Tensor:
    data = torch.Generator().manual_seed(sum(s * 1000**i for i, s in enumerate(seed)))
    x, y = torch.randn(8, 5, generator=data), torch.randn(8, 1, generator=data)
    dtype = next(net.parameters()).dtype
    return torch.nn.functional.mse_loss(net(x.to(dtype)), y.to(dtype))


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def sync(count: int = 3, **more: Any) -> dict[str, Any]:
    return {"workers": {"mode": "sync", "count": count, **more}}


def as_threads(server: ServerProcess, loop: Loop) -> list[Any]:
    """Run ``loop(client, k)`` for each of three workers; return what they return."""

    def run(k: int) -> Any:
        with Client(server.url) as client:
            return loop(client, k)

    with ThreadPoolExecutor(3) as threads:
        return list(threads.map(run, range(3)))


def mean_gradients(net: torch.nn.Module, losses: list[torch.Tensor]) -> None:
    """Give ``net`` the mean of the gradients of ``losses``, summed in their order in float32."""
    params = list(net.parameters())
    grads = [torch.autograd.grad(loss, params) for loss in losses]
    for p, each in zip(params, zip(*grads, strict=True), strict=True):
        total = each[0].float()
        for grad in each[1:]:
            total = total + grad.float()
        p.grad = (total / len(losses)).to(p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_three_replicas_train_bit_for_bit_as_one_process(
    server: ServerProcess, client: Client, dtype: torch.dtype
) -> None:
    session_id = f"replicas-{dtype}".replace("torch.", "")

    def loop(client: Client, k: int) -> torch.nn.Module:
        net = model(k, dtype)  # whoever comes first brings the parameters of all
        optimizer = RemoteOptimizer(
            net.named_parameters(),
            "AdamW",
            lr=0.01,
            client=client,
            session_id=session_id,
            session=sync(),
            worker=NAMES[k],
        )
        for i in range(ROUNDS):
            optimizer.zero_grad()
            loss = loss_of(net, i, k)
            loss.backward()
            optimizer.step(loss=loss)
            assert optimizer.result is not None
            assert optimizer.result.round is not None
            assert optimizer.result.round["workers"] == NAMES
        assert optimizer.worker is not None
        assert (optimizer.worker.version, optimizer.worker.epoch) == (ROUNDS, 1)
        return net

    replicas = as_threads(server, loop)
    served = client.session(session_id)
    local = model(0, dtype)
    start = served.fork(version=0).params()
    local.load_state_dict({name: as_tensor(value) for name, value in start.items()})
    optimizer = torch.optim.AdamW(local.parameters(), lr=0.01, fused=True)
    for i in range(ROUNDS):
        mean_gradients(local, [loss_of(local, i, k) for k in range(3)])
        optimizer.step()
    for replica in replicas:
        same(replica, local)
    assert served.status()["updates"] == ROUNDS
    assert all(row["loss"] is not None for row in served.history())


def as_tensor(value: Any) -> torch.Tensor:
    if hasattr(value, "array"):
        return torch.from_numpy(value.array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(value)


def test_torchs_schedulers_drive_all_replicas(server: ServerProcess, client: Client) -> None:
    def loop(client: Client, k: int) -> tuple[torch.nn.Module, float]:
        net = model()
        optimizer = RemoteOptimizer(
            net.parameters(),
            "SGD",
            lr=0.1,
            client=client,
            session_id="scheduled",
            session=sync(),
            worker=NAMES[k],
        )
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for i in range(ROUNDS):
            optimizer.zero_grad()
            loss_of(net, i, k).backward()
            optimizer.step()
            schedule.step()
        return net, optimizer.param_groups[0]["lr"]

    local = model()
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for i in range(ROUNDS):
        mean_gradients(local, [loss_of(local, i, k) for k in range(3)])
        optimizer.step()
        schedule.step()
    for replica, lr in as_threads(server, loop):
        same(replica, local)
        assert lr == schedule.get_last_lr()[0]


def test_what_the_last_one_sets_holds_for_all(client: Client) -> None:
    session = {"workers": {"mode": "async"}}
    one, two = (alone(client, "set-by-one", name, session)[1] for name in ("a", "b"))
    one.param_groups[0]["lr"] = 0.5
    one.step()
    assert two.param_groups[0]["lr"] == 0.1
    two.step()
    assert two.param_groups[0]["lr"] == 0.5


def test_the_rate_of_a_schedule_on_the_server_arrives(client: Client) -> None:
    scheduler = {"name": "StepLR", "step_size": 1, "gamma": 0.5, "advance": "step"}
    _, optimizer = alone(client, "their-schedule", "a", {**sync(1), "scheduler": scheduler})
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def alone(
    client: Client, session_id: str, worker: str | Worker, session: dict[str, Any]
) -> tuple[torch.nn.Module, RemoteOptimizer]:
    """Return a model that has gradients, and its optimizer."""
    net = model()
    loss_of(net, 0).backward()
    optimizer = RemoteOptimizer(
        net.parameters(),
        "SGD",
        lr=0.1,
        client=client,
        session_id=session_id,
        session=session,
        worker=worker,
    )
    return net, optimizer


def test_a_replica_that_was_changed_is_refused_until_it_pulls(client: Client) -> None:
    net, optimizer = alone(client, "edited", "a", sync(1))
    before = net[0].weight.detach().clone()  # type: ignore[index]
    net[0].weight.data.clamp_(-0.1, 0.1)  # type: ignore[index]
    with pytest.raises(RuntimeError, match=r"parameter '0' was changed.*pull\(\) brings"):
        optimizer.step()
    assert optimizer.session.status()["version"] == 0
    optimizer.pull()
    assert torch.equal(net[0].weight, before)  # type: ignore[index]
    optimizer.step()
    assert optimizer.session.status()["version"] == 1


def test_a_late_gradient_leaves_the_model_with_the_parameters_of_now(client: Client) -> None:
    session = sync(2, quorum=1, deadline_s=0.2)
    quick_net, quick = alone(client, "late", "a", session)
    slow_net, slow = alone(client, "late", "b", session)
    quick.step()
    with pytest.raises(errors.StaleGradient):
        slow.step()
    same(slow_net, quick_net)
    slow.step()
    dropping = Worker(client, "late", "c", on_stale="drop")
    net, third = alone(client, "late", dropping, session)
    slow.step()
    third.step()
    same(net, slow_net)
    assert third.worker is dropping
    assert third.result is not None
    assert third.result.skipped == "stale_gradient"
    assert third.param_groups[0]["lr"] == 0.1


def test_what_belongs_to_all_workers_is_not_changed_by_one(client: Client) -> None:
    _, optimizer = alone(client, "of-all", "a", sync(1))
    with pytest.raises(RuntimeError, match="a group is added before there are several workers"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1
    saved = optimizer.state_dict()
    with pytest.raises(RuntimeError, match="a state is loaded before there are several workers"):
        optimizer.load_state_dict(saved)
    optimizer.step()


def test_a_worker_that_starts_again_goes_on_with_the_others(client: Client) -> None:
    first_net, first = alone(client, "again", "a", sync(1))
    first.step()
    net, second = alone(client, "again", "a", sync(1))
    same(net, first_net)
    with pytest.raises(errors.Fenced):
        first.step()
    second.step()
    assert second.worker is not None
    assert (second.worker.epoch, second.worker.version) == (2, 2)


def test_a_worker_needs_a_session_of_workers_by_name(client: Client) -> None:
    net = model()
    with pytest.raises(errors.Invalid, match="worker needs session_id"):
        RemoteOptimizer(net.parameters(), "SGD", lr=0.1, client=client, worker="a")
    with pytest.raises(errors.Invalid, match="'plain' is not one of several workers"):
        alone(client, "plain", "a", {})
    with pytest.raises(errors.Invalid, match="session_id is 'x', the worker's session is 'y'"):
        alone(client, "x", Worker(client, "y", "a"), sync(1))


# Federated ---------------------------------------------------------------------------------------


def test_local_steps_are_averaged_with_momentum_as_one_process_does(
    server: ServerProcess, client: Client
) -> None:
    """FedAvgM (Hsu et al. 2019): the server's SGD with momentum on minus the mean change."""
    local_steps = 4

    def train_locally(net: torch.nn.Module, i: int, k: int) -> None:
        inner = torch.optim.SGD(net.parameters(), lr=0.05)
        for j in range(local_steps):
            inner.zero_grad()
            loss_of(net, i, j, k).backward()
            inner.step()

    def loop(client: Client, k: int) -> torch.nn.Module:
        net = model()
        outer = RemoteOptimizer(
            net.parameters(),
            {"name": "SGD", "lr": 1.0, "momentum": 0.9},
            client=client,
            session_id="federated-torch",
            session=sync(push="deltas"),
            worker=NAMES[k],
        )
        for i in range(ROUNDS):
            train_locally(net, i, k)
            outer.push_deltas(loss=loss_of(net, i, k), metrics={"k": k})
        return net

    merged = model()
    outer = torch.optim.SGD(merged.parameters(), lr=1.0, momentum=0.9, fused=True)
    for i in range(ROUNDS):
        total = [torch.zeros_like(p) for p in merged.parameters()]
        for k in range(3):
            net = model()
            net.load_state_dict(merged.state_dict())
            train_locally(net, i, k)
            for t, p, q in zip(total, net.parameters(), merged.parameters(), strict=True):
                t += p.detach() - q.detach()
        for t, p in zip(total, merged.parameters(), strict=True):
            p.grad = -(t / 3)
        outer.step()
    for replica in as_threads(server, loop):
        same(replica, merged)
    assert client.session("federated-torch").history()[-1]["metrics"] == {"k": 1.0}


def test_gradients_and_deltas_are_not_mistaken_for_each_other(client: Client) -> None:
    _, outer = alone(client, "deltas", "a", sync(1, push="deltas"))
    with pytest.raises(RuntimeError, match=r"workers push deltas: call push_deltas\(\)"):
        outer.step()
    _, optimizer = alone(client, "gradients", "a", sync(1))
    with pytest.raises(RuntimeError, match="push_deltas is for one of several workers"):
        optimizer.push_deltas()
