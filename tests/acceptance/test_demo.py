"""The first command of the README, as a newcomer runs it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest

from tests.record import Figure
from tests.serving import ROOT, environment


@pytest.fixture
def demo() -> Iterator[subprocess.Popen[str]]:
    """scripts/demo in a pipe, started; everything is installed, or this test would not run."""
    process = subprocess.Popen(
        [ROOT / "scripts" / "demo"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    try:
        with process:
            yield process
    finally:
        process.kill()


def address(line: str) -> tuple[str, int]:
    found = re.search(r" ready at http://([\d.]+):(\d+) ", line)
    assert found is not None, line
    return found[1], int(found[2])


def assert_nobody_listens(where: tuple[str, int]) -> None:
    with pytest.raises(ConnectionRefusedError), socket.create_connection(where, timeout=5):
        pass


def test_the_demo_trains_equals_torch_and_stops_its_server(
    demo: subprocess.Popen[str], figure: Figure
) -> None:
    output, _ = demo.communicate(timeout=240)
    assert demo.returncode == 0, output
    assert "\x1b" not in output  # no colours and no moving cursor in a pipe
    assert "\r" not in output

    accuracy = re.search(r"^test accuracy ([\d.]+)%", output, re.MULTILINE)
    assert accuracy is not None, output
    assert float(accuracy[1]) >= 95
    difference = re.search(r"^largest difference .*: (\S+)$", output, re.MULTILINE)
    assert difference is not None, output
    assert float(difference[1]) == 0
    first = re.search(r"^first step ([\d.]+) s after the start", output, re.MULTILINE)
    assert first is not None, output
    figure("demo: from start to first step", float(first[1]), "s")
    figure("demo: test accuracy", float(accuracy[1]), "%")

    shown = re.findall(r"^  \$ curl .*\n    (.*)$", output, re.MULTILINE)
    assert len(shown) == 3
    assert '"created":true' in shown[0]
    assert '"applied":true' in shown[1]
    assert '"params":{"w":[' in shown[2]
    assert_nobody_listens(address(output))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_an_interrupted_demo_stops_its_server_too(
    demo: subprocess.Popen[str], number: signal.Signals
) -> None:
    assert demo.stdout is not None
    line = next(line for line in demo.stdout if " ready at " in line)
    demo.send_signal(number)
    assert demo.wait(20) == 128 + number
    assert_nobody_listens(address(line))
