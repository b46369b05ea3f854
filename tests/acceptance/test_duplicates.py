"""A network that drops, delays, cuts and duplicates: each step is applied exactly once."""

from __future__ import annotations

import httpx
import pytest

from optserve_client import Client
from tests.conftest import Figure
from tests.proxy import FAULTS, Proxy
from tests.serving import ServerProcess
from tests.training import SPECS, Trainer

CLIENTS = 8


@pytest.mark.timeout(1800)
def test_each_step_is_applied_exactly_once_through_a_bad_network(
    long_form: bool, figure: Figure
) -> None:
    steps = 20_000 if long_form else 2_000
    specs = [spec for spec in SPECS if spec.name != "large"]
    with ServerProcess("--threads", "1") as server:
        url = httpx.URL(server.url)
        assert url.port is not None
        with Proxy((url.host, url.port), seed=20) as proxy:
            trainers = [
                Trainer(
                    Client(proxy.url, timeout=2.0),
                    {spec.name: spec for spec in specs[i::CLIENTS]},
                    100 + i,
                    limit=steps // CLIENTS,
                )
                for i in range(CLIENTS)
            ]
            for trainer in trainers:
                trainer.start()
            for trainer in trainers:
                trainer.finish(1500)
            proxy.settle()
        with Client(server.url) as client:
            for trainer in trainers:
                for one in trainer.owned:
                    status = client.session(one.session.id).status()
                    assert (status["version"], status["updates"]) == (
                        one.story.version,
                        one.story.updates,
                    )
                    one.story.head.exports.append(
                        bytes(client.session(one.session.id).export_state())
                    )
            names = {row["id"] for row in client.list(limit=1000).sessions}
            assert names == {one.session.id for trainer in trainers for one in trainer.owned}
    assert sum(one.story.tree.check() for trainer in trainers for one in trainer.owned) > 0
    assert set(proxy.faults) == set(FAULTS)
    assert set(proxy.replayed) <= {200, 201, 404, 409}, proxy.replayed
    assert sum(one.duplicates for trainer in trainers for one in trainer.owned) > 0
    figure("bad network: changes, each applied once", sum(t.changes for t in trainers), "changes")
    figure(
        "bad network: requests dropped, cut, delayed or duplicated",
        sum(proxy.faults.values()),
        f"of {proxy.requests:,}",
    )
