"""Bad input over real HTTP: each row has status, code and a whole sentence, and changes nothing.

The rows go to a server process as bytes. After each of them the exported state of the session that
it names is byte for byte what it was, and the list of sessions is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from optserve_client.errors import RequestError, tree
from tests.integration import bad_input
from tests.integration.bad_input import CREATES, FENCED, GRADS, Row, Tampered, body, f4, frame
from tests.integration.bad_input_rows import ROWS
from tests.serving import ServerProcess

SESSIONS = [*CREATES, FENCED]


class Target:
    """The sessions on the server, and what they were when last looked at."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        bad_input.make(http)
        self.files = {url: self.file(url) for url in SESSIONS}
        self.list = self.rows()
        self.status: dict[str, Any] = {url: http.get(url).json() for url in SESSIONS}

    def file(self, url: str) -> bytes:
        return self.http.get(f"{url}/state").content

    def rows(self) -> Any:
        return self.http.get(bad_input.V, params={"limit": 1000}).json()

    def send(self, row: Row) -> httpx.Response:
        sent = row.sent.sent(self.http) if isinstance(row.sent, Tampered) else row.sent
        session, _, rest = row.url.partition("/pushes/")
        if not rest.startswith("<"):
            return self.http.request(row.method, row.url, **sent)
        opened = self.http.post(f"{session}/pushes", json={"loss": 0.5})
        push = opened.headers["location"]
        for name, grad in GRADS.items() if rest.startswith("<filled>") else ():
            assert self.http.put(f"{push}/{name}", json={"grad": grad}).status_code == 200
        try:
            return self.http.request(row.method, push + rest.partition(">")[2], **sent)
        finally:
            self.http.delete(push)

    def sentence(self, row: Row) -> str:
        """Return the row's sentence with what only this run can know."""
        url = next((url for url in SESSIONS if row.url.startswith(url)), SESSIONS[0])
        generation, version = self.status[url]["generation"], self.status[url]["version"]
        known = row.sentence.replace("<at>", f"{generation}.{version}")
        return known.replace("<generation>", generation)

    def check_unchanged(self, row: Row) -> None:
        named = [url for url in SESSIONS if url.rpartition("/")[2] in f"{row.url} {row.sent}"]
        for url in named or SESSIONS[:1]:
            assert self.file(url) == self.files[url]
        assert self.rows() == self.list


@pytest.fixture(scope="module")
def target(server: ServerProcess) -> Iterator[Target]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield Target(http)
        for url in SESSIONS:
            assert http.delete(url).status_code == 200


def name_of(row: Row) -> str:
    return f"{row.method} {row.url} {row.sentence[:60]}"


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_bad_input_is_refused_with_a_sentence_and_changes_nothing(target: Target, row: Row) -> None:
    reply = target.send(row)
    document = reply.json()
    assert (reply.status_code, document["code"]) == row.answer, document
    assert document["detail"] == target.sentence(row)
    assert reply.headers["content-type"] == "application/problem+json"
    assert document["status"] == reply.status_code
    assert document["type"] == f"urn:optserve:error:{document['code']}"
    if reply.status_code == 405:
        assert row.sentence.endswith(f"allowed: {reply.headers['allow']}")
    target.check_unchanged(row)


def test_every_session_is_at_the_end_what_it_was(target: Target) -> None:
    assert {url: target.file(url) for url in SESSIONS} == target.files


def test_no_row_comes_twice_and_every_refusal_has_one() -> None:
    assert len(ROWS) >= 80
    assert len({repr(row) for row in ROWS}) == len(ROWS)
    # Rows cannot show these: a body too large or too slow, and a server that owns no such session.
    elsewhere = {"refused", "body_timeout", "too_large", "misdirected"}
    assert {row.answer[1] for row in ROWS} == {cls.code for cls in tree(RequestError)} - elsewhere


# --- too large -----------------------------------------------------------------------------------

JSON_LIMIT, BINARY_LIMIT = 1_000, 2_000


