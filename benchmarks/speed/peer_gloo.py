"""PyTorch over gloo: two processes that send and receive one buffer each way for a step.

The client is rank 0; the server is another process of this module, started with a port. How many
steps are coming it hears on its standard input, outside what is timed.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
from collections.abc import Sequence
from typing import IO

import torch
import torch.distributed as dist

from benchmarks.speed.peer_state import Model
from benchmarks.speed.shapes import Shapes
from benchmarks.speed.worker import (
    Worker,
    check_first_step,
    gradient,
    run,
    server_of,
    split,
    timed,
)


def join(rank: int, port: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=300),
    )


class Gloo(Worker):
    def __init__(self, pid: int, orders: IO[str]) -> None:
        self._pid = pid
        self._orders = orders
        self._grads = self._params = torch.empty(0)

    def server_pids(self) -> list[int]:
        return [self._pid]

    def open(self, shapes: Shapes, variants: Sequence[str]) -> None:
        self._tell({"shapes": shapes})
        self._grads = torch.from_numpy(gradient(sum(torch.Size(shape).numel() for shape in shapes)))
        self._params = torch.zeros_like(self._grads)
        self.steps("", 1)
        check_first_step(self._params, self._grads)

    def steps(self, variant: str, count: int) -> list[float]:
        self._tell({"steps": count})
        return timed(self._step, count)

    def close(self) -> None:
        self._tell({"shapes": []})
        self._grads = self._params = torch.empty(0)

    def _step(self) -> None:
        dist.send(self._grads, 1)
        dist.recv(self._params, 1)

    def _tell(self, order: dict[str, object]) -> None:
        print(json.dumps(order), file=self._orders, flush=True)


def serve(port: int) -> None:
    print("joining", flush=True)
    join(1, port)
    flat = grads = torch.empty(0)
    model = Model([])
    for line in sys.stdin:
        order = json.loads(line)
        if "shapes" in order:
            shapes = order["shapes"]
            del model, flat, grads
            model = Model(shapes)
            flat = torch.zeros(sum(param.numel() for param in model.params))
            grads = torch.zeros_like(flat)
            views = split(grads, shapes)
            for param, view in zip(model.params, split(flat, shapes), strict=True):
                param.data = view  # so that what is sent back lies in one piece
        else:
            for _ in range(order["steps"]):
                dist.recv(grads, 0)
                model.step(views)
                dist.send(flat, 0)


def main() -> None:
    if len(sys.argv) > 1:
        serve(int(sys.argv[1]))
        os._exit(0)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with server_of("peer_gloo", str(port)) as (process, _):
        join(0, port)
        assert process.stdin is not None
        run(Gloo(process.pid, process.stdin))
    os._exit(0)


if __name__ == "__main__":
    main()
