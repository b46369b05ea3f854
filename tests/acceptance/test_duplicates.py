"""A network that drops, delays, cuts and duplicates: each step is applied exactly once."""

from __future__ import annotations

import httpx
import pytest

from optserve_client import Client
from tests.proxy import FAULTS, Proxy
from tests.record import Figure
from tests.serving import ServerProcess
from tests.specs import SPECS
from tests.training import Trainer, share, stories

CLIENTS = 8


@pytest.mark.timeout(3600)
def test_each_step_is_applied_exactly_once_through_a_bad_network(
    long_form: bool, figure: Figure
) -> None:
    steps = 20_000 if long_form else 2_000
    specs = [spec for spec in SPECS if spec.name != "large"]
    with ServerProcess("--threads", "1") as server, Client(server.url) as client:
        url = httpx.URL(server.url)
        assert url.port is not None
        with Proxy((url.host, url.port), seed=20) as proxy:
            trainers = [
                Trainer(
                    Client(proxy.url, timeout=2.0),
                    {spec.name: spec for spec in specs[i::CLIENTS]},
                    100 + i,
                    limit=steps * 5 // 4 // CLIENTS,  # so many changes of all kinds
                )
                for i in range(CLIENTS)
            ]
            share(trainers[:2])
            for trainer in trainers:
                trainer.start()
            for trainer in trainers:
                trainer.finish(3000)
            proxy.settle()
        found = stories(trainers, client)
        for name, story in found.items():
            session = client.session(name)
            status = session.status()
            assert (status["version"], status["updates"]) == (story.version, story.updates)
            story.head.exports.append(bytes(session.export_state()))
        assert {row["id"] for row in client.list(limit=1000).sessions} == set(found)
    assert all(story.tree.check() > 0 for story in found.values())
    assert set(proxy.faults) == set(FAULTS)
    assert set(proxy.replayed) <= {200, 201, 404, 409}, proxy.replayed
    applied = sum(story.tree.steps for story in found.values())
    assert applied >= steps
    repeated = sum(one.duplicates for trainer in trainers for one in trainer.owned)
    assert repeated > 0
    figure("bad network: steps, each applied exactly once", applied, "steps")
    figure("bad network: steps that were answered as duplicates", repeated, "steps")
    faults = sum(proxy.faults.values())
    figure("bad network: requests that met a fault", faults, f"of {proxy.requests:,}")
