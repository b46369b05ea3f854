"""The image and the compose file as their users run them: started, killed, stopped, refused."""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from examples.demo_digits import (
    LR,
    WEIGHT_DECAY,
    Digits,
    accuracy,
    initial_params,
    loss_and_grads,
    train_locally,
)
from optserve_client import Client, errors
from tests.acceptance import test_docs_run
from tests.containers import (
    SERVER,
    TESTS,
    Compose,
    attempt,
    built,
    compose_command,
    composed,
    need_containers,
    postgres_image,
    run,
    size_mb,
    state,
    wait_ready,
)
from tests.record import Figure
from tests.serving import ROOT
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(1200)  # the first test builds the images

#: Of a container, for everything; and of that, for sessions.
MEMORY = 2**30
BUDGET = (MEMORY - 2**28) // 2
DRAIN_LIMIT_S = 15
STEP_LIMIT_S = 60


@pytest.fixture(scope="module", autouse=True)
def images() -> None:
    need_containers()
    built()


@pytest.fixture(scope="module")
def service() -> Iterator[Compose]:
    """The compose file's service alone, ready."""
    with composed() as project:
        project("up", "-d")
        wait_ready(project.url)
        yield project


# --- the image -----------------------------------------------------------------------------------


def test_the_image_is_built_and_holds_what_serves_and_no_more(figure: Figure) -> None:
    figure("build of the server's image (0: it was there)", built(), "s")
    figure("size of the server's image", size_mb(SERVER), "MB")
    shown = run("docker", "image", "inspect", SERVER, "--format", "{{json .Config}}")
    config = json.loads(shown)
    assert config["User"] == "optserve"
    assert (config["Entrypoint"], config["Cmd"]) == (["optserve"], ["serve"])
    assert config["Healthcheck"]["Test"] == ["CMD", "optserve", "health"]
    assert list(config["Volumes"]) == ["/data"]
    script = """
        id -u
        which gcc cc g++ make || echo no compiler
        ls -d /root/.cache/pip /src 2>/dev/null || echo no cache and no sources
        find / -xdev -name pytest -not -path '/proc/*' 2>/dev/null | head -1
    """
    inside = run("docker", "run", "--rm", "--user", "0", "--entrypoint", "sh", SERVER, "-c", script)
    assert inside.splitlines() == ["0", "no compiler", "no cache and no sources"]


def test_the_program_in_the_image_has_its_other_commands() -> None:
    assert run("docker", "run", "--rm", SERVER, "version").startswith("optserve 0.")
    said = run("docker", "run", "--rm", "-e", "OPTSERVE_THREADS=1", SERVER, "config")
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert 'host = "0.0.0.0" # OPTSERVE_HOST' in lines
    assert 'data_dir = "/data" # OPTSERVE_DATA_DIR' in lines
    assert "threads = 1 # OPTSERVE_THREADS" in lines


def test_a_variable_that_a_platform_injects_gets_a_clear_sentence() -> None:
    done = attempt("docker", "run", "--rm", "-e", "OPTSERVE_PORT=tcp://10.0.0.7:8000", SERVER)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "optserve: OPTSERVE_PORT is 'tcp://10.0.0.7:8000', an address that a container platform "
        "injects for a service named 'optserve', not a port; rename that service, "
    )
    assert len(done.stderr.splitlines()) == 1


# --- the service alone ---------------------------------------------------------------------------


def test_it_is_ready_soon_and_healthy_by_its_own_word(figure: Figure) -> None:
    with composed() as project:
        began = time.monotonic()
        project("up", "-d")
        wait_ready(project.url)
        figure("docker-compose up, from its start to ready", time.monotonic() - began, "s")
        container = project.container()
        assert run("docker", "exec", container, "optserve", "health") == "ready\n"
        wait_until(lambda: state(container)["Health"]["Status"] == "healthy", "health", 30)
        elsewhere = attempt(
            "docker", "exec", "-e", "OPTSERVE_PORT=8009", container, "optserve", "health"
        )
        assert (elsewhere.returncode, elsewhere.stdout) == (1, "")
        assert elsewhere.stderr.startswith("optserve: http://127.0.0.1:8009 cannot be reached: ")


def test_it_is_published_on_loopback_alone(service: Compose) -> None:
    assert run("docker", "port", service.container()) == f"8000/tcp -> 127.0.0.1:{service.port}\n"


def test_nothing_but_data_and_tmp_can_be_written(service: Compose) -> None:
    folders = {"/": False, "/opt/optserve": False, "/data": True, "/tmp": True}
    for folder, allowed in folders.items():
        tried = attempt("docker", "exec", service.container(), "touch", f"{folder}/x")
        assert (tried.returncode == 0) == allowed, (folder, tried.stderr)
        assert allowed or "Read-only file system" in tried.stderr
    assert run("docker", "exec", service.container(), "id", "-u") == "10001\n"


