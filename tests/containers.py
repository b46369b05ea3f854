"""The images and the compose file, really run: what the tests of them share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import httpx
import pytest

from tests.serving import ROOT, environment, free_port
from tests.waiting import wait_until

BASE = os.environ.get("OPTSERVE_TEST_BASE", "python:3.11-slim-bookworm")
SERVER, TESTS = "optserve:test", "optserve-tests:test"
#: The public image that docker-compose.yml names, where it is on this machine, else our stand-in.
POSTGRES, STANDIN = "postgres:17-bookworm", "optserve-postgres:test"
PULL_LIMIT_S, BUILD_LIMIT_S, READY_LIMIT_S = 200, 600, 60
#: For the build, where pip finds no torch for the CPU by itself.
TORCH_INDEX = os.environ.get("OPTSERVE_TEST_TORCH_INDEX", "")


def run(*command: str, env: Mapping[str, str] | None = None, limit_s: float = 60) -> str:
    """Run a command to its end and return what it printed; AssertionError where it failed."""
    done = attempt(*command, env=env, limit_s=limit_s)
    said = f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    return done.stdout


def attempt(
    *command: str, env: Mapping[str, str] | None = None, limit_s: float = 60
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=limit_s,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        env=environment(**(env or {})),
    )


@cache
def missing() -> str | None:
    """Say what these tests lack on this machine; None: nothing."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    if compose_command() is None:
        return "neither docker-compose nor `docker compose` is installed"
    engine = attempt("docker", "info", "--format", "{{.ServerVersion}}")
    if engine.returncode != 0:
        return f"no Docker engine answers: {engine.stderr.strip()}"
    if attempt("docker", "image", "inspect", BASE).returncode == 0:
        return None
    try:
        pulled = attempt("docker", "pull", "-q", BASE, limit_s=PULL_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"no base image {BASE}: not pulled within {PULL_LIMIT_S} s"
    return f"no base image {BASE}: {pulled.stderr.strip()}" if pulled.returncode else None


@cache
def compose_command() -> tuple[str, ...] | None:
    """Return how docker-compose is called here: 1.29 as a program, later ones as a plugin."""
    if shutil.which("docker-compose") is not None:
        return ("docker-compose",)
    plugin = attempt("docker", "compose", "version")
    return ("docker", "compose") if plugin.returncode == 0 else None


@cache
def built() -> float:
    """Build all images once; return the seconds that the server's took."""
    build = ("docker", "build", "-q", "--network", "host", "--build-arg", f"BASE={BASE}", "-t")
    index = () if not TORCH_INDEX else ("--build-arg", f"TORCH_INDEX={TORCH_INDEX}")
    began = time.monotonic()
    run(*build, SERVER, *index, ".", limit_s=BUILD_LIMIT_S)
    took = time.monotonic() - began
    run(*build, TESTS, "-f", "tests/compose/Dockerfile", ".", limit_s=BUILD_LIMIT_S)
    if attempt("docker", "image", "inspect", POSTGRES).returncode != 0:
        run(*build, STANDIN, "tests/compose/postgres", limit_s=BUILD_LIMIT_S)
    return took


def postgres_image() -> str:
    found = attempt("docker", "image", "inspect", POSTGRES)
    return POSTGRES if found.returncode == 0 else STANDIN


class Compose:
    """The compose file as a project of its own, on ports of its own."""

    def __init__(self, **env: str) -> None:
        self.name = f"optserve-test-{uuid.uuid4().hex[:8]}"
        self.port, self.postgres_port = free_port(), free_port()
        self.env = {
            "COMPOSE_PROJECT_NAME": self.name,
            "OPTSERVE_IMAGE": SERVER,
            "OPTSERVE_TESTS_IMAGE": TESTS,
            "OPTSERVE_PUBLISH": str(self.port),
            "OPTSERVE_PUBLISH_POSTGRES": str(self.postgres_port),
            "POSTGRES_IMAGE": postgres_image(),
            **env,
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __call__(self, *words: str, limit_s: float = 120) -> str:
        return run(*(compose_command() or ()), *words, env=self.env, limit_s=limit_s)

    def container(self, service: str = "optserve") -> str:
        """Return the id of the service's container, also of one that has ended."""
        [found] = run(
            *("docker", "ps", "-aq", "--filter", f"label=com.docker.compose.project={self.name}"),
            *("--filter", f"label=com.docker.compose.service={service}"),
        ).split()
        return found

    def down(self) -> None:
        self("--profile", "postgres", "--profile", "tests", "down", "-v", "--timeout", "0")


@contextmanager
def composed(**env: str) -> Iterator[Compose]:
    """Yield the project, nothing of it started, and remove whatever is left of it."""
    project = Compose(**env)
    try:
        yield project
    finally:
        project.down()


def state(container: str) -> dict[str, Any]:
    """Return what the engine knows of a container: Running, ExitCode, OOMKilled, Health."""
    shown = run("docker", "inspect", container, "--format", "{{json .State}}")
    known: dict[str, Any] = json.loads(shown)
    return known


def wait_ready(url: str) -> None:
    """Wait until the server at ``url`` is ready."""

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(ready, f"the server at {url}", READY_LIMIT_S)


def size_mb(image: str) -> float:
    return int(run("docker", "image", "inspect", image, "--format", "{{.Size}}")) / 1e6


def need_containers() -> None:
    """Skip the test, and say what is missing, where no container can be started."""
    if (lacks := missing()) is not None:
        pytest.skip(f"containers cannot be run here: {lacks}")
