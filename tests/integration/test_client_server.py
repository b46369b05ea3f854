"""The blocking and the awaited client against a real server, with torch as the oracle."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from optserve_client import (
    AsyncClient,
    Bits,
    Client,
    Retry,
    Session,
    Sparse,
    StepResult,
    errors,
    wire,
)
from tests.serving import ServerProcess

SHAPES = {"w": (7, 3), "b": (3,), "scale": (), "empty": (0, 4)}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url) as connected:
        yield connected


def arrays(seed: int, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


class Local:
    """The same training with torch itself."""

    def __init__(self, cls: Any, params: dict[str, Any], **hyper: Any) -> None:
        self.params = {
            n: torch.nn.Parameter(torch.from_numpy(np.array(p))) for n, p in params.items()
        }
        self.optimizer = cls(list(self.params.values()), **hyper)

    def step(self, grads: dict[str, Any]) -> None:
        for name, p in self.params.items():
            p.grad = None if grads[name] is None else torch.from_numpy(np.array(grads[name]))
        self.optimizer.step()

    def check(self, served: Any) -> None:
        assert list(served) == list(self.params)
        for name, p in self.params.items():
            assert torch.equal(torch.from_numpy(served[name]), p.detach()), name


def params_of(result: StepResult) -> dict[str, Any]:
    assert result.params is not None
    return result.params


# Steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_served_steps_are_those_of_torch(client: Client, dtype: Any) -> None:
    local = Local(torch.optim.AdamW, arrays(0, dtype), lr=1e-2, betas=(0.8, 0.99), fused=True)
    session = client.create("AdamW", arrays(0, dtype), lr=1e-2, betas=(0.8, 0.99))
    assert session.created
    for i in range(5):
        grads = arrays(i + 1, dtype) | ({"b": None} if i == 2 else {})
        local.step(grads)
        result = session.step(grads, loss=1.0 / (i + 1), metrics={"acc": 0.5})
        local.check(params_of(result))
        assert (result.version, result.updates, result.applied_version) == (i + 1, i + 1, i + 1)
        assert result.applied
        assert not result.duplicate
    local.check(session.params())
    assert [row["loss"] for row in session.history()] == [1.0, 0.5, 1 / 3, 0.25, 0.2]
    assert [row["version"] for row in session.history(after_version=3, limit=1)] == [4]


def test_bfloat16_goes_in_and_out_as_bits(client: Client) -> None:
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    p = torch.nn.Parameter(start.clone())
    local = torch.optim.SGD([p], lr=0.1, momentum=0.9, fused=True)
    session = client.create("SGD", {"p": bits(start)}, lr=0.1, momentum=0.9)
    for i in range(3):
        p.grad = torch.full_like(p, 0.1 * (i + 1))
        local.step()
        served = params_of(session.step({"p": bits(p.grad)}))["p"]
        assert isinstance(served, Bits)
        np.testing.assert_array_equal(served.array, bits(p.detach()).array)


def bits(t: torch.Tensor) -> Bits:
    return Bits(t.view(torch.int16).numpy().view(np.uint16), "BF16")


def test_sparse_gradients_are_those_of_torch(client: Client) -> None:
    start = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    p = torch.nn.Parameter(torch.from_numpy(start.copy()))
    local = torch.optim.SparseAdam([p], lr=0.1)
    session = client.create("SparseAdam", {"emb": start}, lr=0.1, sparse=["emb"])
    indices, values = np.array([[5, 0, 5]]), np.ones((3, 4), np.float32)
    for _ in range(3):
        p.grad = torch.sparse_coo_tensor(
            torch.from_numpy(indices), torch.from_numpy(values), (9, 4), check_invariants=True
        )
        local.step()
        grad = Sparse(indices=indices, values=values, shape=(9, 4))
        served = params_of(session.step({"emb": grad}))["emb"]
        assert torch.equal(torch.from_numpy(served), p.detach())


def test_a_step_returns_what_was_asked_for(client: Client) -> None:
    session = client.create("SGD", {"w": np.ones(3, np.float32)}, lr=0.5)
    grad = {"w": np.full(3, 2, np.float32)}
    nothing = session.step(grad, returns="none")
    assert (nothing.params, nothing.returned) == (None, None)
    delta = session.step(grad, returns="delta")
    assert delta.returned == "delta"
    np.testing.assert_array_equal(params_of(delta)["w"], np.full(3, -1, np.float32))
    half = session.step(grad, return_dtype="float16")
    assert params_of(half)["w"].dtype == np.float16
    dry = session.step(grad, dry_run=True)
    np.testing.assert_array_equal(params_of(dry)["w"], np.full(3, -3, np.float32))
    assert session.status()["version"] == 3


def test_params_and_group_changes_come_with_a_step(client: Client) -> None:
    session = client.create("SGD", {"w": np.ones(2, np.float32)}, lr=0.5)
    grad = {"w": np.ones(2, np.float32)}
    result = session.step(grad, params={"w": np.full(2, 9, np.float32)}, groups=[{"lr": 2.0}])
    np.testing.assert_array_equal(params_of(result)["w"], [7, 7])
    assert result.groups[0]["lr"] == 2.0
    with pytest.raises(errors.VersionConflict) as caught:
        session.step(grad, base_version=0)
    assert caught.value.extra["version"] == 1
    assert session.step(grad, base_version=1).version == 2


def test_lbfgs_asks_for_evaluations(client: Client) -> None:
    def evaluate(w: Any) -> tuple[float, Any]:
        return float((w - 3) @ (w - 3)), (2 * (w - 3)).astype(np.float32)

    start = np.zeros(4, np.float32)
    p = torch.nn.Parameter(torch.from_numpy(start.copy()))
    local = torch.optim.LBFGS([p], lr=1, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        loss, grad = evaluate(p.detach().numpy())
        p.grad = torch.from_numpy(grad)
        return torch.tensor(loss)

    session = client.create("LBFGS", {"w": start}, lr=1, line_search_fn="strong_wolfe")
    local.step(closure)
    w: Any = start
    for _ in range(100):
        loss, grad = evaluate(w)
        result = session.step({"w": grad}, loss=loss)
        w = params_of(result)["w"]
        if result.need is None:
            break
        assert not result.applied
    assert result.applied
    assert torch.equal(torch.from_numpy(w), p.detach())


# The rest of a session ---------------------------------------------------------------------------


def test_params_are_pulled_again_only_if_they_changed(client: Client) -> None:
    session = client.create("SGD", arrays(0), lr=0.1, ema={"decay": 0.5})
    first = session.params()
    assert session.params(if_none_match=first) is first
    session.step(arrays(1))
    second = session.params(if_none_match=first)
    assert (first.version, second.version) == (0, 1)
    assert list(session.params(names=["scale", "w"])) == ["w", "scale"]
    assert session.params("ema").weights == "ema"


def test_params_are_overwritten_under_a_condition(client: Client) -> None:
    session = client.create("SGD", arrays(0), lr=0.1)
    seen = session.params()
    session.put_params(arrays(5), if_match=seen)
    np.testing.assert_array_equal(session.params()["w"], arrays(5)["w"])
    with pytest.raises(errors.PreconditionFailed):
        session.put_params(arrays(6), if_match=seen)


def test_groups_are_patched_and_added(client: Client) -> None:
    session = client.create(
        "SGD", arrays(0), groups=[{"params": ["w"], "lr": 0.1}], lr=0.5, momentum=0.9
    )
    assert [group["lr"] for group in session.status()["groups"]] == [0.1, 0.5]
    session.patch_group(1, lr=0.25, momentum=0.0)
    session.add_group({"late": np.ones(2, np.float32)}, lr=0.01)
    groups = session.status()["groups"]
    assert [(group["lr"], group["momentum"]) for group in groups] == [
        (0.1, 0.9),
        (0.25, 0.0),
        (0.01, 0.9),
    ]
    session.step(arrays(1) | {"late": np.ones(2, np.float32)})
    session.patch(name="renamed", clip_grad_norm=1.0)
    assert session.status()["name"] == "renamed"


def test_a_scheduler_is_attached_stepped_and_previewed(client: Client) -> None:
    session = client.create("SGD", {"w": np.ones(1, np.float32)}, lr=1.0)
    session.put_scheduler({"name": "StepLR", "step_size": 2, "gamma": 0.5})
    session.step({"w": np.ones(1, np.float32)})
    assert session.scheduler_preview(4)
    for _ in range(2):
        session.scheduler_step()
    assert session.scheduler()["next_lr"] == [0.5]
    session.put_scheduler({"name": "ReduceLROnPlateau", "patience": 0, "factor": 0.1})
    session.scheduler_step(1.0)
    session.scheduler_step(2.0)
    assert session.scheduler()["next_lr"] == [pytest.approx(0.05)]
    session.put_scheduler(None)
    with pytest.raises(errors.Conflict):
        session.scheduler_step()


def test_a_schedule_is_previewed_without_a_session(client: Client) -> None:
    preview = client.preview_scheduler(
        {"name": "ExponentialLR", "gamma": 0.5}, {"name": "SGD", "lr": 1.0}, steps=3
    )
    assert [row[0]["lr"] for row in preview["steps"]] == [1.0, 0.5, 0.25]


def test_a_fork_goes_its_own_way(client: Client) -> None:
    session = client.create("Adam", arrays(0), lr=0.1)
    session.step(arrays(1))
    copy = session.fork(name="copy")
    assert copy.id != session.id
    session.step(arrays(2))
    copy.step(arrays(3))
    assert not np.array_equal(session.params()["w"], copy.params()["w"])
    copy.step(arrays(4))
    assert copy.status()["updates"] == 3


def test_an_exported_session_goes_on_elsewhere_bit_for_bit(client: Client) -> None:
    session = client.create("Adam", arrays(0), lr=0.1)
    session.step(arrays(1))
    state = session.export_state()
    assert "param/w" in wire.decode(state)[0]
    twin = client.import_session(state)
    for i in (2, 3):
        mine, other = session.step(arrays(i)), twin.step(arrays(i))
        np.testing.assert_array_equal(params_of(mine)["w"], params_of(other)["w"])
    session.import_state(state)
    again = session.step(arrays(2))
    assert again.updates == 2
    assert again.version == 5


def test_metrics_come_later(client: Client) -> None:
    session = client.create("SGD", arrays(0), lr=0.1)
    session.step(arrays(1))
    session.put_metrics(1, {"accuracy": 0.75})
    assert session.history()[-1]["metrics"] == {"accuracy": 0.75}


def test_a_session_is_found_listed_and_deleted(client: Client) -> None:
    tags = {"suite": f"client-{random.random()}"}
    ids = [
        client.create("SGD", {"w": np.ones(1)}, lr=0.1, tags=tags, name=f"run {i}").id
        for i in range(3)
    ]
    first = client.list(tags=tags, limit=2, order_by="name")
    second = client.list(tags=tags, limit=2, order_by="name", cursor=first.next_cursor)
    assert [row["id"] for row in first.sessions + second.sessions] == ids
    assert second.next_cursor is None
    client.session(ids[0]).delete()
    with pytest.raises(errors.SessionNotFound, match=f"no session '{ids[0]}'"):
        client.session(ids[0]).status()
    with pytest.raises(errors.SessionNotFound):
        client.session(ids[0]).delete()


def test_the_same_create_again_opens_the_session(client: Client) -> None:
    name = f"s-{random.getrandbits(60)}"
    first = client.create("SGD", arrays(0), id=name, lr=0.1)
    first.step(arrays(1))
    again = client.create("SGD", arrays(9), id=name, lr=0.1)
    assert (first.created, again.created) == (True, False)
    assert again.step(arrays(2)).version == 2
    with pytest.raises(errors.SessionExists):
        client.create("SGD", arrays(0), id=name, lr=0.2)
    first.delete()
    anew = client.create("SGD", arrays(0), id=name, lr=0.2)
    assert anew.step(arrays(2)).version == 1


def test_the_order_of_the_mapping_is_the_order_of_the_session(client: Client) -> None:
    session = client.create("SGD", {"z": np.ones(1), "a": np.ones(1), "é": np.ones(1)}, lr=0.1)
    assert list(session.params()) == ["z", "a", "é"]
    result = session.step({"a": np.ones(1), "é": np.ones(1), "z": np.ones(1)})
    assert list(params_of(result)) == ["z", "a", "é"]


def test_the_catalogue_describes_each_entry(client: Client) -> None:
    names = {entry["name"] for entry in client.optimizers()}
    assert {"AdamW", "SGD", "LBFGS"} <= names
    assert "lr" in client.optimizer("adam_w")["schema"]["properties"]
    assert "StepLR" in {entry["name"] for entry in client.schedulers()}
    assert "gamma" in client.scheduler("StepLR")["schema"]["properties"]
    assert client.healthz()["status"] == "ok"
    assert client.version()["torch"].startswith(torch.__version__.split("+")[0])
    with pytest.raises(errors.NotFound):
        client.optimizer("Adamm")


REFUSED = {
    "missing": (lambda s: s.step({"w": arrays(1)["w"]}), errors.MissingGradient),
    "unknown": (lambda s: s.step(arrays(1) | {"x": np.ones(1)}), errors.Invalid),
    "shape": (lambda s: s.step(arrays(1) | {"b": np.ones(4, np.float32)}), errors.Invalid),
    "dtype": (lambda s: s.step(arrays(1, np.float64)), errors.Invalid),
    "NaN": (
        lambda s: s.step(arrays(1) | {"b": np.float32([0, np.nan, 0])}),
        errors.Nonfinite,
    ),
    "group": (lambda s: s.step(arrays(1), groups=[{"lrr": 1}]), errors.Invalid),
    "field": (lambda s: s.patch(clip_norm=1), errors.Invalid),
    "loss_scale": (lambda s: s.step(arrays(1), loss_scale=float("inf")), errors.Invalid),
}


@pytest.mark.parametrize("call, kind", REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_change_uses_up_no_number(
    client: Client, call: Any, kind: type[errors.OptserveError]
) -> None:
    session = client.create("SGD", arrays(0), lr=0.1)
    session.step(arrays(1))
    with pytest.raises(kind) as caught:
        call(session)
    assert type(caught.value) is kind
    assert caught.value.detail
    assert session.step(arrays(2)).version == 2


def test_a_wrong_hyperparameter_is_refused_at_creation(client: Client) -> None:
    with pytest.raises(errors.Invalid, match="betaz"):
        client.create("AdamW", arrays(0), betaz=(0.9, 0.99))


# Exactly once ------------------------------------------------------------------------------------


class Lossy(httpx.BaseTransport):
    """Loses some requests, and some answers after the server has done what they answer."""

    def __init__(self, seed: int, share: float) -> None:
        self.inner = httpx.HTTPTransport()
        self.random, self.share = random.Random(seed), share
        self.lost = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        fate = self.random.random()
        if fate < self.share / 2:
            self.lost += 1
            raise httpx.WriteError("the request was lost")
        response = self.inner.handle_request(request)
        if fate < self.share:
            self.lost += 1
            response.read()
            response.close()
            raise httpx.ReadError("the answer was lost")
        return response

    def close(self) -> None:
        self.inner.close()


def test_each_step_is_applied_once_over_a_network_that_loses_half(server: ServerProcess) -> None:
    local = Local(torch.optim.Adam, arrays(0), lr=0.1, fused=True)
    net = Lossy(seed=1, share=0.5)
    quick = Retry(retries=40, first_s=0.0, longest_s=0.0)
    with Client(server.url, transport=net, retries=quick) as client:
        session = client.create("Adam", arrays(0), lr=0.1)
        for i in range(1, 21):
            local.step(arrays(i))
            result = session.step(arrays(i))
            assert result.applied_version == i
            if i % 5 == 0:
                session.patch(notes=str(i))
        local.check(params_of(result))
        session.delete()
    assert net.lost > 10


def test_a_step_whose_answer_never_came_is_applied_once_if_it_is_called_again(
    server: ServerProcess,
) -> None:
    local = Local(torch.optim.Adam, arrays(0), lr=0.1, fused=True)
    net = Lossy(seed=7, share=0.6)
    failures = 0
    with Client(server.url, transport=net, retries=0) as client:
        session = persistent(lambda: client.create("Adam", arrays(0), id=f"s-{net.share}", lr=0.1))
        for i in range(1, 16):
            local.step(arrays(i))
            while True:
                try:
                    result = session.step(arrays(i))
                    break
                except errors.TransportError:
                    failures += 1
            assert result.applied_version == i
        local.check(params_of(result))
    assert failures > 5


def rosenbrock(w: Any) -> tuple[float, Any]:
    p = torch.from_numpy(w.copy()).requires_grad_()
    loss = 100 * (p[1] - p[0] ** 2) ** 2 + (1 - p[0]) ** 2
    loss.backward()
    assert p.grad is not None
    return float(loss.detach()), p.grad.numpy()


def test_lbfgs_evaluates_at_the_right_params_even_if_answers_are_lost(
    server: ServerProcess,
) -> None:
    def train(client: Client) -> Any:
        w: Any = np.array([-1.2, 1.0])
        session = client.create("LBFGS", {"w": w}, lr=1, line_search_fn="strong_wolfe", max_iter=5)
        for _ in range(40):
            loss, grad = rosenbrock(w)
            w = params_of(session.step({"w": grad}, loss=loss))["w"]
        return w

    quick = Retry(retries=40, first_s=0.0, longest_s=0.0)
    with (
        Client(server.url) as good,
        Client(server.url, transport=Lossy(seed=3, share=0.4), retries=quick) as bad,
    ):
        np.testing.assert_array_equal(train(good), train(bad))


def persistent(call: Any) -> Session:
    for _ in range(50):
        try:
            return call()
        except errors.TransportError:
            continue
    raise AssertionError("fifty failures in a row")


def test_a_server_that_is_not_there_is_named(unused_port: int) -> None:
    url = f"http://127.0.0.1:{unused_port}"

    async def awaited() -> None:
        async with AsyncClient(url, retries=0) as client:
            await client.healthz()

    sentence = f"GET /healthz: cannot connect to {url}: Connection refused (tried once, limit 60 s)"
    with Client(url, retries=0) as client, pytest.raises(errors.ConnectFailed) as one:
        client.healthz()
    with pytest.raises(errors.ConnectFailed) as other:
        asyncio.run(awaited())
    assert one.value.detail == other.value.detail == sentence


def test_a_loss_that_overflowed_with_the_gradients_does_not_stop_the_loop(client: Client) -> None:
    session = client.create("SGD", {"w": [1.0]}, lr=0.5, best={"monitor": "loss", "mode": "min"})
    skipped = session.step({"w": [np.inf]}, loss=np.inf, loss_scale=2.0)
    assert (skipped.applied, skipped.skipped) == (False, "nonfinite")
    applied = session.step({"w": [2.0]}, loss=np.nan, metrics={"a": np.nan}, loss_scale=2.0)
    assert (applied.applied, params_of(applied)["w"]) == (True, 0.5)
    assert [row["loss"] for row in session.history()] == [None]


def test_lists_are_arrays_of_the_sessions_dtype(client: Client) -> None:
    for dtype in ("float32", "float64"):
        session = client.create("SGD", {"w": [1.0, 2.0]}, lr=0.1, dtype=dtype)
        assert params_of(session.step({"w": [0.1, 0.2]}))["w"].dtype == np.dtype(dtype)


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Large bodies, and asyncio -----------------------------------------------------------------------


def test_a_body_of_many_chunks_goes_up_and_comes_back(client: Client) -> None:
    w = np.random.default_rng(0).standard_normal(1_500_000).astype(np.float32)
    session = client.create("SGD", {"w": w, "b": w[:3]}, lr=0.5)
    result = session.step({"w": w, "b": w[:3]})
    np.testing.assert_array_equal(params_of(result)["w"], w - np.float32(0.5) * w)
    session.delete()


#: Of a client that is made to wait: what the server may take to answer beyond that.
IMPATIENT_S = 1.0


@pytest.mark.parametrize("over", ["sockets", "httpx"])
def test_params_can_be_waited_for_longer_than_for_anything_else(
    client: Client, server: ServerProcess, over: str
) -> None:
    session = client.create("SGD", arrays(0), lr=0.1)
    transport = httpx.HTTPTransport() if over == "httpx" else None
    with Client(server.url, timeout=IMPATIENT_S, retries=0, transport=transport) as impatient:
        mine = impatient.session(session.id)
        assert mine.params(min_version=1) is None
        assert mine.params(min_version=1, wait_s=1.5 * IMPATIENT_S) is None
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(mine.params, min_version=1, wait_s=60.0)
            assert not wait([waiting], 1.5 * IMPATIENT_S).done
            session.step(arrays(1), returns="none")
            params = waiting.result(30)
    assert params is not None
    assert params.version == 1
    np.testing.assert_array_equal(params["w"], session.params()["w"])
    session.delete()


@pytest.mark.parametrize("over", ["sockets", "httpx"])
def test_the_awaited_client_waits_for_params_as_well(
    client: Client, server: ServerProcess, over: str
) -> None:
    session = client.create("SGD", arrays(0), lr=0.1)

    async def run() -> None:
        transport = httpx.AsyncHTTPTransport() if over == "httpx" else None
        async with AsyncClient(
            server.url, timeout=IMPATIENT_S, retries=0, transport=transport
        ) as impatient:
            mine = impatient.session(session.id)
            assert await mine.params(min_version=1, wait_s=1.5 * IMPATIENT_S) is None
            pulls = [mine.params(min_version=1, wait_s=60.0) for _ in range(9)]
            waiting = [asyncio.create_task(pull) for pull in pulls]
            assert not (await asyncio.wait(waiting, timeout=1.5 * IMPATIENT_S))[0]
            await asyncio.to_thread(session.step, arrays(1), returns="none")
            for params in await asyncio.gather(*waiting):
                assert params is not None
                assert params.version == 1

    asyncio.run(run())
    session.delete()


def test_the_awaited_client_trains_the_same(server: ServerProcess) -> None:
    local = Local(torch.optim.SGD, arrays(0), lr=0.1, momentum=0.9, fused=True)
    w = np.random.default_rng(0).standard_normal(600_000).astype(np.float32)

    async def run() -> Any:
        async with AsyncClient(server.url) as client:
            session = await client.create("SGD", arrays(0), lr=0.1, momentum=0.9)
            big = await client.create("SGD", {"w": w}, lr=0.5)
            steps = [session.step(arrays(i)) for i in range(1, 6)]
            large, *results = await asyncio.gather(big.step({"w": w}), *steps)
            np.testing.assert_array_equal(params_of(large)["w"], w - np.float32(0.5) * w)
            assert sorted(result.version for result in results) == [1, 2, 3, 4, 5]
            await big.delete()
            with pytest.raises(errors.SessionNotFound):
                await big.status()
            return await session.params()

    for i in range(1, 6):
        local.step(arrays(i))
    local.check(asyncio.run(run()))


# Content codings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
@pytest.mark.parametrize("over", ["sockets", "httpx"])
def test_a_client_that_compresses_gets_the_same_numbers(
    server: ServerProcess, client: Client, encoding: Any, over: str
) -> None:
    size, name = 300_000, f"coded-{encoding}-{over}"
    grad = np.random.default_rng(0).integers(-3, 4, size).astype(np.float32)
    transport = httpx.HTTPTransport() if over == "httpx" else None
    with Client(server.url, encoding=encoding, transport=transport) as coded:
        one = coded.create("Adam", {"w": np.zeros(size, np.float32)}, id=name)
        two = client.create("Adam", {"w": np.zeros(size, np.float32)}, id=f"{name}-plain")
        for _ in range(3):
            got, want = (session.step({"w": grad}).params for session in (one, two))
            assert got is not None
            assert want is not None
            np.testing.assert_array_equal(got["w"], want["w"])
        pulled = one.params()
        assert one.params(if_none_match=pulled) is pulled
        one.put_params({"w": np.zeros(size, np.float32)}, if_match=pulled)
        with pytest.raises(errors.PreconditionFailed):
            one.put_params({"w": np.zeros(size, np.float32)}, if_match=pulled)
        frame = one.export_state()
        again = coded.import_session(frame, id=f"{name}-again")
        np.testing.assert_array_equal(again.params()["w"], one.params()["w"])
        for session in (one, two, again):
            session.delete()


def test_an_awaited_client_that_compresses_gets_the_same_numbers(server: ServerProcess) -> None:
    async def run() -> Any:
        async with AsyncClient(server.url, encoding="zstd") as client:
            session = await client.create("SGD", {"w": np.zeros(100_000, np.float32)}, lr=1.0)
            result = await session.step({"w": np.ones(100_000, np.float32)})
            await session.delete()
            return result.params

    assert set(asyncio.run(run())["w"].tolist()) == {-1.0}
