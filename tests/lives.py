"""Lives of the store under watch: run the scenario, kill it or fail its calls, judge the rest."""

from __future__ import annotations

import datetime
import json
import select
import socket
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.syscalls import Call, Decide, Watched
from tests.zygote import Zygote

LIFE_S = 60.0
#: The short forms take every so manieth call, beginning with another one each day.
STRIDE = 7
#: A day's number.
TODAY = datetime.date.today().toordinal()
#: The session of the scenario that goes back to its snapshots, and requests without a number.
FORGETFUL = "forgetful"
#: Those whose answers do not wait for a sync.
UNSYNCED = (FORGETFUL, "quick", "wide")
UNNUMBERED = ("snapshot", "delete")
Message = dict[str, Any]
States = dict[str, str | None]


@dataclass
class Life:
    """What a life told, and the calls that it made until it ended."""

    messages: list[Message] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    #: Both, in the order in which they came.
    log: list[Message | Call] = field(default_factory=list)
    killed: bool = False

    def of(self, name: str) -> list[Message]:
        return [message for message in self.messages if name in message]

    @property
    def acknowledged(self) -> int:
        """How many requests are answered, of all there are."""
        done = self.of("done")
        return done[-1]["done"] + 1 if done else 0

    @property
    def closed(self) -> bool:
        return bool(self.of("closed"))


def live(
    zygote: Zygote,
    directory: Path,
    first: int = 0,
    decide: Callable[[int, Call], int | str | None] = lambda number, call: None,
    script: str = "life",
    heard: Callable[[Message], None] = lambda message: None,
) -> Life:
    """Run the scenario from request ``first`` on; ``decide`` is asked for each call, from 1."""
    life = Life()

    def asked(call: Call) -> int | str | None:
        life.calls.append(call)
        life.log.append(call)
        verdict = decide(len(life.calls), call)
        life.killed |= verdict == "kill"
        return verdict

    channel = zygote.fork(
        json.dumps({"directory": str(directory), "first": first, "script": script})
    )
    with channel:
        watched = Watched(channel, directory)
        try:
            _listen(channel, watched, asked, life, heard)
        finally:
            watched.kill()
            watched.wait(10)
            watched.close()
    assert life.killed or life.closed, f"it died by itself after {life.messages[-3:]}"
    return life


def _listen(
    channel: socket.socket,
    watched: Watched,
    asked: Decide,
    life: Life,
    heard: Callable[[Message], None],
) -> None:
    poll = select.poll()
    for source in (channel.fileno(), watched.listener):
        poll.register(source, select.POLLIN)
    text, until = b"", time.monotonic() + LIFE_S
    while True:
        ready = dict(poll.poll(1000))
        assert time.monotonic() < until, f"it hangs after {life.messages[-3:]} {life.calls[-3:]}"
        if channel.fileno() in ready:  # first: it was said before the next call was made
            piece = channel.recv(1 << 16)
            text += piece
            *lines, text = text.split(b"\n")
            for line in lines:
                life.messages.append(json.loads(line))
                life.log.append(life.messages[-1])
                heard(life.messages[-1])
            if not piece:
                return
        if ready.get(watched.listener, 0) & select.POLLIN:
            watched.answer(asked)
        elif watched.listener in ready:
            poll.unregister(watched.listener)  # its last thread is gone


def reference(zygote: Zygote, directory: Path, script: str = "life") -> Reference:
    """Live without being disturbed."""
    life = live(zygote, directory, script=script)
    made = Reference(life)
    made.judge_end(life)
    assert_no_orphans(directory)
    return made


class Reference:
    """How the scenario goes when nothing happens."""

    def __init__(self, life: Life) -> None:
        self.calls = life.calls
        self.answers = life.of("done")
        [closing] = life.of("final")
        self.final: States = closing["final"]

    @cached_property
    def requests(self) -> int:
        return len(self.answers)

    def session(self, index: int) -> str:
        return str(self.answers[index]["session"])

    def states(self, answered: int) -> States:
        """Return the digests of all sessions after so many requests."""
        states: States = dict.fromkeys(self.final)
        for answer in self.answers[:answered]:
            states[answer["session"]] = answer["digest"]
        return states

    def judge_found(self, acknowledged: int, found: States) -> set[str]:
        """Every acknowledged change is there, and at most the one in flight beside them.

        Return the sessions in which that one is there.
        """
        before = self.states(acknowledged)
        after = self.states(min(acknowledged + 1, self.requests))
        ahead = set()
        for name, digest in found.items():
            if name == FORGETFUL:
                assert digest in self._remembered(acknowledged), f"{name}: not one of its snapshots"
            elif digest != before[name]:
                assert digest == after[name], (
                    f"{name} is neither as after request {acknowledged} nor as after the next one"
                )
                ahead.add(name)
        return ahead

    def _remembered(self, acknowledged: int) -> set[str | None]:
        """Return the states in which the session without durability may be found.

        Those of its last acknowledged snapshot, of one in flight, and of the one at the end.
        """
        states: list[str | None] = [None]
        for index, answer in enumerate(self.answers[: acknowledged + 1]):
            if answer["session"] == FORGETFUL and answer["what"] in ("create", "snapshot"):
                states = [*(states if index == acknowledged else []), answer["digest"]]
        return {*states, *([self.final[FORGETFUL]] if acknowledged == self.requests else [])}

    def judge_answers(self, life: Life) -> None:
        """Every answer is the one of the reference, and so is the state after it."""
        for message in life.of("done"):
            want = self.answers[message["done"]]
            for name in ("applied_version", "digest"):
                if name == "applied_version" and message["session"] == FORGETFUL:
                    continue
                assert message[name] == want[name], f"request {message['done']}: {name}"

    def judge_end(self, life: Life) -> None:
        """It got to the end, and everything is as it should be."""
        self.judge_answers(life)
        assert life.closed, f"it ended after {life.messages[-3:]}"
        [closing] = life.of("final")
        assert closing["final"] == self.final


def payload_names(directory: Path) -> set[str]:
    """Return the payload files that committed rows name."""
    database = sqlite3.connect(directory / "optserve.db")
    try:
        return {
            name
            for table in ("events", "snapshots")
            for (name,) in database.execute(
                f"SELECT payload_file FROM {table} WHERE payload_file IS NOT NULL"
            )
        }
    finally:
        database.close()


def assert_no_orphans(directory: Path) -> None:
    """The payload files are exactly those that committed rows name."""
    found = {path.name for path in (directory / "payloads").iterdir()}
    assert found == payload_names(directory)
