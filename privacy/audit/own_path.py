"""The plan's own workload: its network or statistics, its D, clip, sample rate, mode, sum and readers.

Two probes. Over sites without records the opened sum is noise alone, at the plan's sample rate and noise multiplier.
Over a few made-up records, all taken (q = 1) and under less noise, the sum is held against clipped gradients that a
:class:`~fedveil.privacy.audit.evidence.Reference` computes apart. There the clip may be shortened, so that it cuts.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from scipy import stats

from fedveil.privacy.audit import noise_checks as noise
from fedveil.privacy.audit.evidence import Finding, Implementation, Part, Reference, Release
from fedveil.privacy.audit.runs import Runs, carry_out
from fedveil.privacy.audit.slab import QUIET, derived, noise_std, residuals, steps_of
from fedveil.privacy.plan import PrivacyPlan

RECORDS = 32
_SHORT = 4.0  # the usual record is at least so many clips long
_LEAST_ROUNDS = 2
NAMES = (
    "own path: noise", "own path: every block", "own path: largest value", "own path: clipped sum",
    "own path: noise beside records",
)  # fmt: skip


def noise_alone(
    implementation: Implementation, reference: Reference, plan: PrivacyPlan, numbers: int, most: int
) -> Runs:
    """Sums over no records at all, so many rounds that about ``numbers`` are seen, and at most ``most``."""
    rounds = max(_LEAST_ROUNDS, min(most, math.ceil(numbers / plan.model.parameters)))
    make = partial(
        derived, plan, model=reference.workload(plan), sample_rate=plan.sample_rate, records=plan.records,
        clip=plan.clip,
    )  # fmt: skip
    inner = make(steps=1 if plan.task == "stats" else rounds)
    return carry_out(implementation, inner, reference.records(inner, [0] * plan.sites), [frozenset()] * rounds)


def noise_findings(runs: Runs, alpha: float, confidence: float) -> list[Finding]:
    """The noise of the plan's own sums."""
    plan, z = runs.plan, residuals(runs.plan, runs.releases, np.zeros(runs.plan.model.parameters))
    return [
        noise.variance(z, plan.noise_multiplier, alpha, confidence, plan.sites, NAMES[0]),
        noise.every_block(z, alpha, NAMES[1]),
        noise.largest(float(np.abs(z).max()), z.size, alpha, NAMES[2]),
    ]


def with_records(
    implementation: Implementation, reference: Reference, plan: PrivacyPlan, rounds: int, alpha: float,
    confidence: float,
) -> list[Finding]:  # fmt: skip
    """The plan's own sums over a few records against the reference's."""
    each = [RECORDS // plan.sites + (i < RECORDS % plan.sites) for i in range(plan.sites)]
    make = partial(
        derived, plan, model=reference.workload(plan), sample_rate=1.0, records=plan.records, quiet=True,
        learning_rate=plan.optimizer.learning_rate if plan.mode == "client" else 1e-12,
    )  # fmt: skip
    steps = 1 if plan.task == "stats" else rounds
    inner = make(clip=plan.clip, steps=steps)
    parts = reference.records(inner, each)
    if plan.task == "train":
        inner = make(clip=_short(reference, inner, parts), steps=steps)
    runs = carry_out(implementation, inner, parts, [frozenset()] * rounds)
    known = reference.known(inner, parts) * steps_of(inner)
    z = residuals(inner, runs.releases, known)
    return [
        _along(inner, runs.releases, known, alpha, confidence),
        noise.variance(z, min(plan.noise_multiplier, QUIET), alpha, confidence, plan.sites, NAMES[4]),
    ]


def _short(reference: Reference, plan: PrivacyPlan, parts: list[Part]) -> float:
    """A clip that cuts most of the records; the plan's where it does."""
    usual = float(np.median(reference.lengths(plan, parts)))
    return min(plan.clip, usual / _SHORT) if usual > 0 else plan.clip


def _along(
    plan: PrivacyPlan, releases: tuple[Release, ...], known: np.ndarray, alpha: float, confidence: float
) -> Finding:
    """The component of the sums along the known one, as a multiple of it."""
    length = float(np.linalg.norm(known))
    asks = f"component of the opened sums along the clipped sum of {RECORDS} records, computed apart"
    if length == 0:
        return Finding(NAMES[3], asks, 1.0, alpha, 1.0, 1.0, len(releases), "nothing: these records add nothing")
    ratio = float(np.mean([r.values @ known for r in releases])) / length**2
    noisy = math.sqrt(sum(noise_std(plan, len(r.members)) ** 2 for r in releases)) / len(releases)
    std = noisy / length
    half = float(stats.norm.isf((1 - confidence) / 2)) * std
    least = float(stats.norm.isf(alpha / 2) + stats.norm.ppf(noise.POWER)) * std
    return Finding(
        NAMES[3], asks, min(1.0, 2 * float(stats.norm.sf(abs(ratio - 1) / std))), alpha, ratio, 1.0, len(releases),
        f"a sum that is {least:.2f} of itself too long or too short", (ratio - half, ratio + half),
    )  # fmt: skip
