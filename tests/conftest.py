"""What every test may ask for: a real server, the long form, and a place to note a figure."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import record
from tests.record import Figure
from tests.serving import ServerProcess

#: What runs in a container of its own; see tests/acceptance/test_compose.py.
collect_ignore = ["compose"]

LONG = os.environ.get("OPTSERVE_TEST_LONG") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests marked ``long`` unless ``scripts/test --long`` asked for them."""
    if LONG:
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def long_form() -> bool:
    """Whether to run the whole product instead of a rotating part of it."""
    return LONG


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Figure:
    """Return ``figure(name, value, unit)``, which notes a measured number.

    Figures are listed when the run ends, and with ``--long`` appended to docs/track-record.md.
    """

    def note(name: str, value: float, unit: str) -> None:
        record_property(record.PROPERTY, (name, float(value), unit))

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the figures that the tests noted."""
    figures = record.collect(terminalreporter.stats)
    if not figures:
        return
    terminalreporter.section("figures")
    for name, value, unit in figures:
        terminalreporter.write_line(f"{name}: {record.number(value)} {unit}")
    if LONG:
        path = Path(__file__).resolve().parents[1] / "docs" / "track-record.md"
        record.append(path, figures)
        terminalreporter.write_line(f"appended to {path}")


@pytest.fixture
def registry() -> Iterator[Any]:
    """A registry over an empty memory store, closed afterwards."""
    from optserve.sessions.registry import Registry  # imports torch: not for tests that need none
    from optserve.store.memory import MemoryStore

    registry = Registry(MemoryStore(), device="cpu")
    yield registry
    registry.close()


@pytest.fixture
def app(registry: Any) -> Any:
    """The ASGI app over ``registry``, in this process."""
    from optserve.api.app import create_app
    from optserve.settings import Settings

    return create_app(registry, Settings())


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """A real server process on a free loopback port, shared by all tests that do not stop it."""
    with ServerProcess() as process:
        yield process
