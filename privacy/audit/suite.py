"""The conformance suite: runs an implementation on the audit slab and compares what comes out with the plan.

It sees what a recipient of the sums sees, what every site handed to the sum, and the ledgers. Noise is measured at the
plan's noise multiplier, over empty sites; records are looked at under a noise multiplier of at most 0.25, which hides
less of them. The plan's own workload is looked at as well (:mod:`~fedveil.privacy.audit.own_path`). The suite tests
honest code: a site that draws its noise in examinations and nowhere else would pass. Each finding states the smallest
fault that its check finds: a smaller one may stay unseen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from math import ceil, sqrt

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import BudgetExhausted, RunAborted, UsageError
from fedveil.common.workload.model import ModelSpec
from fedveil.privacy.audit import noise_checks as noise
from fedveil.privacy.audit import own_path
from fedveil.privacy.audit import record_checks as records
from fedveil.privacy.audit import share_checks as sites
from fedveil.privacy.audit.evidence import ALPHA, Conformance, Examined, Finding, Implementation, Reference, Run
from fedveil.privacy.audit.runs import Runs, carry_out
from fedveil.privacy.audit.slab import (
    MOST_BINS,
    Slab,
    kind_of,
    noise_std,
    residuals,
    sampled,
    shares,
    slab_plan,
    steps_of,
)
from fedveil.privacy.dp.accounting import Filter, best_order
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan

EXHAUSTED = "BUDGET_EXHAUSTED"
_WIDE_NUMBERS = 1 << 21  # that all sites hand in in the two wide sums, about
_MOST_GROUPS = 2048  # in all: every record has a feature for each
_SEATED, _DRAWN = (6, 0.75, 16), 4000  # records, sample rate, places; steps


@dataclass(frozen=True)
class Effort:
    """How much is run.

    Attributes:
        rounds: sums over empty sites, through all patterns of drop-outs, and over the slab's records.
        inputs: features of the slab; a sum has ``2 * (inputs + 1)`` coordinates.
        wide: features in two sums over empty sites, for whatever shows far along a model or rarely; fewer where there
            are many sites.
        keys: releases whose noise is compared, to find a short key.
        groups: directions of each site; fewer where there are many sites.
        group: records on a direction at most; the grid's clamp may allow fewer.
        alpha: each check fails a correct program with at most this probability.
        confidence: of the intervals.
    """

    rounds: int = 12
    inputs: int = 2048
    wide: int = 1 << 15
    keys: int = 1024
    groups: int = 8
    group: int = 16
    alpha: float = ALPHA
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if min(self.rounds - 1, self.inputs - 15, self.wide - 15, self.keys - 1, self.groups, self.group - 1) < 1:
            raise UsageError("an examination needs at least two rounds, 16 features, and a group of two records")
        if not (0 < self.alpha < 0.1 and 0 < self.confidence < 1):
            raise UsageError("alpha is outside (0, 0.1), or the confidence outside (0, 1)")


def examine(
    implementation: Implementation,
    plan: PrivacyPlan,
    effort: Effort | None = None,
    *,
    reference: Reference,
    engine: str = "",
    precision: str = "",
) -> Conformance:
    """Run every probe and make every check.

    Args:
        plan: whose mechanism is examined: task, mode, sum, readers, committee, sites, tolerances, clip, noise
            multiplier, sample rate; on the slab and on its own workload.
        reference: computes the clipped sums of the plan's own workload apart.
        engine, precision: of the sites' clipping, as the result names them.

    Returns:
        The findings; ``passed`` if none speaks against the plan. With the default alpha a correct program is
        flagged with a probability below 3e-4.

    Raises:
        PlanError: the slab's plan cannot hold.
        RunAborted: the implementation released fewer sums than it was asked for.
    """
    e = effort or Effort()
    empty, alone = _noise_alone(implementation, plan, e)
    z_alone = residuals(alone.plan, alone.releases, empty.known(empty.units))
    wide = _wide(implementation, plan, e)
    findings = [
        *_noise_findings(alone.plan, z_alone, e),
        *_wide_findings(wide, e),
        *_share_findings(alone, wide, e),
        sites.fresh_keys(_many_releases(implementation, plan, e), e.alpha),
        records.charges(alone.plan, alone.runs, e.alpha),
        records.prices(plan, alone.plan, alone.runs, e.alpha),
        records.places(_seats(implementation), _SEATED[1], e.alpha),
    ]
    slab, whole = _whole(implementation, plan, e)
    z_records = residuals(whole.plan, whole.releases, slab.known(slab.units))
    quiet = whole.plan.noise_multiplier
    findings += [
        noise.variance(z_records, quiet, e.alpha, e.confidence, plan.sites, "noise: beside records"),
        records.clipping(whole.plan, slab, whole.releases, e.alpha, e.confidence),
        records.clipped_sum(whole.plan, slab, whole.releases, e.alpha),
    ]
    if sampled(plan):
        findings += _sampling(implementation, plan, e)
    pair, z_pair = _pair(implementation, plan, e)
    findings += pair
    findings.append(noise.rounds_apart([z_alone, z_records, *z_pair], e.alpha))
    findings.append(_stopping(implementation, plan, e))
    findings += _own(implementation, reference, plan, e)
    measured = noise.multiplier(z_alone, plan.noise_multiplier, e.confidence)
    return Conformance(
        plan.hash, plan.sum, plan.noise_multiplier, *measured, e.confidence, z_alone.size, tuple(findings),
        Examined.of(plan, engine, precision),
    )  # fmt: skip


def _seats(implementation: Implementation) -> NDArray[np.int64]:
    """Which record sits where, in many steps of a small table."""
    return np.stack([implementation.seats(*_SEATED) for _ in range(_DRAWN)])


def _noise_findings(plan: PrivacyPlan, z: noise.Residuals, e: Effort) -> list[Finding]:
    cell = plan.grid / noise_std(plan, plan.sites - plan.dropouts)
    return [
        noise.variance(z, plan.noise_multiplier, e.alpha, e.confidence, plan.sites, "noise: variance"),
        noise.every_round(z, e.alpha),
        noise.every_coordinate(z, e.alpha),
        noise.mean(z, e.alpha),
        noise.shape(z, cell, e.alpha),
        noise.coordinates_apart(z, e.alpha),
    ]


def _wide_findings(wide: Runs, e: Effort) -> list[Finding]:
    z = residuals(wide.plan, wide.releases, np.zeros(wide.plan.model.parameters))
    return [
        noise.every_block(z, e.alpha),
        noise.largest(float(np.abs(z).max()), z.size, e.alpha, "noise: largest value"),
    ]


def _share_findings(alone: Runs, wide: Runs, e: Effort) -> list[Finding]:
    each = shares(alone.plan, alone.releases)
    return [
        sites.every_site(each, e.alpha),
        sites.largest_share([each, shares(wide.plan, wide.releases)], e.alpha),
        sites.nothing_lost(alone.runs, alone.plan.grid, e.alpha),
    ]


def _own(implementation: Implementation, reference: Reference, plan: PrivacyPlan, e: Effort) -> list[Finding]:
    runs = own_path.noise_alone(implementation, reference, plan, 2 * (e.inputs + 1) * e.rounds, e.rounds)
    return [
        *own_path.noise_findings(runs, e.alpha, e.confidence),
        *own_path.with_records(implementation, reference, plan, max(2, e.rounds // 4), e.alpha, e.confidence),
    ]


def _steps(plan: PrivacyPlan, rounds: int) -> int:
    return 1 if plan.task == "stats" else rounds  # every sum of statistics needs a run of its own


def _noise_alone(implementation: Implementation, plan: PrivacyPlan, e: Effort) -> tuple[Slab, Runs]:
    """All sites empty; rounds go through every number of drop-outs."""
    inputs = min(MOST_BINS, 2 * e.inputs) if plan.task == "stats" else max(e.inputs, plan.sites)
    steps = _steps(plan, e.rounds)
    inner = slab_plan(plan, inputs=inputs, steps=steps, sample_rate=plan.sample_rate, records=plan.sites)
    empty = Slab(np.zeros((plan.sites, 1), np.int64), inputs, inner.clip * steps_of(inner), kind_of(plan))
    return empty, carry_out(implementation, inner, empty.parts(), list(_absences(plan, e.rounds)))


def _wide(implementation: Implementation, plan: PrivacyPlan, e: Effort) -> Runs:
    """Two sums of many coordinates, all sites empty."""
    inputs = max(16, plan.sites, min(e.wide, max(1 << 13, _WIDE_NUMBERS // (4 * plan.sites))))
    if plan.task == "stats":
        inputs = min(MOST_BINS, 2 * inputs)
    steps = _steps(plan, 2)
    inner = slab_plan(plan, inputs=inputs, steps=steps, sample_rate=plan.sample_rate, records=plan.sites)
    empty = Slab(np.zeros((plan.sites, 1), np.int64), inputs, inner.clip * steps_of(inner), kind_of(plan))
    return carry_out(implementation, inner, empty.parts(), [frozenset()] * 2)


def _many_releases(implementation: Implementation, plan: PrivacyPlan, e: Effort) -> Run:
    """Many small sums: how a key is drawn does not depend on the sum, so they are added in the clear."""
    rounds = ceil(e.keys / plan.sites)
    few = slab_plan(_plainest(plan), inputs=16, steps=rounds, sample_rate=1.0, records=plan.sites)
    empty = [(np.zeros((0, 16), np.float32), np.zeros(0, np.int64))] * plan.sites
    return carry_out(implementation, few, empty, [frozenset()] * rounds).runs[0]


def _plainest(plan: PrivacyPlan) -> PrivacyPlan:
    """Training in the clear over the plan's sites, with so much noise that a thousand steps can be planned."""
    return make_plan(
        sum="plain" if plan.sites > 2 else "none", mode="distributed" if plan.sites > 2 else "local", sites=plan.sites,
        records=plan.sites, noise_multiplier=sqrt(1024.0), delta=plan.delta, steps=1, clip=1.0,
        model=ModelSpec(name="logistic", inputs=16, classes=2), optimizer=Optimizer(learning_rate=1.0),
        contract_hash=plan.contract_hash,
    )  # fmt: skip


