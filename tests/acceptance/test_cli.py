"""The program as people and process managers run it."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

import optserve
from tests.serving import ROOT, ServerProcess, environment
from tests.waiting import wait_until

CREATE = {"optimizer": {"name": "SGD", "lr": 0.5}, "params": {"w": [1.0]}}
STEP = b'{"grads": {"w": [1.0]}}'


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "optserve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env=environment(**{"OPTSERVE_STORE": "memory", **env}),
        cwd=ROOT,
    )


def said_by(server: ServerProcess, level: str) -> list[str]:
    """Return the events of this level that the server logged."""
    lines = [json.loads(line) for line in server.stderr().splitlines()]
    return [line["event"] for line in lines if line["level"] == level]


def test_version_names_what_the_numbers_depend_on() -> None:
    done = run("version")
    assert done.returncode == 0
    assert re.fullmatch(
        rf"optserve {re.escape(optserve.__version__)} \(torch 2\.13\.\S+, Python 3\.\S+\)\n",
        done.stdout,
    )


def test_help_lists_every_flag() -> None:
    said = run("serve", "--help").stdout
    flags = ("host", "port", "uds", "fd", "threads", "device", "log-level")
    stored = ("data-dir", "store", "files", "memory-budget", "session-ttl")
    assert [flag for flag in (*flags, *stored) if f"--{flag} " not in said] == []


@pytest.mark.parametrize(
    ("flags", "env", "sentence"),
    [
        ((), {"OPTSERVE_PORT": "tcp://10.0.0.7:8000"}, "a container platform injects"),
        (("--threads", "0"), {}, "--threads must be >= 1, got 0"),
        (("--port", "70000"), {}, "--port must be <= 65535, got 70000"),
        (("--uds", "/x", "--port", "3"), {}, "--port and --uds are two places to listen"),
        (("--uds", "/x", "--fd", "3"), {}, "two places to listen, expected one"),
        (("--device", "tpu"), {}, "--device must be auto, cpu, cuda or cuda:<index>, got 'tpu'"),
        (("--port", "0", "--device", "cuda:99"), {}, "device 'cuda:99': this server has "),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_sentence_and_status_2(
    flags: tuple[str, ...], env: dict[str, str], sentence: str
) -> None:
    done = run("serve", *flags, **env)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("optserve: ")
    assert sentence in done.stderr


def test_help_names_the_settings_that_have_no_flag_and_the_log_levels() -> None:
    said = " ".join(run("serve", "--help").stdout.split())
    assert "OPTSERVE_MAX_BODY_BYTES" in said
    assert "debug, info, warning or error" in said


def test_a_device_that_is_not_there_leaves_no_socket_file(tmp_path: Path) -> None:
    path = tmp_path / "o.sock"
    assert run("serve", "--uds", str(path), "--device", "cuda:99").returncode == 2
    assert not path.exists()


def test_a_variable_that_is_no_setting_is_warned_about() -> None:
    with ServerProcess(env={"OPTSERVE_PROT": "9000"}) as server:
        [said] = said_by(server, "warning")
    assert said.endswith("(did you mean OPTSERVE_PORT?)")


def test_an_announced_length_sets_no_memory_aside() -> None:
    with ServerProcess(env={"OPTSERVE_MAX_JSON_BYTES": str(2**31)}) as server:
        before = _resident_bytes(server)
        connection = http.client.HTTPConnection(*_address(server), timeout=30)
        connection.putrequest("POST", "/v1/sessions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(2**30))
        connection.endheaders()
        connection.send(b"{")
        assert httpx.get(f"{server.url}/healthz", timeout=1).status_code == 200
        assert _resident_bytes(server) - before < 64 * 2**20
        connection.close()


def _resident_bytes(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("there is no /proc here")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_a_port_in_use_is_told_before_torch_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--port", str(port))
    assert done.returncode == 1
    assert done.stderr == f"optserve: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_the_ready_line_comes_when_the_server_is_ready(server: ServerProcess) -> None:
    found = re.fullmatch(
        r"optserve (\S+) ready at http://127\.0\.0\.1:\d+ "
        r"\(torch 2\.13\.0, (cpu|cuda\S*), \d+ threads, store: sqlite\)",
        server.line,
    )
    assert found is not None
    assert found[1] == optserve.__version__
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_the_serve_script_passes_its_flags_on() -> None:
    command = [ROOT / "scripts" / "serve", "--port", "0", "--threads", "1", "--store", "memory"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.terminate()
        assert process.wait(20) == 0
    assert ", 1 threads, store: memory)" in line


def test_requests_are_not_logged_at_info_and_nothing_else_is_said() -> None:
    with ServerProcess() as server:
        assert httpx.get(f"{server.url}/v1/sessions").status_code == 200
        assert httpx.get(f"{server.url}/v1/sessions/nobody").status_code == 404
        assert server.stop() == 0
        [said] = server.stderr().splitlines()
    assert json.loads(said)["event"] == "sessions are kept here"


def test_a_flag_beats_the_environment() -> None:
    with ServerProcess("--threads", "2", env={"OPTSERVE_THREADS": "1"}) as server:
        assert server.threads == 2
    with ServerProcess(env={"OPTSERVE_THREADS": "1"}) as server:
        assert server.threads == 1


def test_a_body_limit_comes_from_the_environment() -> None:
    with ServerProcess(env={"OPTSERVE_MAX_JSON_BYTES": "100"}) as server:
        reply = httpx.post(f"{server.url}/v1/sessions", json={"notes": "x" * 200})
        assert reply.status_code == 413
        assert reply.json()["code"] == "too_large"


def test_a_unix_socket_serves_and_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "o.sock"
    with ServerProcess("--uds", str(path)) as server:
        assert server.url == f"unix:{path}"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://optserve/readyz").status_code == 200
        second = run("serve", "--uds", str(path))
        assert second.returncode == 1
        assert "Address already in use" in second.stderr
        assert server.stop() == 0
    assert not path.exists()


def test_the_socket_file_of_a_killed_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "o.sock"
    with ServerProcess("--uds", str(path)) as server:
        server.stop(signal.SIGKILL)
    assert path.exists()
    with ServerProcess("--uds", str(path)) as server:
        assert server.url == f"unix:{path}"


def test_an_inherited_socket_is_served() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        descriptor = listening.fileno()
        with ServerProcess("--fd", str(descriptor), pass_fds=(descriptor,)) as server:
            assert server.url == f"http://127.0.0.1:{port}"
            assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_an_address_that_others_can_reach_is_warned_about() -> None:
    with ServerProcess("--host", "0.0.0.0") as server:
        [said] = said_by(server, "warning")
    assert "there is no authentication yet" in said


def half_a_step(server: ServerProcess, session_id: str) -> http.client.HTTPConnection:
    """Create a session and send the first half of a step; return once the server is reading it."""
    assert httpx.put(f"{server.url}/v1/sessions/{session_id}", json=CREATE).status_code == 201
    connection = http.client.HTTPConnection(*_address(server), timeout=30)
    connection.putrequest("POST", f"/v1/sessions/{session_id}/step")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(STEP)))
    connection.putheader("Expect", "100-continue")
    connection.endheaders()
    assert connection.sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.send(STEP[:10])
    return connection


def _address(server: ServerProcess) -> tuple[str, int]:
    url = httpx.URL(server.url)
    assert url.port is not None
    return url.host, url.port


def test_sigterm_lets_an_open_request_finish_and_refuses_new_ones() -> None:
    with ServerProcess() as server:
        connection = half_a_step(server, "drained")
        server.process.send_signal(signal.SIGTERM)
        _wait_until_draining(server)
        refused = httpx.put(f"{server.url}/v1/sessions/late", json=CREATE)
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert int(refused.headers["Retry-After"]) >= 1
        connection.send(STEP[10:])
        reply = connection.getresponse()
        body = json.loads(reply.read())
        connection.close()
        assert reply.status == 200
        assert body["params"] == {"w": [0.5]}
        assert server.process.wait(10) == 0


def _wait_until_draining(server: ServerProcess) -> None:
    wait_until(lambda: httpx.get(f"{server.url}/readyz").status_code == 503, "the stop")


def test_draining_ends_after_drain_s() -> None:
    with ServerProcess(env={"OPTSERVE_DRAIN_S": "1"}) as server:
        connection = half_a_step(server, "stuck")
        assert server.stop() == 0  # not in time otherwise: the body's own deadline is later
        connection.close()


def test_a_second_sigterm_exits_at_once() -> None:
    with ServerProcess(env={"OPTSERVE_DRAIN_S": "60"}) as server:
        connection = half_a_step(server, "hurried")
        server.process.send_signal(signal.SIGTERM)
        _wait_until_draining(server)
        assert server.stop() == 128 + signal.SIGTERM  # within its limit, which is below 60 s
        connection.close()


def test_ctrl_c_is_an_orderly_exit() -> None:
    with ServerProcess() as server:
        assert server.stop(signal.SIGINT) == 0


def test_a_client_that_connects_while_the_server_starts_is_answered() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port, descriptor = listening.getsockname()[1], listening.fileno()
        answers: list[int] = []

        def ask() -> None:
            answers.append(httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=60).status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        with ServerProcess("--fd", str(descriptor), pass_fds=(descriptor,)):
            asking.join(60)
    assert answers == [200]


# --- config and health ---------------------------------------------------------------------------


def shown(*flags: str, **env: str) -> dict[str, str]:
    """Return what ``optserve config`` prints, by the name of the setting."""
    done = run("config", *flags, **env)
    assert done.returncode == 0, done.stderr
    lines = [line.partition("  # ") for line in done.stdout.splitlines()]
    return {line.strip().removeprefix("# "): why for line, _, why in lines}


def test_config_shows_what_is_in_force_and_from_where(tmp_path: Path) -> None:
    file = tmp_path / "optserve.toml"
    file.write_text('port = 9001\nthreads = 1\ndrain_s = 3\nlog_level = "error"\n')
    found = shown("--config", str(file), "--port", "9003", OPTSERVE_LOG_LEVEL="debug")
    assert found["port = 9003"] == "--port"
    assert found['log_level = "debug"'] == "OPTSERVE_LOG_LEVEL"
    assert found["threads = 1"] == f"threads in {file}"
    assert found["drain_s = 3"] == f"drain_s in {file}"
    assert found['host = "127.0.0.1"'] == "default"
    assert found["uds"] == "not set"


def test_what_config_prints_is_a_file_that_says_the_same(tmp_path: Path) -> None:
    file = tmp_path / "optserve.toml"
    printed = run("config", "--port", "9003", "--data-dir", str(tmp_path)).stdout
    file.write_text(printed)
    again = shown("--config", str(file), OPTSERVE_STORE="")
    values = {line for line in again if " = " in line and not line.startswith("config")}
    assert values == {
        line.partition("  # ")[0].strip() for line in printed.splitlines() if line[0] != "#"
    }
    assert again["port = 9003"] == f"port in {file}"


def test_config_shows_no_password() -> None:
    done = run("config", OPTSERVE_STORE="postgresql+psycopg://me:secret@db/x")
    assert "secret" not in done.stdout + done.stderr
    assert '# store = "postgresql+psycopg://me:***@db/x"' in done.stdout


def test_config_shows_what_the_memory_makes_of_a_limit() -> None:
    found = shown("--memory-budget", "5MB")
    assert found["max_body_bytes = 5000000"] == (
        f"not {4 * 2**30} (default): never more than memory_budget"
    )


@pytest.mark.parametrize("command", ["config", "health"])
def test_flags_that_contradict_each_other_are_refused_there_too(command: str) -> None:
    done = run(command, "--uds", "/tmp/x", "--port", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "optserve: --port and --uds are two places to listen, expected one\n"


def test_a_configuration_that_cannot_be_used_is_one_sentence_and_status_2(tmp_path: Path) -> None:
    file = tmp_path / "optserve.toml"
    file.write_text("prt = 1\n")
    for command in ("serve", "config", "health"):
        done = run(command, OPTSERVE_CONFIG=str(file))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"optserve: prt in {file} is no setting (did you mean port?)\n"


def test_a_server_takes_its_settings_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "optserve.toml"
    file.write_text("max_json_bytes = 100\n")
    with ServerProcess("--config", str(file)) as server:
        reply = httpx.put(f"{server.url}/v1/sessions/s", json={**CREATE, "notes": "x" * 100})
        assert reply.status_code == 413
        assert "100" in reply.json()["detail"]


def test_health_says_whether_the_server_is_ready(tmp_path: Path) -> None:
    socket_path = str(tmp_path / "s")
    with ServerProcess() as tcp, ServerProcess("--uds", socket_path) as local:
        assert local.url.startswith("unix:")
        port = tcp.url.rpartition(":")[2]
        for flags, env in (
            (("--port", port), {}),
            ((), {"OPTSERVE_PORT": port, "OPTSERVE_HOST": "0.0.0.0"}),
            (("--uds", socket_path), {}),
        ):
            done = run("health", *flags, **env)
            assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")
    for flags in (("--port", port), ("--uds", socket_path)):
        done = run("health", *flags)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"optserve: \S+ cannot be reached: .+\n", done.stderr)


def test_health_says_when_the_server_does_not_answer_or_is_not_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        silent = run("health", "--port", port)
        assert (silent.returncode, silent.stderr) == (
            1,
            f"optserve: http://127.0.0.1:{port} did not answer within 3 s\n",
        )

        def refuse() -> None:
            connection, _ = listener.accept()
            while not connection.recv(4096).endswith(b"\r\n\r\n"):
                pass
            body = b'{"status":"starting"}'
            head = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: %d\r\n\r\n" % len(body)
            connection.sendall(head + body)
            connection.close()

        listener.accept()[0].close()  # the one that gave up
        thread = threading.Thread(target=refuse)
        thread.start()
        starting = run("health", "--port", port)
        thread.join(10)
        said = f'optserve: http://127.0.0.1:{port} is not ready: {{"status":"starting"}}\n'
        assert (starting.returncode, starting.stderr) == (1, said)
