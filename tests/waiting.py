"""Waiting for what another thread or process does, and for no longer than a limit."""

from __future__ import annotations

import time
from collections.abc import Callable

LIMIT_S = 10


def wait_until(
    condition: Callable[[], object], what: str = "this", limit_s: float = LIMIT_S
) -> None:
    """Return once ``condition`` holds; an AssertionError says that ``what`` takes too long."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"{what} takes longer than {limit_s} s"
        time.sleep(0.005)
