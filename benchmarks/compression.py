"""What compression saves and costs: bytes and time of a step, and where the training ends up.

One real server and its clients, on this machine. The contestants take turns, one step each, so that
whatever else the machine does meets all of them alike. The slow link is a relay in this process
that lets so many bytes through in a second, each way.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks import results
from examples.demo_digits import LR, WEIGHT_DECAY, Digits, accuracy, initial_params, loss_and_grads
from optserve_client import Client, Half, Int8, Session, TopK
from optserve_client._codings import Coded
from tests import record
from tests.serving import ServerProcess

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "compression.md"
BEGIN, END = "<!-- measured -->\n", "<!-- end of what was measured -->\n"

#: Name, and how a step is sent.
CONTESTANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "`Half()`, bfloat16": {"compress": Half()},
    '`Half("float16")`': {"compress": Half("float16")},
    "`TopK(0.1)`": {"compress": TopK(0.1)},
    "`TopK(0.01)`": {"compress": TopK(0.01)},
    "`Int8()`": {"compress": Int8()},
    "gzip": {"encoding": "gzip"},
    "zstd": {"encoding": "zstd"},
    "`Int8()` and zstd": {"compress": Int8(), "encoding": "zstd"},
    "`TopK(0.01)` and zstd": {"compress": TopK(0.01), "encoding": "zstd"},
}
#: Besides, for the training: what error feedback is good for.
WITHOUT_FEEDBACK = {
    "`TopK(0.01, error_feedback=False)`": {"compress": TopK(0.01, error_feedback=False)},
    "`Int8(error_feedback=False)`": {"compress": Int8(error_feedback=False)},
}
LARGE, LARGE_ROUNDS, LINK_ROUNDS = 25_000_000, 10, 3
LINK_BITS_S = 100e6
#: Steps over which a loss is averaged.
WINDOW = 23


class Counted:
    """A transport that counts the bytes of bodies."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.sent = 0

    def send(self, request: Any) -> Any:
        self.sent += request.length
        return self._inner.send(request)

    def close(self) -> None:
        self._inner.close()


@dataclass
class Contestant:
    """One way to send a step, and what was measured of it."""

    session: Session
    counted: Counted
    compress: Any
    seconds: list[float] = field(default_factory=list)
    bytes_sent: list[int] = field(default_factory=list)

    def step(self, grads: Any, **options: Any) -> Any:
        """Take a step and note what it cost."""
        before = self.counted.sent
        began = time.perf_counter()
        result = self.session.step(grads, compress=self.compress, **options)
        self.seconds.append(time.perf_counter() - began)
        self.bytes_sent.append(self.counted.sent - before)
        return result

    @property
    def ms(self) -> float:
        return statistics.median(self.seconds) * 1e3

    @property
    def sent(self) -> float:
        return statistics.mean(self.bytes_sent)


def contestant(
    stack: ExitStack, url: str, session_id: str, compress: Any = None, encoding: Any = None
) -> Contestant:
    """Return a contestant with a client of its own, which is closed with ``stack``."""
    client = stack.enter_context(Client(url, encoding=encoding))
    if isinstance(client._transport, Coded):
        counted = client._transport._inner = Counted(client._transport._inner)
    else:
        counted = client._transport = Counted(client._transport)
    return Contestant(client.session(session_id), counted, compress)


# --- a slow link ---------------------------------------------------------------------------------


@contextmanager
def slow_link(url: str, bits_s: float) -> Iterator[str]:
    """Yield the address of a relay to ``url``."""
    where = urlsplit(url)
    assert where.hostname is not None
    target = (where.hostname, where.port or 80)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=_accept, args=(listener, target, bits_s), daemon=True)
        accepting.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join(10)


def _accept(listener: socket.socket, target: tuple[str, int], bits_s: float) -> None:
    with suppress(OSError):
        while True:
            near, _ = listener.accept()
            far = socket.create_connection(target)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_relay, args=(source, sink, bits_s), daemon=True).start()


def _relay(source: socket.socket, sink: socket.socket, bits_s: float) -> None:
    due = 0.0
    with suppress(OSError):
        # Of the size that a hundredth of a second lets through.
        while data := source.recv(max(1024, int(bits_s / 800))):
            due = max(due, time.monotonic()) + len(data) * 8 / bits_s
            time.sleep(max(0.0, due - time.monotonic()))
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


# --- a large gradient ----------------------------------------------------------------------------


