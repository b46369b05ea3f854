"""python -m tests.data.make_format: makes format-N, which every later release must open.

Run it when the format on disk has got a new number, and check the new directory in beside the old
ones; those are never made again. Run it anew for a format that no release has written yet.
"""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from optserve.store.schema import FORMAT
from optserve_client import Client, Sparse, wire
from tests import oracle
from tests.serving import ServerProcess

HERE = Path(__file__).parent
#: As wherever the directory is opened, so that the sums have the same order.
FLAGS = ("--threads", "1")
SMALL: oracle.Shapes = {"w": (5, 7), "b": (7,), "s": (), "e": (0, 3)}
#: 66 kB, so that its payload and its snapshots are files.
TABLE = (1100, 15)
BODIES: dict[str, dict[str, Any]] = {
    "adamw": {
        "optimizer": {"name": "AdamW", "lr": 0.1},
        "scheduler": {"name": "LambdaLR", "lr_lambda": "0.9 ** epoch", "advance": "step"},
        "clip_grad_norm": 1.0,
        "ema": {"decay": 0.9},
        "best": {"monitor": "loss"},
        "tags": {"made": "for later releases"},
    },
    "accumulate": {
        "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9},
        "groups": [{"params": ["b"], "lr": 0.01}],
        "scheduler": {"name": "MultiStepLR", "milestones": [2, 4]},
        "accumulate": {"steps": 3, "reduce": "mean"},
    },
    "lbfgs": {"optimizer": {"name": "LBFGS", "line_search_fn": "strong_wolfe"}},
    "adafactor": {"optimizer": {"name": "Adafactor"}},
    "bfloat16": {"optimizer": {"name": "Adam", "lr": 0.1}, "dtype": "bfloat16"},
}
#: Adafactor refuses empty tensors.
WHOLE: oracle.Shapes = {"w": (5, 7), "b": (7,), "s": ()}


def shapes(name: str) -> oracle.Shapes:
    return WHOLE if name == "adafactor" else SMALL


def digests(state_file: bytes | memoryview) -> dict[str, str]:
    """Return a digest of each tensor of a state file but the ledger, which holds times."""
    tensors, _ = wire.decode(state_file)
    return {
        name: xxhash.xxh3_128_hexdigest(bytes(wire.as_bytes(tensor)))
        for name, tensor in sorted(tensors.items())
        if name != "ledger"
    }


def create(client: Client) -> None:
    for name, body in BODIES.items():
        fields = dict(body)
        dtype = fields.pop("dtype", "float32")
        params = oracle.tensors(1, shapes(name), dtype)
        client.create(fields.pop("optimizer"), params, id=name, **fields)


def train(client: Client, first: int, count: int) -> None:
    for seed in range(first, first + count):
        for name, body in BODIES.items():
            grads = oracle.tensors(seed, shapes(name), body.get("dtype", "float32"))
            client.session(name).step(grads, loss=10.0 / seed)
    client.session("accumulate").scheduler_step()


def rows(seed: int) -> Sparse:
    return Sparse(
        indices=np.array([[seed, seed + 1]]),
        values=np.full((2, TABLE[1]), seed, "f4"),
        shape=TABLE,
    )


def described(client: Client) -> dict[str, Any]:
    sessions = {}
    for name in (*BODIES, "sparse"):
        session = client.session(name)
        status = session.status()
        sessions[name] = {
            "version": status["version"],
            "updates": status["updates"],
            "generation": status["generation"],
            "history": [row["version"] for row in session.history()],
            "tensors": digests(session.export_state()),
        }
    return sessions


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "data"
        # An orderly end, for snapshots, and then a kill, for events that are to be replayed.
        with ServerProcess(*FLAGS, data_dir=directory) as server, Client(server.url) as client:
            create(client)
            train(client, 1, 2)
        with ServerProcess(*FLAGS, data_dir=directory) as server:
            with Client(server.url, worker="maker") as client:
                train(client, 3, 2)
                table = {"rows": np.ones(TABLE, "f4")}
                session = client.create("SGD", table, id="sparse", sparse=["rows"])
                session.step({"rows": rows(1)})
                sessions = described(client)
            server.stop(signal.SIGKILL)
        shut(directory)
        target = HERE / f"format-{FORMAT}"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(directory, target)
    text = json.dumps({"flags": FLAGS, "sessions": sessions}, indent=1)
    (HERE / f"format-{FORMAT}.json").write_text(text + "\n")
    total = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target.name}: {total:,} bytes")


def shut(directory: Path) -> None:
    """Leave one file of the database, and no lock."""
    database = sqlite3.connect(directory / "optserve.db")
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.execute("VACUUM")
    database.close()
    (directory / "lock").unlink()


if __name__ == "__main__":
    main()
