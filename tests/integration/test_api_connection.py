"""Large bodies and replies over real sockets: the lent connection, and what does without it.

Every test runs behind our protocol on both event loops and over TLS, and behind uvicorn's own,
where ASGI messages carry the bytes: what a caller sees must not tell them apart.
"""

from __future__ import annotations

import gc
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from optserve.api.app import create_app
from optserve.api.connection import Connection
from optserve.sessions.lending import Loan
from optserve.sessions.registry import Registry
from optserve.settings import Settings
from optserve.store.memory import MemoryStore
from optserve_client.wire import SAFETENSORS
from tests.integration.api_client import frame, unframe
from tests.integration.api_uvicorn import Wire, served
from tests.waiting import wait_until

N = 600_000
STEP = "/v1/sessions/s/step"
PARAMS = "/v1/sessions/s/params"
#: name -> what uvicorn is told; ``ssl`` stands for a certificate.
TWINS: dict[str, dict[str, Any]] = {
    "lent on uvloop": {"http": Connection, "loop": "uvloop"},
    "lent on asyncio": {"http": Connection, "loop": "asyncio"},
    "lent over TLS": {"http": Connection, "loop": "uvloop", "ssl": True},
    "lent over TLS on asyncio": {"http": Connection, "loop": "asyncio", "ssl": True},
    "messages by httptools": {"http": "httptools", "loop": "uvloop"},
    "messages by h11": {"http": "h11", "loop": "asyncio"},
}
PLAIN = [name for name, told in TWINS.items() if "ssl" not in told]
LENT = [name for name, told in TWINS.items() if told["http"] is Connection]
LIMIT = 30_000_000
SETTINGS = Settings(body_timeout_s=0.5, reply_timeout_s=0.5, max_body_bytes=LIMIT)


