"""Power loss at any moment, with the least that a disk may keep; and the proof that it would show."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tests.power_loss import Found, Machine, Play, Violation, Wreck, check, wrecks
from tests.record import Figure

CALLS = 40


def campaign(seed: int, budget: int) -> int:
    """Check at least ``budget`` states of histories from ``seed``; return how many."""
    rng = random.Random(seed)
    checked = 0
    while checked < budget:
        with Machine(Wreck(None, {})) as machine:
            born = len(machine.log.operations)
            play = Play(machine, rng)
            play.run(CALLS)
            machine.store.close()
            for place, wreck in wrecks(play, rng, samples=1, first=born):
                checked += reopen(play, place, wreck, rng, depth=2)
    return checked


def reopen(play: Play, place: int, wreck: Wreck, rng: random.Random, depth: int) -> int:
    """Check one state; of some, go on from there and cut the power again, also while it opens."""
    checked = 1
    with Machine(wreck) as machine:
        found = Found(machine)
        check(play, place, found)
        if depth == 0 or rng.random() > 0.05:
            return checked
        later = Play(machine, rng, found)
        later.run(5)
        machine.store.close()
        again = list(wrecks(later, rng, samples=1))
        for place, wreck in rng.sample(again, min(len(again), 5)):
            checked += reopen(later, place, wreck, rng, depth - 1)
    return checked


def test_x():
    import time
    t=time.time()
    n=campaign(1, 200)
    print(n, time.time()-t)
