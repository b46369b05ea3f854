"""What rounds leave behind: snapshots in time, replies that are shared, no waits on the loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from optserve.sessions.registry import Registry
from optserve.store.opening import open_store
from optserve_client.errors import RoundFailed
from tests import rounds
from tests.local import arrays, create
from tests.rounds import Clock, ended, push, sync

SHAPES = {"w": (300, 300)}


def test_rounds_that_fail_again_and_again_do_not_fill_the_disk(tmp_path: Path) -> None:
    clock = Clock()
    store = open_store(url=None, data_dir=tmp_path, files=None)
    registry = Registry(store, threads=torch.get_num_threads(), alarms=clock)
    session = create(registry, sync(3, deadline_s=10), arrays(0, SHAPES))
    most = 0
    for seq in range(1, 61):
        replies = [push(session, w, seq, 0, arrays(seq, SHAPES)) for w in "ab"]
        clock.advance(10, session)
        for reply in replies:
            with pytest.raises(RoundFailed):
                ended(reply)
        files = sum(
            f.stat().st_size for f in tmp_path.rglob("*") if f.is_file() and "payload" in str(f)
        )
        most = max(most, files)
    registry.close()
    gradient = 4 * 300 * 300
    assert most < 45 * gradient, most / gradient


@pytest.mark.parametrize("form", [{"return": "delta"}, {"return_dtype": "bfloat16"}])
def test_what_several_want_alike_is_made_once(form: dict[str, str]) -> None:
    shapes = {"w": (1024, 1024)}
    with rounds.registry() as (registry, _):
        session = create(registry, sync(4), arrays(0, shapes))
        replies = [push(session, w, 1, 0, arrays(1, shapes), **form) for w in "abcd"]
        found = [ended(reply).params for reply in replies]
    assert len({id(params.loan) for params in found if params is not None}) == 1
