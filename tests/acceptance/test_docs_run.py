"""The examples in README and docs do what they say.

A code block under the line ``<!-- run -->`` is run, in its file's order, against a real server; a
block under ``<!-- prints -->`` is what the run before it must print, where ``…`` stands for
anything.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.serving import ROOT, ServerProcess, environment

DOCUMENTS = [
    "README.md",
    "docs/quickstart.md",
    "docs/how-to.md",
    "docs/client.md",
    "docs/compression.md",
]
#: The address that the documents use.
DEFAULT = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Block:
    kind: str
    language: str
    text: str
    line: int


def blocks(path: Path, marker: str = "") -> list[Block]:
    """Return the blocks under ``<!-- run -->`` and ``<!-- prints -->``, or with a word more."""
    block = rf"<!-- {marker}(run|prints) -->\n+```(\w+)\n(.*?)^```$"
    source = path.read_text()
    return [
        Block(found[1], found[2], found[3], source.count("\n", 0, found.start(3)) + 1)
        for found in re.finditer(block, source, re.DOTALL | re.MULTILINE)
    ]


def run(block: Block, url: str, folder: Path) -> str:
    """Run one block as a reader would and return what it printed."""
    text = block.text.replace(DEFAULT, url)
    if block.language == "python":
        command = [sys.executable, "-W", "error", "-c", text]
    else:
        assert block.language == "bash"
        command = ["bash", "-euo", "pipefail", "-c", text]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        env=environment(PATH=path),
    )
    assert done.returncode == 0, f"line {block.line}:\n{text}\n{done.stdout}\n{done.stderr}"
    assert done.stderr == "", f"line {block.line}: {done.stderr}"
    return done.stdout


def pattern(expected: str) -> re.Pattern[str]:
    """Return what matches ``expected``: … is anything, and space does not matter."""
    words = ["".join(part.split()) for part in expected.split("…")]
    return re.compile(".*".join(re.escape(word) for word in words), re.DOTALL)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_examples_run_and_print_what_the_text_shows(
    name: str, server: ServerProcess, tmp_path: Path
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not on this machine")
    printed = None
    for block in blocks(ROOT / name):
        if block.kind == "run":
            printed = run(block, server.url, tmp_path)
        else:
            assert printed is not None, f"{name}:{block.line}: nothing was run before"
            got = "".join(printed.replace(server.url, DEFAULT).split())
            assert pattern(block.text).fullmatch(got), f"{name}:{block.line}: printed\n{printed}"


def test_the_comparison_of_optimizers_leaves_each_far_below_its_start(
    server: ServerProcess,
) -> None:
    command = [sys.executable, "-W", "error", ROOT / "examples" / "compare_optimizers.py"]
    done = subprocess.run(
        [*command, server.url], capture_output=True, text=True, timeout=60, env=environment()
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+) .* f = ([\d.]+) at ", done.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["SGD", "Momentum", "Adagrad", "Adam"]
    assert all(float(value) < 0.2 for _, value in rows)  # from 6.45


def test_the_workers_of_the_example_train_digits_together(server: ServerProcess) -> None:
    example = ROOT / "examples" / "workers_digits.py"
    command = [sys.executable, "-W", "error", example, server.url, "--workers", "3"]
    done = subprocess.run(
        [*command, "--epochs", "2"], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pushes = re.findall(r"^(w\d): (\d+) pushes, epoch 1$", done.stdout, re.MULTILINE)
    assert pushes == [("w0", "46"), ("w1", "46"), ("w2", "46")]
    last = re.search(r"^version 46 after .* s, test accuracy ([\d.]+)%$", done.stdout, re.MULTILINE)
    assert last is not None
    assert float(last[1]) > 80  # 10 is chance


def test_the_training_run_in_curl_trains(server: ServerProcess) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not on this machine")
    done = subprocess.run(
        [ROOT / "examples" / "curl.sh", server.url], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    reached = re.fullmatch(r"w = (\S+) after 20 steps", lines[0])
    assert reached is not None
    assert abs(float(reached[1])) < 1
    assert lines[1].startswith("version,")
    assert len(lines) == 22


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_document_has_examples_to_run(name: str) -> None:
    assert sum(block.kind == "run" for block in blocks(ROOT / name)) >= 2


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name
)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []
