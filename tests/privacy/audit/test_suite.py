"""The suite against another implementation: a mechanism written down in a few lines of NumPy, right and wrong."""

import math
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedveil.common.workload.model import ModelSpec
from fedveil.privacy.audit import consistency, noise_checks
from fedveil.privacy.audit.evidence import Charge, Release, Run
from fedveil.privacy.audit.slab import Slab, slab_plan
from fedveil.privacy.audit.suite import Effort, examine
from fedveil.privacy.dp.accounting import Filter, best_order, rdp
from fedveil.privacy.plan import Optimizer, make_plan

SLACK = 1e-6


def plan(**changes):
    given: dict[str, Any] = {
        "sites": 5, "records": 1000, "noise_multiplier": 1.5, "steps": 20, "clip": 0.5, "sample_rate": 0.25,
        "model": ModelSpec(name="logistic", inputs=8, classes=2), "optimizer": Optimizer(learning_rate=0.1),
        "contract_hash": "c" * 64, "sum": "plain",
    }  # fmt: skip
    return make_plan(**{**given, **changes})


@dataclass
class Written:
    """The mechanism after its definition, from a seed; the attributes are what may be wrong with it."""

    seed: int = 0
    clip: float = 1.0
    by_layer: bool = False
    rate: float = 0.0
    fixed_batches: bool = False
    spikes: bool = False
    divide_by_length: bool = False
    only_first_charged: bool = False
    uncharged_site: bool = False
    past_the_cap: int = 0
    noise_on_weights_only: bool = False
    same_seed: bool = False
    bound: float = 0.0
    first: float = 1.0
    from_block: int = 1 << 30
    added: int = 0
    cheap: float = 1.0
    seeds: int = 0
    in_order: bool = False

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)
        self.calls = 0

    def run(self, plan, parts, *, absent, cap=None):
        rng = np.random.default_rng(self.seed) if self.same_seed else self.rng
        order = best_order(cap or plan.filter_epsilon(), plan.delta)
        budget = Filter(cap or plan.filter_epsilon(), plan.delta, order)
        carried = min(plan.steps, budget.affords(plan.event) + self.past_the_cap)
        releases, present = [], []
        for r in range(carried):
            members = tuple(i for i in range(plan.sites) if i not in absent[r])
            present.append(members)
            shares = {i: self._site(rng, plan, *parts[i]) for i in members}
            values = np.sum(list(shares.values()), axis=0) + self.added * plan.grid
            length = sum(len(y) for _, y in parts)
            divisor = plan.sample_rate * max(length, 1) if self.divide_by_length else plan.divisor
            releases.append(Release(members, values, values / divisor, shares))
        charges = {}
        for i in range(plan.sites):
            steps = sum(i in m for m in present)
            counted = min(steps, 1) if self.only_first_charged else steps
            price = (plan.sample_rate * self.cheap, plan.noise_multiplier)
            charges[i] = Charge(counted, budget.epsilon_of(counted * rdp(plan.event, order)), (price,))
        if self.uncharged_site:
            del charges[0]
        status = "COMPLETED" if carried == plan.steps else "BUDGET_EXHAUSTED"
        return Run(tuple(releases), status, charges)

    def seats(self, records, rate, places):
        taken = np.flatnonzero(self.rng.random(records) < rate)
        out = np.full(places, -1)
        where = np.arange(len(taken)) if self.in_order else self.rng.permutation(places)[: len(taken)]
        out[where] = taken
        return out

    def _site(self, rng, plan, X, y):
        q = self.rate or plan.sample_rate
        taken = rng.random(len(X)) < q
        if self.fixed_batches:
            taken = rng.permutation(len(X)) < round(q * len(X))
        X = X[taken].astype(float)
        half = np.concatenate([-0.5 * X, 0.5 * X], 1), np.tile([-0.5, 0.5], (len(X), 1))
        if self.by_layer:
            total = np.concatenate([_clipped(p, plan.clip).sum(0) for p in half])
        else:
            total = _clipped(np.concatenate(half, 1), self.clip * plan.clip).sum(0)
        width = plan.clip * (1 + SLACK) + math.sqrt(total.size) * plan.grid
        noise = rng.standard_normal(total.size)
        if self.spikes:  # the right variance, another distribution
            noise = rng.choice([-3.0, 0.0, 3.0], total.size, p=[1 / 18, 8 / 9, 1 / 18])
        if self.seeds:
            noise = np.random.default_rng(int(rng.integers(self.seeds))).standard_normal(total.size)
        if self.noise_on_weights_only:
            noise[-2:] = 0
        if self.bound:
            noise = np.clip(noise, -self.bound, self.bound)
        noise[self.from_block :] = 0
        self.calls += 1
        if self.calls % plan.sites == 1:
            noise *= self.first
        return total + noise * plan.noise_multiplier * width / math.sqrt(plan.honest)


