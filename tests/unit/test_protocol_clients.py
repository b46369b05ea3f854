"""Both clients over a network that the test holds in its hand."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

import optserve_client
from optserve_client import (
    AsyncClient,
    AsyncPush,
    AsyncSession,
    Client,
    Params,
    Push,
    Retry,
    Session,
    Sparse,
    errors,
    wire,
)
from optserve_client._transport import place

Handler = Callable[[httpx.Request], httpx.Response]
STEP = {"id": "s", "generation": "g", "version": 1, "applied_version": 1, "updates": 1}
STEP |= {"applied": True, "duplicate": False, "groups": [{"lr": 0.1}], "grad_norm": 2.0}
QUICK = Retry(retries=2, first_s=0.0, longest_s=0.0)


class Wire:
    """Answers requests from a list and keeps them."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def fields(self, index: int = -1) -> dict[str, Any]:
        body = self.requests[index].content
        if self.requests[index].headers["content-type"] == wire.SAFETENSORS:
            return json.loads(wire.decode(body)[1][wire.META_KEY])
        return json.loads(body)

    def tensors(self, index: int = -1) -> dict[str, Any]:
        return wire.decode(self.requests[index].content)[0]


def client(transport: Handler, **options: Any) -> Client:
    options = {"retries": QUICK, "worker": "w"} | options
    return Client("http://test", transport=httpx.MockTransport(transport), **options)


def frame(scalars: dict[str, Any], **params: Any) -> httpx.Response:
    body = b"".join(
        wire.encode(
            {f"param/{name}": value for name, value in params.items()},
            {wire.META_KEY: json.dumps(scalars)},
        )
    )
    return httpx.Response(200, content=body, headers={"content-type": wire.SAFETENSORS})


def created(session_id: str = "s") -> httpx.Response:
    return httpx.Response(201, json={"id": session_id, "generation": "g", "created": True})


# One surface -------------------------------------------------------------------------------------


def surface(cls: type) -> dict[str, list[tuple[str, Any, Any]]]:
    return {
        name: [
            (p.name, p.kind, p.default)
            for p in inspect.signature(member).parameters.values()
            if p.name != "transport"
        ]
        for name, member in inspect.getmembers(cls, callable)
        if not name.startswith("_") or name == "__init__"
    }


@pytest.mark.parametrize(
    "one, other", [(Client, AsyncClient), (Session, AsyncSession), (Push, AsyncPush)]
)
def test_both_clients_have_the_same_methods_with_the_same_arguments(one: type, other: type) -> None:
    assert surface(one) == surface(other)
    assert len(surface(one)) >= 4


@pytest.mark.parametrize("cls", [Client, AsyncClient, Session, AsyncSession, Push, AsyncPush])
def test_every_public_method_says_what_it_does(cls: type) -> None:
    for name, member in inspect.getmembers(cls, inspect.isfunction):
        if not name.startswith("_"):
            assert member.__doc__, f"{cls.__name__}.{name}"


