"""Where torch's and the optimizers' own exceptions become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from optserve_client.errors import OptserveError, TorchRefused


@contextmanager
def torchs_refusals() -> Iterator[None]:
    """Translate what torch and the optimizers raise into TorchRefused with their sentence."""
    try:
        yield
    except (OptserveError, MemoryError):
        raise
    except Exception as exc:  # libraries raise classes of their own
        kind = type(exc).__name__
        # A KeyError says nothing but the key.
        said = f"{kind}: {exc}" if isinstance(exc, KeyError) else str(exc)
        raise TorchRefused(said or kind) from exc
