"""scripts/image-torch, with a real pip and wheels that are made here."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.serving import ROOT, environment


def wheel(folder: Path, name: str, version: str, needs: str | None = None) -> None:
    """Make an empty distribution."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "" if needs is None else f"Requires-Dist: {needs}\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
    return folder / "bin" / "python"


def install(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it where pip finds only what is in ``folder``."""
    (folder / "constraints.txt").write_text("torch==9.1\n")
    kept = {name: text for name, text in environment().items() if not name.startswith("PIP_")}
    return subprocess.run(
        ["sh", ROOT / "scripts" / "image-torch", python, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={
            **kept,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(folder),
            "PIP_CONFIG_FILE": os.devnull,
        },
    )


def installed(python: Path) -> str:
    command = [python, "-m", "pip", "list", "--format", "freeze"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_cuda_comes_only_to_those_who_ask_for_it(python: Path, tmp_path: Path) -> None:
    wheel(tmp_path, "nvidia_cublas", "13")
    wheel(tmp_path, "torch", "9.1", "nvidia-cublas")
    refused = install(python, tmp_path, "cpu")
    assert refused.returncode == 1, refused.stderr
    assert "torch==9.1 is a build for CUDA" in refused.stderr
    assert "--build-arg TORCH_INDEX=<address>" in refused.stderr
    assert "torch==" not in installed(python)
    done = install(python, tmp_path, "cuda")
    assert done.returncode == 0, done.stderr
    assert "nvidia-cublas==13" in installed(python).replace("_", "-")
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "torch", "nvidia-cublas"], check=True)


def test_torch_for_the_cpu_comes_without_asking(python: Path, tmp_path: Path) -> None:
    wheel(tmp_path, "torch", "9.1")
    done = install(python, tmp_path, "cpu")
    assert done.returncode == 0, done.stderr
    assert "torch==9.1" in installed(python)


def test_another_build_is_refused(python: Path, tmp_path: Path) -> None:
    done = install(python, tmp_path, "rocm")
    assert done.returncode == 2
    assert done.stderr == "image-torch: TORCH must be cpu or cuda, got 'rocm'\n"
