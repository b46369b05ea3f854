"""The program and what it keeps, for how long and for whom; and the commands that look at it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.serving import ROOT, ServerProcess, environment

CREATE = {
    "optimizer": {"name": "SGD", "lr": 0.5, "momentum": 0.9},
    "params": {"w": [1.0]},
    "name": "a\tname\nof \x1b[31mtwo lines",
}
STEP = {"grads": {"w": [1.0]}}


def optserve(
    *arguments: str | Path, stdin: bytes | None = None, **env: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "optserve", *map(str, arguments)],
        capture_output=True,
        timeout=60,
        input=stdin or b"",
        env=environment(**env),
        cwd=ROOT,
    )


def sentence(done: subprocess.CompletedProcess[bytes], status: int = 1) -> str:
    """Return the one line that a command that failed has said."""
    assert (done.returncode, done.stdout) == (status, b""), done
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("optserve: ")
    return line.removeprefix("optserve: ")


def fill(url: str, *names: str) -> None:
    """Make these sessions, each at version 2."""
    for name in names:
        assert httpx.put(f"{url}/v1/sessions/{name}", json=CREATE).status_code == 201
        for _ in range(2):
            assert step(url, name)["applied"] is True


def step(url: str, name: str) -> dict[str, object]:
    reply: dict[str, object] = httpx.post(f"{url}/v1/sessions/{name}/step", json=STEP).json()
    return reply


# --- the data directory --------------------------------------------------------------------------


def test_sessions_outlive_the_server_and_a_second_server_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    with ServerProcess(data_dir=folder) as server:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        fill(server.url, "a")
        said = sentence(optserve("serve", "--port", "0", "--data-dir", folder))
        assert f"data directory {folder} is used by the server with pid " in said
        assert str(server.process.pid) in said
        assert server.stop() == 0
    with ServerProcess(data_dir=folder) as server:
        assert step(server.url, "a")["version"] == 3
        server.stop(signal.SIGKILL)
    with ServerProcess(data_dir=folder) as server:
        assert httpx.get(f"{server.url}/v1/sessions/a").json()["version"] == 3
        place = json.loads(server.stderr().splitlines()[0])
    assert (place["event"], place["place"]) == ("sessions are kept here", str(folder))


def test_a_store_in_memory_makes_no_directory(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    with ServerProcess("--store", "memory", data_dir=folder) as server:
        assert server.line.endswith("store: memory)")
    assert not folder.exists()


def test_a_directory_that_cannot_be_is_one_sentence() -> None:
    said = sentence(optserve("serve", "--port", "0", "--data-dir", "/dev/null/x"))
    assert said == (
        "the data directory /dev/null/x cannot be made: Not a directory; "
        "name another one with --data-dir"
    )


def test_a_password_is_in_no_message(tmp_path: Path) -> None:
    url = "postgresql+psycopg://me:secret@127.0.0.1:1/db"
    done = optserve("serve", "--port", "0", "--store", url, "--data-dir", tmp_path)
    assert sentence(done)
    assert b"secret" not in done.stderr
    for wrong in ("postgresql+psycopg://me:secret@host:port/db", "mysql://me:secret@host/db"):
        done = optserve("fsck", OPTSERVE_STORE=wrong)
        assert sentence(done, 2)
        assert b"secret" not in done.stderr


# --- optserve sessions, with a server and without ------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where sessions are, as flags name it."""

    flags: tuple[str, ...]
    online: bool

    def run(
        self, command: str, *arguments: str | Path, stdin: bytes | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        return optserve("sessions", command, *arguments, *self.flags, stdin=stdin)

    def ids(self) -> list[str]:
        done = self.run("ls")
        assert done.returncode == 0, done.stderr
        return [line.split("\t")[0] for line in done.stdout.decode().splitlines()[1:]]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with sessions for every test here, that no server has open."""
    folder = tmp_path_factory.mktemp("kept")
    with ServerProcess(data_dir=folder) as server:
        fill(server.url, "a", "b", "c", "d")
    return folder


@pytest.fixture(scope="module")
def running() -> Iterator[ServerProcess]:
    with ServerProcess() as server:
        fill(server.url, "a", "b", "c", "d")
        yield server


@pytest.fixture(params=["server", "files"])
def place(request: pytest.FixtureRequest) -> Place:
    if request.param == "server":
        server: ServerProcess = request.getfixturevalue("running")
        return Place(("--url", server.url), True)
    return Place(("--data-dir", str(request.getfixturevalue("kept"))), False)


def test_ls_lists_by_tabs_in_a_pipe(place: Place) -> None:
    done = place.run("ls")
    assert done.returncode == 0, done.stderr
    head, first, *_ = done.stdout.decode().splitlines()
    assert head.split("\t") == [
        "ID",
        "OPTIMIZER",
        "VERSION",
        "UPDATES",
        "PARAMETERS",
        "DTYPE",
        "DURABILITY",
        "CHANGED",
        "NAME",
    ]
    cells = first.split("\t")
    assert cells[:7] == ["a", "SGD", "2", "2", "1", "float32", "always"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", cells[7])
    assert cells[8] == "a�name�of �[31mtwo lines"
    assert done.stderr == b""


def test_ls_and_show_speak_json(place: Place) -> None:
    rows = json.loads(place.run("ls", "--json").stdout)
    [row] = [row for row in rows if row["id"] == "a"]
    shown = json.loads(place.run("show", "a").stdout)
    assert shown.items() >= row.items()
    assert (shown["version"], shown["optimizer"], shown["name"]) == (2, "SGD", CREATE["name"])
    assert shown["created_at"] <= shown["updated_at"]
    if not place.online:
        assert (shown["events"], shown["suspect"]) == (3, False)
        assert [kept["version"] for kept in shown["snapshots"]] == [2]


def test_a_session_moves_to_another_place_and_goes_on(
    place: Place, running: ServerProcess, tmp_path: Path
) -> None:
    """Out of a server or a data directory, into each of them."""
    file = tmp_path / "a.safetensors"
    done = place.run("export", "a", file)
    assert done.returncode == 0, done.stderr
    assert done.stderr.decode() == f"optserve: a: {file.stat().st_size} bytes in {file}\n"
    assert os.listdir(tmp_path) == ["a.safetensors"]
    done = place.run("import", file)
    assert done.returncode == 0, done.stderr
    made = done.stdout.decode().strip()
    assert made in place.ids()
    again = place.run("export", made, "-")
    moved = optserve("sessions", "import", "-", "--url", running.url, stdin=again.stdout)
    assert moved.returncode == 0, moved.stderr
    reply = step(running.url, moved.stdout.decode().strip())
    assert reply["version"] == 3
    # momentum 0.9 over three gradients of 1, lr 0.5: 1 - 0.5 * (1 + 1.9 + 2.71)
    assert reply["params"] == {"w": [pytest.approx(-1.805)]}


def test_export_replaces_nothing_unasked(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_bytes(b"mine")
    assert sentence(place.run("export", "a", file)) == f"{file} exists; --force replaces it"
    assert file.read_bytes() == b"mine"
    assert place.run("export", "a", file, "--force").returncode == 0
    assert file.stat().st_size > 100
    said = sentence(place.run("export", "a", tmp_path))
    assert said == f"{tmp_path} is a directory or device, expected the name of a file"
    said = sentence(place.run("export", "a", tmp_path / "no" / "file"))
    assert said == f"there is no directory {tmp_path / 'no'}"
    said = sentence(place.run("export", "nobody", tmp_path / "new"))
    assert "no session 'nobody'" in said
    assert os.listdir(tmp_path) == ["taken"]


def test_import_replaces_nothing_unasked(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "a"
    assert place.run("export", "a", file).returncode == 0
    said = sentence(place.run("import", file, "--id", "b"))
    assert said.startswith("session 'b' exists; --force replaces everything in it")
    done = place.run("import", file, "--id", "b", "--force")
    assert (done.returncode, done.stdout) == (0, b"b\n")
    assert json.loads(place.run("show", "b").stdout)["version"] == 3
    said = sentence(place.run("import", tmp_path / "missing"))
    assert said == f"{tmp_path / 'missing'} cannot be read: No such file or directory"
    file.write_bytes(file.read_bytes()[:-1])
    sentence(place.run("import", file, "--id", "half"))
    assert "half" not in place.ids()


def test_rm_wants_yes_where_nobody_can_be_asked(place: Place) -> None:
    said = sentence(place.run("rm", "c", "d"), 2)
    assert said == "nobody is there to be asked; --yes deletes without asking"
    assert {"c", "d"} <= set(place.ids())
    done = place.run("rm", "--yes", "c", "nobody", "d")
    assert (done.returncode, done.stdout) == (1, b"c\nd\n")
    assert done.stderr.decode().startswith("optserve: nobody: no session 'nobody'")
    assert not {"c", "d"} & set(place.ids())


@pytest.mark.parametrize("command", ["show", "export", "rm"])
def test_a_bad_id_is_refused_before_anything_is_opened(command: str) -> None:
    rest = ["-"] if command == "export" else []
    said = sentence(optserve("sessions", command, "a/b", *rest, "--data-dir", "/nowhere"), 2)
    assert said.startswith("session id must match [A-Za-z0-9._-]{1,128}") or "a/b" in said


# --- who holds them ------------------------------------------------------------------------------


def test_without_a_url_a_running_server_is_named(tmp_path: Path) -> None:
    with ServerProcess("--uds", str(tmp_path / "o.sock"), data_dir=tmp_path) as server:
        said = sentence(optserve("sessions", "ls", "--data-dir", tmp_path))
        assert f"the server with pid {server.process.pid}" in said
        assert said.endswith("; or ask it: --url http://HOST:PORT")
        asked = optserve("sessions", "ls", OPTSERVE_URL=server.url)
        assert (asked.returncode, asked.stdout.count(b"\n")) == (0, 1)
        asked = optserve("fsck", "--data-dir", tmp_path)
        assert f"pid {server.process.pid}" in sentence(asked, 2)


def test_a_flag_beats_the_url_in_the_environment(kept: Path) -> None:
    done = optserve("sessions", "ls", "--data-dir", kept, OPTSERVE_URL="http://127.0.0.1:1")
    assert done.returncode == 0, done.stderr
    said = sentence(optserve("sessions", "ls", "--data-dir", kept, "--url", "http://h"), 2)
    assert said == "--url and --data-dir are two places to look for sessions, expected one"


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    said = sentence(optserve("sessions", "ls", "--url", "http://127.0.0.1:1"))
    assert "cannot connect to http://127.0.0.1:1" in said
    assert "http:// or https://" in sentence(optserve("sessions", "ls", "--url", "nonsense"))


def test_looking_loads_no_torch(kept: Path) -> None:
    for arguments in (["sessions", "ls"], ["sessions", "show", "a"], ["fsck"]):
        program = (
            "import sys; from optserve.cli import app\n"
            f"app({[*arguments, '--data-dir', str(kept)]!r}, standalone_mode=False)\n"
            "sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, timeout=60, env=environment()
        )
        assert done.returncode == 0, done.stderr


# --- on a terminal -------------------------------------------------------------------------------


def on_terminal(*arguments: str | Path, answer: bytes = b"") -> tuple[int, str]:
    """Run the program on a terminal of its own; return its status and what was to be seen."""
    pid, terminal = pty.fork()
    if pid == 0:  # the new process
        os.chdir(ROOT)
        program = [sys.executable, "-m", "optserve", *map(str, arguments)]
        os.execve(sys.executable, program, environment())
    seen = bytearray()
    until = time.monotonic() + 60
    try:
        while time.monotonic() < until:
            if select.select([terminal], [], [], 1)[0]:
                try:
                    piece = os.read(terminal, 65536)
                except OSError:  # EIO: the other end is gone
                    break
                if not piece:
                    break
                seen += piece
                if answer and b"[y/N]" in seen:
                    os.write(terminal, answer)
                    answer = b""
    finally:
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), seen.decode()


def test_ls_is_a_table_on_a_terminal(kept: Path) -> None:
    status, seen = on_terminal("sessions", "ls", "--data-dir", kept)
    head, first, *_ = seen.splitlines()
    assert status == 0
    assert head.startswith("ID")
    assert head.index("OPTIMIZER") == first.index("SGD")
    assert "\t" not in seen
    assert "\x1b" not in seen


def test_rm_asks_on_a_terminal(kept: Path) -> None:
    flags = ("--data-dir", kept)
    status, seen = on_terminal("sessions", "rm", "a", *flags, answer=b"n\n")
    assert status == 1
    assert "Delete this session with all history: a?" in seen
    assert optserve("sessions", "show", "a", *flags).returncode == 0


def test_no_state_file_is_poured_onto_a_terminal(kept: Path) -> None:
    status, seen = on_terminal("sessions", "export", "a", "-", "--data-dir", kept)
    assert status == 1
    assert "a state file is no text for a terminal" in seen


def test_fsck_shows_where_it_is_on_a_terminal_only(kept: Path) -> None:
    status, seen = on_terminal("fsck", "--data-dir", kept)
    assert status == 0
    assert "1 of " in seen
    assert seen.rstrip().endswith(": clean")
    done = optserve("fsck", "--data-dir", kept)
    assert (done.returncode, done.stdout.count(b"\n"), done.stderr) == (0, 1, b"")


# --- after a crash -------------------------------------------------------------------------------


def test_looking_hides_no_loss(tmp_path: Path) -> None:
    """A session that lost acknowledged steps says so, however often somebody looked before."""
    with ServerProcess(data_dir=tmp_path) as server:
        body = {**CREATE, "durability": "memory"}
        made = httpx.put(f"{server.url}/v1/sessions/light", json=body).json()
        assert step(server.url, "light")["applied"] is True
        server.stop(signal.SIGKILL)
    for _ in range(2):
        done = optserve("fsck", "--data-dir", tmp_path)
        assert done.returncode == 0, done
        assert b"light: the last events before a crash may be gone" in done.stdout
        shown = json.loads(optserve("sessions", "show", "light", "--data-dir", tmp_path).stdout)
        assert (shown["version"], shown["suspect"]) == (0, True)
        done = optserve("sessions", "export", "light", "-", "--data-dir", tmp_path)
        assert done.returncode == 0, done.stderr
    with ServerProcess(data_dir=tmp_path) as server:
        found = httpx.get(f"{server.url}/v1/sessions/light").json()
        assert found["version"] == 0
        assert found["generation"] != made["generation"]
