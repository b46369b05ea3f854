"""zstd, for a client that was asked for it: a part of Python 3.14, and a package before that."""

from __future__ import annotations

import sys

try:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        "encoding='zstd' needs a package: pip install 'optserve-client[zstd]'", name=exc.name
    ) from exc

__all__ = ["zstd"]
