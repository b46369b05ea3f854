"""What can be set: by a flag of ``optserve serve``, else ``OPTSERVE_*``, else the default here."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "OPTSERVE_"
MIB = 1 << 20
GIB = 1 << 30

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
        le=1024,
        description="Threads of one torch operation; unset, torch decides.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Where sessions live that do not say: auto, cpu, cuda or cuda:N.",
    )
    log_level: LogLevel = Field("info", description="Least severe message that is logged.")
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
                f"{value!r} is an address that a container platform injects for a service named "
                "'optserve', not a port; rename that service, switch service links off "
                "(enableServiceLinks: false), or give --port"
            )
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
        message = error["msg"].removeprefix("Value error, ")
        if not error["loc"]:
            lines.append(message)
            continue
        field = str(error["loc"][0])
        source = f"--{field.replace('_', '-')}" if field in flags else f"{PREFIX}{field.upper()}"
        got = "" if repr(error["input"]) in message else f", got {error['input']!r}"
        lines.append(f"{source}: {message}{got}")
    return lines
