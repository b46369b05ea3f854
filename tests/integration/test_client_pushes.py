"""Pushes of both clients against a real server: many at a time, over a bad network, bit for bit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from optserve_client import AsyncClient, Client, Session, Sparse, errors
from tests.proxy import FAULTS, Proxy
from tests.serving import ServerProcess

#: A hundred tensors, small ones and some of more than a mebibyte.
SHAPES = {f"layers/{i}/weight": (i + 1, 7) if i % 9 else (400, 1000) for i in range(100)}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url) as connected:
        yield connected


def arrays(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(shape).astype(np.float32) for n, shape in SHAPES.items()}


def equal(a: Any, b: Any) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


def test_many_threads_put_the_gradients_of_one_step(client: Client) -> None:
    one = client.create("AdamW", arrays(0), lr=0.01)
    many = client.create("AdamW", arrays(0), lr=0.01)
    with ThreadPoolExecutor(8) as threads:
        for step in range(3):
            grads = arrays(step + 1)
            stepped = one.step(grads, loss=0.5)
            with many.push(loss=0.5) as push:
                names = list(np.random.default_rng(step).permutation(list(grads)))
                list(threads.map(push.put, names, [grads[name] for name in names]))
                pushed = push.commit()
            assert (pushed.version, pushed.grad_norm) == (stepped.version, stepped.grad_norm)
            assert equal(pushed.params, stepped.params)
    one.delete()
    many.delete()


def test_several_pushes_of_one_session_at_a_time_are_one_version_each(client: Client) -> None:
    session = client.create("SGD", {n: np.zeros(50, np.float32) for n in "abcd"}, lr=1.0)

    def push(number: int) -> int | None:
        with session.push(returns="none") as push:
            for name in "abcd":
                push.put(name, np.full(50, number, np.float32))
            return push.commit().applied_version

    with ThreadPoolExecutor(6) as threads:
        versions = list(threads.map(push, range(20)))
    assert sorted(versions) == list(range(1, 21))
    for value in session.params().values():
        assert (value == -sum(range(20))).all()


def test_the_awaited_client_puts_several_at_a_time(server: ServerProcess) -> None:
    async def run() -> None:
        async with AsyncClient(server.url) as client:
            one = await client.create("AdamW", arrays(0), lr=0.01)
            many = await client.create("AdamW", arrays(0), lr=0.01)
            grads = arrays(1)
            stepped = await one.step(grads, returns="delta")
            async with many.push(returns="delta") as push:
                await asyncio.gather(*(push.put(name, grad) for name, grad in grads.items()))
                pushed = await push.commit()
            assert (pushed.returned, stepped.returned) == ("delta", "delta")
            assert equal(pushed.params, stepped.params)
            await one.delete()
            await many.delete()

    asyncio.run(run())


def test_other_changes_of_the_session_do_not_wait_for_a_push(client: Client) -> None:
    session = client.create("SGD", {"w": np.zeros(2, np.float32)}, lr=1.0)
    with session.push() as push:
        push.put("w", [1.0, 1.0])
        session.patch_group(0, lr=0.5)
        assert session.step({"w": [2.0, 2.0]}).version == 1
        result = push.commit()
    assert (result.version, result.params["w"].tolist()) == (2, [-1.5, -1.5])


def test_sparse_gradients_and_none_are_as_in_a_step(client: Client) -> None:
    start = {"emb": np.ones((4, 2), np.float32), "w": np.ones(2, np.float32)}
    fields: dict[str, Any] = {"lr": 0.1, "sparse": ["emb"]}
    one, many = (client.create("Adagrad", start, **fields) for _ in range(2))
    coo = Sparse(indices=np.array([[3, 0, 3]]), values=np.ones((3, 2), np.float32), shape=(4, 2))
    stepped = one.step({"emb": coo, "w": None})
    with many.push() as push:
        push.put("emb", coo)
        pushed = push.commit(none=["w"])
    assert equal(pushed.params, stepped.params)


def test_a_push_that_was_left_is_given_up_on_the_server(client: Client) -> None:
    session = client.create("SGD", {"w": np.zeros(2, np.float32)}, lr=1.0)
    with session.push() as push:
        push.put("w", [1.0, 1.0])
        assert push._staged.id is not None
        told = client._run(_status(push._staged.path, push._staged.id))
        assert told["missing"] == []
    with pytest.raises(errors.PushNotFound):
        client._run(_status(push._staged.path, push._staged.id))
    assert session.status()["version"] == 0


def _status(path: str, push_id: str) -> Any:
    from optserve_client import _calls

    return _calls.get(f"{path}/{push_id}", _calls.scalars)


def test_a_refused_gradient_is_told_and_the_rest_goes_on(client: Client) -> None:
    session = client.create("SGD", {"w": np.zeros(2, np.float32)}, lr=1.0)
    with session.push(base_version=0) as push:
        with pytest.raises(errors.Invalid, match=r"'grad/w' has shape \[3\], expected \[2\]"):
            push.put("w", np.zeros(3, np.float32))
        with pytest.raises(errors.MissingGradient):
            push.commit()
        push.put("w", [1.0, 1.0])
        session.step({"w": [1.0, 1.0]})
        with pytest.raises(errors.VersionConflict):
            push.commit()


#: Several of a hundred requests have an accident, of every kind there is.
MANY_FAULTS = {fault: 2 * rate for fault, rate in FAULTS.items() if fault != "silence"}


def train(session: Session, threads: ThreadPoolExecutor, steps: int) -> Any:
    for step in range(steps):
        grads = {n: np.full(30, step + i, np.float32) for i, n in enumerate("abcdef")}
        with session.push(loss=float(step)) as push:
            list(threads.map(push.put, grads.keys(), grads.values()))
            result = push.commit()
        assert result.version == step + 1
    return result.params


@pytest.mark.parametrize("seed", [1, 2])
def test_a_bad_network_changes_nothing(server: ServerProcess, seed: int) -> None:
    url = urlsplit(server.url)
    assert url.hostname is not None
    assert url.port is not None
    start = {n: np.ones(30, np.float32) for n in "abcdef"}
    with Proxy((url.hostname, url.port), seed, MANY_FAULTS) as proxy, ThreadPoolExecutor(3) as pool:
        with Client(proxy.url) as client:
            session = client.create("AdamW", start, lr=0.01)
            params = train(session, pool, 30)
            proxy.settle()
            assert [row["loss"] for row in session.history()] == [float(n) for n in range(30)]
        assert sum(proxy.faults.values()) > 20
        with Client(server.url) as client:
            assert equal(params, train(client.create("AdamW", start, lr=0.01), pool, 30))
