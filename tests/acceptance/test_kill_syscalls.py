"""kill -9 at every system call that changes a file: nothing is lost and nothing applied twice."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import lives, syscalls
from tests.lives import STRIDE, TODAY, Life, Message, Reference
from tests.record import Figure
from tests.syscalls import Call
from tests.zygote import Zygote

pytestmark = pytest.mark.skipif(
    syscalls.unavailable() is not None, reason=str(syscalls.unavailable())
)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote("tests.scenario") as zygote:
        yield zygote


@pytest.fixture(scope="module")
def reference(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return lives.reference(zygote, tmp_path_factory.mktemp("reference"))


def test_the_scenario_makes_every_kind_of_call(reference: Reference) -> None:
    kinds = Counter(str(call).split("-")[0] for call in reference.calls)
    named = Counter(call.name for call in reference.calls)
    assert named["fdatasync"] + named["fsync"] > 30, kinds
    assert named["pwrite64"] > 100, kinds
    assert named["write"] > 5, kinds
    assert named["unlink"] + named["unlinkat"] > 3, kinds
    assert named["ftruncate"] > 0, kinds
    assert sum(call.creates and "payloads" in call.path for call in reference.calls) > 5, kinds


def _killed_at(zygote: Zygote, directory: Path, first: int, number: int) -> Life:
    """Live until call ``number``, which does not happen any more."""
    return lives.live(zygote, directory, first, lambda n, call: "kill" if n == number else None)


class Case:
    """One directory whose lives are killed, each judged by the next one's first look."""

    def __init__(self, zygote: Zygote, reference: Reference, directory: Path) -> None:
        self.zygote = zygote
        self.reference = reference
        self.directory = directory
        self.acknowledged = 0

    def kill(self, number: int) -> Life:
        life = _killed_at(self.zygote, self.directory, self.acknowledged, number)
        self._judge(life)
        return life

    def finish(self) -> Life:
        life = lives.live(self.zygote, self.directory, self.acknowledged)
        self._judge(life)
        self.reference.judge_end(life)
        lives.assert_no_orphans(self.directory)
        return life

    def _judge(self, life: Life) -> None:
        found = life.of("found")
        ahead = self.reference.judge_found(self.acknowledged, found[0]["found"]) if found else set()
        done = life.of("done")
        if done and done[0]["session"] in ahead and done[0]["what"] not in lives.UNNUMBERED:
            assert done[0]["duplicate"] or done[0]["version"] is None, "it was applied twice"
        self.reference.judge_answers(life)
        self.acknowledged = max(self.acknowledged, life.acknowledged)


def _numbers(calls: int, long_form: bool) -> range:
    """Return at which of so many calls to kill."""
    return range(1, calls + 1) if long_form else range(TODAY % STRIDE + 1, calls + 1, STRIDE)


def _told(entry: Message | Call) -> Message:
    return {} if isinstance(entry, Call) else entry


@pytest.mark.timeout(3600)  # of the long form
def test_killed_at_any_call_it_goes_on_bit_for_bit(
    zygote: Zygote, reference: Reference, tmp_path: Path, long_form: bool, figure: Figure
) -> None:
    """And killed again in the recovery from that, at a call that moves with the day."""
    kills = 0
    for number in _numbers(len(reference.calls), long_form):
        case = Case(zygote, reference, tmp_path / str(number))
        case.directory.mkdir()
        try:
            kills += case.kill(number).killed
            kills += case.kill((number * 5 + TODAY) % 23 + 1).killed
            case.finish()
        except AssertionError as exc:
            call: Call = reference.calls[number - 1]
            raise AssertionError(f"killed at call {number}, {call}: {exc}") from exc
        shutil.rmtree(case.directory)
    figure("kills at a system call, all recovered bit for bit", kills, "kills")


@pytest.mark.parametrize("share", [0.15, 0.4, 0.6, 0.8, 0.97])
def test_killed_at_any_call_of_a_recovery(
    zygote: Zygote, reference: Reference, tmp_path: Path, long_form: bool, share: float
) -> None:
    """From one and the same crash, up to the first request that the new life answers."""
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    first = Case(zygote, reference, crashed)
    first.kill(int(len(reference.calls) * share))
    copy = tmp_path / "whole"
    shutil.copytree(crashed, copy)
    recovery = lives.live(zygote, copy, first.acknowledged)
    answers = (i for i, entry in enumerate(recovery.log) if "done" in _told(entry))
    begin = next(answers, len(recovery.log))
    calls = sum(isinstance(entry, Call) for entry in recovery.log[:begin])
    for number in _numbers(calls, long_form):
        directory = tmp_path / str(number)
        shutil.copytree(crashed, directory)
        case = Case(zygote, reference, directory)
        case.acknowledged = first.acknowledged
        case.kill(number)
        case.finish()
        shutil.rmtree(directory)