class Formula:
    """The clipped sums of a logistic model of two classes at zero, written down."""

    def workload(self, plan):
        return plan.model

    def records(self, plan, each):
        rng = np.random.default_rng(3)
        X = rng.uniform(-1, 1, (4, plan.model.inputs)).astype(np.float32)
        return [(X[np.arange(n) % 4], np.zeros(n, np.int64)) for n in each]

    def _rows(self, parts):
        rows = np.concatenate([X for X, _ in parts]).astype(float)
        return np.concatenate([-0.5 * rows, 0.5 * rows, np.tile([-0.5, 0.5], (len(rows), 1))], 1)

    def lengths(self, plan, parts):
        return np.linalg.norm(self._rows(parts), axis=1)

    def known(self, plan, parts):
        return _clipped(self._rows(parts), plan.clip).sum(0)


def examined(program, plan, effort):
    return examine(program, plan, effort, reference=Formula(), engine="none", precision="float64")


def _clipped(g, clip):
    return g * np.minimum(1, clip / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1e-300))


SMALL = Effort(rounds=12, inputs=256, wide=256, keys=40)


def test_the_definition_passes():
    for seed in range(10):
        found = examined(Written(seed), plan(), SMALL)
        assert found.failed == ()
        consistency.conformance(found, plan())


@pytest.mark.parametrize(
    "changes",
    [{"mode": "local", "sum": "none"}, {"sample_rate": 1.0}, {"sites": 400, "noise_multiplier": 0.7},
     {"clip": 40.0}, {"sample_rate": 0.01}, {"noise_multiplier": 60.0}],
)  # fmt: skip
def test_other_plans_pass(changes):
    found = examined(Written(1), plan(**changes), SMALL)
    assert found.failed == ()
    assert sorted(f.name for f in found.findings) == sorted(consistency.checks_of(plan(**changes), found.examined))
    consistency.conformance(found, plan(**changes))


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        ({"clip": 1.05}, "clip: norm of a record"),
        ({"clip": 0.9}, "clip: norm of a record"),
        ({"by_layer": True}, "clip: whole gradient"),
        ({"rate": 0.32}, "sampling: rate"),
        ({"fixed_batches": True}, "sampling: random batch size"),
        ({"spikes": True}, "noise: shape"),
        ({"same_seed": True, "seed": 5}, "noise: rounds independent"),
        ({"divide_by_length": True}, "neighbours: divisor"),
        ({"only_first_charged": True}, "ledger: composition"),
        ({"uncharged_site": True}, "ledger: composition"),
        ({"past_the_cap": 1}, "ledger: stops at the cap"),
        ({"noise_on_weights_only": True}, "noise: every coordinate"),
        ({"bound": 3.0}, "sites: largest value"),
        ({"first": 0.5}, "sites: noise"),
        ({"from_block": 300}, "noise: every block"),
        ({"from_block": 4}, "own path: noise"),
        ({"added": 1}, "sum: nothing added or lost"),
        ({"cheap": 0.8}, "ledger: price"),
        ({"seeds": 64}, "noise: key"),
        ({"in_order": True}, "places: at random"),
        ({"clip": 3.0}, "own path: clipped sum"),
    ],
)
def test_what_is_wrong_is_named(wrong, check):
    # a shape shows where few shares are added: the sum of many is normal whatever they are
    where = plan(mode="local", sum="none", sites=2) if "spikes" in wrong else plan()
    effort = Effort(rounds=12, inputs=2048, wide=256, keys=40) if "spikes" in wrong else SMALL
    found = examined(Written(**wrong), where, effort)
    assert check in found.failed
    consistency.conformance(found, where)  # what a wrong program shows is evidence in the same form


