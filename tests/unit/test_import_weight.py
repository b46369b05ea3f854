"""Whoever imports the client pays for httpx and numpy only; the program starts without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "fastapi", "starlette", "pydantic", "optserve", "sqlalchemy", "backports")


def loaded_after(code: str) -> set[str]:
    """Return the top-level packages in a fresh interpreter after ``code``."""
    program = f"import sys\n{code}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import optserve_client",
        "from optserve_client import AsyncClient, Client",
        "from optserve_client import errors, wire",
    ],
)
def test_the_client_brings_in_nothing_heavy(code: str) -> None:
    loaded = loaded_after(code)
    assert "optserve_client" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_command_line_answers_without_torch() -> None:
    loaded = loaded_after("import optserve.cli")
    assert "typer" in loaded
    assert loaded.isdisjoint({"torch", "fastapi", "starlette", "uvicorn"})
