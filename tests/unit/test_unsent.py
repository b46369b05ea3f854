"""What compressed steps left out is sent later, once, whatever becomes of the steps."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optserve_client import AsyncClient, Client, Half, Int8, Retry, Session, TopK, errors, wire
from optserve_client.wire import Bits

SIZE = 1000
ONCE = Retry(retries=0)
TENTH = TopK(0.1)


class Server:
    """Adds up the gradients of session ``s``, each request once, over a network that may fail."""

    def __init__(self) -> None:
        self.total = np.zeros(SIZE)
        self.bodies: list[bytes] = []
        #: Losses of the steps that count.
        self.applied: list[float] = []
        self.last_seq = 0
        self.last: dict[str, Any] = {}
        #: What becomes of the next requests; then all goes well.
        self.script: list[str] = []
        #: Told of each request before anything is done.
        self.watch: Callable[[], None] = lambda: None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.watch()
        outcome = self.script.pop(0) if self.script else "applied"
        if outcome == "lost":
            raise httpx.ReadError("lost before it arrived")
        answer = self.answer(request, outcome)
        if outcome == "unheard":
            raise httpx.ReadError("lost after it was applied")
        return answer

    def answer(self, request: httpx.Request, outcome: str) -> httpx.Response:
        if request.url.path != "/v1/sessions/s/step":
            seq = json.loads(request.content)["seq"]
            self.last_seq = seq
            return httpx.Response(200, json={"id": "s", "version": seq})
        tensors, metadata = wire.decode(request.content)
        fields = json.loads(metadata[wire.META_KEY])
        if fields.get("seq") == self.last_seq:
            return self.reply({**self.last, "duplicate": True})
        if outcome == "refused":
            detail = {"code": "version_conflict", "detail": "too late", "version": 7}
            return httpx.Response(409, json=detail)
        if fields.get("dry_run"):
            return self.reply(self.scalars(fields))
        self.bodies.append(request.content)
        self.last_seq = fields["seq"]
        self.last = self.scalars(fields)
        if outcome == "skipped":
            self.last |= {"applied": False, "skipped": "nonfinite"}
        else:
            self.applied.append(fields.get("loss"))
            self.total += dense(tensors, fields) / fields.get("loss_scale", 1.0)
        return self.reply(self.last)

    def scalars(self, fields: dict[str, Any]) -> dict[str, Any]:
        known = {"id": "s", "generation": "g", "version": fields.get("seq", 0), "updates": 1}
        return {**known, "applied": True, "groups": []}

    def reply(self, scalars: dict[str, Any]) -> httpx.Response:
        body = b"".join(wire.encode({}, {wire.META_KEY: json.dumps(scalars)}))
        return httpx.Response(200, content=body, headers={"content-type": wire.SAFETENSORS})


def dense(tensors: dict[str, Any], fields: dict[str, Any]) -> np.ndarray:
    if "grad/w" in tensors:
        tensor = tensors["grad/w"]
        return np.asarray(tensor.to_float32() if isinstance(tensor, Bits) else tensor)
    made = np.zeros(SIZE)
    if "topk/w/indices" in tensors:
        made[tensors["topk/w/indices"]] = tensors["topk/w/values"]
        return made
    block = fields.get("int8_block", 256)
    return tensors["int8/w/values"] * np.repeat(tensors["int8/w/scales"], block)[:SIZE]


def gradient(seed: int) -> np.ndarray:
    """Whole numbers, whose sums are exact."""
    return np.random.default_rng(seed).integers(-99, 100, SIZE).astype(np.float32)


@pytest.fixture
def server() -> Server:
    return Server()


def session_of(server: Server, retries: Retry = ONCE) -> Session:
    client = Client("http://test", transport=httpx.MockTransport(server), retries=retries)
    return client.session("s")


def unsent(session: Any, name: str = "w") -> Any:
    kept = session._client._lanes.unsent("s").left.get(name)
    return np.zeros(SIZE) if kept is None else kept[0] / kept[1]


def step(session: Session, seed: int, **options: Any) -> Any:
    return session.step({"w": gradient(seed)}, **{"returns": "none", "compress": TENTH} | options)


# --- what moves it on, and what does not ---------------------------------------------------------


def test_what_was_not_sent_is_added_to_the_next_gradient(server: Server) -> None:
    session = session_of(server)
    for seed in range(5):
        step(session, seed)
        given = sum(gradient(i) for i in range(seed + 1))
        np.testing.assert_array_equal(server.total + unsent(session), given)
    assert np.count_nonzero(unsent(session)) > SIZE // 2
    assert [len(body) < 2000 for body in server.bodies] == [True] * 5


def test_a_refused_step_leaves_it_as_it_was(server: Server) -> None:
    session = session_of(server)
    step(session, 0)
    before = unsent(session).copy()
    server.script = ["refused"]
    with pytest.raises(errors.VersionConflict):
        step(session, 1)
    np.testing.assert_array_equal(unsent(session), before)
    step(session, 2)
    np.testing.assert_array_equal(server.total + unsent(session), gradient(0) + gradient(2))


def test_a_skipped_step_leaves_it_as_it_was(server: Server) -> None:
    session = session_of(server)
    step(session, 0)
    before = unsent(session).copy()
    server.script = ["skipped"]
    assert step(session, 1).skipped == "nonfinite"
    np.testing.assert_array_equal(unsent(session), before)


def test_a_gradient_with_a_nan_is_sent_as_it_is_and_leaves_it_as_it_was(server: Server) -> None:
    session = session_of(server)
    step(session, 0)
    before = unsent(session).copy()
    bad = np.full(SIZE, np.nan, np.float32)
    session.step({"w": bad}, returns="none", compress=TENTH, loss_scale=8.0)
    np.testing.assert_array_equal(wire.decode(server.bodies[-1])[0]["grad/w"], bad)
    np.testing.assert_array_equal(unsent(session), before)


@pytest.mark.parametrize("outcome", ["lost", "unheard"])
def test_the_same_call_again_sends_the_same_bytes_and_counts_once(
    server: Server, outcome: str
) -> None:
    session = session_of(server)
    step(session, 0)
    sent: list[bytes] = []
    answer = server.answer
    server.answer = lambda request, o: sent.append(request.content) or answer(request, o)  # type: ignore[assignment, method-assign]
    server.script = ["unheard", outcome, "applied"]
    for _ in range(2):
        with pytest.raises(errors.TransportError):
            step(session, 1)
    assert step(session, 1).duplicate
    assert len(set(sent)) == 1
    assert len(server.bodies) == 2
    np.testing.assert_array_equal(server.total + unsent(session), gradient(0) + gradient(1))


@pytest.mark.parametrize("outcome", ["lost", "unheard"])
def test_another_step_after_one_that_was_not_answered_knows_what_that_one_left(
    server: Server, outcome: str
) -> None:
    session = session_of(server)
    step(session, 0)
    server.script = [outcome]
    with pytest.raises(errors.TransportError):
        step(session, 1)
    step(session, 2)
    assert len(server.bodies) == 3
    given = gradient(0) + gradient(1) + gradient(2)
    np.testing.assert_array_equal(server.total + unsent(session), given)


def test_another_step_after_one_that_turns_out_to_be_refused_forgets_that_one(
    server: Server,
) -> None:
    session = session_of(server)
    step(session, 0)
    server.script = ["lost", "refused"]
    with pytest.raises(errors.TransportError):
        step(session, 1)
    step(session, 2)
    np.testing.assert_array_equal(server.total + unsent(session), gradient(0) + gradient(2))


def test_any_other_change_settles_it_too(server: Server) -> None:
    session = session_of(server)
    server.script = ["unheard"]
    with pytest.raises(errors.TransportError):
        step(session, 0)
    assert not unsent(session).any()
    session.patch_group(0, lr=0.5)
    np.testing.assert_array_equal(server.total + unsent(session), gradient(0))
    assert unsent(session).any()


def test_an_interrupted_step_is_settled_by_the_next_one(server: Server) -> None:
    session = session_of(server)

    def interrupt() -> None:
        server.watch = lambda: None
        raise KeyboardInterrupt

    server.watch = interrupt
    with pytest.raises(KeyboardInterrupt):
        step(session, 0)
    step(session, 1)
    np.testing.assert_array_equal(server.total + unsent(session), gradient(0) + gradient(1))


def test_repeats_inside_one_call_count_once(server: Server) -> None:
    session = session_of(server, Retry(retries=3, first_s=0.0, longest_s=0.0))
    server.script = ["lost", "unheard", "lost"]
    assert step(session, 0).duplicate
    np.testing.assert_array_equal(server.total + unsent(session), gradient(0))


def test_a_dry_run_shows_what_would_be_sent_and_moves_nothing(server: Server) -> None:
    session = session_of(server)
    step(session, 0)
    before = unsent(session).copy()
    step(session, 1, dry_run=True)
    np.testing.assert_array_equal(unsent(session), before)
    step(session, 1)
    np.testing.assert_array_equal(server.total + unsent(session), gradient(0) + gradient(1))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["applied", "lost", "unheard", "refused", "skipped"]),
            st.booleans(),
            st.sampled_from([TENTH, TopK(0.02), TopK(0.3)]),
        ),
        max_size=25,
    )
)
def test_what_was_applied_and_what_is_left_is_what_was_given(
    calls: list[tuple[str, bool, TopK]],
) -> None:
    server = Server()
    session = session_of(server)
    number, used, is_open = 0, TENTH, False
    for outcome, again, compressor in calls:
        if not (again and is_open):
            number, used = number + 1, compressor
        server.script = [outcome]
        try:
            step(session, number, loss=number, compress=used)
            is_open = False
        except errors.TransportError:
            is_open = True
        except errors.RequestError:
            is_open = False
    server.script = []
    session.patch_group(0, lr=1.0)  # settles what is open
    assert len(server.applied) == len(set(server.applied))
    given = sum((gradient(number) for number in server.applied), np.zeros(SIZE))
    np.testing.assert_array_equal(server.total + unsent(session), given)


# --- of which gradient ---------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [(8.0, 8.0), (8.0, 2.0), (1.0, 1024.0)])
def test_it_is_in_the_units_of_each_steps_loss_scale(
    server: Server, scales: tuple[float, ...]
) -> None:
    session = session_of(server)
    for seed, scale in enumerate(scales):
        scaled = gradient(seed) * np.float32(scale)
        session.step({"w": scaled}, returns="none", compress=TENTH, loss_scale=scale)
    np.testing.assert_array_equal(server.total + unsent(session), gradient(0) + gradient(1))


def test_without_error_feedback_nothing_is_kept(server: Server) -> None:
    session = session_of(server)
    step(session, 0)
    before, total = unsent(session).copy(), server.total.copy()
    for compressor in (
        TopK(0.1, error_feedback=False),
        Int8(error_feedback=False),
        Half(error_feedback=False),
    ):
        step(session, 1, compress=compressor)
        np.testing.assert_array_equal(unsent(session), before)
    chosen = np.sort(np.abs(gradient(1)))[-SIZE // 10 :].sum()
    sent = server.total - total
    assert np.abs(sent).sum() == pytest.approx(chosen + 2 * np.abs(gradient(1)).sum(), rel=0.01)


def test_another_way_to_compress_sends_what_the_first_left(server: Server) -> None:
    session = session_of(server)
    step(session, 0)
    step(session, 1, compress=Int8(block=64))
    step(session, 2, compress=Half())
    given = gradient(0) + gradient(1) + gradient(2)
    np.testing.assert_allclose(server.total + unsent(session), given, atol=1e-3)
    assert np.abs(unsent(session)).max() <= 2


def test_a_step_without_compress_is_sent_as_it_is_and_leaves_it(server: Server) -> None:
    session = session_of(server)
    step(session, 0)
    before = unsent(session).copy()
    step(session, 1, compress=None)
    np.testing.assert_array_equal(wire.decode(server.bodies[-1])[0]["grad/w"], gradient(1))
    np.testing.assert_array_equal(unsent(session), before)


def test_each_session_and_each_client_has_its_own(server: Server) -> None:
    one, other = session_of(server), session_of(server)
    step(one, 0)
    assert unsent(one).any()
    assert not unsent(other).any()
    assert not one._client._lanes.unsent("t").left


def test_a_session_that_is_deleted_takes_it_along(server: Server) -> None:
    session = session_of(server)
    step(session, 0)
    session._client._lanes.forget("s")
    assert not unsent(session).any()


def test_a_gradient_of_another_size_is_refused_before_anything_is_sent(server: Server) -> None:
    session = session_of(server)
    step(session, 0)
    sentence = r"grads\['w'\] has 3 elements, what earlier steps left of it has 1000"
    with pytest.raises(errors.Invalid, match=sentence):
        session.step({"w": np.zeros(3, np.float32)}, compress=TENTH)
    step(session, 1)
    assert server.last_seq == 2


def test_memory_of_earlier_steps_is_used_again(server: Server) -> None:
    session = session_of(server)
    kept = session._client._lanes.unsent("s")
    for seed in range(3):
        step(session, seed)
    arrays = {id(kept.left["w"][0]), id(kept.spare["w"])}
    for seed in range(3, 6):
        step(session, seed)
        assert {id(kept.left["w"][0]), id(kept.spare["w"])} == arrays


def test_a_session_whose_dtype_is_known_gets_its_gradients_in_it(server: Server) -> None:
    session = session_of(server)
    session.info = {"dtype": "float32"}
    with pytest.raises(errors.Invalid, match=r"grads\['w'\] is float64 and the session is float32"):
        session.step({"w": np.zeros(SIZE)}, compress=TENTH)
    step_of_bits = Bits.bfloat16(gradient(0))
    session.step({"w": step_of_bits}, returns="none", compress=TENTH)
    sent = wire.decode(server.bodies[-1])[0]["topk/w/values"]
    assert wire.dtype_of(sent) == "F32"


# --- who waits for it ----------------------------------------------------------------------------


def test_steps_of_many_threads_lose_nothing(server: Server) -> None:
    session = session_of(server)
    threads = [threading.Thread(target=step, args=(session, seed)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    given = sum(gradient(seed) for seed in range(12))
    np.testing.assert_array_equal(server.total + unsent(session), given)


def test_the_asynchronous_client_compresses_in_a_thread(server: Server) -> None:
    where: list[threading.Thread] = []

    class Watched:
        error_feedback = True

        def encode(self, *args: Any, **options: Any) -> Any:
            where.append(threading.current_thread())
            return TENTH.encode(*args, **options)

    async def run() -> None:
        transport = httpx.MockTransport(server)
        async with AsyncClient("http://test", transport=transport, retries=ONCE) as client:
            session = client.session("s")
            server.script = ["applied", "unheard", "applied"]
            for seed in range(3):
                try:
                    gradients = {"w": gradient(seed)}
                    await session.step(gradients, returns="none", compress=Watched())
                except errors.TransportError:
                    assert seed == 1
            given = gradient(0) + gradient(1) + gradient(2)
            np.testing.assert_array_equal(server.total + unsent(session), given)

    asyncio.run(run())
    assert len(where) == 4  # one of them to see that it is not the open request
    assert threading.main_thread() not in where


def test_an_encoder_that_fails_is_told_and_leaves_all_as_it_was(server: Server) -> None:
    class Broken:
        error_feedback = True

        def encode(self, *args: Any, **options: Any) -> Any:
            raise ZeroDivisionError

    session = session_of(server)
    step(session, 0)
    before = unsent(session).copy()
    with pytest.raises(ZeroDivisionError):
        step(session, 1, compress=Broken())
    np.testing.assert_array_equal(unsent(session), before)
    step(session, 2)
    np.testing.assert_array_equal(server.total + unsent(session), gradient(0) + gradient(2))
