"""A parameter server over torch RPC (TensorPipe): one rpc_sync for each step.

The client is rank 0; the server is another process of this module, started with a port.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

import torch
from torch.distributed import rpc

from benchmarks.speed.peer_state import Model
from benchmarks.speed.shapes import Shapes
from benchmarks.speed.worker import (
    Worker,
    check_first_step,
    die_with_parent,
    gradient,
    run,
    server_of,
    split,
    timed,
)

SERVER = "server"
_model: Model | None = None


def make(shapes: Shapes | None) -> None:
    """On the server: begin anew with these shapes, or forget all."""
    global _model
    _model = None if shapes is None else Model(shapes)


def step(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """On the server."""
    assert _model is not None
    return _model.step(grads)


def join(name: str, rank: int, port: int) -> None:
    os.environ.setdefault("TP_SOCKET_IFNAME", "lo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"tcp://127.0.0.1:{port}", rpc_timeout=120
    )
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)


class Rpc(Worker):
    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._grads: list[torch.Tensor] = []

    def server_pids(self) -> list[int]:
        return [self._pid]

    def open(self, shapes: Shapes, variants: Sequence[str]) -> None:
        rpc.rpc_sync(SERVER, make, args=(shapes,))
        flat = torch.from_numpy(gradient(sum(torch.Size(shape).numel() for shape in shapes)))
        # One tensor of its own each: a view would be sent with all of its storage.
        self._grads = [view.clone() if len(shapes) > 1 else view for view in split(flat, shapes)]
        check_first_step(self._step()[0].reshape(-1), self._grads[0].reshape(-1))

    def steps(self, variant: str, count: int) -> list[float]:
        return timed(self._step, count)

    def close(self) -> None:
        self._grads = []
        rpc.rpc_sync(SERVER, make, args=(None,))

    def _step(self) -> list[torch.Tensor]:
        params: list[torch.Tensor] = rpc.rpc_sync(SERVER, step, args=(self._grads,))
        return params


def main() -> None:
    die_with_parent()  # the driver stops us and the server while others have their turn
    if len(sys.argv) > 1:
        print("joining", flush=True)
        join(SERVER, 1, int(sys.argv[1]))
        sys.stdin.read()
        os._exit(0)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with server_of("peer_rpc", str(port)) as (process, _):
        join("client", 0, port)
        run(Rpc(process.pid))
    os._exit(0)  # its threads wait for a server that has gone


if __name__ == "__main__":
    # What is called on the server is known there by the module's full name.
    from benchmarks.speed import peer_rpc

    peer_rpc.main()
