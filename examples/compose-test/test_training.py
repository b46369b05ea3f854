"""An integration test of your own: docker-compose starts the service, pytest trains with it."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from optserve_client import Client

COMPOSE = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
COMPOSE += ["-f", str(Path(__file__).with_name("docker-compose.yml"))]


@pytest.fixture(scope="session")
def client():
    subprocess.run([*COMPOSE, "up", "-d"], check=True)
    try:
        address = subprocess.check_output([*COMPOSE, "port", "optserve", "8000"], text=True).strip()
        with Client(f"http://{address}") as connected:
            connected.version()  # repeated until the service is there, for a minute at most
            yield connected
    finally:
        subprocess.run([*COMPOSE, "down", "-v"], check=True)


def test_the_minimum_is_found(client):
    session = client.create("Adam", {"w": np.array([3.0, -2.0], np.float32)}, lr=0.3)
    w = session.params()["w"]
    for _ in range(100):
        w = session.step({"w": 2 * w}, loss=float(w @ w)).params["w"]
    assert np.abs(w).max() < 0.05
    assert session.status()["updates"] == 100
