"""optserve fsck over data directories that were damaged on purpose, and what a salvage leaves."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from optserve.cli import app
from optserve.sessions.operations import Pin
from optserve.sessions.registry import Registry
from optserve.sessions.session import Session
from optserve.store.opening import open_store
from optserve_client.errors import Damaged, SessionRewound
from tests import local, rounds
from tests.local import NOBODY, Identity, arrays, create, exported, step
from tests.postgres import shared_cluster

#: Gradients of 100 kB lie in files, those of 400 bytes in the database.
LARGE: dict[str, tuple[int, ...]] = {"w": (25_000,)}
SMALL: dict[str, tuple[int, ...]] = {"w": (100,)}
SHAPES = {"large": LARGE, "small": SMALL}
BODY: dict[str, Any] = {"optimizer": {"name": "Adam", "lr": 0.1}}
STEPS = 6


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OPTSERVE_")]:
        monkeypatch.delenv(name)


@contextmanager
def registry(folder: Path, url: str | None = None) -> Iterator[Registry]:
    """A registry on the data directory; no snapshots at its end, as after a crash."""
    store = open_store(url=url, data_dir=folder, files=None)
    made = Registry(store, threads=torch.get_num_threads())
    try:
        yield made
    finally:
        made.close(snapshots_s=-1)


def steps(session: Session, name: str, first: int = 1, last: int = STEPS) -> None:
    for i in range(first, last + 1):
        step(session, arrays(i, SHAPES[name]), Identity(worker="w", seq=i, digest=bytes([i])))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sessions with a create event and six steps each: lsn 1 to 7, versions 0 to 6."""
    with registry(tmp_path) as made:
        for name, shapes in SHAPES.items():
            steps(create(made, BODY, arrays(0, shapes), name), name)
    return tmp_path


def fsck(folder: Path, *flags: str) -> Result:
    return CliRunner().invoke(app, ["fsck", "--data-dir", str(folder), *flags])


def sql(folder: Path, statement: str, *values: Any) -> list[Any]:
    with closing(sqlite3.connect(folder / "optserve.db")) as database, database:
        return database.execute(statement, values).fetchall()


def payload_of(folder: Path, lsn: int, table: str = "events", session: str = "large") -> Path:
    [[name]] = sql(
        folder,
        f"SELECT payload_file FROM {table} WHERE session = ? AND lsn = ?",
        session,
        lsn,
    )
    return folder / "payloads" / str(name)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# --- what is found -------------------------------------------------------------------------------


def test_a_sound_directory_is_clean(folder: Path) -> None:
    done = fsck(folder)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("2 sessions, 14 events, 0 snapshots, 14 payloads of ")
    assert done.stdout.endswith(f" in {folder}: clean\n")
    assert done.stderr == ""


def test_a_session_with_snapshots_and_pins_is_clean(folder: Path) -> None:
    with registry(folder) as made:
        session = made.get("default", "large")
        session.change(Pin(version=2, name="two"), NOBODY).result(30)
        for last in (7, 8, 9):
            steps(session, "large", last, last)
            session.snapshot().result(30)
    done = fsck(folder)
    assert done.exit_code == 0, done.output
    assert "3 snapshots" in done.stdout


def truncate(folder: Path) -> None:
    os.truncate(payload_of(folder, 5), 10)


def extend(folder: Path) -> None:
    with payload_of(folder, 5).open("ab") as file:
        file.write(b"x")


def unlink(folder: Path) -> None:
    payload_of(folder, 5).unlink()


def flip_bit(folder: Path) -> None:
    flip(payload_of(folder, 5))


def unreadable(folder: Path) -> None:
    path = payload_of(folder, 5)
    path.unlink()
    path.mkdir()


def drop_row(folder: Path) -> None:
    sql(folder, "DELETE FROM events WHERE session = 'large' AND lsn = 5")


