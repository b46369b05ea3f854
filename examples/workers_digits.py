"""Train the digit classifier of demo_digits.py with several worker processes, in rounds.

scripts/serve &
.venv/bin/python examples/workers_digits.py http://127.0.0.1:8000 --workers 4

Each process takes its share of every batch and pushes its gradient, weighted by the number of scans
in it; the server averages them in the order of the workers' names, and all go on with the same
params. Kill one, and the others wait for its pushes until the deadline of the round; start it again
with --only w2, and it goes on with them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from itertools import islice

from demo_digits import BATCH, LR, Batch, Digits, accuracy, initial_params, loss_and_grads

from optserve_client import Client, Session, Worker


def share(digits: Digits, rank: int, count: int, steps: int) -> Iterator[Batch]:
    """Yield what worker ``rank`` of ``count`` takes of each batch."""
    for x, y in islice(digits.batches(), steps):
        yield x[rank::count], y[rank::count]


def work(url: str, session_id: str, rank: int, count: int, steps: int) -> None:
    """Be one worker, from the version that the session has to the last one."""
    digits = Digits.load()
    with Worker(url, session_id, f"w{rank}", retry_rounds=100) as worker:
        params = worker.pull()
        for batch in islice(share(digits, rank, count, steps), params.version, None):
            loss, grads = loss_and_grads(params, batch)
            result = worker.push(grads, loss=loss, weight=len(batch[0]))
            params = result.params
            if rank == 0 and result.version % (steps // 10) == 0:
                print(f"version {result.version:4}  loss {loss:.4f}", flush=True)


def open_session(client: Client, session_id: str, count: int) -> Session:
    workers = {"mode": "sync", "count": count, "reduce": "weighted_mean", "deadline_s": 10}
    return client.create(
        "AdamW", initial_params(), lr=LR, id=session_id, name="digits", workers=workers
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument("--workers", type=int, default=4, help="processes")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--session", default=f"digits-{int(time.time())}", help="its id")
    parser.add_argument("--only", default="", help="start only these, such as w0,w2")
    options = parser.parse_args(argv)
    digits = Digits.load()
    steps = options.epochs * -(-len(digits.train_x) // BATCH)
    names = [f"w{rank}" for rank in range(options.workers)]
    chosen = options.only.split(",") if options.only else names
    with Client(options.url) as client:
        session = open_session(client, options.session, options.workers)
        print(f"session {session.id}: {options.workers} workers, {steps} rounds", flush=True)
        spawn, before = multiprocessing.get_context("spawn"), time.perf_counter()
        processes = [
            spawn.Process(target=work, args=(options.url, session.id, rank, len(names), steps))
            for rank, name in enumerate(names)
            if name in chosen
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        seconds = time.perf_counter() - before
        for row in session.workers()["workers"]:
            print(f"{row['worker']}: {row['contributions']} pushes, epoch {row['epoch']}")
        params = session.params()
    reached = accuracy(params, digits)
    print(f"version {params.version} after {seconds:.1f} s, test accuracy {reached:.2%}")
    return 0 if params.version == steps and not any(p.exitcode for p in processes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
