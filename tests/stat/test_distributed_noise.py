"""The noise in the opened sum of a whole run: (σ·sensitivity)²·|U|/h for every pattern of drop-outs.

All sites are empty, so that a sum is noise alone, drawn in shares at the sites, encrypted, added and opened.
Chi-square on the variance, two-sided; a correct program fails an assertion with probability below 1e-7. With D = 5000
one pattern shows a variance that is wrong by 13 %, all of them together one that is wrong by 3 %; the faults that the
negative controls put in are larger.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedveil.client import round as line
from fedveil.client.app import make_app as client_app
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab import virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy.dp.noise import discrete_gaussian
from fedveil.privacy.plan import Optimizer, make_plan
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app
from fedveil.server.rounds import Round

FALSE_ALARM = 1e-9
SITES, COLLUDERS, DROPOUTS = 6, 1, 2
HONEST = SITES - COLLUDERS - DROPOUTS
INPUTS, D = 2499, 5000
PATTERNS = [p for d in range(DROPOUTS + 1) for p in combinations(range(SITES), d)]


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Run one round for every pattern; the plan, and by pattern the opened sum in the gradient's unit."""

    def go(sum_: Any):
        plan = make_plan(
            sum=sum_, sites=SITES, records=600, epsilon=2.0, steps=len(PATTERNS), clip=0.7, colluders=COLLUDERS,
            dropouts=DROPOUTS, model=ModelSpec(name="logistic", inputs=INPUTS, classes=2),
            optimizer=Optimizer(learning_rate=1e-9), contract_hash="c" * 64,
        )  # fmt: skip
        assert plan.model.parameters == D
        sums, opened = {}, Round.opened

        def kept(self):
            packet, values = opened(self)
            assert values is not None
            sums[PATTERNS[self.number - 1]] = values * plan.grid
            return packet, values

        monkeypatch.setattr(Round, "opened", kept)
        world = virtual_sites.World.make(SITES)
        job = jobs.create(tmp_path / "run", plan, world.roster, world.server, documents={}, durable=False)
        none = np.zeros((0, INPUTS), np.float32), np.zeros(0, np.int64)
        virtual = virtual_sites.Kept(
            lambda i: virtual_sites.make_site(
                world.roster, i, world.keys[i], plan, *none, tmp_path, cap=99.0, engine="closed"
            )
        )

        def drop(site, message):
            m = message.metadata
            return m.message_type == "train.contribute" and world.sites.index(site) in PATTERNS[int(m.group_id) - 1]

        server, strategy = server_app(job)
        run_inprocess(server, client_app(virtual.resolve), world.sites, lambda _: {}, drop=drop)
        assert strategy.status == "COMPLETED"
        assert set(sums) == set(PATTERNS)
        return plan, sums

    return go


def p_values(plan, sums):
    """Two-sided p-values of the variance: of each pattern, and of all together; written out from the plan's formula."""
    sensitivity = plan.clip * (1 + 1e-6) + math.sqrt(D) * plan.grid
    statistics = []
    for pattern, values in sums.items():
        variance = (plan.noise_multiplier * sensitivity) ** 2 * (SITES - len(pattern)) / HONEST
        statistics.append(float((values**2).sum() / variance))
    each = [_two_sided(s, D) for s in statistics]
    return min(each), _two_sided(sum(statistics), D * len(statistics))


def _two_sided(statistic: float, freedom: int) -> float:
    return 2 * min(float(stats.chi2.cdf(statistic, freedom)), float(stats.chi2.sf(statistic, freedom)))


def correlation(sums) -> float:
    """The largest correlation between the noise of two rounds, in standard deviations of a chance one."""
    rows = np.stack([v / np.linalg.norm(v) for v in sums.values()])
    return float(np.abs(np.triu(rows @ rows.T, 1)).max()) * math.sqrt(D)


@pytest.mark.parametrize("sum_", ["keysum", "plain"])
def test_the_opened_noise_is_what_the_plan_charges_for(opened, sum_):
    plan, sums = opened(sum_)
    each, together = p_values(plan, sums)
    assert each > FALSE_ALARM
    assert together > FALSE_ALARM
    assert correlation(sums) < 8
    standardised = np.concatenate([v / v.std() for v in sums.values()])
    assert stats.kstest(standardised, "norm").pvalue > FALSE_ALARM


def weaker(std, size):
    return discrete_gaussian(0.9 * std, size)


def stronger(std, size):
    return discrete_gaussian(1.1 * std, size)


def for_all_who_could_answer(std, size):
    """A share of σ/sqrt(n): right if nobody ever dropped out or colluded."""
    return discrete_gaussian(std * math.sqrt(HONEST / SITES), size)


class OneShareMissing:
    """The first of the sites in every round forgets its noise."""

    def __init__(self) -> None:
        present = [[i for i in range(SITES) if i not in p] for p in PATTERNS]
        self._first = [i == members[0] for members in present for i in members]

    def __call__(self, std, size):
        draw = discrete_gaussian(std, size)
        return 0 * draw if self._first.pop(0) else draw


@pytest.mark.parametrize(
    "fault",
    [weaker, stronger, for_all_who_could_answer, OneShareMissing()],
    ids=["weaker", "stronger", "n for h", "one missing"],
)
def test_a_faulty_share_is_seen(opened, monkeypatch, fault):
    monkeypatch.setattr(line, "discrete_gaussian", fault() if isinstance(fault, type) else fault)
    each, together = p_values(*opened("plain"))
    assert each < FALSE_ALARM
    assert together < FALSE_ALARM


def test_noise_that_is_used_twice_is_seen(opened, monkeypatch):
    once = []

    def again(std, size):
        if not once:
            once.append(discrete_gaussian(std, size))
        return once[0].copy()

    monkeypatch.setattr(line, "discrete_gaussian", again)
    monkeypatch.setattr("fedveil.privacy.norm_cap.check", lambda *_: None)  # which stops the longest of these sums
    plan, sums = opened("plain")
    assert correlation(sums) > 8
    assert p_values(plan, sums)[1] < FALSE_ALARM  # all sites share it as well: the variance is |U| times too large