def test_all_names_what_there_is() -> None:
    public = {
        name
        for name, value in vars(optserve_client).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(optserve_client.__all__) == public | {"errors", "wire"}


# What is sent ------------------------------------------------------------------------------------


def test_create_puts_a_frame_under_a_new_id_with_a_key() -> None:
    net = Wire(created(), created())
    with client(net) as c:
        session = c.create(
            "AdamW",
            {"z": np.ones(2, np.float32), "a": np.zeros(1, np.float32)},
            lr=np.float64(1e-3),
            betas=(0.9, 0.95),
            clip_grad_norm=1.0,
        )
        c.create({"name": "SGD", "lr": 1}, {"a": np.zeros(1), "z": np.zeros(1)}, id="mine")
    first, second = net.requests
    assert (session.id, session.created) == ("s", True)
    assert first.method == "PUT"
    assert first.url.path.startswith("/v1/sessions/")
    assert first.headers["idempotency-key"] != second.headers["idempotency-key"]
    assert net.fields(0) == {
        "optimizer": {"name": "AdamW", "lr": 1e-3, "betas": [0.9, 0.95]},
        "clip_grad_norm": 1.0,
        "order": ["z", "a"],
    }
    assert list(net.tensors(0)) == ["param/z", "param/a"]
    assert second.url.path == "/v1/sessions/mine"
    assert "order" not in net.fields(1)


def test_an_optimizer_given_twice_over_is_refused() -> None:
    with client(Wire()) as c, pytest.raises(errors.Invalid, match=r"optimizer\.lr is given twice"):
        c.create({"name": "SGD", "lr": 1}, {"w": np.ones(1)}, lr=2)


def test_step_sends_dense_sparse_and_missing_gradients() -> None:
    net = Wire(frame(STEP, w=np.ones(2, np.float32)))
    indices, values = np.array([[0, 2]], np.int32), np.ones((2, 4), np.float32)
    with client(net) as c:
        result = c.session("s").step(
            {
                "w": np.ones(2, np.float32),
                "emb": Sparse(indices=indices, values=values, shape=(9, 4)),
                "b": None,
            },
            params={"w": np.zeros(2, np.float32)},
            none=["c"],
            loss=np.float32(0.5),
            groups=[{"lr": 0.1}],
            returns="delta",
        )
    sent = net.tensors()
    assert list(sent) == ["grad/w", "sparse/emb/indices", "sparse/emb/values", "param/w"]
    assert sent["sparse/emb/indices"].dtype == np.int64
    assert net.fields() == {
        "none": ["c", "b"],
        "loss": 0.5,
        "groups": [{"lr": 0.1}],
        "return": "delta",
        "worker": "w",
        "epoch": 1,
        "seq": 1,
    }
    assert net.requests[0].headers["accept"] == wire.SAFETENSORS
    assert result.params is not None
    np.testing.assert_array_equal(result.params["w"], np.ones(2))
    assert (result.version, result.grad_norm, result.groups) == (1, 2.0, [{"lr": 0.1}])


def test_a_step_that_returns_nothing_has_no_params() -> None:
    with client(Wire(frame(STEP))) as c:
        result = c.session("s").step({"w": np.ones(1)}, returns="none")
    assert (result.params, result.returned) == (None, None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.float32("nan"), np.array(np.inf)])
def test_a_loss_or_metric_that_is_not_finite_is_left_out(value: Any) -> None:
    net = Wire(frame(STEP), frame(STEP), httpx.Response(200, json={}))
    with client(net) as c:
        session = c.session("s")
        session.step({}, loss=value, metrics={"a": value, "b": 2.0}, loss_scale=8.0)
        session.step({}, loss=0.0, metrics={"a": value})
        session.put_metrics(1, {"a": value, "b": 3.0})
    identity: dict[str, Any] = {"worker": "w", "epoch": 1}
    assert net.fields(0) == {"metrics": {"b": 2.0}, "loss_scale": 8.0, **identity, "seq": 1}
    identity["generation"] = "g"
    assert net.fields(1) == {"loss": 0.0, **identity, "seq": 2}
    assert net.fields(2)["metrics"] == {"b": 3.0}


def test_other_numbers_that_are_not_finite_are_refused_by_name() -> None:
    with client(Wire()) as c:
        with pytest.raises(errors.Invalid, match="metrics is nan, which JSON has not"):
            c.session("s").scheduler_step(metrics=np.nan)
        with pytest.raises(errors.Invalid, match="loss_scale is inf, which JSON has not"):
            c.session("s").step({}, loss_scale=np.inf)


def test_lists_are_float32_as_in_json_and_arrays_keep_their_dtype() -> None:
    net = Wire(created())
    with client(net) as c:
        c.create("SGD", {"list": [1.0, 2], "tuple": (1, 2), "number": 3, "array": np.ones(2)})
    sent = net.tensors()
    kinds = {name: (value.dtype.name, value.shape) for name, value in sent.items()}
    assert kinds == {
        "param/list": ("float32", (2,)),
        "param/tuple": ("float32", (2,)),
        "param/number": ("float32", ()),
        "param/array": ("float64", (2,)),
    }


