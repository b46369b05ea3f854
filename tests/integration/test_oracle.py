"""The oracle would see a step that is lost, applied twice, or applied out of turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from optserve.sessions.registry import Registry
from tests import local, oracle
from tests.oracle import Story, Tree
from tests.specs import SPECS, Spec

STEPPED = [spec for spec in SPECS if spec.body["optimizer"]["name"] != "LBFGS"]
SEEDS = (1, 2, 3, 4, 5, 6)


@pytest.fixture
def made() -> Iterator[Registry]:
    with local.registry() as registry:
        yield registry


def story_of(made: Registry, spec: Spec, told: Sequence[int]) -> Story:
    """Step a session with SEEDS, and tell a story of other steps."""
    params = oracle.tensors(0, spec.shapes, spec.dtype)
    session = local.create(made, dict(spec.body), params)
    for seed in SEEDS:
        local.step(session, oracle.tensors(seed, spec.shapes, spec.dtype), loss=float(seed))
    story = Story(Tree(spec.body, params, session.status().result(60)["impl"]))
    for seed in told:
        story.note(oracle.Step(seed, float(seed)))
    # Counters alone would give it away.
    story.head.version, story.head.updates = session.version, session.row.updates
    story.head.exports.append(local.exported(session))
    return story


@pytest.mark.parametrize("spec", STEPPED, ids=lambda spec: spec.name)
def test_the_truth_is_bit_equal(made: Registry, spec: Spec) -> None:
    assert story_of(made, spec, SEEDS).tree.check() == 1


@pytest.mark.parametrize("told", [SEEDS[:-1], (*SEEDS, 6), (4, 2, 3, 1, 5, 6)], ids=str)
@pytest.mark.parametrize("spec", STEPPED, ids=lambda spec: spec.name)
def test_anything_else_is_not(made: Registry, spec: Spec, told: Sequence[int]) -> None:
    story = story_of(made, spec, told)
    with pytest.raises(AssertionError):
        story.tree.check()
