"""A PostgreSQL of our own: made, started and stopped by a test session, on a Unix socket alone."""

from __future__ import annotations

import atexit
import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

#: Where Debian's package has what PATH does not name.
DEBIAN = Path("/usr/lib/postgresql")
MISSING = "PostgreSQL is not installed: apt-get install postgresql"
#: Who runs it where we are root, whom PostgreSQL refuses.
UNPRIVILEGED = ("postgres", "nobody")
#: The same order of names everywhere.
LOCALE = ("--locale=C", "--encoding=UTF8")
START_LIMIT_S = 60


def binaries() -> Path | None:
    """Return the folder of initdb and postgres, of the newest version; None if there is none."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return versions[-1].parent if versions else None


class Cluster:
    """A running server; its data directory goes when it stops."""

    def __init__(self, bin_dir: Path) -> None:
        self._bin = bin_dir
        # Short: the path of a socket has at most 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="optserve-pg-", dir="/tmp"))
        self._user = _unprivileged()
        if self._user is not None:
            shutil.chown(self.directory, self._user)
        self._data = self.directory / "data"
        self._log = self.directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._idle: list[str] = []
        # fsync stays on, as it is by default.
        self._run("initdb", "-D", str(self._data), "-U", "optserve", "-A", "trust", *LOCALE)
        self.start()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = ["-k", str(self.directory), "-c", "listen_addresses="]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._bin / "postgres"), "-D", str(self._data), *options],
                stdout=log,
                stderr=log,
                user=self._user,
                cwd=self.directory,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        end = time.monotonic() + START_LIMIT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"PostgreSQL does not start:\n{self._log.read_text()}")
            time.sleep(0.05)

    def crash(self) -> None:
        """Kill the whole server, as a power loss of its process would."""
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        self._process.kill()
        self._process.wait()
        for child in children:  # each has a group of its own, and the memory is theirs too
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        end = time.monotonic() + START_LIMIT_S
        while any(_runs(child) for child in children):
            assert time.monotonic() < end, "PostgreSQL does not die"
            time.sleep(0.01)

    def kill_connections(self, database: str) -> None:
        """End all connections to a database, as an operator or a network may."""
        self.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            f"WHERE datname = '{database}' AND pid <> pg_backend_pid()"
        )

    def stop(self) -> None:
        """Stop the server and remove everything."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)  # "fast": ends the connections
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self.crash()
        shutil.rmtree(self.directory, ignore_errors=True)

    def url(self, database: str) -> str:
        """Return the URL of a database, for ``open_store``."""
        made = sa.URL.create(
            "postgresql+psycopg",
            username="optserve",
            database=database,
            query={"host": str(self.directory)},
        )
        return made.render_as_string(hide_password=False)

    @contextmanager
    def database(self) -> Iterator[str]:
        """Yield the name of an empty database that nobody else uses meanwhile.

        They are used again: emptying one takes a tenth of the time of making one.
        """
        if self._idle:
            name = self._idle.pop()
        else:
            name = f"t{uuid.uuid4().hex}"
            self.execute(f"CREATE DATABASE {name}")
        yield name
        self.kill_connections(name)
        self.execute("DROP SCHEMA public CASCADE", name)
        self.execute("CREATE SCHEMA public", name)
        self._idle.append(name)  # not where the test failed: it may be anything then

    def execute(self, text: str, database: str = "postgres") -> None:
        """Run one statement."""
        with self._connect(database) as connection:
            connection.execute(text.encode())

    def _connect(self, database: str) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(
            host=str(self.directory), user="optserve", dbname=database, autocommit=True
        )

    def _answers(self) -> bool:
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._bin / program), *arguments],
            capture_output=True,
            text=True,
            user=self._user,
            cwd=self.directory,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{done.stdout}{done.stderr}")


def _end_with_parent() -> None:
    """Shut down when the test session dies, however that happens."""
    ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _unprivileged() -> str | None:
    if os.getuid() != 0:
        return None
    for name in UNPRIVILEGED:
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise RuntimeError(f"PostgreSQL does not run as root, and there is none of {UNPRIVILEGED}")


@cache
def _started() -> Cluster | None:
    bin_dir = binaries()
    if bin_dir is None:
        return None
    cluster = Cluster(bin_dir)
    atexit.register(cluster.stop)
    return cluster


def shared_cluster() -> Cluster:
    """Return the cluster of this test session; skips the test where PostgreSQL is missing."""
    cluster = _started()
    if cluster is None:
        pytest.skip(MISSING)
    return cluster
