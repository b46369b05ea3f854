"""Flag, else OPTSERVE_*, else default; and a sentence for each value that cannot be used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from pydantic import ValidationError

from optserve.memory_budget import budget_of, default_budget, limits, parse_bytes
from optserve.settings import (
    Settings,
    StoreSettings,
    contradiction,
    explain,
    masked,
    unknown_variables,
)

GIB = 2**30


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OPTSERVE_")]:
        monkeypatch.delenv(name)


def sentences(**flags: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Settings(**flags)
    return explain(caught.value, flags)


def test_the_default_is_loopback_only() -> None:
    assert (Settings().host, Settings().port) == ("127.0.0.1", 8000)


def test_a_flag_beats_the_environment_and_the_environment_beats_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPTSERVE_PORT", "9000")
    monkeypatch.setenv("OPTSERVE_MAX_BODY_BYTES", "1000")
    assert Settings().port == 9000
    assert Settings(port=9001).port == 9001
    assert Settings(port=9001).max_body_bytes == 1000


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTSERVE_UDS", "")
    assert Settings().uds is None


def test_an_injected_port_gets_a_sentence_that_says_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPTSERVE_PORT", "tcp://10.0.0.7:8000")
    assert sentences() == [
        "OPTSERVE_PORT is 'tcp://10.0.0.7:8000', an address that a container platform injects for "
        "a service named 'optserve', not a port; rename that service, switch service links off "
        "(enableServiceLinks: false), or give --port"
    ]
    assert Settings(port=8000).port == 8000


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"port": 65536}, "--port must be <= 65535, got 65536"),
        ({"threads": 0}, "--threads must be >= 1, got 0"),
        ({"device": "gpu"}, "--device must be auto, cpu, cuda or cuda:<index>, got 'gpu'"),
        (
            {"log_level": "loud"},
            "--log-level must be 'debug', 'info', 'warning' or 'error', got 'loud'",
        ),
        (
            {"uds": "/run/o", "fd": 3},
            "uds (/run/o) and fd (3) are two places to listen, expected one",
        ),
        ({"data_dir": ""}, "--data-dir must be a path, got ''"),
        (
            {"store": "mysql://me:secret@host/db"},
            "--store must be memory, sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME, "
            "got 'mysql://me:***@host/db'",
        ),
        (
            {"memory_budget": "8 loaves"},
            "--memory-budget must be bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB, "
            "got '8 loaves'",
        ),
        ({"memory_budget": "0"}, "--memory-budget must be >= 1, got 0"),
        ({"session_ttl": "0"}, "--session-ttl must be > 0, got '0'"),
        ({"session_ttl": "inf"}, "--session-ttl must be a finite number, got 'inf'"),
    ],
)
def test_a_bad_flag_is_named_with_its_value(flags: dict[str, Any], sentence: str) -> None:
    assert sentences(**flags) == [sentence]


def test_a_bad_variable_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTSERVE_KEEP_ALIVE_S", "soon")
    assert sentences() == ["OPTSERVE_KEEP_ALIVE_S must be an integer, got 'soon'"]


def test_more_threads_than_the_cpus_can_bear_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert Settings(threads=8).threads == 8
    assert sentences(threads=9) == ["--threads must be <= 8, 4 for each CPU of this machine, got 9"]


@pytest.mark.parametrize(
    ("variables", "flags", "sentence"),
    [
        ({}, {"uds": "/o", "port": 1}, "--port and --uds are two places to listen, expected one"),
        ({}, {"fd": 3, "host": "::1"}, "--host and --fd are two places to listen, expected one"),
        (
            {"OPTSERVE_UDS": "/o"},
            {"port": 1},
            "--port and OPTSERVE_UDS are two places to listen, expected one",
        ),
        ({"OPTSERVE_PORT": "1"}, {"uds": "/o"}, None),
        ({}, {"host": "::1", "port": 1}, None),
    ],
)
def test_a_flag_is_never_ignored_for_another_place_to_listen(
    variables: dict[str, str],
    flags: dict[str, Any],
    sentence: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert contradiction(Settings(**flags), flags) == sentence


def test_a_variable_that_is_no_setting_is_told_with_the_closest_one() -> None:
    injected = ["OPTSERVE_SERVICE_HOST", "OPTSERVE_PORT_8000_TCP_ADDR", "OPTSERVE_TORCH_INDEX"]
    assert unknown_variables(
        ["PATH", "OPTSERVE_PORT", *injected, "OPTSERVE_PROT", "OPTSERVE_QQQQQQQQQQQQQQQQQQQQQQQ"]
    ) == [
        "OPTSERVE_PROT is no setting and does nothing (did you mean OPTSERVE_PORT?)",
        "OPTSERVE_QQQQQQQQQQQQQQQQQQQQQQQ is no setting and does nothing",
    ]


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, info in Settings.model_fields.items() if not info.description] == []


# --- where sessions are kept ---------------------------------------------------------------------


def test_sessions_are_kept_in_the_users_data_directory_unless_told() -> None:
    assert Settings().directory == platformdirs.user_data_path("optserve")
    assert Settings(data_dir="/srv/o").directory == Path("/srv/o")


def test_a_directory_may_be_relative_or_begin_with_a_tilde(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("OPTSERVE_FILES", "~/tensors")
    settings = Settings(data_dir="here")
    assert (settings.data_dir, settings.files) == (tmp_path / "here", Path("/home/me/tensors"))


def test_a_command_that_only_opens_the_store_reads_no_other_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPTSERVE_PORT", "nonsense")
    monkeypatch.setenv("OPTSERVE_DATA_DIR", "/srv/o")
    assert StoreSettings().directory == Path("/srv/o")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory", "memory"),
        ("sqlite:////srv/o.db", "sqlite:////srv/o.db"),
        ("postgresql+psycopg://me@host/db", "postgresql+psycopg://me@host/db"),
        ("postgresql+psycopg://me:secret@host/db", "postgresql+psycopg://me:***@host/db"),
        ("postgresql+psycopg://me:se/cr@et@host/db", "postgresql+psycopg://me:***@host/db"),
        (
            "postgresql+psycopg://host/db?user=me&password=secret&sslpassword=s",
            "postgresql+psycopg://host/db?user=me&password=***&sslpassword=***",
        ),
        ("me:secret@host", "***@host"),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str) -> None:
    assert masked(url) == shown


def test_settings_show_no_password() -> None:
    settings = Settings(store="postgresql+psycopg://me:secret@host/db")
    assert "secret" not in f"{settings!r} {settings} {settings.place}"
    with pytest.raises(ValidationError) as caught:
        Settings(store="mysql://me:secret@host/db")
    assert "secret" not in str(caught.value)


# --- how much memory -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1073741824", GIB),
        ("512MiB", GIB // 2),
        ("512 mib", GIB // 2),
        ("8GiB", 8 * GIB),
        ("8GB", 8 * 10**9),
        ("1.5KB", 1500),
        ("2TiB", 2048 * GIB),
        ("10B", 10),
        ("8G", None),
        ("-1", None),
        ("1e9", None),
        ("", None),
        ("GiB", None),
    ],
)
def test_an_amount_of_memory_is_read_with_its_unit(text: str, nbytes: int | None) -> None:
    assert parse_bytes(text) == nbytes


def test_the_budget_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTSERVE_MEMORY_BUDGET", "3MiB")
    assert Settings().memory_budget == 3 * 2**20
    assert Settings(memory_budget="5").memory_budget == 5


def test_the_default_budget_is_at_most_half_of_the_machine() -> None:
    budget = default_budget()
    assert budget is not None
    assert 0 < budget <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@pytest.mark.parametrize(
    ("process", "sessions"), [(2**30, 384 * 2**20), (512 * 2**20, 128 * 2**20), (2**28, 2**25)]
)
def test_torch_itself_is_not_for_sessions(process: int, sessions: int) -> None:
    assert budget_of(process) == sessions


@pytest.mark.parametrize(
    ("own", "files", "found"),
    [
        pytest.param(
            "0::/pod/box",
            {"pod/memory.max": "400", "pod/box/memory.max": "900", "memory.max": "max"},
            [900, 400],
            id="v2: every parent's limit holds",
        ),
        pytest.param("0::/", {"memory.max": "400"}, [400], id="v2 inside a container"),
        pytest.param("0::/../../x", {"memory.max": "400"}, [400], id="v2, the host's path"),
        pytest.param(
            "7:cpu,memory:/docker/ab\n0::/",
            {"memory/docker/ab/memory.limit_in_bytes": "400"},
            [400],
            id="v1",
        ),
        pytest.param(
            "7:memory:/docker/ab",
            {"memory/memory.limit_in_bytes": "400"},
            [400],
            id="v1 inside a container",
        ),
        pytest.param(
            "7:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, [], id="v1: none"
        ),
        pytest.param("0::/", {"memory.max": "max"}, [], id="v2: none"),
        pytest.param("1:cpu:/x", {}, [], id="another controller"),
    ],
)
def test_the_containers_limit_is_found(
    tmp_path: Path, own: str, files: dict[str, str], found: list[int]
) -> None:
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (tmp_path / "own").write_text(f"{own}\n")
    assert list(limits(tmp_path / "cgroup", tmp_path / "own")) == found


def test_where_there_are_no_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert list(limits(tmp_path, tmp_path / "missing")) == []
