"""Versions over HTTP: listed, gone back to, pinned; and what a server says that cannot go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from optserve_client.errors import Damaged, OutOfSpace, Unavailable
from tests.integration.api_client import CREATE, GRADS, Api, asking

S = "/v1/sessions/s"


@pytest.fixture
def api(app: Any) -> Iterator[Api]:
    with asking(app) as api:
        yield api


@pytest.fixture
def session(api: Api) -> str:
    """The path of a session at version 3."""
    assert api.put(S, json={**CREATE, "name": "first", "ttl_s": 1000}).status_code == 201
    for i in range(3):
        step(api, loss=float(i))
    return S


def step(api: Api, **fields: Any) -> dict[str, Any]:
    reply = api.post(f"{S}/step", json={"grads": GRADS, **fields})
    assert reply.status_code == 200, reply.text
    said: dict[str, Any] = reply.json()
    return said


def params(api: Api) -> Any:
    return api.get(f"{S}/params").json()["params"]


def rows(api: Api, **query: Any) -> Any:
    reply = api.get(f"{S}/versions", params=query)
    assert reply.status_code == 200, reply.text
    return reply.json()["rows"]


def state_of(api: Api) -> dict[str, Any]:
    """Return what a rollback brings back, apart from its place in the history."""
    told = api.get(S).json()
    return {name: told[name] for name in ("groups", "scheduler", "config", "updates", "torch")}


# --- the list ------------------------------------------------------------------------------------


def test_every_version_is_listed_from_the_first_one_on(api: Api, session: str) -> None:
    listed = rows(api)
    assert [row["version"] for row in listed] == [0, 1, 2, 3]
    assert [row["kind"] for row in listed] == ["create", "step", "step", "step"]
    assert [row["updates"] for row in listed] == [0, 1, 2, 3]
    assert all(row["pin"] is None and row["time"] > 0 for row in listed)


def test_pages_of_versions_follow_each_other(api: Api, session: str) -> None:
    first = api.get(f"{S}/versions", params={"limit": 2}).json()
    assert ([row["version"] for row in first["rows"]], first["next_after"]) == ([0, 1], 1)
    rest = api.get(f"{S}/versions", params={"after": 1, "limit": 9}).json()
    assert ([row["version"] for row in rest["rows"]], rest["next_after"]) == ([2, 3], None)


def test_what_makes_no_version_is_not_listed(api: Api, session: str) -> None:
    api.patch(S, json={"notes": "n"})
    api.patch(f"{S}/groups/0", json={"lr": 0.5})
    assert [row["version"] for row in rows(api)] == [0, 1, 2, 3]


# --- going back ----------------------------------------------------------------------------------


def test_a_rollback_makes_a_new_version_with_the_old_ones_state(api: Api, session: str) -> None:
    at_three = params(api)
    expected = state_of(api)
    step(api)
    api.patch(f"{S}/groups/0", json={"lr": 0.5})
    reply = api.post(f"{S}/rollback", json={"version": 3}).json()
    assert (reply["version"], reply["applied_version"], reply["updates"]) == (5, 5, 3)
    assert reply["duplicate"] is False
    assert params(api) == at_three
    # The lr was set before version 4 was left, but after the event that made version 3.
    assert state_of(api) == expected
    assert [row["kind"] for row in rows(api, after=3)] == ["step", "rollback"]


def test_training_goes_on_from_there_bit_for_bit(api: Api, session: str) -> None:
    after_four = step(api)["params"]
    api.post(f"{S}/rollback", json={"version": 3})
    assert step(api)["params"] == after_four


def test_a_rollback_can_be_rolled_back(api: Api, session: str) -> None:
    at_three = params(api)
    api.post(f"{S}/rollback", json={"version": 0})
    assert params(api) == {"w": CREATE["params"]["w"], "b": CREATE["params"]["b"]}
    api.post(f"{S}/rollback", json={"version": 3})
    assert params(api) == at_three
    assert api.get(S).json()["version"] == 5


def test_what_people_call_the_session_stays_as_it_is(api: Api, session: str) -> None:
    api.patch(S, json={"name": "second", "notes": "n", "tags": {"a": "b"}, "ttl_s": 2000})
    api.post(f"{S}/rollback", json={"version": 1})
    told = api.get(S).json()
    assert (told["name"], told["notes"], told["tags"]) == ("second", "n", {"a": "b"})
    assert told["ttl_s"] == 2000


@pytest.mark.parametrize("who", [{"worker": "me", "seq": 1}, {"key": "k-1"}], ids=["seq", "key"])
def test_a_repeated_rollback_is_applied_once(api: Api, session: str, who: dict[str, Any]) -> None:
    headers = {"idempotency-key": who["key"]} if "key" in who else {}
    body = {"version": 1, **{k: v for k, v in who.items() if k != "key"}}
    first = api.post(f"{S}/rollback", json=body, headers=headers).json()
    again = api.post(f"{S}/rollback", json=body, headers=headers).json()
    assert (first["version"], again["version"]) == (4, 4)
    assert (first["duplicate"], again["duplicate"]) == (False, True)


def test_what_a_session_knows_of_its_workers_is_not_rolled_back(api: Api, session: str) -> None:
    said = {"worker": "me", "seq": 1}
    assert step(api, **said)["applied_version"] == 4
    api.post(f"{S}/rollback", json={"version": 3})
    repeat = step(api, **said)
    assert (repeat["duplicate"], repeat["applied_version"], repeat["version"]) == (True, 4, 5)


def test_a_rollback_under_a_condition(api: Api, session: str) -> None:
    etag = api.get(f"{S}/params").headers["etag"]
    step(api)
    late = api.post(f"{S}/rollback", json={"version": 1}, headers={"if-match": etag})
    assert (late.status_code, late.json()["code"]) == (412, "precondition_failed")
    etag = api.get(f"{S}/params").headers["etag"]
    assert api.post(f"{S}/rollback", json={"version": 1}, headers={"if-match": etag}).is_success


def test_an_open_line_search_has_to_be_abandoned(api: Api) -> None:
    lbfgs = {**CREATE, "optimizer": {"name": "LBFGS", "max_iter": 4}}
    api.put(S, json=lbfgs)
    step(api, loss=1.0)
    step(api, loss=0.5)
    refused = api.post(f"{S}/rollback", json={"version": 0})
    assert refused.json()["code"] == "line_search_open"
    assert api.post(f"{S}/rollback", json={"version": 0, "abandon": True}).status_code == 200


def test_a_fork_of_an_earlier_version_goes_its_own_way(api: Api, session: str) -> None:
    api.post(f"{S}/rollback", json={"version": 1})
    at_one = params(api)
    made = api.post(f"{S}/fork", json={"id": "f", "version": 1}).json()
    assert made["forked_from"]["version"] == 1
    assert api.get("/v1/sessions/f/params").json()["params"] == at_one


# --- pins ----------------------------------------------------------------------------------------


def test_a_version_is_pinned_renamed_and_let_go(api: Api, session: str) -> None:
    pinned = api.post(f"{S}/versions/1/pin").json()
    assert pinned["pinned"] == {"version": 1, "pin": "v1"}
    assert (pinned["version"], pinned["applied_version"]) == (3, None)
    assert [(r["version"], r["pin"]) for r in rows(api) if r["snapshot"]] == [(1, "v1")]
    api.post(f"{S}/versions/1/pin", json={"name": "before the sweep"})
    assert rows(api, after=0, limit=1)[0]["pin"] == "before the sweep"
    gone = api.delete(f"{S}/versions/1/pin").json()
    assert gone["pinned"] == {"version": 1, "pin": None}
    assert [row["pin"] for row in rows(api)] == [None] * 4


def test_the_current_version_can_be_pinned(api: Api, session: str) -> None:
    api.post(f"{S}/versions/3/pin", json={"name": "now"})
    assert rows(api, after=2)[0]["pin"] == "now"


def test_a_repeated_pin_and_unpin_are_answered_as_before(api: Api, session: str) -> None:
    body = {"name": "a", "worker": "me", "seq": 1}
    for duplicate in (False, True):
        reply = api.post(f"{S}/versions/2/pin", json=body).json()
        assert (reply["duplicate"], reply["pinned"]["pin"]) == (duplicate, "a")
    for duplicate in (False, True):
        reply = api.delete(f"{S}/versions/2/pin", params={"worker": "me", "seq": 2}).json()
        assert (reply["duplicate"], reply["pinned"]["pin"]) == (duplicate, None)


# --- ttl, durability, recovery -------------------------------------------------------------------


def test_ttl_and_recovery_are_in_the_status_and_ttl_can_be_changed(api: Api, session: str) -> None:
    told = api.get(S).json()
    assert told["ttl_s"] == 1000
    assert told["recovery"] == {"bit_exact": True, "reason": None}
    assert api.patch(S, json={"ttl_s": None}).status_code == 200
    assert api.get(S).json()["ttl_s"] is None


def test_every_reply_of_a_change_says_how_safe_it_is(api: Api, session: str) -> None:
    durability = api.get(S).json()["durability"]
    replies = [
        api.post(f"{S}/step", json={"grads": GRADS}),
        api.patch(S, json={"notes": "n", "durability": durability}),
        api.post(f"{S}/rollback", json={"version": 1}),
        api.post(f"{S}/versions/1/pin"),
        api.delete(f"{S}/versions/1/pin"),
    ]
    assert {reply.json()["durability"] for reply in replies} == {durability}


# --- a server that cannot go on ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "after"),
    [
        (OutOfSpace("the disk is full"), "5"),
        (Unavailable("busy"), "1"),
        (Unavailable("stopping", retry_after=3), "3"),
        (Damaged("snapshot 4 does not read back"), None),
    ],
    ids=lambda value: getattr(value, "code", None),
)
def test_failures_say_when_to_come_again(error: Any, after: str | None) -> None:
    from optserve.api.problems import problem_response

    response = problem_response({"type": "http", "method": "POST", "path": S}, error)
    assert response.status_code == error.status
    assert response.headers.get("retry-after") == after


def test_a_server_that_stops_is_not_ready(api: Api, app: Any) -> None:
    app.state.registry.warm()
    assert api.get("/readyz").status_code == 200
    app.state.registry.draining = True
    reply = api.get("/readyz")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert "stops" in reply.json()["detail"]
    app.state.registry.draining = False


def test_every_change_documents_what_a_full_disk_and_a_damaged_session_answer(app: Any) -> None:
    for path, operations in app.openapi()["paths"].items():
        for method, said in operations.items():
            changes = method != "get" and not path.startswith("/v1/schedulers")
            assert ("507" in said["responses"]) == changes, (method, path)
            assert ("500" in said["responses"]) == ("{session_id}" in path or "/step" in path)
