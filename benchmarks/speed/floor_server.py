"""The server of the floors: plain sockets, preallocated buffers, torch's fused Adam.

A request is 16 bytes, what is asked for and how many bytes follow, and those bytes.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
import time

import torch
import xxhash

from benchmarks.speed.shapes import Shapes
from benchmarks.speed.worker import LR, split

HEAD = struct.Struct("<QQ")
#: What is asked for.
OPEN, BARE, SAFE, LOCAL, CLOSE, LINK = range(6)
#: Most that one read brings, and that one write takes: of all that were tried, the fastest.
READ_BYTES = 2**18
WRITE_BYTES = 2**20


class State:
    """Parameters, gradients and Adam over them, each in one buffer."""

    def __init__(self, shapes: Shapes) -> None:
        numel = sum(torch.Size(shape).numel() for shape in shapes)
        self.params, self.grads = torch.zeros(numel), torch.zeros(numel)
        self.sent = self.params.numpy().data.cast("B")
        self.room = self.grads.numpy().data.cast("B")
        leaves = [torch.nn.Parameter(view) for view in split(self.params, shapes)]
        for leaf, grad in zip(leaves, split(self.grads, shapes), strict=True):
            leaf.grad = grad
        self._grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        self._adam = torch.optim.Adam(leaves, lr=LR, fused=True)

    def step(self) -> None:
        self._adam.step()

    def norm(self) -> float:
        return float(torch.nn.utils.get_total_norm(self._grads))


def receive(peer: socket.socket, room: memoryview) -> None:
    at = 0
    while at < len(room):
        got = peer.recv_into(room[at : at + READ_BYTES])
        if not got:
            raise EOFError
        at += got


def send(peer: socket.socket, body: memoryview) -> None:
    for at in range(0, len(body), WRITE_BYTES):
        peer.sendall(body[at : at + WRITE_BYTES])


def receive_hashed(peer: socket.socket, room: memoryview) -> bytes:
    at, digest = 0, xxhash.xxh3_128()
    while at < len(room):
        got = peer.recv_into(room[at : at + READ_BYTES])
        if not got:
            raise EOFError
        digest.update(room[at : at + got])
        at += got
    return digest.digest()


def answer(peer: socket.socket, state: State | None) -> State | None:
    """Serve one request; return the state from then on."""
    head = bytearray(HEAD.size)
    receive(peer, memoryview(head))
    asked, nbytes = HEAD.unpack(head)
    if asked == OPEN:
        body = bytearray(nbytes)
        receive(peer, memoryview(body))
        state = State(json.loads(body))
        peer.sendall(bytes(8))
        return state
    if asked == CLOSE:
        peer.sendall(bytes(8))
        return None
    assert state is not None
    if asked == LOCAL:
        began = time.perf_counter()
        state.step()
        peer.sendall(struct.pack("<d", time.perf_counter() - began))
        return state
    if asked == SAFE:
        receive_hashed(peer, state.room)
        norm = state.norm()
        if norm != norm:
            raise ValueError("the gradients are not numbers")
    else:
        receive(peer, state.room)
    if asked != LINK:
        state.step()
    send(peer, state.sent)
    return state


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    host = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1"
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], fused=True)  # loads what it needs
    with socket.create_server((host, 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        peer, _ = listening.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        state: State | None = None
        while True:
            try:
                state = answer(peer, state)
            except EOFError:
                return


if __name__ == "__main__":
    main()
