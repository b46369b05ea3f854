"""What a session answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optserve.sessions.published import Published


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """Scalars for everybody, params for those who asked for them."""

    scalars: dict[str, Any]
    params: Published | None = None
    #: ``params`` or ``delta``: what ``params`` holds; None without params.
    returned: str | None = None
    #: How the request wanted params: ``list`` or ``base64``, and a dtype; None: the defaults.
    encoding: str | None = None
    dtype: str | None = None
