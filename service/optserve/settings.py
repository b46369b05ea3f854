"""What can be set: by a flag of ``optserve serve``, else ``OPTSERVE_*``, else the default here."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from optserve.sessions.fields import say, shown

PREFIX = "OPTSERVE_"
MIB = 1 << 20
GIB = 1 << 30
#: More threads than this only get in each other's way.
THREADS_PER_CPU = 4
#: Of no setting but not a mistake either: read by scripts/, or what Kubernetes injects for a
#: service named optserve.
_FOREIGN = re.compile(r"TORCH_INDEX|SERVICE_(HOST|PORT)\w*|PORT_\d+_\w+|(DEMO|TEST)_\w+")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")

LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(BaseSettings):
    """The settings of one server; a field's description is what ``--help`` says."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    uds: str | None = Field(
        None, description="Path of a Unix domain socket to listen on instead of a port."
    )
    fd: int | None = Field(
        None, ge=0, description="Number of an inherited listening socket to serve on instead."
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="Threads of one torch operation, at most 4 per CPU; unset, torch decides.",
    )
    device: str = Field(
        "auto", description="Where sessions live that do not say: auto, cpu, cuda or cuda:N."
    )
    log_level: LogLevel = Field(
        "info", description="Least severe message that is logged: debug, info, warning or error."
    )
    max_body_bytes: int = Field(4 * GIB, ge=1, description="Largest binary body.")
    max_json_bytes: int = Field(256 * MIB, ge=1, description="Largest JSON body.")
    body_timeout_s: float = Field(30, gt=0, description="Longest silence while a body arrives.")
    body_min_rate_bytes_s: int = Field(
        64 * 1024, ge=0, description="Least average rate of a body after its first body_timeout_s."
    )
    keep_alive_s: int = Field(
        75, ge=1, description="How long an idle connection is kept for the next request."
    )
    # Below the 10 s after which docker stop kills.
    drain_s: int = Field(
        8,
        ge=0,
        description="How long open requests may finish after SIGTERM.",
    )

    @field_validator("port", mode="before")
    @classmethod
    def _port_is_no_link(cls, value: Any) -> Any:
        """Recognise the variable that Kubernetes injects for a service named optserve."""
        if isinstance(value, str) and re.match(r"^(tcp|udp)://", value):
            raise ValueError(
                f"is {value!r}, an address that a container platform injects for a service named "
                "'optserve', not a port; rename that service, switch service links off "
                "(enableServiceLinks: false), or give --port"
            )
        return value

    @field_validator("threads")
    @classmethod
    def _threads_have_cpus(cls, value: int | None) -> int | None:
        cpus = os.cpu_count() or 1
        if value is not None and value > THREADS_PER_CPU * cpus:
            raise ValueError(
                f"must be <= {THREADS_PER_CPU * cpus}, {THREADS_PER_CPU} for each CPU of this "
                f"machine, got {value}"
            )
        return value

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError(f"must be auto, cpu, cuda or cuda:<index>, got {shown(value)}")
        return value

    @model_validator(mode="after")
    def _one_place_to_listen(self) -> Settings:
        if self.uds is not None and self.fd is not None:
            raise ValueError(
                f"uds ({self.uds}) and fd ({self.fd}) are two places to listen, expected one"
            )
        return self


def explain(exc: ValidationError, flags: dict[str, Any]) -> list[str]:
    """Return a sentence for each error in ``exc``, naming the flag or variable it came from."""
    lines = []
    for error in exc.errors(include_url=False):
        if not error["loc"]:
            lines.append(error["msg"].removeprefix("Value error, "))
            continue
        field = str(error["loc"][0])
        lines.append(say(error, _flag(field) if field in flags else f"{PREFIX}{field.upper()}"))
    return lines


def contradiction(settings: Settings, flags: Iterable[str]) -> str | None:
    """Return a sentence about flags of which one would be ignored, or None.

    A variable may be set for all servers of a machine, so --uds beats OPTSERVE_PORT; but a flag is
    never ignored.
    """
    other = "uds" if settings.uds is not None else "fd" if settings.fd is not None else None
    for name in ("host", "port"):
        if other is not None and name in flags:
            source = _flag(other) if other in flags else f"{PREFIX}{other.upper()}"
            return f"{_flag(name)} and {source} are two places to listen, expected one"
    return None


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """Return a sentence for each variable that looks like a setting and is none."""
    known = [f"{PREFIX}{name.upper()}" for name in Settings.model_fields]
    lines = []
    for name in sorted(environment):
        if not name.startswith(PREFIX) or name in known:
            continue
        if not _FOREIGN.fullmatch(name.removeprefix(PREFIX)):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            lines.append(f"{name} is no setting and does nothing{hint}")
    return lines


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"