def test_a_training_outlives_docker_kill_and_each_step_counts_once(
    service: Compose, long_form: bool, figure: Figure
) -> None:
    """Digits, with the container killed in the middle of steps: the params are those of local
    torch to the last bit, so nothing was lost and nothing counted twice."""
    digits, container = Digits.load(), service.container()
    kills = [150, 400, 600] if long_form else [250]
    params: Any = initial_params()
    with Client(service.url) as client:
        session = client.create(
            {"name": "AdamW", "lr": LR, "weight_decay": WEIGHT_DECAY},
            params,
            scheduler={"name": "CosineAnnealingLR", "T_max": digits.steps, "advance": "step"},
        )
        for number, batch in enumerate(digits.batches(), start=1):
            loss, grads = loss_and_grads(params, batch)
            if number in kills:
                killer = threading.Thread(target=kill_and_start, args=(container,))
                killer.start()
            result = session.step(grads, loss=loss)
            assert (result.version, result.applied_version) == (number, number)
            assert result.params is not None
            params = result.params
        killer.join()
        assert session.status()["updates"] == digits.steps
        line = session.info["torch"]
    assert state(container)["Running"]
    figure("docker kill during a training of digits", len(kills), "times")
    assert accuracy(params, digits) > 0.95
    local = train_locally(digits, line, threads=server_threads(service))
    for name, value in local.items():
        np.testing.assert_array_equal(params[name], value, err_msg=name)


def kill_and_start(container: str) -> None:
    run("docker", "kill", "-s", "KILL", container)
    assert state(container)["ExitCode"] == 137
    run("docker", "start", container)


def server_threads(project: Compose) -> int:
    """Return the threads of one torch operation, of which sums depend in their last bits."""
    logs = project("logs", "--no-color", "optserve")
    return int(logs.rpartition(" threads, store: ")[0].rpartition(", ")[2])


def test_a_step_whose_answer_was_lost_is_applied_once(service: Compose) -> None:
    """The same request before and after a kill, by hand: what the client does by itself."""
    container, url = service.container(), f"{service.url}/v1/sessions/once"
    made = {"optimizer": {"name": "SGD", "lr": 1.0}, "params": {"w": [1.0]}}
    assert httpx.put(url, json=made).status_code == 201
    body = {"grads": {"w": [0.25]}, "worker": "me", "seq": 1}
    assert httpx.post(f"{url}/step", json=body).json()["duplicate"] is False
    kill_and_start(container)
    wait_ready(service.url)
    again = httpx.post(f"{url}/step", json=body).json()
    assert (again["duplicate"], again["applied_version"]) == (True, 1)
    assert again["params"] == {"w": [0.75]}


def test_docker_stop_drains_what_is_under_way_and_exits_with_0(service: Compose) -> None:
    container, stop = service.container(), threading.Event()
    applied: list[int] = []
    refused: list[Exception] = []

    def steps() -> None:
        with Client(service.url, retries=0) as client:
            start = {"w": np.zeros(500_000, np.float32)}
            session = client.create("SGD", start, lr=1.0, id="drained")
            while not stop.is_set():
                try:
                    result = session.step({"w": np.ones(500_000, np.float32)}, returns="none")
                except (errors.ServerError, errors.TransportError) as exc:
                    refused.append(exc)
                    return
                applied.append(result.version)

    worker = threading.Thread(target=steps)
    worker.start()
    wait_until(lambda: len(applied) > 5, "the first steps", STEP_LIMIT_S)
    run("docker", "stop", "--time", str(DRAIN_LIMIT_S), container)
    worker.join(STEP_LIMIT_S)
    stop.set()
    ended = state(container)
    assert (ended["ExitCode"], ended["OOMKilled"]) == (0, False)
    assert refused, "it went on after docker stop"
    run("docker", "start", container)
    wait_ready(service.url)
    # Where the container's network went before the last answer was through, that step is applied.
    unheard = isinstance(refused[0], errors.TransportError)
    with Client(service.url) as client:
        session = client.session("drained")
        version = session.status()["version"]
        assert version in {len(applied), len(applied) + unheard}
        held: Any = session.params()["w"]
        assert set(held) == {-float(version)}