@pytest.mark.parametrize("dtype, tag", [("float64", "F64"), ("bfloat16", "BF16"), (None, "F32")])
def test_lists_become_the_dtype_of_the_session_where_it_is_known(dtype: Any, tag: str) -> None:
    info = {"id": "s", "generation": "g", "created": True} | ({"dtype": dtype} if dtype else {})
    net = Wire(httpx.Response(201, json=info), frame(STEP), httpx.Response(200, json={}))
    with client(net) as c:
        session = c.create("SGD", {"w": [0.1]}, dtype=dtype)
        session.step({"w": [0.1]}, params={"w": [0.2]})
        session.put_params({"w": [0.3]})
    for index in range(3):
        assert {wire.dtype_of(t) for t in net.tensors(index).values()} == {tag}


@pytest.mark.parametrize("bad", [[[1.0], [1.0, 2.0]], ["x"], [None, {}]])
def test_lists_that_are_no_array_are_refused_by_name(bad: Any) -> None:
    sentence = r"grads\['w'\] must be numbers in lists of equal lengths"
    with client(Wire()) as c, pytest.raises(errors.Invalid, match=sentence):
        c.session("s").step({"w": bad})


def test_what_is_no_mapping_of_names_is_refused() -> None:
    with client(Wire()) as c:
        session: Any = c.session("s")
        with pytest.raises(TypeError, match=r"grads must map names to arrays.*got ndarray"):
            session.step(np.ones(2))
        with pytest.raises(TypeError, match=r"params must map names to arrays.*got ndarray"):
            session.step({"w": np.ones(2)}, params=np.ones(2))
        with pytest.raises(TypeError, match=r"params must map names to arrays.*got list"):
            c.create("SGD", [np.ones(2)])  # type: ignore[arg-type]


def test_abandon_is_sent_only_where_it_is_asked_for() -> None:
    net = Wire(*(httpx.Response(200, json={}) for _ in range(6)))
    with client(net) as c:
        session = c.session("s")
        for flag in (True, False):
            session.patch(notes="x", abandon=flag)
            session.scheduler_step(abandon=flag)
            session.put_scheduler(None, abandon=flag)
    fields = [net.fields(i).get("abandon") for i in (0, 1, 3, 4)]
    assert fields == [True, True, None, None]
    assert [net.requests[i].url.params.get("abandon") for i in (2, 5)] == ["true", None]


def test_a_dry_run_uses_up_no_number() -> None:
    net = Wire(frame(STEP), frame(STEP))
    with client(net) as c:
        c.session("s").step({"w": np.ones(1)}, dry_run=True)
        c.session("s").step({"w": np.ones(1)})
    assert "seq" not in net.fields(0)
    assert net.fields(1)["seq"] == 1


