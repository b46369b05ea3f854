"""Where torch's and the optimizers' own exceptions become ours."""

from __future__ import annotations

from types import TracebackType

from optserve_client.errors import OptserveError, TorchRefused


class torchs_refusals:  # noqa: N801 - reads as a function, and costs half of a generator
    """Translate what torch and the optimizers raise into TorchRefused with their sentence."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, cls: type[BaseException] | None, exc: BaseException | None, _: TracebackType | None
    ) -> None:
        # Libraries raise classes of their own.
        if isinstance(exc, Exception) and not isinstance(exc, OptserveError | MemoryError):
            kind = type(exc).__name__
            # A KeyError says nothing but the key.
            said = f"{kind}: {exc}" if isinstance(exc, KeyError) else str(exc)
            raise TorchRefused(said or kind) from exc