def only(names: list[str]) -> Any:
    return pytest.mark.parametrize("twin", names, indirect=True)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path] | None]:
    if shutil.which("openssl") is None:
        yield None
        return
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    curve = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    subprocess.run(
        ["openssl", "req", "-x509", *curve.split(), "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
        timeout=60,
    )
    yield key, certificate


class Twin:
    """A server with one session of ``N`` params, and connections to it."""

    def __init__(self, address: tuple[str, int], tls: bool) -> None:
        self.address = address
        self._tls = tls

    def connect(self, **kwargs: Any) -> Wire:
        wire = Wire(self.address, **kwargs)
        if self._tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            wire.socket = context.wrap_socket(wire.socket)
        return wire

    def version(self) -> int:
        with self.connect() as wire:
            version: int = orjson.loads(wire.request("GET /v1/sessions/s HTTP/1.1")[2])["version"]
            return version


@pytest.fixture(params=TWINS)
def twin(request: Any, certificate: tuple[Path, Path] | None) -> Iterator[Twin]:
    told = dict(TWINS[request.param])
    if tls := told.pop("ssl", False):
        if certificate is None:
            pytest.skip("openssl is not here to make a certificate")
        told |= {"ssl_keyfile": certificate[0], "ssl_certfile": certificate[1]}
    registry = Registry(MemoryStore())
    try:
        with served(create_app(registry, SETTINGS), **told) as address:
            twin = Twin(address, tls)
            create(twin)
            yield twin
    finally:
        registry.close()


GRADS = np.random.default_rng(5).standard_normal(N).astype("<f4")
BODY = frame({"grad/w": GRADS}, {})


def head(body: bytes | None, *lines: str, target: str = f"POST {STEP}") -> bytes:
    length = [] if body is None else [f"Content-Length: {len(body)}"]
    told = [f"{target} HTTP/1.1", "Host: x", f"Content-Type: {SAFETENSORS}", *length, *lines]
    return "\r\n".join([*told, f"Accept: {SAFETENSORS}", "", ""]).encode()


def create(twin: Twin) -> None:
    body = frame({"param/w": np.zeros(N, "<f4")}, {"optimizer": {"name": "SGD", "lr": 0.5}})
    with twin.connect() as wire:
        wire.send(head(body, target="PUT /v1/sessions/s") + body)
        assert wire.answer()[0] == 201


def params_after(steps: int) -> Any:
    params = np.zeros(N, "<f4")
    for _ in range(steps):
        params -= np.float32(0.5) * GRADS
    return params


def assert_stepped(answer: tuple[int, dict[str, str], bytes], version: int) -> None:
    status, _, body = answer
    assert status == 200, body[:300]
    tensors, fields = unframe(body)
    assert fields["version"] == version
    np.testing.assert_array_equal(tensors["param/w"], params_after(version))


def in_chunks(body: bytes, size: int) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


# --- bodies --------------------------------------------------------------------------------------


def test_large_steps_follow_each_other_on_one_connection(twin: Twin) -> None:
    with twin.connect() as wire:
        for version in (1, 2, 3):
            wire.send(head(BODY) + BODY)
            assert_stepped(wire.answer(), version)


@pytest.mark.parametrize("early", [0, 1, 9, 300, 70_000, len(BODY) - 1])
def test_any_part_of_a_body_may_come_with_its_head(twin: Twin, early: int) -> None:
    with twin.connect() as wire:
        wire.send(head(BODY) + BODY[:early])
        time.sleep(0.05)
        wire.send(BODY[early:])
        assert_stepped(wire.answer(), 1)


def test_a_chunked_body_is_read_too(twin: Twin) -> None:
    with twin.connect() as wire:
        wire.send(head(None, "Transfer-Encoding: chunked") + in_chunks(BODY, 100_000))
        assert_stepped(wire.answer(), 1)
        wire.send(head(BODY) + BODY)
        assert_stepped(wire.answer(), 2)


@only(PLAIN)  # Python's TLS sockets are not for two threads
def test_requests_may_follow_before_the_answer(twin: Twin) -> None:
    small = head(None, target=f"GET {PARAMS}")
    with twin.connect() as wire:
        sent = threading.Thread(
            target=wire.send, args=((head(BODY) + BODY) * 2 + small + head(BODY) + BODY,)
        )
        sent.start()
        assert_stepped(wire.answer(), 1)
        assert_stepped(wire.answer(), 2)
        np.testing.assert_array_equal(unframe(wire.answer()[2])[0]["param/w"], params_after(2))
        assert_stepped(wire.answer(), 3)
        sent.join(10)


def test_who_waits_for_100_gets_it(twin: Twin) -> None:
    with twin.connect() as wire:
        wire.send(head(BODY, "Expect: 100-continue"))
        assert wire.answer()[0] == 100
        wire.send(BODY)
        assert_stepped(wire.answer(), 1)


def test_a_refusal_comes_instead_of_100(twin: Twin) -> None:
    with twin.connect() as wire:
        wire.send(head(BODY, "Expect: 100-continue", target="POST /v1/sessions/none/step"))
        assert wire.answer()[0] == 404


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_a_caller_who_goes_away_in_mid_body_changes_nothing(twin: Twin, share: float) -> None:
    for _ in range(8):  # more than there are gradient buffers
        with twin.connect() as wire:
            wire.send(head(BODY) + BODY[: int(len(BODY) * share)])
    with twin.connect() as wire:
        wire.send(head(BODY) + BODY)
        assert_stepped(wire.answer(), 1)


def test_a_caller_who_falls_silent_in_mid_body_is_told_so(twin: Twin) -> None:
    with twin.connect() as wire:
        wire.send(head(BODY) + BODY[:-5000])
        status, headers, body = wire.answer()
        assert (status, headers["connection"]) == (408, "close")
        said = orjson.loads(body)["detail"]
        assert said.startswith("nothing arrived for 0.5 s, after ")
        assert said.endswith(f" bytes of {len(BODY)}")
    assert twin.version() == 0


WRONG = np.full(N, np.nan, "<f4")
REFUSED: dict[str, tuple[bytes, int, str]] = {
    "an unknown name": (frame({"grad/v": GRADS}, {}), 422, "unknown parameter 'v'"),
    "another shape": (frame({"grad/w": GRADS.reshape(2, -1)}, {}), 422, "has shape [2, 300000]"),
    "NaN": (frame({"grad/w": WRONG}, {}), 422, "grads['w'][0] is nan"),
    "trailing bytes": (BODY + b"x" * 100_000, 400, "goes on after the"),
    "missing bytes": (BODY[:-200_000], 400, "the body ended after"),
    "too large": (BODY + bytes(LIMIT), 413, f"the limit is {LIMIT}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_body_that_is_refused_gets_its_answer_and_changes_nothing(twin: Twin, name: str) -> None:
    body, status, said = REFUSED[name]
    with twin.connect() as wire:
        send_quietly(wire, head(body) + body)  # the server reads on for a while after a refusal
        answer = wire.answer()
    assert answer[0] == status, answer[2]
    assert said in orjson.loads(answer[2])["detail"]
    with twin.connect() as wire:
        wire.send(head(BODY) + BODY)
        assert_stepped(wire.answer(), 1)


def send_quietly(wire: Wire, data: bytes) -> None:
    """Send; the server may have said enough before the end."""
    try:
        wire.send(data)
    except OSError:
        return


def test_json_of_any_size_is_read(twin: Twin) -> None:
    body = orjson.dumps({"grads": {"w": GRADS}}, option=orjson.OPT_SERIALIZE_NUMPY)
    lines = [f"POST {STEP} HTTP/1.1", "Host: x", "Content-Type: application/json"]
    with twin.connect() as wire:
        for version in (1, 2):
            wire.send("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
            status, _, text = wire.answer()
            document = orjson.loads(text)
            assert (status, document["version"]) == (200, version)
            np.testing.assert_array_equal(
                np.array(document["params"]["w"], "<f4"), params_after(version)
            )


# --- one gradient of a push ----------------------------------------------------------------------

OTHER = frame({"grad/w": np.ones(N, "<f4")})


def open_push(twin: Twin) -> str:
    with twin.connect() as wire:
        status, headers, _ = wire.request("POST /v1/sessions/s/pushes HTTP/1.1\nContent-Length: 0")
        assert status == 201
        return headers["location"]


def put_head(url: str, body: bytes = BODY) -> bytes:
    return accepting_json(head(body, target=f"PUT {url}/w"))


def accepting_json(lines: bytes) -> bytes:
    return lines.replace(b"Accept: " + SAFETENSORS.encode(), b"Accept: application/json")


def told(twin: Twin, url: str, what: str) -> list[str]:
    with twin.connect() as wire:
        status, _, body = wire.request(f"GET {url} HTTP/1.1")
        assert status == 200
        names: list[str] = orjson.loads(body)[what]
        return names


def begin(wire: Wire, twin: Twin, url: str, late: int = 5000) -> None:
    """Send a body but for its last bytes, and return when the server reads it."""
    wire.send(put_head(url, OTHER) + OTHER[:-late])
    wait_until(lambda: told(twin, url, "arriving") == ["w"], "a body that arrives")


def commit(twin: Twin, url: str) -> tuple[int, dict[str, str], bytes]:
    with twin.connect() as wire:
        wire.send(head(b"", target=f"POST {url}/commit"))
        return wire.answer()


@pytest.mark.parametrize("early", [0, 1, 9, 300, 70_000, len(BODY) - 1])
def test_a_gradient_arrives_however_it_is_cut(twin: Twin, early: int) -> None:
    url = open_push(twin)
    with twin.connect() as wire:
        wire.send(put_head(url) + BODY[:early])
        time.sleep(0.05)
        wire.send(BODY[early:])
        assert wire.answer()[0] == 200
        wire.send(put_head(url) + BODY)
        assert wire.answer()[0] == 200
    assert_stepped(commit(twin, url), 1)


def test_a_gradient_that_breaks_off_is_not_there(twin: Twin) -> None:
    url = open_push(twin)
    with twin.connect() as wire:
        wire.send(put_head(url) + BODY)
        assert wire.answer()[0] == 200
    assert told(twin, url, "missing") == []
    with twin.connect() as wire:
        begin(wire, twin, url)
    wait_until(lambda: told(twin, url, "arriving") == [], "the end of a connection")
    assert told(twin, url, "missing") == ["w"]
    assert commit(twin, url)[0] == 422
    with twin.connect() as wire:
        wire.send(put_head(url) + BODY)
        assert wire.answer()[0] == 200
    assert_stepped(commit(twin, url), 1)


def test_a_gradient_that_falls_silent_is_refused_and_not_there(twin: Twin) -> None:
    url = open_push(twin)
    with twin.connect() as wire:
        wire.send(put_head(url) + BODY[:-5000])
        assert wire.answer()[0] == 408
    assert told(twin, url, "missing") == ["w"]


def test_a_commit_says_what_is_still_arriving(twin: Twin) -> None:
    url = open_push(twin)
    with twin.connect() as wire:
        begin(wire, twin, url)
        status, _, body = commit(twin, url)
        assert (status, orjson.loads(body)["code"]) == (409, "conflict")
        assert orjson.loads(body)["detail"] == "the body of 'w' is still arriving"
        wire.send(OTHER[-5000:])
        assert wire.answer()[0] == 200
    assert unframe(commit(twin, url)[2])[1]["version"] == 1


@pytest.mark.parametrize("late", [5000, 1_000_000])
def test_a_body_that_hangs_does_not_touch_the_one_that_replaced_it(twin: Twin, late: int) -> None:
    url = open_push(twin)
    with twin.connect() as hung, twin.connect() as wire:
        begin(hung, twin, url, late)
        wire.send(put_head(url) + BODY)
        assert wire.answer()[0] == 200
        assert told(twin, url, "arriving") == []
        hung.send(OTHER[-late:])
        status, _, body = hung.answer()
        assert (status, orjson.loads(body)["code"]) == (503, "unavailable")
        assert "another body of 'w' came meanwhile" in orjson.loads(body)["detail"]
    assert_stepped(commit(twin, url), 1)


def test_what_arrives_of_a_push_that_is_given_up_goes_nowhere(twin: Twin) -> None:
    url = open_push(twin)
    with twin.connect() as hung, twin.connect() as wire:
        begin(hung, twin, url)
        assert wire.request(f"DELETE {url} HTTP/1.1")[0] == 200
        # The next step must not find it in its buffer.
        wire.send(head(BODY) + BODY[:-5000])
        hung.send(OTHER[-5000:])
        assert hung.answer()[0] == 404
        wire.send(BODY[-5000:])
        assert_stepped(wire.answer(), 1)


# --- replies -------------------------------------------------------------------------------------


def test_head_has_the_length_and_no_body(twin: Twin) -> None:
    with twin.connect() as wire:
        wire.send(head(None, target=f"HEAD {PARAMS}"))
        while b"\r\n\r\n" not in wire._left:
            wire._more()
        begun, _, wire._left = wire._left.partition(b"\r\n\r\n")
        assert b" 200 " in begun
        assert int(begun.lower().split(b"content-length: ")[1].split(b"\r\n")[0]) > 4 * N
        wire.send(head(BODY) + BODY)
        assert_stepped(wire.answer(), 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_reply_in_another_dtype_is_rounded_as_torch_does(twin: Twin, dtype: str) -> None:
    import torch

    with twin.connect() as wire:
        wire.send(head(BODY) + BODY)
        assert_stepped(wire.answer(), 1)
        wire.send(head(None, target=f"GET {PARAMS}?dtype={dtype}"))
        tensors, _ = unframe(wire.answer()[2])
    want = torch.from_numpy(params_after(1)).to(getattr(torch, dtype))
    got = tensors["param/w"]
    if dtype == "bfloat16":
        assert np.array_equal(got.array, want.view(torch.uint16).numpy())
    else:
        assert np.array_equal(got, want.numpy())


#: More than the kernel takes of a reply that nobody reads.
BIG = 6_000_000


def create_big(twin: Twin) -> None:
    body = frame({"param/w": np.zeros(BIG, "<f4")}, {"optimizer": {"name": "SGD", "lr": 0.5}})
    with twin.connect() as wire:
        wire.send(head(body, target="PUT /v1/sessions/big") + body)
        assert wire.answer()[0] == 201


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes of the copies that are made of live params from now on."""
    made: list[int] = []
    original: Callable[..., None] = Loan._copy_live

    def copy_live(self: Loan, live: Any) -> None:
        made.append(live.nbytes)
        original(self, live)

    monkeypatch.setattr(Loan, "_copy_live", copy_live)
    return made


@only(LENT[:2])
def test_who_reads_slowly_gets_the_version_that_was_asked_for(
    twin: Twin, copies: list[int]
) -> None:
    create_big(twin)
    grads = np.ones(BIG, "<f4")
    body = frame({"grad/w": grads}, {"return": "none"})
    with twin.connect() as slow, twin.connect() as other:
        slow.send(head(None, target="GET /v1/sessions/big/params"))
        slow._more()  # it has begun
        for version in (1, 2):
            other.send(head(body, target="POST /v1/sessions/big/step") + body)
            assert unframe(other.answer()[2])[1]["version"] == version
        tensors, fields = unframe(slow.answer()[2])
    assert fields["version"] == 0
    assert not tensors["param/w"].any()
    assert copies == [4 * BIG]


@only(LENT[:2])
def test_a_reply_that_nobody_takes_is_given_up(twin: Twin) -> None:
    create_big(twin)
    with twin.connect() as wire:
        wire.send(head(None, target="GET /v1/sessions/big/params"))
        until = time.monotonic() + 10
        with pytest.raises(OSError, match=r"reset|pipe"):
            while time.monotonic() < until:  # writing fails once the other end has closed
                wire.send(b"\r\n")
                time.sleep(0.05)
    assert twin.version() == 0


@only(LENT[:2])
def test_a_reply_that_was_taken_cost_no_copy(twin: Twin, copies: list[int]) -> None:
    with twin.connect() as wire:
        for version in range(1, 6):
            wire.send(head(BODY) + BODY)
            assert_stepped(wire.answer(), version)
    assert copies == []


@only(LENT)
def test_a_request_leaves_nothing_for_the_garbage_collector(twin: Twin) -> None:
    gc.collect()
    gc.disable()
    try:
        with twin.connect() as wire:
            for version in (1, 2):
                wire.send(head(BODY) + BODY)
                assert_stepped(wire.answer(), version)
            wire.send(head(None, target=f"GET {PARAMS}"))
            assert wire.answer()[0] == 200
            left = [kept for kept in gc.get_objects() if type(kept).__name__ == "Exchange"]
            assert len(left) <= 1  # the one that the connection knows
    finally:
        gc.enable()
