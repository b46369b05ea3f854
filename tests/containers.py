"""The images and the compose file, really run: what the tests of them share."""

from __future__ import annotations

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

BASE = os.environ.get("OPTSERVE_TEST_BASE", "python:3.11-slim-bookworm")
SERVER, TESTS = "optserve:test", "optserve-tests:test"
#: The public image that docker-compose.yml names, where it is on this machine, else our stand-in.
POSTGRES, STANDIN = "postgres:17-bookworm", "optserve-postgres:test"
BUILD_LIMIT_S, READY_LIMIT_S = 280, 60


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
    for program in ("docker", "docker-compose"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    engine = attempt("docker", "info", "--format", "{{.ServerVersion}}")
    if engine.returncode != 0:
        return f"no Docker engine answers: {engine.stderr.strip().splitlines()[-1]}"
    if attempt("docker", "image", "inspect", BASE).returncode == 0:
        return None
    pulled = attempt("docker", "pull", "-q", BASE, limit_s=200)
    return f"no base image {BASE}: {pulled.stderr.strip()}" if pulled.returncode else None


@cache
def built() -> float:
    """Build all images once; return the seconds that the server's took."""
    build = ("docker", "build", "-q", "--network", "host", "--build-arg", f"BASE={BASE}", "-t")
    began = time.monotonic()
    run(*build, SERVER, ".", limit_s=BUILD_LIMIT_S)
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
        return run("docker-compose", *words, env=self.env, limit_s=limit_s)

    def attempt(self, *words: str, limit_s: float = 120) -> subprocess.CompletedProcess[str]:
        return attempt("docker-compose", *words, env=self.env, limit_s=limit_s)

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
    return dict(httpx.Response(200, content=shown).json())


def wait_ready(url: str, limit_s: float = READY_LIMIT_S) -> float:
    """Wait until the server at ``url`` is ready and return the seconds that it took."""
    began = time.monotonic()
    while True:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return time.monotonic() - began
        except httpx.TransportError:
            pass
        assert time.monotonic() - began < limit_s, f"{url} is not ready after {limit_s} s"
        time.sleep(0.02)


def size_mb(image: str) -> float:
    return int(run("docker", "image", "inspect", image, "--format", "{{.Size}}")) / 1e6


def need_containers() -> None:
    """Skip the test, and say what is missing, where no container can be started."""
    if (lacks := missing()) is not None:
        pytest.skip(f"containers cannot be run here: {lacks}")
