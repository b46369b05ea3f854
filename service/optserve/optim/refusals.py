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
    except OptserveError:
        raise
    except (
        RuntimeError, ValueError, TypeError, IndexError, KeyError, ArithmeticError, AttributeError,
        AssertionError,
    ) as exc:  # fmt: skip
        raise TorchRefused(str(exc) or type(exc).__name__) from exc
