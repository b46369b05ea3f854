"""Settings from a TOML file: below flags and variables, and a sentence for each mistake."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import make_url

from optserve.config_file import BadConfigFile
from optserve.settings import Settings, StoreSettings, explain, sources


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OPTSERVE_")]:
        monkeypatch.delenv(name)


def written(folder: Path, text: str) -> str:
    path = folder / "optserve.toml"
    path.write_text(text)
    return str(path)


def test_flags_beat_variables_beat_the_file_beats_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, 'port = 9001\nhost = "::1"\nthreads = 1\npush_ttl_s = 2.5\n')
    monkeypatch.setenv("OPTSERVE_PORT", "9002")
    monkeypatch.setenv("OPTSERVE_HOST", "127.0.0.2")
    flags: dict[str, Any] = {"config": file, "port": 9003}
    settings = Settings(**flags)
    assert (settings.port, settings.host, settings.threads) == (9003, "127.0.0.2", 1)
    assert (settings.push_ttl_s, settings.drain_s) == (2.5, 8)
    known = sources(flags)
    assert known["port"] == "--port"
    assert known["host"] == "OPTSERVE_HOST"
    assert known["threads"] == f"threads in {file}"
    assert "drain_s" not in known


def test_a_variable_names_the_file_and_a_flag_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTSERVE_CONFIG", written(tmp_path, "port = 9001"))
    assert Settings().port == 9001
    (tmp_path / "other").mkdir()
    assert Settings(config=written(tmp_path / "other", "port = 9002")).port == 9002


def test_a_command_that_opens_a_store_takes_from_the_file_what_it_needs(tmp_path: Path) -> None:
    file = written(tmp_path, f'data_dir = "{tmp_path}"\nport = 9001\nmemory_budget = "1 GiB"')
    assert StoreSettings(config=file).directory == tmp_path
    assert Settings(config=file).memory_budget == 2**30


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prt = 1", "prt in {} is no setting (did you mean port?)"),
        ("zzz = 1", "zzz in {} is no setting"),
        ("[port]\nx = 1", "port in {} is a table, expected a string or a number"),
        ("port = [1]", "port in {} is of type list, expected a string or a number"),
        ("port 1", "{} is not TOML: Expected '=' after a key in a key/value pair "),
        ('config = "x"', "config in {} is no setting"),
        ('host = ""', "host in {} is empty: leave it out"),
    ],
)
def test_a_file_that_nobody_understands_gets_a_sentence(
    tmp_path: Path, text: str, sentence: str
) -> None:
    file = written(tmp_path, text)
    with pytest.raises(BadConfigFile) as refusal:
        Settings(config=file)
    assert str(refusal.value).startswith(sentence.format(file))


def test_a_file_that_is_not_there_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadConfigFile, match=r"x\.toml cannot be read: No such file or directory"):
        Settings(config=str(tmp_path / "x.toml"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("port = 70000", "port in {} must be <= 65535, got '70000'"),
        ("port = true", "port in {} must be an integer, got 'True'"),
        ('memory_budget = "much"', "memory_budget in {} must be bytes, or a number with KiB, "),
    ],
)
def test_a_bad_value_is_named_with_its_file(tmp_path: Path, text: str, sentence: str) -> None:
    flags: dict[str, Any] = {"config": written(tmp_path, text)}
    with pytest.raises(ValidationError) as refusal:
        Settings(**flags)
    [line] = explain(refusal.value, flags)
    assert line.startswith(sentence.format(flags["config"]))


# --- a password in a file ------------------------------------------------------------------------

STORE = "postgresql+psycopg://me@db:5432/x"


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_password_of_the_database_comes_from_a_file(tmp_path: Path, end: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(f"a b/c@d:e%{end}".encode())
    settings = StoreSettings(store=STORE, store_password_file=secret)
    assert settings.url is not None
    parts = make_url(settings.url)
    assert (parts.password, parts.username, parts.host) == ("a b/c@d:e%", "me", "db")
    assert "a b/c" not in repr(settings)
    assert settings.place == STORE


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {},
            "store_password_file (/dev/null) is for a store at postgresql+psycopg://..., "
            "the store is not set",
        ),
        (
            {"store": "memory"},
            "store_password_file (/dev/null) is for a store at postgresql+psycopg://..., "
            "the store is memory",
        ),
        (
            {"store": "postgresql+psycopg://me:x@db/x"},
            "the store has a password and store_password_file, expected one",
        ),
    ],
)
def test_a_password_that_nothing_uses_is_refused(fields: dict[str, Any], sentence: str) -> None:
    flags = {**fields, "store_password_file": "/dev/null"}
    with pytest.raises(ValidationError) as refusal:
        StoreSettings(**flags)
    assert explain(refusal.value, flags) == [sentence]


def test_an_empty_password_is_none(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("\n")
    with pytest.raises(ValueError, match="it is empty"):
        _ = StoreSettings(store=STORE, store_password_file=secret).url
