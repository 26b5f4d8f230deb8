"""The conformance suite: runs an implementation on the audit slab and compares what comes out with the plan.

It sees what a recipient of the sums sees, and the ledgers. Noise is measured at the plan's noise multiplier, over
empty sites; records are looked at under a noise multiplier of at most 0.25, which hides less of them. The suite tests
honest code: a site that draws its noise on the slab and nowhere else would pass. Each finding states the smallest fault
that its check finds: a smaller one may stay unseen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import RunAborted, UsageError
from fedveil.privacy.audit import noise_checks as noise
from fedveil.privacy.audit import record_checks as records
from fedveil.privacy.audit.evidence import ALPHA, Conformance, Finding, Implementation, Run
from fedveil.privacy.audit.slab import Slab, noise_std, residuals, slab_plan
from fedveil.privacy.dp.accounting import Filter, best_order
from fedveil.privacy.plan import PrivacyPlan

EXHAUSTED = "BUDGET_EXHAUSTED"
_MOST_GROUPS = 2048  # in all: every record has a feature for each


@dataclass(frozen=True)
class Effort:
    """How much is run.

    Attributes:
        rounds: sums over empty sites, through all patterns of drop-outs, and over the slab's records.
        inputs: features of the slab; a sum has ``2 * (inputs + 1)`` coordinates.
        groups: directions of each site; fewer where there are many sites.
        group: records on a direction at most; the grid's clamp may allow fewer.
        alpha: each check fails a correct program with at most this probability.
        confidence: of the intervals.
    """

    rounds: int = 12
    inputs: int = 2048
    groups: int = 8
    group: int = 16
    alpha: float = ALPHA
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not (self.rounds >= 2 and self.inputs >= 16 and self.groups >= 1 and self.group >= 2):
            raise UsageError("an examination needs at least two rounds, 16 features, and a group of two records")
        if not (0 < self.alpha < 0.1 and 0 < self.confidence < 1):
            raise UsageError("alpha is outside (0, 0.1), or the confidence outside (0, 1)")


def examine(implementation: Implementation, plan: PrivacyPlan, effort: Effort | None = None) -> Conformance:
    """Run every probe and make every check.

    Args:
        plan: whose mode, sum, sites, tolerances, clip, noise multiplier and sample rate are examined.

    Returns:
        The findings; ``passed`` if none speaks against the plan. With the default alpha a correct program is
        flagged with a probability below 2e-4.

    Raises:
        UsageError: a plan of whole clients.
        PlanError: the slab's plan cannot hold.
        RunAborted: the implementation released fewer sums than it was asked for.
    """
    e = effort or Effort()
    inner, empty, run = _noise_alone(implementation, plan, e)
    z_alone = residuals(inner, run.releases, empty.known(empty.counts))
    findings = [*_noise_findings(inner, z_alone, e), records.charges(inner, run, e.alpha)]
    inner, slab, run = _whole(implementation, plan, e)
    z_records = residuals(inner, run.releases, slab.known(slab.counts))
    findings += [
        noise.variance(z_records, inner.noise_multiplier, e.alpha, e.confidence, plan.sites, "noise: beside records"),
        records.clipping(inner, slab, run.releases, e.alpha, e.confidence),
        records.clipped_sum(inner, slab, run.releases, e.alpha),
    ]
    if plan.sample_rate < 1:
        findings += _sampling(implementation, plan, e)
    pair, z_pair = _pair(implementation, plan, e)
    findings += pair
    findings.append(noise.rounds_apart([z_alone, z_records, *z_pair], e.alpha))
    findings.append(_stopping(implementation, plan, e))
    measured = noise.multiplier(z_alone, plan.noise_multiplier, e.confidence)
    return Conformance(
        plan.hash, plan.sum, plan.noise_multiplier, *measured, e.confidence, z_alone.size, tuple(findings)
    )


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


def _noise_alone(implementation: Implementation, plan: PrivacyPlan, e: Effort) -> tuple[PrivacyPlan, Slab, Run]:
    """All sites empty; rounds go through every number of drop-outs."""
    inputs = max(e.inputs, plan.sites)
    inner = slab_plan(plan, inputs=inputs, steps=e.rounds, sample_rate=plan.sample_rate, records=plan.sites)
    empty = Slab(np.zeros((plan.sites, 1), np.int64), inputs, plan.clip)
    return inner, empty, _run(implementation, inner, empty, absent=list(_absences(plan, e.rounds)))


def _absences(plan: PrivacyPlan, rounds: int) -> Iterable[frozenset[int]]:
    for r in range(rounds):
        missing = r % (plan.dropouts + 1)
        yield frozenset((r + i) % plan.sites for i in range(missing))


def _groups(plan: PrivacyPlan, e: Effort) -> NDArray[np.int64]:
    """Records by site and group: different numbers, so that whatever depends on a site's own size shows."""
    groups = max(1, min(e.groups, _MOST_GROUPS // plan.sites))
    wanted = e.group - np.arange(plan.sites * groups).reshape(plan.sites, groups) % max(1, e.group // 2)
    return wanted.astype(np.int64)


def _slab(plan: PrivacyPlan, e: Effort, steps: int, rate: float) -> tuple[PrivacyPlan, Slab]:
    """A plan and a slab of which no group reaches the grid's clamp."""
    counts = _groups(plan, e)
    inputs = max(e.inputs, counts.size)
    inner = slab_plan(plan, inputs=inputs, steps=steps, sample_rate=rate, records=int(counts.sum()), quiet=True)
    most = max(1, int(inner.clamp / plan.clip / 2))  # so that twice the clip is seen before the clamp hides it
    return inner, Slab(np.minimum(counts, most), inputs, plan.clip)


def _whole(implementation: Implementation, plan: PrivacyPlan, e: Effort) -> tuple[PrivacyPlan, Slab, Run]:
    """Every record in every round: the sums are known."""
    inner, slab = _slab(plan, e, max(2, e.rounds // 2), 1.0)
    return inner, slab, _run(implementation, inner, slab)


def _sampling(implementation: Implementation, plan: PrivacyPlan, e: Effort) -> list[Finding]:
    inner, slab = _slab(plan, e, e.rounds, plan.sample_rate)
    releases = _run(implementation, inner, slab).releases
    return [
        records.sampling_rate(inner, slab, releases, e.alpha),
        records.batch_sizes(inner, slab, releases, e.alpha),
        records.fresh_samples(inner, slab, releases, e.alpha),
    ]


def _pair(implementation: Implementation, plan: PrivacyPlan, e: Effort) -> tuple[list[Finding], list[noise.Residuals]]:
    """The same plan over N and over N + 1 records at the first site; the others are empty."""
    N = 4
    inputs, steps = max(e.inputs, plan.sites), max(2, e.rounds // 2)
    inner = slab_plan(plan, inputs=inputs, steps=steps, sample_rate=1.0, records=plan.sites * N, quiet=True)
    slabs, runs = [], []
    for size in (N, N + 1):
        counts = np.zeros((plan.sites, 1), np.int64)
        counts[0] = size
        slabs.append(Slab(counts, inputs, plan.clip))
        runs.append(_run(implementation, inner, slabs[-1]))
    z = [residuals(inner, r.releases, s.known(s.counts)) for r, s in zip(runs, slabs, strict=True)]
    return records.neighbours((inner, inner), (slabs[0], slabs[1]), (runs[0], runs[1]), e.alpha), z


def _stopping(implementation: Implementation, plan: PrivacyPlan, e: Effort) -> Finding:
    """A cap that carries two steps less than the plan has; without sampling, so that a step costs something."""
    inputs = max(16, plan.sites)
    make = partial(slab_plan, plan, inputs=inputs, sample_rate=1.0, records=plan.sites)
    few = make(steps=2)
    cap = few.filter_epsilon()
    carried = Filter(cap, plan.delta, best_order(cap, plan.delta)).affords(few.event)
    whole = make(steps=carried + 2)
    empty = Slab(np.zeros((plan.sites, 1), np.int64), inputs, plan.clip)
    run = implementation.run(whole, empty.parts(), absent=[frozenset()] * whole.steps, cap=cap)
    return records.stops(run, carried, EXHAUSTED, e.alpha)


def _run(
    implementation: Implementation, plan: PrivacyPlan, slab: Slab, absent: list[frozenset[int]] | None = None
) -> Run:
    """One run, complete."""
    run = implementation.run(plan, slab.parts(), absent=absent or [frozenset()] * plan.steps)
    if len(run.releases) != plan.steps:
        raise RunAborted(
            f"{len(run.releases)} of {plan.steps} sums were released ({run.status})", hint="see the run's own log"
        )
    return run
