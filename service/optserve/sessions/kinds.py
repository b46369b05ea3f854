"""Kinds of events."""

from __future__ import annotations

#: Those that cannot be replayed without their payload. (A ``skip`` may have one.)
WITH_PAYLOAD = frozenset(
    {"create", "step", "contribution", "evaluate", "params", "group", "import", "rollback"}
)
