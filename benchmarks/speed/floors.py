"""The floors: what the same step costs over plain sockets, and without any.

``bare``: gradients up, fused Adam, parameters down. ``safe``: the same with XXH3-128 over the
gradients as they arrive and their 2-norm. ``local``: the fused step alone, in that server.
``link``: gradients up, parameters down, no step. Arguments: host, port and process of a server that
runs already; without them one is started here.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
from collections.abc import Sequence
from functools import partial

import numpy as np

from benchmarks.speed.shapes import Shapes
from benchmarks.speed.worker import Worker, check_first_step, gradient, run, server_of, timed

HEAD = struct.Struct("<QQ")
#: As the server's.
READ_BYTES, WRITE_BYTES = 2**18, 2**20
ASKED = {"bare": 1, "safe": 2, "link": 5}
_OPEN, _LOCAL, _CLOSE = 0, 3, 4


class Floors(Worker):
    def __init__(self, host: str, port: int, pid: int) -> None:
        self._pid = pid
        self._server = socket.create_connection((host, port), timeout=120)
        self._server.settimeout(None)  # a limit costs a poll for each write and read
        self._server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._grads = self._params = np.empty(0, np.float32)

    def server_pids(self) -> list[int]:
        return [self._pid]

    def open(self, shapes: Shapes, variants: Sequence[str]) -> None:
        body = json.dumps(shapes).encode()
        self._ask(_OPEN, body)
        self._grads = gradient(sum(int(np.prod(shape)) for shape in shapes))
        self._params = np.zeros_like(self._grads)
        self._room = self._params.data.cast("B")
        self._body = self._grads.data.cast("B")
        self._step(ASKED["bare"])
        check_first_step(self._params, self._grads)

    def steps(self, variant: str, count: int) -> list[float]:
        if variant == "local":
            return [struct.unpack("<d", self._ask(_LOCAL))[0] for _ in range(count)]
        return timed(partial(self._step, ASKED[variant]), count)

    def close(self) -> None:
        self._ask(_CLOSE)
        self._body = self._room = memoryview(b"")
        self._grads = self._params = np.empty(0, np.float32)

    def _step(self, asked: int) -> None:
        server, body, room = self._server, self._body, self._room
        head = HEAD.pack(asked, len(body))
        if len(body) < 2**16:
            server.sendall(head + body)
        else:
            server.sendall(head)
            for at in range(0, len(body), WRITE_BYTES):
                server.sendall(body[at : at + WRITE_BYTES])
        at = 0
        while at < len(room):
            got = server.recv_into(room[at : at + READ_BYTES])
            if not got:
                raise EOFError
            at += got

    def _ask(self, asked: int, body: bytes = b"") -> bytes:
        self._server.sendall(HEAD.pack(asked, len(body)) + body)
        return self._server.recv(8, socket.MSG_WAITALL)


def main() -> None:
    if len(sys.argv) > 1:
        host, port, pid = sys.argv[1:]
        run(Floors(host, int(port), int(pid)))
        return
    with server_of("floor_server") as (process, line):
        run(Floors("127.0.0.1", int(line), process.pid))


if __name__ == "__main__":
    main()