def test_a_large_body_is_sent_in_pieces_and_arrives_whole() -> None:
    seen: dict[str, Any] = {}

    class Receiver(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            assert isinstance(request.stream, httpx.SyncByteStream)
            chunks = list(request.stream)
            seen.update(headers=request.headers, sizes=[len(c) for c in chunks])
            seen["tensors"] = wire.decode(b"".join(chunks))[0]
            return frame(STEP)

    grad = np.random.default_rng(0).standard_normal(700_001)
    with Client("http://test", transport=Receiver()) as c:
        c.session("s").step({"w": grad})
    np.testing.assert_array_equal(seen["tensors"]["grad/w"], grad)
    assert max(seen["sizes"]) == 2**20
    assert int(seen["headers"]["content-length"]) == sum(seen["sizes"])
    assert "transfer-encoding" not in seen["headers"]


def test_a_large_answer_is_read_into_one_writable_buffer() -> None:
    big = np.random.default_rng(0).standard_normal(300_000)
    whole = frame(STEP, a=big, b=big[:10]).content

    class Sender(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            def chunks() -> Iterator[bytes]:
                for at in range(0, len(whole), 65_536):
                    yield whole[at : at + 65_536]

            headers = {"content-type": wire.SAFETENSORS, "content-length": str(len(whole))}
            return httpx.Response(200, headers=headers, content=chunks())

    with Client("http://test", transport=Sender()) as c:
        params = c.session("s").step({"a": big}).params
    assert params is not None
    np.testing.assert_array_equal(params["a"], big)
    a, b = params["a"], params["b"]
    assert isinstance(a, np.ndarray)
    assert isinstance(b, np.ndarray)
    assert a.base is not None
    assert a.flags.writeable
    assert a.ctypes.data + a.nbytes == b.ctypes.data, "two buffers"


def test_params_come_with_an_etag_and_304_returns_the_ones_at_hand() -> None:
    scalars = {"version": 4, "generation": "g", "weights": "ema"}
    first = frame(scalars, w=np.ones(2))
    first.headers["etag"] = '"g.4"'
    net = Wire(first, httpx.Response(304))
    with client(net) as c:
        got = c.session("s").params("ema", names=["w", "a,b"])
        again = c.session("s").params("ema", if_none_match=got)
    assert again is got
    assert net.requests[0].url.query == b"weights=ema&names=w&names=a%2Cb"
    assert net.requests[1].headers["if-none-match"] == '"g.4"'
    assert isinstance(got, Params)
    assert (got.version, list(got), len(got)) == (4, ["w"], 1)
    np.testing.assert_array_equal(got["w"], np.ones(2))


def call_everything(session: Any) -> list[Any]:
    params = {"w": np.ones(1)}
    return [
        lambda: session.put_params(params, if_match='"g.1"', abandon=True),
        lambda: session.patch(clip_grad_norm=2.0),
        lambda: session.patch_group(1, lr=0.5, abandon=True),
        lambda: session.add_group(params, lr=0.5),
        lambda: session.put_scheduler({"name": "StepLR", "step_size": 3}),
        lambda: session.put_scheduler(None),
        lambda: session.scheduler_step(0.5),
        lambda: session.put_metrics(3, {"acc": 0.5}),
        lambda: session.import_state(b"frame"),
        lambda: session.rollback(2, if_match='"g.1"', abandon=True),
        lambda: session.pin(2, "before the sweep"),
        lambda: session.pin(3),
        lambda: session.unpin(2),
        lambda: session.delete(),
    ]


def test_every_change_carries_the_next_number_of_its_session() -> None:
    net = Wire(*(httpx.Response(200, json={"generation": "g"}) for _ in range(14)))
    with client(net) as c:
        for call in call_everything(c.session("s")):
            call()
    ends = [(r.method, r.url.path.removeprefix("/v1/sessions/s")) for r in net.requests]
    assert ends == [
        ("PUT", "/params"),
        ("PATCH", ""),
        ("PATCH", "/groups/1"),
        ("POST", "/groups"),
        ("PUT", "/scheduler"),
        ("PUT", "/scheduler"),
        ("POST", "/scheduler/step"),
        ("PUT", "/metrics"),
        ("PUT", "/state"),
        ("POST", "/rollback"),
        ("POST", "/versions/2/pin"),
        ("POST", "/versions/3/pin"),
        ("DELETE", "/versions/2/pin"),
        ("DELETE", ""),
    ]
    in_query = {4, 5, 8, 12, 13}
    for i, request in enumerate(net.requests):
        if i in in_query:
            assert request.url.params["seq"] == str(i + 1)
            assert request.url.params["worker"] == "w"
        else:
            assert (net.fields(i)["seq"], net.fields(i)["worker"]) == (i + 1, "w")
    assert net.requests[4].content == b'{"name":"StepLR","step_size":3}'
    assert net.requests[5].content == b"null"
    assert net.requests[8].content == b"frame"
    assert net.requests[0].headers["if-match"] == '"g.1"'
    assert net.requests[9].headers["if-match"] == '"g.1"'
    stamp = {"worker": "w", "epoch": 1}
    assert net.fields(9) == {"version": 2, "abandon": True, **stamp, "seq": 10}
    assert net.fields(10) == {"name": "before the sweep", **stamp, "seq": 11}
    assert net.fields(11) == {**stamp, "seq": 12}


def test_versions_are_listed_from_the_first_one_on() -> None:
    rows = [{"version": 0}, {"version": 1}]
    net = Wire(*(httpx.Response(200, json={"rows": rows, "next_after": None}) for _ in range(2)))
    with client(net) as c:
        assert c.session("s").versions() == rows
        c.session("s").versions(7, limit=2)
    assert [str(r.url.query, "ascii") for r in net.requests] == ["limit=1000", "after=7&limit=2"]


@pytest.mark.parametrize("bad", ["1/../2", None, 1.0])
def test_a_version_that_is_no_integer_is_never_sent(bad: Any) -> None:
    with client(Wire()) as c:
        for call in (c.session("s").pin, c.session("s").unpin):
            with pytest.raises(TypeError, match="version must be an integer"):
                call(bad)


def test_a_rewound_session_is_not_changed_until_resume_by_either_client() -> None:
    lost = errors.SessionRewound("lost", last_seq=0, generation="h", version=0)
    one, other = (Wire(httpx.Response(409, json=lost.problem()), created()) for _ in range(2))
    with client(one) as c:
        session = c.session("s")
        for _ in range(3):
            with pytest.raises(errors.SessionRewound, match="lost"):
                session.patch(name="x")
        session.resume()
        session.patch(name="x")

    async def run() -> None:
        async with async_client(other) as c:
            session = c.session("s")
            for _ in range(3):
                with pytest.raises(errors.SessionRewound, match="lost"):
                    await session.patch(name="x")
            session.resume()
            await session.patch(name="x")

    asyncio.run(run())
    assert len(one.requests) == len(other.requests) == 2


BEGINNINGS: list[Callable[[Any], Any]] = [
    lambda c: c.create("SGD", {"w": np.ones(1)}, lr=1),
    lambda c: c.session("s").fork(),
    lambda c: c.import_session(b"frame"),
]


@pytest.mark.parametrize("begin", BEGINNINGS, ids=["create", "fork", "import"])
def test_a_session_whose_first_answer_was_lost_is_begun_once(begin: Callable[[Any], Any]) -> None:
    again = {"id": "s", "generation": "g", "created": False, "duplicate": True}

    def outcomes() -> list[Any]:
        busy = httpx.Response(503, json=errors.Unavailable().problem())
        lost = [httpx.ReadError("reset"), httpx.ConnectError("refused")]
        return [*lost, busy, httpx.Response(200, json=again)]

    one, other = Wire(*outcomes()), Wire(*outcomes())
    with client(one, retries=Retry(first_s=0, longest_s=0)) as c:
        assert begin(c).created

    async def run() -> None:
        transport = httpx.MockTransport(other)
        patient = Retry(first_s=0, longest_s=0)
        async with AsyncClient("http://test", transport=transport, retries=patient) as c:
            assert (await begin(c)).created

    asyncio.run(run())
    for net in (one, other):
        assert len(net.requests) == 4
        assert len({(r.method, r.url, r.content) for r in net.requests}) == 1
        assert len({r.headers["idempotency-key"] for r in net.requests}) == 1


def test_sessions_are_numbered_apart_and_handles_of_one_session_together() -> None:
    net = Wire(*(httpx.Response(200, json={}) for _ in range(3)))
    with client(net) as c:
        c.session("a").patch(name="1")
        c.session("b").patch(name="2")
        c.session("a").patch(name="3")
    assert [net.fields(i)["seq"] for i in range(3)] == [1, 1, 2]


@pytest.mark.parametrize("bad", ["", "a/b", "..", "a?x=1"])
def test_an_id_that_would_leave_its_place_in_the_url_is_never_sent(bad: str) -> None:
    with client(Wire()) as c:
        with pytest.raises(errors.Invalid, match="session id"):
            c.session(bad)
        with pytest.raises(errors.Invalid, match="session id"):
            c.create("SGD", {"w": np.ones(1)}, id=bad or "/")


def test_a_name_in_a_url_is_quoted() -> None:
    net = Wire(httpx.Response(200, json={}))
    with client(net) as c:
        c.optimizer("a/b?c")
    assert net.requests[0].url.raw_path == b"/v1/optimizers/a%2Fb%3Fc"


# What goes wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raised, kind",
    [
        (httpx.ConnectError("no"), errors.ConnectFailed),
        (httpx.ConnectTimeout("no"), errors.ConnectFailed),
        (httpx.PoolTimeout("no"), errors.ConnectFailed),
        (httpx.ReadTimeout("no"), errors.Timeout),
        (httpx.WriteTimeout("no"), errors.Timeout),
        (httpx.ReadError("no"), errors.TransportError),
        (httpx.RemoteProtocolError("no"), errors.TransportError),
    ],
)
def test_failures_of_the_network_are_in_our_words_with_their_cause(
    raised: Exception, kind: type[errors.OptserveError]
) -> None:
    with client(Wire(raised), retries=0) as c, pytest.raises(errors.TransportError) as caught:
        c.session("s").status()
    assert type(caught.value) is kind
    assert caught.value.__cause__ is raised
    assert caught.value.detail.startswith("GET /v1/sessions/s: ")


@pytest.mark.parametrize(
    "raised, sentence",
    [
        (
            httpx.ConnectError("no"),
            "GET /v1/sessions/s: cannot connect to http://test:80: no (tried 3 times, limit 60 s)",
        ),
        (
            httpx.ReadTimeout("no"),
            "GET /v1/sessions/s: no complete answer from http://test:80 in time, 2.5 s: no "
            "(tried 3 times, limit 60 s)",
        ),
    ],
)
def test_failures_name_the_server_the_tries_and_the_limit_in_both_clients(
    raised: Exception, sentence: str
) -> None:
    def options(net: Wire) -> dict[str, Any]:
        return {"retries": QUICK, "timeout": 2.5, "transport": httpx.MockTransport(net)}

    async def awaited() -> None:
        async with AsyncClient("http://me:secret@test", **options(Wire(*[raised] * 3))) as c:
            await c.session("s").status()

    with (
        Client("http://me:secret@test", **options(Wire(*[raised] * 3))) as c,
        pytest.raises(errors.TransportError) as one,
    ):
        c.session("s").status()
    with pytest.raises(errors.TransportError) as other:
        asyncio.run(awaited())
    assert one.value.detail == other.value.detail == sentence


@pytest.mark.parametrize(
    "url, uds, named",
    [
        ("http://localhost:8000/", None, "http://localhost:8000"),
        ("https://me:secret@host", None, "https://host:443"),
        ("http://[::1]", None, "http://[::1]:80"),
        ("http://optserve", "/run/o.sock", "http://optserve:80 at /run/o.sock"),
    ],
)
def test_the_server_is_named_by_host_port_and_socket(url: str, uds: str | None, named: str) -> None:
    assert place(url, httpx.HTTPTransport(uds=uds)) == named
    assert place(url, httpx.AsyncHTTPTransport(uds=uds)) == named


def test_a_lost_answer_is_asked_for_again_with_the_same_bytes() -> None:
    net = Wire(httpx.ReadError("lost"), httpx.Response(503), frame(STEP | {"duplicate": True}))
    with client(net) as c:
        assert c.session("s").step({"w": np.ones(3)}).duplicate
    bodies = {request.content for request in net.requests}
    assert len(net.requests) == 3
    assert len(bodies) == 1


def test_an_answer_cut_short_is_asked_for_again() -> None:
    class Cut(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b'{"a"'
            raise httpx.RemoteProtocolError("peer closed connection")

    cut = httpx.Response(200, headers={"content-length": "9"}, stream=Cut())
    with client(Wire(cut, httpx.Response(200, json={"a": 1}))) as c:
        assert c.healthz() == {"a": 1}


def test_an_if_match_that_is_no_header_is_refused_and_nothing_stays_open() -> None:
    net = Wire(httpx.Response(200, json={}))
    with client(net) as c:
        with pytest.raises(errors.Invalid, match="if_match holds what is not printable ASCII"):
            c.session("s").put_params({"w": np.ones(1)}, if_match='"g.1"\r\nX: y')
        c.session("s").patch(name="x")
    assert net.fields()["seq"] == 1


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "", "/v1", "unix:"])
def test_an_url_without_http_is_refused(url: str) -> None:
    with pytest.raises(errors.Invalid, match="url must begin with http:// or https://, got"):
        Client(url)