def test_p_values_are_valid():
    """Over many honest examinations no check has small p-values more often than it may."""
    seen: dict[str, list[float]] = {}
    for seed in range(30):
        for f in examined(Written(100 + seed), plan(), Effort(rounds=6, inputs=64, wide=64, keys=40)).findings:
            seen.setdefault(f.name, []).append(f.p_value)
    for name, values in seen.items():
        few = sum(p <= 0.1 for p in values)
        assert stats.binomtest(few, len(values), 0.1, alternative="greater").pvalue > 1e-8, name


def test_the_slab_is_what_it_says():
    """Known sums against a record-by-record computation, whatever the clip."""
    for clip in (0.1, 3.0):
        counts = np.array([[2, 1], [0, 3]])
        slab = Slab(counts, 16, clip)
        rows = np.concatenate([X for X, _ in slab.parts()]).astype(float)
        whole = np.concatenate([-0.5 * rows, 0.5 * rows, np.tile([-0.5, 0.5], (len(rows), 1))], 1)
        assert np.linalg.norm(whole, axis=1).min() > 100 * clip
        np.testing.assert_allclose(slab.known(counts), _clipped(whole, clip).sum(0), atol=1e-9)
        release = Release((0, 1), slab.known(counts), np.zeros(34))
        np.testing.assert_allclose(slab.scores(release), counts, atol=1e-9)


def test_the_largest_value_has_its_exact_law():
    """The p-value is uniform over draws of the largest of n normal values, and both ends are found."""
    rng = np.random.default_rng(5)
    tops = np.abs(rng.standard_normal((4000, 500))).max(1)
    p = [noise_checks.extreme(float(t), 500) for t in tops]
    assert stats.kstest(p, "uniform").pvalue > 1e-6
    assert noise_checks.extreme(3.0, 100_000) < 1e-30
    assert noise_checks.extreme(9.0, 100_000) < 1e-12
    assert noise_checks.extreme(0.0, 100_000) == 0
    found = noise_checks.largest(4.4, 100_000, 1e-5, "x")
    assert found.passed
    bound = float(found.detects.split()[3])
    assert not noise_checks.largest(bound - 0.01, 100_000, 1e-5, "x").passed
    assert noise_checks.largest(bound + 0.01, 100_000, 1e-5, "x").passed


def test_who_shows_no_shares_has_shown_nothing():
    class Silent(Written):
        def run(self, plan, parts, *, absent, cap=None):
            run = super().run(plan, parts, absent=absent, cap=cap)
            return Run(tuple(Release(r.members, r.values, r.applied) for r in run.releases), run.status, run.charges)

    failed = examined(Silent(), plan(), SMALL).failed
    assert set(failed) == {"sites: noise", "sites: largest value", "sum: nothing added or lost", "noise: key"}


def test_the_slabs_plan_keeps_the_mechanism():
    p = plan()
    inner = slab_plan(p, inputs=64, steps=7, sample_rate=0.5, records=90)
    for name in (
        "mode",
        "sum",
        "reveal_to",
        "committee",
        "sites",
        "colluders",
        "dropouts",
        "clip",
        "noise_multiplier",
        "delta",
        "honest",
    ):
        assert getattr(inner, name) == getattr(p, name)
    quiet = slab_plan(p, inputs=64, steps=7, sample_rate=0.5, records=90, quiet=True)
    assert quiet.noise_multiplier == 0.25


def test_an_auditor_needs_neither_torch_nor_flower():
    code = (
        "import sys, fedveil.privacy.audit.suite, fedveil.privacy.audit.attach, fedveil.deploy.cli.audit;"
        "print([m for m in ('torch', 'flwr', 'tenseal', 'opacus', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
