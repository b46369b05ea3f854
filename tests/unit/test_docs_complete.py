"""docs/reference.md names every route, field, setting, flag, error code and media type."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from optserve.cli import app as program
from optserve.sessions.config import CreateFields
from optserve.sessions.fields import StepFields
from optserve.settings import PREFIX, Settings
from optserve_client import errors, wire

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
#: Everything that stands in backquotes.
NAMED = set(re.findall(r"`([^`\n]+)`", REFERENCE))


def anonymous(path: str) -> str:
    """Return ``path`` with every parameter spelled {}: its name is no part of the contract."""
    return re.sub(r"\{[^}]*\}", "{}", path)


def routes() -> Iterator[str]:
    from optserve.api.app import create_app
    from optserve.sessions.registry import Registry
    from optserve.store.memory import MemoryStore

    registry = Registry(MemoryStore())
    try:
        document = create_app(registry, Settings()).openapi()
    finally:
        registry.close()
    for path, operations in document["paths"].items():
        for method in operations:
            yield f"{method.upper()} {path}"


def test_every_route_is_in_the_reference() -> None:
    documented = {anonymous(name) for name in NAMED}
    missing = [route for route in routes() if anonymous(route) not in documented]
    assert missing == []


def test_the_reference_names_no_route_that_does_not_exist() -> None:
    served = {anonymous(route) for route in routes()}
    served |= {"GET /docs", "GET /openapi.json"}
    named = {anonymous(name) for name in NAMED if re.match(r"(GET|PUT|POST|PATCH|DELETE) /", name)}
    assert {name.split("?")[0] for name in named} - served == set()


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_every_setting_is_in_the_reference(name: str) -> None:
    assert f"{PREFIX}{name.upper()}" in NAMED


def flags() -> Iterator[str]:
    yield from _flags("optserve", typer.main.get_command(program))


def _flags(name: str, command: typing.Any) -> Iterator[str]:
    for below, inner in getattr(command, "commands", {}).items():
        yield from _flags(f"{name} {below}", inner)
    for parameter in command.params:
        yield from (f"{name} {flag}" for flag in parameter.opts if flag.startswith("-"))


@pytest.mark.parametrize("flag", list(flags()))
def test_every_flag_is_in_the_reference(flag: str) -> None:
    command, _, option = flag.rpartition(" ")
    assert option in NAMED
    assert command in NAMED


@pytest.mark.parametrize("error", list(errors.tree()), ids=lambda error: error.code)
def test_every_error_code_is_in_the_reference(error: type[errors.OptserveError]) -> None:
    assert error.code in NAMED


@pytest.mark.parametrize("model", [CreateFields, StepFields], ids=lambda model: model.__name__)
def test_every_field_of_a_body_is_in_the_reference(model: type[CreateFields | StepFields]) -> None:
    fields = {info.alias or name for name, info in model.model_fields.items()}
    assert fields - NAMED == set()


@pytest.mark.parametrize(
    "media",
    [
        wire.SAFETENSORS,
        "application/json",
        "application/problem+json",
        "application/x-ndjson",
        "text/csv",
    ],
)
def test_every_media_type_is_in_the_reference(media: str) -> None:
    assert media in NAMED