@pytest.fixture(scope="module")
def small_server() -> Iterator[httpx.Client]:
    """A server that takes small bodies only, with one session."""
    limits = {
        "OPTSERVE_MAX_JSON_BYTES": str(JSON_LIMIT),
        "OPTSERVE_MAX_BODY_BYTES": str(BINARY_LIMIT),
    }
    with ServerProcess(env=limits) as server, httpx.Client(base_url=server.url) as http:
        sent = frame({"param/w": f4([0] * 400)}, {"optimizer": "SGD"})
        assert http.put(bad_input.A, **sent).status_code == 201
        yield http


LARGE_JSON = {"w": [0.123456789] * 400}
LARGE_FRAME = {"w": f4([0] * 600)}
LARGE = [
    ("PUT", bad_input.NEW, body({"optimizer": "SGD", "params": LARGE_JSON})),
    ("POST", f"{bad_input.A}/step", body({"grads": LARGE_JSON})),
    ("POST", "/v1/step", body({"id": "bad-adamw", "grads": LARGE_JSON})),
    ("PUT", f"{bad_input.A}/params", body({"params": LARGE_JSON})),
    ("PATCH", bad_input.A, body({"notes": "x" * JSON_LIMIT})),
    ("PUT", f"{bad_input.A}/scheduler", body({"name": "x" * JSON_LIMIT})),
    ("PUT", bad_input.NEW, frame({"param/w": LARGE_FRAME["w"]}, {"optimizer": "SGD"})),
    ("POST", f"{bad_input.A}/step", frame({"grad/w": LARGE_FRAME["w"]})),
    ("POST", "/step", frame({"grad/w": LARGE_FRAME["w"]}, {"id": "bad-adamw"})),
    ("PUT", f"{bad_input.A}/params", frame({"param/w": LARGE_FRAME["w"]})),
    ("PUT", f"{bad_input.A}/state", frame({"param/w": LARGE_FRAME["w"]})),
    ("POST", f"{bad_input.A}/pushes", body({"metrics": LARGE_JSON})),
    ("PUT", f"{bad_input.A}/pushes/<push>/w", body({"grad": LARGE_JSON["w"]})),
    ("PUT", f"{bad_input.A}/pushes/<push>/w", frame({"grad/w": LARGE_FRAME["w"]})),
    ("POST", f"{bad_input.A}/pushes/<push>/commit", body({"metrics": LARGE_JSON})),
]


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "in chunks"])
@pytest.mark.parametrize(("method", "url", "sent"), LARGE, ids=lambda part: str(part)[:30])
def test_a_body_that_is_too_large_is_refused_with_the_limit_and_changes_nothing(
    small_server: httpx.Client, method: str, url: str, sent: dict[str, Any], chunked: bool
) -> None:
    content = sent["content"]
    limit = JSON_LIMIT if "json" in sent["headers"]["content-type"] else BINARY_LIMIT
    before = small_server.get(f"{bad_input.A}/state").content
    sessions = small_server.get(bad_input.V).json()
    given = iter([content[:500], content[500:]]) if chunked else content
    if "<push>" in url:
        url = url.replace("<push>", small_server.post(f"{bad_input.A}/pushes").json()["push"])
    reply = small_server.request(method, url, content=given, headers=sent["headers"])
    document = reply.json()
    assert (reply.status_code, document["code"], document["limit"]) == (413, "too_large", limit)
    if chunked:
        assert str(limit) in document["detail"]
    else:
        sentence = f"the body has {len(content)} bytes, the limit is {limit}"
        assert document["detail"] == sentence
    assert small_server.get(f"{bad_input.A}/state").content == before
    assert small_server.get(bad_input.V).json() == sessions


def test_a_body_at_the_limit_is_taken(small_server: httpx.Client) -> None:
    fields = {"notes": ""}
    spare = JSON_LIMIT - len(body(fields)["content"])
    reply = small_server.patch(bad_input.A, **body({"notes": "x" * spare}))
    assert reply.status_code == 200
    reply = small_server.patch(bad_input.A, **body({"notes": "x" * (spare + 1)}))
    assert reply.status_code == 413
