"""Memory of large answers: used again when nobody can see it, and never before."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from optserve_client import wire
from optserve_client._memory import LEAST_BYTES, Memory

SIZE = 3 * LEAST_BYTES
#: What a program may keep of a result: anything through which the memory is seen.
KEPT: dict[str, Callable[[Any], Any]] = {
    "the array": lambda array: array,
    "a slice": lambda array: array[5:9],
    "a reshaped slice of a slice": lambda array: array.reshape(-1, 4)[1:][:2, 1:3],
    "a view of another dtype": lambda array: array.view(np.uint8)[16:32],
    "a memoryview": lambda array: memoryview(array)[5:9],
    "bytes of a view": lambda array: wire.as_bytes(array)[16:32],
    "a tensor": lambda array: torch.from_numpy(array)[5:9],
    "a view of a tensor": lambda array: torch.from_numpy(array).view(-1, 4)[1].detach(),
    "what the array came from": lambda array: array.base,
    "the view that was lent": lambda array: owner(array),
    "a slice of the view that was lent": lambda array: owner(array)[16:32],
    "the block itself": lambda array: owner(array).base,
}


def owner(array: Any) -> Any:
    while not isinstance(array, memoryview):
        array = array.base
    return array.obj


def result(memory: Memory, value: float, size: int = SIZE) -> Any:
    """Return what a body of ``size`` bytes becomes: a view of a view of the memory."""
    body = memory.take(size)
    array: Any = wire.from_bytes("F32", [(size - 16) // 4], body.cast("B")[16:])
    array[:] = value
    return array


def spare(memory: Memory) -> list[Any]:
    return list(memory._spare)


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT.keys())
def test_what_somebody_keeps_is_never_overwritten(keep: Callable[[Any], Any]) -> None:
    memory = Memory()
    kept = keep(result(memory, 1.0))
    before = bytes(np.asarray(kept))
    for value in (2.0, 3.0):
        result(memory, value)
        assert bytes(np.asarray(kept)) == before
    del kept
    assert len(spare(memory)) == 1


def test_memory_is_used_again_as_soon_as_the_last_view_of_it_goes() -> None:
    memory = Memory()
    first = result(memory, 1.0)
    part = first[3:]
    del first
    assert spare(memory) == []
    del part
    (block,) = spare(memory)
    again = result(memory, 2.0, SIZE - 1000)
    assert np.shares_memory(again, block)
    assert spare(memory) == []


def test_in_a_loop_two_blocks_take_turns() -> None:
    memory = Memory()
    seen: list[int] = []
    params = result(memory, 0.0)
    for value in range(1, 7):
        params = result(memory, value)
        seen.append(params.ctypes.data)
        assert len(spare(memory)) == 1
    assert len(set(seen)) == 2


def test_at_most_one_block_waits() -> None:
    memory = Memory()
    results = [result(memory, value) for value in range(5)]
    assert [float(array[0]) for array in results] == [0, 1, 2, 3, 4]
    results.clear()
    assert len(spare(memory)) == 1


@pytest.mark.parametrize("size", [SIZE * 3, SIZE // 3])
def test_a_block_of_another_size_makes_room_for_one_that_fits(size: int) -> None:
    memory = Memory()
    result(memory, 1.0)
    result(memory, 1.0, size)
    (block,) = spare(memory)
    assert size <= block.nbytes < size + 2**17


def test_small_bodies_do_not_take_part() -> None:
    memory = Memory()
    result(memory, 1.0, LEAST_BYTES - 4)
    assert (spare(memory), memory._lent) == ([], {})


def test_close_keeps_nothing_and_takes_nothing_away() -> None:
    memory = Memory()
    kept, dropped = result(memory, 1.0), result(memory, 2.0)
    del dropped
    memory.close()
    assert (spare(memory), memory._lent) == ([], {})
    late = result(memory, 3.0)
    assert (float(kept[0]), float(late[0])) == (1.0, 3.0)
    del kept, late
    assert spare(memory) == []


def test_results_outlive_the_memory_that_they_came_from() -> None:
    memory = Memory()
    kept = result(memory, 1.0)
    del memory
    gc.collect()
    assert (kept == 1.0).all()


def test_a_cycle_that_the_collector_finds_gives_its_memory_back() -> None:
    memory = Memory()
    cycle: list[Any] = [result(memory, 1.0)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert len(spare(memory)) == 1


def test_threads_never_share_memory() -> None:
    memory, wrong = Memory(), []

    def work(number: int) -> None:
        mine = result(memory, number)
        for turn in range(150):
            other = result(memory, number + turn)
            if not ((mine == mine[0]).all() and (other == number + turn).all()):
                wrong.append(number)
            mine = other

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(spare(memory)) == 1