def _absences(plan: PrivacyPlan, rounds: int) -> Iterable[frozenset[int]]:
    for r in range(rounds):
        missing = r % (plan.dropouts + 1)
        yield frozenset((r + i) % plan.sites for i in range(missing))


def _groups(plan: PrivacyPlan, e: Effort) -> NDArray[np.int64]:
    """Records by site and group: different numbers, so that whatever depends on a site's own size shows."""
    groups = 1 if kind_of(plan) == "client" else max(1, min(e.groups, _MOST_GROUPS // plan.sites))
    wanted = e.group - np.arange(plan.sites * groups).reshape(plan.sites, groups) % max(1, e.group // 2)
    return wanted.astype(np.int64)


def _slab(plan: PrivacyPlan, e: Effort, steps: int, rate: float) -> tuple[PrivacyPlan, Slab]:
    """A plan and a slab of which no group reaches the grid's clamp."""
    counts = _groups(plan, e)
    inputs = max(e.inputs, counts.size)
    inner = slab_plan(plan, inputs=inputs, steps=steps, sample_rate=rate, records=int(counts.sum()), quiet=True)
    most = max(1, int(inner.clamp / inner.clip / 2))  # so that twice the clip is seen before the clamp hides it
    return inner, Slab(np.minimum(counts, most), inputs, inner.clip * steps_of(inner), kind_of(plan))


def _whole(implementation: Implementation, plan: PrivacyPlan, e: Effort) -> tuple[Slab, Runs]:
    """Every record in every round: the sums are known."""
    rounds = max(2, e.rounds // 2)
    inner, slab = _slab(plan, e, _steps(plan, rounds), 1.0)
    return slab, carry_out(implementation, inner, slab.parts(), [frozenset()] * rounds)


def _sampling(implementation: Implementation, plan: PrivacyPlan, e: Effort) -> list[Finding]:
    inner, slab = _slab(plan, e, e.rounds, plan.sample_rate)
    releases = carry_out(implementation, inner, slab.parts(), [frozenset()] * e.rounds).releases
    return [
        records.sampling_rate(inner, slab, releases, e.alpha),
        records.batch_sizes(inner, slab, releases, e.alpha),
        records.fresh_samples(inner, slab, releases, e.alpha),
    ]


def _pair(implementation: Implementation, plan: PrivacyPlan, e: Effort) -> tuple[list[Finding], list[noise.Residuals]]:
    """The same plan over N and N + 1 units at the first site (in mode ``client``: 0 and 1); the others are empty."""
    N, kind = 4, kind_of(plan)
    inputs, rounds = max(e.inputs, plan.sites), max(2, e.rounds // 2)
    steps = _steps(plan, rounds)
    inner = slab_plan(plan, inputs=inputs, steps=steps, sample_rate=1.0, records=plan.sites * N, quiet=True)
    slabs, found = [], []
    for size in (0, N) if kind == "client" else (N, N + 1):
        counts = np.zeros((plan.sites, 1), np.int64)
        counts[0] = size
        slabs.append(Slab(counts, inputs, inner.clip * steps_of(inner), kind))
        found.append(carry_out(implementation, inner, slabs[-1].parts(), [frozenset()] * rounds))
    z = [residuals(inner, r.releases, s.known(s.units)) for r, s in zip(found, slabs, strict=True)]
    return records.neighbours((slabs[0], slabs[1]), (found[0], found[1]), e.alpha), z


def _stopping(implementation: Implementation, plan: PrivacyPlan, e: Effort) -> Finding:
    """A cap that carries two steps less than the plan has; without sampling, so that a step costs something.

    Of statistics, which have one step: a cap that does not carry it. Such a run may refuse to begin.
    """
    inputs = max(16, plan.sites)
    make = partial(slab_plan, plan, inputs=inputs, sample_rate=1.0, records=plan.sites)
    single = plan.task == "stats"
    few = make(steps=1 if single else 2)
    cap = few.filter_epsilon() * (0.9 if single else 1.0)
    carried = Filter(cap, plan.delta, best_order(cap, plan.delta)).affords(few.event)
    whole = few if single else make(steps=carried + 2)
    empty = Slab(np.zeros((plan.sites, 1), np.int64), inputs, whole.clip * steps_of(whole), kind_of(plan))
    try:
        run = implementation.run(whole, empty.parts(), absent=[frozenset()] * whole.steps, cap=cap)
    except (BudgetExhausted, RunAborted):
        run = Run((), EXHAUSTED if single else "", {})
    return records.stops(run, carried, EXHAUSTED, e.alpha)
