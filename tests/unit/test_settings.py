"""Flag, else OPTSERVE_*, else default; and a sentence for each value that cannot be used."""

from __future__ import annotations

import os
from typing import Any

import pytest
from pydantic import ValidationError

from optserve.settings import Settings, contradiction, explain, unknown_variables


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
