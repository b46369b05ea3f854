"""Imports point one way; read from the syntax trees, so lazy imports inside functions count too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICE = ROOT / "service" / "optserve"
CLIENT = ROOT / "client" / "optserve_client"

#: What a module of this layer may import from our two packages, besides its own layer.
SHARED = {"optserve_client.wire", "optserve_client.errors", "optserve.sentences"}
#: wire.py and what it is made of.
CODEC = {"optserve_client._tensors", "optserve_client._json_tensors"}
MAY = {
    "optserve.api": SHARED
    | {"optserve.sessions", "optserve.optim", "optserve.settings", "optserve.__version__"},
    "optserve.sessions": SHARED | {"optserve.optim", "optserve.store"},
    "optserve.optim": SHARED,
    "optserve.store": SHARED,
    # Puts the others together, as cli.py and server.py do.
    "optserve.commands": {"optserve", "optserve_client"},
}
#: Foreign packages that only one layer may import.
ONLY = {
    "fastapi": "optserve.api",
    "starlette": "optserve.api",
    "torch": "optserve.optim",
    "pytorch_optimizer": "optserve.optim",
    "simpleeval": "optserve.optim",
}
#: What the client needs besides the standard library.
CLIENT_MAY = {"numpy", "httpx"}
#: What it needs for one thing, in the one file that does it. Python 3.14 has ``compression``.
OPTIONAL = {"torch.py": {"torch"}, "_zstd.py": {"backports", "compression"}}


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of everything that ``path`` imports.

    ``from a import b`` yields ``a.b``, which is right whether ``b`` is a module or a name in ``a``.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def modules(root: Path) -> list[tuple[Path, str]]:
    """Return each file below ``root`` with the dotted name of the package that it is in."""
    return [
        (path, ".".join(path.parent.relative_to(root.parent).parts))
        for path in sorted(root.rglob("*.py"))
    ]


def within(name: str, allowed: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


def violations(path: Path, package: str) -> list[str]:
    layer = ".".join(package.split(".")[:2])
    found = []
    for line, name in imports(path, package):
        top = name.split(".")[0]
        where = f"{path.name}:{line}: {layer} imports {name}"
        if layer in MAY and top in {"optserve", "optserve_client"}:
            if not within(name, MAY[layer] | {layer}):
                found.append(where)
        elif top in ONLY and layer != ONLY[top]:
            found.append(f"{where}, which only {ONLY[top]} may")
    return found


@pytest.mark.parametrize(
    ("path", "package"), modules(SERVICE), ids=lambda value: getattr(value, "stem", value)
)
def test_a_module_of_the_service_imports_only_what_its_layer_may(path: Path, package: str) -> None:
    assert violations(path, package) == []


@pytest.mark.parametrize("path", [path for path, _ in modules(CLIENT)], ids=lambda path: path.stem)
def test_the_client_imports_numpy_and_httpx_and_never_the_service(path: Path) -> None:
    allowed = CLIENT_MAY | set(sys.stdlib_module_names) | {"optserve_client"}
    allowed |= OPTIONAL.get(path.name, set())
    foreign = {
        name for _, name in imports(path, "optserve_client") if name.split(".")[0] not in allowed
    }
    assert foreign == set()


def test_errors_and_wire_need_nothing_but_numpy() -> None:
    names = {"errors.py", "wire.py", "_tensors.py", "_json_tensors.py"}
    allowed = set(sys.stdlib_module_names) | {"numpy"}
    foreign = {
        name
        for path, package in modules(CLIENT)
        if path.name in names
        for _, name in imports(path, package)
        if name.split(".")[0] not in allowed and not within(name, SHARED | CODEC)
    }
    assert foreign == set()


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("optserve.optim", "from optserve.store import memory"),
        ("optserve.store", "from optserve import optim"),
        ("optserve.optim", "from ..sessions import registry"),
        ("optserve.sessions", "import torch"),
        ("optserve.sessions", "def f():\n    import starlette.requests"),
        ("optserve.sessions", "from optserve.api import app"),
        ("optserve.api", "from optserve.store import memory"),
        ("optserve.store", "from optserve_client.client import Client"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, layer: str, source: str) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(source)
    assert len(violations(path, layer)) == 1


def test_every_folder_of_the_service_is_a_known_layer() -> None:
    folders = {f"optserve.{path.name}" for path in SERVICE.iterdir() if path.is_dir()}
    assert {name for name in folders if not name.endswith("__pycache__")} == set(MAY)