@pytest.mark.parametrize("cls", [Client, AsyncClient])
def test_an_url_that_is_no_string_is_refused(cls: Any) -> None:
    with pytest.raises(TypeError, match=r"url must be a string such as 'http.*', got 8000"):
        cls(8000)


def test_threads_that_share_a_client_send_the_changes_of_a_session_one_at_a_time() -> None:
    running = threading.Semaphore(1)
    seqs: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        assert running.acquire(blocking=False), "two changes at once"
        seqs.append(json.loads(request.content)["seq"])
        threading.Event().wait(0.002)
        running.release()
        return httpx.Response(200, json={})

    with client(handler) as c:
        threads = [
            threading.Thread(target=lambda: [c.session("s").patch(name="x") for _ in range(5)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seqs == list(range(1, 21))


# The one that is awaited -------------------------------------------------------------------------


def async_client(transport: Handler) -> AsyncClient:
    mock = httpx.MockTransport(transport)
    return AsyncClient("http://test", transport=mock, retries=QUICK, worker="w")


def test_the_awaited_client_sends_the_same_requests() -> None:
    def outcomes() -> list[Any]:
        return [created(), *(httpx.Response(200, json={"generation": "g"}) for _ in range(14))]

    one, other = Wire(*outcomes()), Wire(*outcomes())
    with client(one) as c:
        session = c.create("SGD", {"w": np.ones(1)}, id="s", lr=0.1)
        for call in call_everything(session):
            call()

    async def run() -> None:
        async with async_client(other) as c:
            session = await c.create("SGD", {"w": np.ones(1)}, id="s", lr=0.1)
            for call in call_everything(session):
                await call()

    asyncio.run(run())
    assert [(r.method, r.url, r.content) for r in one.requests] == [
        (r.method, r.url, r.content) for r in other.requests
    ]


def test_the_awaited_client_streams_a_large_body_and_repeats_it() -> None:
    bodies: list[bytes] = []

    class Receiver(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            assert isinstance(request.stream, httpx.AsyncByteStream)
            bodies.append(b"".join([chunk async for chunk in request.stream]))
            if len(bodies) == 1:
                raise httpx.ReadError("lost")
            return frame(STEP)

    grad = np.random.default_rng(0).standard_normal(300_000)

    async def run() -> None:
        async with AsyncClient("http://test", transport=Receiver(), retries=QUICK) as c:
            await c.session("s").step({"w": grad})

    asyncio.run(run())
    assert bodies[0] == bodies[1]
    np.testing.assert_array_equal(wire.decode(bodies[0])[0]["grad/w"], grad)


def test_a_cancelled_step_is_settled_before_the_next_change() -> None:
    seen: list[dict[str, Any]] = []

    async def run() -> None:
        stuck = asyncio.Event()

        class Slow(httpx.AsyncBaseTransport):
            async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
                body = await request.aread()
                seen.append(json.loads(body))
                if len(seen) == 1:
                    await stuck.wait()
                return httpx.Response(200, json={})

        async with AsyncClient("http://test", transport=Slow(), worker="w") as c:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(c.session("s").patch(name="one"), 0.05)
            await c.session("s").patch(name="two")

    asyncio.run(run())
    assert [(fields["name"], fields["seq"]) for fields in seen] == [
        ("one", 1),
        ("one", 1),
        ("two", 2),
    ]


def test_awaited_changes_of_a_session_go_out_one_at_a_time() -> None:
    seqs: list[int] = []

    async def run() -> None:
        running = 0

        class Counting(httpx.AsyncBaseTransport):
            async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
                nonlocal running
                running += 1
                assert running == 1, "two changes at once"
                await asyncio.sleep(0.001)
                seqs.append(json.loads(await request.aread())["seq"])
                running -= 1
                return httpx.Response(200, json={})

        async with AsyncClient("http://test", transport=Counting()) as c:
            await asyncio.gather(*(c.session("s").patch(name=str(i)) for i in range(10)))

    asyncio.run(run())
    assert seqs == list(range(1, 11))


def test_the_awaited_client_reads_a_large_answer_in_pieces() -> None:
    whole = frame(STEP, a=np.arange(300_000.0)).content

    class Sender(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            async def chunks() -> AsyncIterator[bytes]:
                for at in range(0, len(whole), 65_536):
                    yield whole[at : at + 65_536]

            headers = {"content-type": wire.SAFETENSORS, "content-length": str(len(whole))}
            return httpx.Response(200, headers=headers, content=chunks())

    async def run() -> Any:
        async with AsyncClient("http://test", transport=Sender()) as c:
            return (await c.session("s").step({"a": np.ones(1)})).params

    np.testing.assert_array_equal(asyncio.run(run())["a"], np.arange(300_000.0))
