"""What can be set: by a flag of ``optserve serve``, else ``OPTSERVE_*``, else in a TOML file, else
the default here."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from optserve import config_file
from optserve.memory_budget import parse_bytes
from optserve.sentences import say, shown

PREFIX = "OPTSERVE_"
MIB = 1 << 20
GIB = 1 << 30
#: More threads than this only get in each other's way.
THREADS_PER_CPU = 4
#: Of no setting but not a mistake either: read by scripts/, docker-compose.yml or `optserve
#: sessions`, or what Kubernetes injects for a service named optserve.
_FOREIGN = re.compile(
    r"TORCH(_INDEX)?|BASE|(TESTS_)?IMAGE|PUBLISH(_POSTGRES)?|MEM_LIMIT|POSTGRES_PASSWORD_FILE|URL|"
    r"SERVICE_(HOST|PORT)\w*|PORT_\d+_\w+|(DEMO|TEST)_\w+"
)
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_STORE = re.compile(r"memory|sqlite:///.+|postgresql(\+psycopg)?://.+")
#: A password as a parameter of a URL.
_PASSWORD = re.compile(r"([?&](?:ssl)?password=)[^&#]*", re.IGNORECASE)

LogLevel = Literal["debug", "info", "warning", "error"]


def masked(url: str) -> str:
    """Return a store's URL without its password: what may be logged and shown.

    A password may hold an @ or a / that nobody escaped, so everything up to the last @ counts.
    """
    login, at, place = url.rpartition("@")
    if at:
        scheme, slashes, user = login.partition("://")
        user, colon, _ = user.partition(":")
        shown_login = f"{scheme}{slashes}{user}{':***' if colon else ''}" if slashes else "***"
        url = f"{shown_login}@{place}"
    return _PASSWORD.sub(r"\1***", url)


class StoreSettings(BaseSettings):
    """Where sessions are kept; a field's description is what ``--help`` says."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    config: Path | None = Field(
        None,
        description="TOML file for settings that no flag and no variable sets; as port = 8000.",
    )
    data_dir: Path | None = Field(
        None,
        description="Directory of the database and of large tensors; unset, optserve in the "
        "user's data directory.",
    )
    store: str | None = Field(
        None,
        repr=False,
        description="Database instead of SQLite in the data directory: sqlite:///PATH, "
        "postgresql+psycopg://USER@HOST/NAME, or memory, which keeps nothing.",
    )
    store_password_file: Path | None = Field(
        None,
        description="File with the password of the database in --store; a line break at its end "
        "does not count.",
    )
    files: Path | None = Field(
        None,
        description="Directory of large tensors; unset, the data directory, or with PostgreSQL "
        "the database.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return flags, variables and the file, in this order."""
        assert isinstance(init_settings, InitSettingsSource)
        said = file_values(init_settings.init_kwargs)
        mine = {name: value for name, value in said.items() if name in cls.model_fields}
        return init_settings, env_settings, InitSettingsSource(settings_cls, mine)

    @field_validator("config", "data_dir", "files", "store_password_file", mode="before")
    @classmethod
    def _path_is_whole(cls, value: Any) -> Any:
        if value == "":  # a shell variable that was not set
            raise ValueError("must be a path, got ''")
        return None if value is None else Path(os.path.abspath(Path(value).expanduser()))

    @field_validator("store")
    @classmethod
    def _store_is_known(cls, value: str | None) -> str | None:
        if value is not None and not _STORE.fullmatch(value):
            raise ValueError(
                "must be memory, sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME, "
                f"got {shown(masked(value))}"
            )
        return value

    @model_validator(mode="after")
    def _one_password(self) -> Self:
        if self.store_password_file is not None:
            if self.store is None or not self.store.startswith("postgresql"):
                raise ValueError(
                    f"store_password_file ({self.store_password_file}) is for a store at "
                    f"postgresql+psycopg://..., the store is {self.store or 'not set'}"
                )
            if masked(self.store) != self.store:
                raise ValueError("the store has a password and store_password_file, expected one")
        return self

    @property
    def url(self) -> str | None:
        """The database with its password. Raises OSError or ValueError where the file with that
        cannot be read."""
        if self.store is None or self.store_password_file is None:
            return self.store
        from sqlalchemy import make_url

        read = self.store_password_file.read_bytes().removesuffix(b"\n").removesuffix(b"\r")
        if not read:
            raise ValueError("it is empty")
        database = make_url(self.store).set(password=read.decode())
        return database.render_as_string(hide_password=False)

    @property
    def directory(self) -> Path:
        """The data directory."""
        if self.data_dir is not None:
            return self.data_dir
        import platformdirs

        return platformdirs.user_data_path("optserve", appauthor=False)

    @property
    def place(self) -> str:
        """Where sessions are kept, as it may be shown."""
        return str(self.directory) if self.store is None else masked(self.store)


class Settings(StoreSettings):
    """The settings of one server."""

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
    memory_budget: int | None = Field(
        None,
        ge=1,
        description="Bytes of memory for sessions, such as 512MiB or 8GB; idle ones beyond it are "
        "put away. Unset, half of what the machine or container has beside the 256 MiB of torch: "
        "the other half is for bodies and replies under way and the page cache.",
    )
    session_ttl: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds without a request after which a session that does not say is "
        "deleted; unset, never.",
    )
    log_level: LogLevel = Field(
        "info", description="Least severe message that is logged: debug, info, warning or error."
    )
    max_body_bytes: int = Field(
        4 * GIB, ge=1, description="Largest binary body; never more than the memory budget."
    )
    max_json_bytes: int = Field(256 * MIB, ge=1, description="Largest JSON body.")
    body_timeout_s: float = Field(
        30, gt=0, allow_inf_nan=False, description="Longest silence while a body arrives."
    )
    body_min_rate_bytes_s: int = Field(
        64 * 1024, ge=0, description="Least average rate of a body after its first body_timeout_s."
    )
    reply_timeout_s: float = Field(
        30, gt=0, allow_inf_nan=False, description="Longest silence while a large reply is taken."
    )
    push_ttl_s: float = Field(
        60,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after its last byte at which a step that came in part, and was not "
        "committed, is thrown away.",
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

    @field_validator("memory_budget", mode="before")
    @classmethod
    def _budget_has_a_unit(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if (nbytes := parse_bytes(value)) is None:
            raise ValueError(
                "must be bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB, "
                f"got {shown(value)}"
            )
        return nbytes

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


def file_values(flags: Mapping[str, Any]) -> dict[str, str]:
    """Return what the TOML file says, if there is one; ``flags`` may name it."""
    path = config_file.path_of(flags)
    return {} if path is None else config_file.read(path, Settings.model_fields)


def sources(flags: Mapping[str, Any]) -> dict[str, str]:
    """Return where each setting comes from that is not the default, as it is called there."""
    path = config_file.path_of(flags)
    found = {name: f"{name} in {path}" for name in file_values(flags)}
    variables = {name: f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    found |= {name: text for name, text in variables.items() if os.environ.get(text)}
    return found | {name: _flag(name) for name, value in flags.items() if value is not None}


def explain(exc: ValidationError, flags: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each error in ``exc``, naming where the value came from."""
    lines, known = [], sources(flags)
    for error in exc.errors(include_url=False):
        if not error["loc"]:
            lines.append(error["msg"].removeprefix("Value error, "))
            continue
        field = str(error["loc"][0])
        lines.append(say(error, known.get(field, f"{PREFIX}{field.upper()}")))
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