def spoil_record(folder: Path) -> None:
    sql(folder, "UPDATE events SET record = '{' WHERE session = 'large' AND lsn = 5")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, " has 10 bytes, expected "),
        (extend, " bytes, expected "),
        (unlink, " cannot be read: No such file or directory"),
        (flip_bit, " does not have its digest"),
        (unreadable, "payload file "),
        (drop_row, "event 5 is missing"),
        (spoil_record, "event 5 cannot be read: "),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage_is_named_with_its_place_and_cure_and_can_be_salvaged(
    folder: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    """The session is back at the version before the damage, bit for bit, and goes on."""
    damage(folder)
    done = fsck(folder)
    assert done.exit_code == 1, done.output
    [line, summary] = done.stdout.splitlines()
    assert line.startswith("large: lsn 5: ")
    assert sentence in line
    assert line.endswith(
        "; `optserve fsck --salvage large` goes back to version 3 and loses "
        "versions 4 to 6 (3 events)"
    )
    assert summary.endswith(": 1 problem")

    done = fsck(folder, "--salvage", "large")
    assert done.exit_code == 0, done.output
    assert "large: salvaged; it is back at version 3, in the new generation " in done.stdout
    assert "; lost: versions 4 to 6 (3 events)\n" in done.stdout
    assert fsck(folder).exit_code == 0
    check_salvaged(folder)


def check_salvaged(folder: Path) -> None:
    with registry(folder) as made:
        session, twin = made.get("default", "large"), create(made, BODY, arrays(0, LARGE), "twin")
        steps(twin, "large", 1, 3)
        assert session.status().result(30)["version"] == 3
        one, two = (step(s, arrays(9, LARGE)) for s in (session, twin))
        assert one.scalars["version"] == two.scalars["version"] == 4
        local.assert_equal(
            local.params_of(one), {n: torch.tensor(p) for n, p in local.params_of(two).items()}
        )
        assert made.get("default", "small").status().result(30)["version"] == STEPS


def test_rounds_are_salvaged_up_to_the_one_with_the_damage(tmp_path: Path) -> None:
    def push(session: Session, worker: str, seq: int, base: int, seed: int) -> Any:
        return rounds.push(session, worker, seq, base, arrays(seed, LARGE))

    oracle = rounds.Local(arrays(0, LARGE))
    with registry(tmp_path) as made:
        session = create(made, rounds.sync(2), arrays(0, LARGE), "large")
        for number in range(2):
            for seed, worker in enumerate("ab", 1 + 2 * number):
                last = push(session, worker, number + 1, number, seed)
            rounds.ended(last)
    flip(payload_of(tmp_path, 5))  # the first push of the second round
    done = fsck(tmp_path, "--salvage", "all")
    assert done.exit_code == 0, done.output
    assert "large: lsn 5: event 5 (contribution, version 1): " in done.stdout
    assert "it is back at version 1, " in done.stdout
    assert "; lost: version 2 (3 events)\n" in done.stdout
    assert fsck(tmp_path).exit_code == 0
    with registry(tmp_path) as made:
        session = made.get("default", "large")
        oracle.step(rounds.mean([arrays(seed, LARGE) for seed in (1, 2)]))
        oracle.check(rounds.params(session))
        assert rounds.round_of(session) is None
        rounds.waits(push(session, "a", 2, 1, 3))
        rounds.ended(push(session, "b", 2, 1, 4))
        oracle.step(rounds.mean([arrays(seed, LARGE) for seed in (3, 4)]))
        oracle.check(rounds.params(session))


def test_an_inline_payload_is_read_too(folder: Path) -> None:
    sql(
        folder,
        "UPDATE parts SET data = zeroblob(length(data)) WHERE session = 'small' AND lsn = 7",
    )
    done = fsck(folder)
    assert done.exit_code == 1
    assert "small: lsn 7: event 7 (step, version 6): " in done.stdout
    assert "loses version 6 (1 event)" in done.stdout


def test_every_damaged_event_has_its_line(folder: Path) -> None:
    for lsn in (3, 5, 7):
        payload_of(folder, lsn).unlink()
    lines = fsck(folder).stdout.splitlines()
    assert [line.partition(": event")[0] for line in lines[:-1]] == [
        "large: lsn 3",
        "large: lsn 5",
        "large: lsn 7",
    ]
    assert all(
        "goes back to version 1 and loses versions 2 to 6 (5 events)" in x for x in lines[:3]
    )


def test_json_has_the_same_for_programs(folder: Path) -> None:
    path = payload_of(folder, 5)
    path.unlink()
    done = fsck(folder, "--json")
    assert done.exit_code == 1
    said = json.loads(done.stdout)
    [problem] = said["problems"]
    assert (problem["session"], problem["lsn"], problem["file"]) == ("large", 5, path.name)
    assert (said["tally"]["sessions"], said["tally"]["events"]) == (2, 14)
    said = json.loads(fsck(folder, "--json", "--salvage", "all").stdout)
    [salvaged] = said["salvaged"]
    assert (salvaged["version"], salvaged["lost_versions"]) == (3, [4, 6])


def test_what_the_database_finds_in_itself_is_told(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "optserve.db")) as database:
        database.execute("PRAGMA writable_schema=ON")
        database.execute(
            "UPDATE sqlite_master SET sql = replace(sql, 'loss DOUBLE', 'loss DOUBLE NOT NULL') "
            "WHERE name = 'events'"
        )
        database.commit()
    done = fsck(folder)
    assert done.exit_code == 1, done.output
    line = done.stdout.splitlines()[0]
    assert line.startswith(
        f"{folder}: the database {folder}/optserve.db: NULL value in events.loss"
    )
    assert line.endswith("or go back to a backup")