def minds_sigterm(container: str) -> bool:
    """Say whether the first process of a container catches SIGTERM, else the kernel drops it."""
    status = attempt("docker", "exec", container, "cat", "/proc/1/status").stdout
    caught = re.search(r"^SigCgt:\s+([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) & 1 << signal.SIGTERM - 1)


def test_docker_stop_ends_it_while_it_starts() -> None:
    container = run("docker", "run", "-d", SERVER).strip()
    try:
        wait_until(lambda: minds_sigterm(container), "to mind signals", 30)
        run("docker", "stop", "--time", "30", container)
        assert state(container)["ExitCode"] == 143  # 137: nobody heard it; 0: it was ready
    finally:
        run("docker", "rm", "-f", "-v", container)


def test_sessions_beyond_the_containers_memory_are_refused_and_nobody_is_killed() -> None:
    """Half of what torch leaves is for sessions. One that can never fit is refused; of those that
    fit one by one, the ones that nobody uses are put away."""
    with composed(OPTSERVE_MEM_LIMIT=str(MEMORY)) as project:
        project("up", "-d")
        wait_ready(project.url)
        container = project.container()
        budget = run("docker", "exec", container, "optserve", "config")
        assert f"memory_budget = {BUDGET} " in budget
        with Client(project.url) as client:
            for numel in (MEMORY // 12, MEMORY // 3):  # its moments are too much; its body is
                with pytest.raises(errors.TooLarge, match=str(BUDGET)):
                    client.create("Adam", {"w": np.ones(numel, np.float32)}, id="too-large")
            for number in range(6):  # two of them are more than the budget
                part = np.full(MEMORY // 72, number, np.float32)
                session = client.create("Adam", {"w": part}, lr=1.0, id=f"s{number}")
                session.step({"w": part + 1}, returns="none")
            for number in range(6):
                got: Any = client.session(f"s{number}").params()["w"]
                assert got.shape == (MEMORY // 72,)
                np.testing.assert_allclose(got[:3], number - 1, atol=1e-4)
        kept = state(container)
        assert (kept["Running"], kept["OOMKilled"]) == (True, False)
        assert run("docker", "inspect", container, "--format", "{{.RestartCount}}") == "0\n"


# --- profiles ------------------------------------------------------------------------------------


def test_the_tests_in_a_container_pass_against_the_service(service: Compose) -> None:
    printed = service("--profile", "tests", "run", "--rm", "tests")
    assert " passed" in printed
    assert "test_a_regression_is_trained PASSED" in printed
    assert "failed" not in printed
    assert "skipped" not in printed


def test_the_tests_in_a_container_fail_where_there_is_no_service() -> None:
    done = attempt("docker", "run", "--rm", "-e", "OPTSERVE_URL=http://127.0.0.1:9", TESTS, "-x")
    assert done.returncode == 1, done.stdout


def test_on_postgresql_with_a_password_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("not: in/the@environment\n")
    secret.chmod(0o644)
    with composed(OPTSERVE_POSTGRES_PASSWORD_FILE=str(secret)) as project:
        project("--profile", "postgres", "up", "-d", "optserve-postgres")
        url = f"http://127.0.0.1:{project.postgres_port}"
        wait_ready(url)
        container = project.container("optserve-postgres")
        with Client(url) as client:
            session = client.create("Adam", {"w": np.zeros(50_000, np.float32)}, lr=0.1, id="kept")
            before = session.step({"w": np.ones(50_000, np.float32)}).params
            assert before is not None
            run("docker", "kill", "-s", "KILL", container)
            run("docker", "start", container)
            wait_ready(url)
            after = session.params()
            np.testing.assert_array_equal(before["w"], after["w"])
            assert session.step({"w": np.ones(50_000, np.float32)}).version == 2
        logs = project("--profile", "postgres", "logs", "--no-color")
        assert "store: postgresql" in logs
        shown = run("docker", "exec", container, "optserve", "config")
        for text in (logs, shown, run("docker", "inspect", container)):
            assert "not: in/the@environment" not in text
            assert "not%3A" not in text


def test_an_empty_password_is_refused_by_both_sides() -> None:
    done = attempt(
        *("docker", "run", "--rm", "-e", "OPTSERVE_STORE=postgresql+psycopg://me@db/x"),
        *("-e", "OPTSERVE_STORE_PASSWORD_FILE=/dev/null", SERVER),
    )
    assert done.returncode == 1
    assert "optserve: the password in /dev/null cannot be read: it is empty\n" in done.stderr
    secret = ("-v", f"{ROOT / '.no-password'}:/secret:ro", "-e", "POSTGRES_PASSWORD_FILE=/secret")
    names = ("-e", "POSTGRES_USER=me", "-e", "POSTGRES_DB=x")
    done = attempt("docker", "run", "--rm", *secret, *names, postgres_image())
    assert done.returncode == 1
    assert "superuser password is not specified" in done.stderr


# --- for the tests of others ---------------------------------------------------------------------


def test_a_project_of_its_own_tests_against_the_service() -> None:
    """examples/compose-test, as its page says to run it."""
    folder = ROOT / "examples" / "compose-test"
    env = {"OPTSERVE_IMAGE": SERVER}
    done = attempt(sys.executable, "-m", "pytest", "-q", str(folder), env=env, limit_s=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_the_quick_start_of_the_readme_prints_what_it_shows() -> None:
    with composed() as project:
        printed = None
        for block in test_docs_run.blocks(ROOT / "README.md", "docker "):
            if block.kind == "run":
                text = block.text.replace(test_docs_run.DEFAULT, project.url)
                text = text.replace("docker compose", " ".join(compose_command() or ()))
                printed = run("bash", "-euo", "pipefail", "-c", text, env=project.env, limit_s=120)
            else:
                assert printed is not None
                got = "".join(printed.split())
                assert test_docs_run.pattern(block.text).fullmatch(got), printed
        assert printed is not None
