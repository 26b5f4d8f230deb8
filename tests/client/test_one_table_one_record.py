"""One session speaks of one table; and one record changes a sum by its own share, whatever it holds."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedveil.client import round as line
from fedveil.client.statistics import statistics_sum
from fedveil.common.errors import ProtocolError
from fedveil.common.wire import Packet
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import EVALUATED, MetricSpec, StatsSpec
from fedveil.common.workload.torch.networks import build, flatten


def evidence(table: str) -> dict[str, Any]:
    return {"v": 1, "commitments": {"source": table * 64, "released": table * 64}}


@pytest.fixture(params=["keysum", "plain"])
def restarted(world, request):
    """A consortium whose first site contributed, was killed, and was started again with another table."""
    w = world(sum=request.param)
    for site in w.sites:
        site.evidence = evidence("1")
    w.begin()
    line.contribute(w.sites[0], w.request(1))
    site = w.reopen(0)
    site.evidence = evidence("2")
    return w, site


def test_another_table_is_refused_however_often_it_is_tried(restarted):
    w, site = restarted
    for _ in range(3):
        with pytest.raises(ProtocolError, match="not the one it joined with"):
            line.contribute(site, w.request(2))
    with pytest.raises(ProtocolError, match="not the one it joined with"):
        line.join(site, w.proposal())
    with pytest.raises(ProtocolError, match="not the one it joined with"):
        line.contribute(site, w.request(2))
    assert w.spends() == [1]


def test_the_same_table_goes_on(restarted):
    w, site = restarted
    site.evidence = evidence("1")
    line.contribute(site, w.request(2))
    assert w.spends() == [1, 2]


NETWORKS = [
    ModelSpec(name="transformer", inputs=4, classes=2, hidden=(2, 8, 2, 1)),
    ModelSpec(name="lstm", inputs=4, classes=2, hidden=(2, 4, 4)),
    ModelSpec(name="logistic", inputs=4, classes=2),
]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, 3e38, np.nan, np.inf])
def test_one_more_record_changes_the_statistics_by_its_own_share(network, value):
    rng = np.random.default_rng(0)
    weights = flatten(build(network)).astype("<f4").tobytes()
    metric = MetricSpec(network=network, model_hash=hashlib.sha256(weights).hexdigest(), confusion=True)
    spec = StatsSpec(inputs=4, classes=2, metric=metric)
    plan: Any = SimpleNamespace(clip=spec.norm_bound, places=lambda capacity: capacity, rows_per_person=1)
    request = Packet({"kind": "contribute"}, {EVALUATED: weights})
    X, y = rng.integers(0, 2, (30, 4)).astype(np.float32), rng.integers(0, 2, 30)
    more = np.vstack([X, [[0, 1, value, 0]]]).astype(np.float32)
    before = statistics_sum(plan, spec, request, X, y, 40)
    after = statistics_sum(plan, spec, request, more, np.append(y, 0), 40)
    assert before[0] == pytest.approx(30, rel=1e-12)  # the margin of a clip that cuts nothing
    assert np.linalg.norm(after - before) <= plan.clip * (1 + 1e-9)