def large_rows(
    server: ServerProcess, size: int, rounds: int, link_rounds: int
) -> list[Sequence[str]]:
    """Push gradients of normal numbers, without an answer of their size."""
    random = np.random.default_rng(0)
    gradients = [random.standard_normal(size, dtype=np.float32) for _ in range(2)]
    with Client(server.url) as client:
        params = {"w": np.zeros(size, np.float32)}
        session = client.create("Adam", params, id="large", durability="memory")
        near = timed(server.url, gradients, rounds)
        with slow_link(server.url, LINK_BITS_S) as url:
            far = timed(url, gradients, link_rounds)
        session.delete()
    whole = near["none"].sent
    return [
        [
            name,
            f"{near[name].sent / 1e6:.3g}",
            f"{100 * near[name].sent / whole:.3g}",
            record.number(near[name].ms),
            f"{far[name].ms / 1e3:.3g}",
        ]
        for name in CONTESTANTS
    ]


def timed(url: str, gradients: list[np.ndarray], rounds: int) -> dict[str, Contestant]:
    """Return the contestants after ``rounds`` steps each, and one before that does not count."""
    with ExitStack() as stack:
        made = {name: contestant(stack, url, "large", **how) for name, how in CONTESTANTS.items()}
        for number in range(rounds + 1):
            for name, one in made.items():
                one.step({"w": gradients[number % 2]}, returns="none")
                if number == 0:
                    one.seconds.clear()
                    one.bytes_sent.clear()
                print(number, name, f"{one.session.id} {url}", sep="\t", flush=True)
    return made


# --- a training ----------------------------------------------------------------------------------


def digits_rows(server: ServerProcess, steps: int | None) -> tuple[list[str], list[Sequence[str]]]:
    """Train the model of examples/demo_digits.py once for each contestant, on the same batches."""
    digits = Digits.load()
    steps = min(steps or digits.steps, digits.steps)
    marks = sorted({max(WINDOW, steps // 6), max(WINDOW, steps // 2), steps})
    with ExitStack() as stack:
        made, params, losses = {}, {}, {}
        for number, (name, how) in enumerate({**CONTESTANTS, **WITHOUT_FEEDBACK}.items()):
            made[name] = contestant(stack, server.url, f"digits-{number}", **how)
            with Client(server.url) as client:
                client.create(
                    {"name": "AdamW", "lr": LR, "weight_decay": WEIGHT_DECAY},
                    initial_params(),
                    id=f"digits-{number}",
                    scheduler={"name": "CosineAnnealingLR", "T_max": steps, "advance": "step"},
                )
            params[name], losses[name] = initial_params(), []
        for batch in islice(digits.batches(), steps):
            for name, one in made.items():
                loss, grads = loss_and_grads(params[name], batch)
                losses[name].append(loss)
                params[name] = one.step(grads, loss=loss).params
        rows = [
            [
                name,
                f"{one.sent:,.0f}",
                f"{one.ms:.2f}",
                *(f"{statistics.mean(losses[name][mark - WINDOW : mark]):.4f}" for mark in marks),
                f"{100 * accuracy(params[name], digits):.2f}",
            ]
            for name, one in made.items()
        ]
    head = ["", "bytes", "ms", *(f"loss at {mark}" for mark in marks), "accuracy %"]
    return head, rows


# --- the document --------------------------------------------------------------------------------


def write(text: str, path: Path = DOCUMENT) -> None:
    """Put ``text`` between the marks of the document."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{path} has no line {BEGIN.strip()} before one {END.strip()}")
    path.write_text(f"{before}{BEGIN}\n{text.strip()}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench compression", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="in miniature, and print only")
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args()
    size, rounds, link_rounds, steps = LARGE, LARGE_ROUNDS, LINK_ROUNDS, None
    if options.quick:
        size, rounds, link_rounds, steps = 100_000, 2, 1, 2 * WINDOW
    with (
        tempfile.TemporaryDirectory(dir=Path(__file__).parent) as directory,
        ServerProcess(data_dir=Path(directory)) as server,
    ):
        large = large_rows(server, size, rounds, link_rounds)
        head, digits = digits_rows(server, steps)
    command = shlex.join(["scripts/bench", "compression", *sys.argv[1:]])
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    columns = ("", "MB", "% of none", "ms", f"s, at {LINK_BITS_S / 1e6:.0f} Mbit/s")
    text = (
        f"{today}; {results.machine()}; `{command}`\n\n"
        f"**Bytes and time.** A gradient of {size:,} normal numbers, in one tensor, pushed to Adam "
        '(`returns="none"`, durability `memory`): the body of a request, and the median time of a '
        "step over loopback and through a slow link. Compressing is part of the time.\n\n"
        f"{results.table(columns, large)}\n"
        "**Convergence.** The classifier of `examples/demo_digits.py` (9,610 parameters, AdamW, "
        f"batches of 64), from the same start over the same batches: bytes of a request, median "
        f"time of a step, mean loss of {WINDOW} steps, and accuracy on held-out scans at the end."
        f"\n\n{results.table(head, digits)}"
    )
    print(text)
    if not (options.dry or options.quick):
        write(text)


if __name__ == "__main__":
    main()