# --- snapshots -----------------------------------------------------------------------------------


@pytest.fixture
def snapshots(folder: Path) -> Path:
    """Session large has snapshots after events 7 and 9, and versions up to 9."""
    with registry(folder) as made:
        session = made.get("default", "large")
        session.status().result(30)
        session.snapshot().result(30)
        steps(session, "large", 7, 8)
        session.snapshot().result(30)
        steps(session, "large", 9, 9)
    return folder


@pytest.mark.parametrize("lsn", [7, 9])
def test_one_damaged_snapshot_costs_nothing(snapshots: Path, lsn: int) -> None:
    flip(payload_of(snapshots, lsn, "snapshots"))
    done = fsck(snapshots)
    assert done.exit_code == 1, done.output
    assert f"large: lsn {lsn}: snapshot of version {lsn - 1}: payload file " in done.stdout
    assert "no event is lost, the session is rebuilt without it" in done.stdout
    done = fsck(snapshots, "--salvage", "large")
    assert "large: nothing was changed" in done.stdout
    with registry(snapshots) as made:
        assert made.get("default", "large").status().result(30)["version"] == 9


def test_a_damaged_event_behind_a_snapshot_costs_what_came_after_it(snapshots: Path) -> None:
    flip(payload_of(snapshots, 10))
    assert "goes back to version 8 and loses version 9 (1 event)" in fsck(snapshots).stdout
    assert fsck(snapshots, "--salvage", "large").exit_code == 0
    with registry(snapshots) as made:
        assert made.get("default", "large").status().result(30)["version"] == 8


