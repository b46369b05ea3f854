"""One server per data directory and per database: a second one says who has it, and leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from tests.postgres import shared_cluster
from tests.serving import ROOT, ServerProcess, environment

CREATE = {"optimizer": {"name": "SGD", "lr": 0.5}, "params": {"w": [1.0]}}
STEP = {"grads": {"w": [1.0]}}


def second(*flags: str) -> subprocess.CompletedProcess[str]:
    """Start a second server, which must not stay."""
    return subprocess.run(
        [sys.executable, "-m", "optserve", "serve", "--port", "0", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env=environment(),
        cwd=ROOT,
    )


def check_the_first_stays_the_only_one(data_dir: Path, flags: Sequence[str], place: str) -> None:
    with ServerProcess(*flags, data_dir=data_dir) as server:
        session = f"{server.url}/v1/sessions/a"
        assert httpx.put(session, json=CREATE).status_code == 201
        done = second("--data-dir", str(data_dir), *flags)
        assert done.returncode == 1
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("optserve: ")
        assert place in done.stderr
        assert str(server.process.pid) in done.stderr
        assert httpx.post(f"{session}/step", json=STEP).json()["version"] == 1
        server.stop(signal.SIGKILL)
    with ServerProcess(*flags, data_dir=data_dir) as server:  # a dead one is in nobody's way
        answer = httpx.post(f"{server.url}/v1/sessions/a/step", json=STEP).json()
        assert (answer["version"], answer["params"]) == (2, {"w": [0.0]})


def test_a_data_directory_has_one_server(tmp_path: Path) -> None:
    check_the_first_stays_the_only_one(tmp_path, (), str(tmp_path))


def test_a_postgresql_database_has_one_server(tmp_path: Path) -> None:
    cluster = shared_cluster()
    with cluster.database() as name:
        check_the_first_stays_the_only_one(tmp_path, ("--store", cluster.url(name)), name)
