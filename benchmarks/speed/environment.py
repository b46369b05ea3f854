"""The peers' own environment, benchmarks/.venv-peers: what the project itself must not depend on.

It sees the project's packages, so that the peers run on the same torch.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.speed.process import peers_python
from benchmarks.speed.progress import say

REQUIREMENTS = ["ray==2.60.0", "matplotlib==3.11.2"]
INSTALL_S = 900


def ensure() -> bool:
    """Make the environment unless it is there; return whether it is. Failing is said, not raised:
    who needs it then does not take part."""
    python = peers_python()
    stamp = python.parents[1] / "installed"
    wanted = "\n".join([*REQUIREMENTS, sysconfig.get_path("purelib")])
    if stamp.exists() and stamp.read_text() == wanted:
        return True
    say(f"installing {', '.join(REQUIREMENTS)} into {python.parents[1]}")
    try:
        _run(sys.executable, "-m", "venv", "--clear", str(python.parents[1]))
        where = _run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        (Path(where.strip()) / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = ("-m", "pip", "install", "--disable-pip-version-check", "--quiet")
        _run(str(python), *pip, *REQUIREMENTS)
    except (OSError, subprocess.SubprocessError) as exc:
        said = getattr(exc, "stderr", "") or str(exc)
        say(f"the peers' environment could not be made: {said.strip()}")
        return False
    stamp.write_text(wanted)
    return True


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=True)
    return done.stdout