def test_where_nothing_reads_back_only_removal_is_left(snapshots: Path) -> None:
    for lsn in (7, 9):
        flip(payload_of(snapshots, lsn, "snapshots"))
    done = fsck(snapshots, "--salvage", "all")
    assert done.exit_code == 1
    cure = "nothing of it can be rebuilt, `optserve sessions rm large` removes it"
    assert f"large: nothing was changed; {cure}" in done.stdout
    arguments = ["sessions", "rm", "--yes", "large", "--data-dir", str(snapshots)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert fsck(snapshots).exit_code == 0


def test_a_pinned_snapshot_is_the_last_resort(folder: Path) -> None:
    with registry(folder) as made:
        session = made.get("default", "large")
        session.change(Pin(version=2, name="two"), NOBODY).result(30)
        session.snapshot().result(30)
        steps(session, "large", 7, 7)
        session.snapshot().result(30)
    for [lsn] in sql(folder, "SELECT lsn FROM snapshots WHERE pin IS NULL"):
        flip(payload_of(folder, lsn, "snapshots"))
    done = fsck(folder, "--salvage", "large")
    assert "large: salvaged; it is back at version 2" in done.stdout, done.output
    with registry(folder) as made:
        assert made.get("default", "large").status().result(30)["version"] == 2


# --- salvage -------------------------------------------------------------------------------------


def test_a_damaged_session_says_how_it_is_salvaged_and_the_others_work(folder: Path) -> None:
    flip_bit(folder)
    with registry(folder) as made:
        with pytest.raises(Damaged, match=r"optserve fsck --salvage large"):
            made.get("default", "large").status().result(30)
        assert made.get("default", "small").status().result(30)["version"] == STEPS


def test_a_salvage_touches_no_sound_session(folder: Path) -> None:
    with registry(folder) as made:
        before = exported(made.get("default", "small"))
    flip_bit(folder)
    done = fsck(folder, "--salvage", "small")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == "small: nothing is damaged, nothing was changed"
    assert fsck(folder, "--salvage", "all").exit_code == 0
    with registry(folder) as made:
        assert exported(made.get("default", "small")) == before


def test_a_salvage_of_an_unknown_session_changes_nothing(folder: Path) -> None:
    flip_bit(folder)
    done = fsck(folder, "--salvage", "large", "--salvage", "nobody")
    assert done.exit_code == 2
    assert done.stderr == f"optserve: no session 'nobody' in {folder}\n"
    assert fsck(folder).exit_code == 1


def test_a_client_of_a_salvaged_session_is_told(folder: Path) -> None:
    flip_bit(folder)
    fsck(folder, "--salvage", "large")
    with registry(folder) as made:
        session = made.get("default", "large")
        session.status().result(30)
        with pytest.raises(SessionRewound):
            step(session, arrays(7, LARGE), Identity(worker="w", seq=STEPS + 1, digest=b"x"))


# --- what cannot be opened -----------------------------------------------------------------------


def test_a_store_that_somebody_has_open_is_not_checked(folder: Path) -> None:
    with registry(folder):
        done = fsck(folder)
    assert done.exit_code == 2
    assert f"data directory {folder} is used by the server with pid {os.getpid()}" in done.stderr


def test_looking_makes_no_database(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    done = fsck(folder)
    assert done.exit_code == 2
    assert done.stderr == (
        f"optserve: there is no database at {folder}/optserve.db; see --data-dir and --store\n"
    )
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"x" * 5000, b"SQLite format 3\0" + b"\0" * 5000])
def test_what_is_no_database_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "optserve.db").write_bytes(content)
    done = fsck(tmp_path)
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path / "optserve.db") in done.stderr


# --- PostgreSQL ----------------------------------------------------------------------------------


def test_a_database_of_postgresql_is_checked_and_salvaged_too() -> None:
    """Without --files: large payloads lie in it, too."""
    cluster = shared_cluster()

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--store", url])

    with cluster.database() as name:
        url = cluster.url(name)
        with registry(Path("/nowhere"), url) as made:
            steps(create(made, BODY, arrays(0, LARGE), "large"), "large")
            held = run("sessions", "ls")
            assert held.exit_code == 1
            assert f"the server with pid {os.getpid()}" in held.stderr
            assert held.stderr.endswith("; or ask it: --url http://HOST:PORT\n")
        assert run("fsck").exit_code == 0
        cluster.execute("DELETE FROM parts WHERE lsn = 5", name)
        done = run("fsck")
        assert done.exit_code == 1
        assert done.stdout.startswith("large: lsn 5: event 5 (step, version 4): a payload of ")
        assert "goes back to version 3" in done.stdout
        assert run("fsck", "--salvage", "large").exit_code == 0
        assert run("fsck").exit_code == 0
        assert run("sessions", "ls").stdout.splitlines()[1].split("\t")[:3] == [
            "large",
            "Adam",
            "3",
        ]
