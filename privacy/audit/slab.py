"""The audit slab: plans and records whose clipped sums are known in advance.

The model is logistic with two classes and starts at zero. A record of the slab is ``B`` in one feature and 0 in all
others, of class 0. Its gradient is ``(-1, +1) / 2`` times that feature and the bias, far longer than the clip. So,
clipped, it is a known vector of length C. A *group* is a site's records on one feature. No two groups share one. The
learning rate is so small that the weights stay at zero for every practical purpose, so that all rounds are alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import UsageError
from fedveil.common.workload.model import ModelSpec
from fedveil.privacy.audit.evidence import Part, Release
from fedveil.privacy.dp.rounding import relative
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan

LEARNING_RATE = 1e-12
QUIET = 0.25


def slab_plan(
    plan: PrivacyPlan, *, inputs: int, steps: int, sample_rate: float, records: int, quiet: bool = False
) -> PrivacyPlan:
    """The mechanism of ``plan`` (mode, sum, sites, tolerances, clip, noise multiplier) over the slab's model.

    Args:
        quiet: a noise multiplier of at most :data:`QUIET`, so that single records can be seen under the noise.

    Raises:
        UsageError: the plan protects whole clients: their updates have no known clipped sum.
        PlanError: so many steps cannot be planned.
    """
    if plan.mode == "client":
        raise UsageError("the slab cannot measure a plan of whole clients", hint="give a plan of another mode")
    noise = min(plan.noise_multiplier, QUIET) if quiet else plan.noise_multiplier
    return make_plan(
        mode=plan.mode, sum=plan.sum, sites=plan.sites, records=max(1, records), sample_rate=sample_rate,
        noise_multiplier=noise, delta=plan.delta, steps=steps, clip=plan.clip,
        model=ModelSpec(name="logistic", inputs=inputs, classes=2),
        optimizer=Optimizer(learning_rate=LEARNING_RATE, momentum=0.0), contract_hash=plan.contract_hash,
        colluders=plan.colluders, dropouts=plan.dropouts, committee=plan.committee, committee_seed=plan.committee_seed,
    )  # fmt: skip


@dataclass(frozen=True)
class Slab:
    """Records by site and group.

    Attributes:
        counts: ``(sites, groups)`` how many records; group g of site i is on feature ``i * groups + g``.
        inputs: the model's features, at least as many as groups.
        clip: C.
    """

    counts: NDArray[np.int64]
    inputs: int
    clip: float

    def __post_init__(self) -> None:
        if self.counts.size > self.inputs:
            raise UsageError(f"{self.counts.size} groups do not fit on {self.inputs} features")

    @property
    def scale(self) -> float:
        """B, so large that every gradient is at least 500 clips long."""
        return 1000.0 * max(1.0, self.clip)

    @property
    def own(self) -> float:
        """How much of a record's clipped gradient lies on its group's direction; the rest is the bias."""
        return self.clip * self.scale / math.hypot(self.scale, 1.0)

    def parts(self) -> list[Part]:
        """``(X, y)`` of every site."""
        out: list[Part] = []
        for i, groups in enumerate(self.counts):
            features = i * groups.size + np.repeat(np.arange(groups.size), groups)
            X = np.zeros((features.size, self.inputs), np.float32)
            X[np.arange(features.size), features] = self.scale
            out.append((X, np.zeros(features.size, np.int64)))
        return out

    def known(self, counts: NDArray[np.integer]) -> NDArray[np.float64]:
        """``(D,)``: the sum of the clipped gradients of ``counts`` records (sites, groups)."""
        weights = np.zeros((2, self.inputs))
        weights[1, : counts.size] = counts.reshape(-1) * self.own / math.sqrt(2)
        weights[0] = -weights[1]
        bias = float(counts.sum()) * self.own / self.scale / math.sqrt(2)
        return np.concatenate([weights.reshape(-1), [-bias, bias]])

    def scores(self, release: Release) -> NDArray[np.float64]:
        """``(sites, groups)``: how many records the sum holds of each group, plus noise of :func:`spread` clips."""
        weights = release.values[: 2 * self.inputs].reshape(2, self.inputs)
        along = (weights[1] - weights[0])[: self.counts.size] / math.sqrt(2)
        return along.reshape(self.counts.shape) / self.own


def sensitivity(plan: PrivacyPlan) -> float:
    """Δ = C·(1 + rounding) + sqrt(D)·γ, written out: what the noise multiplier is relative to."""
    return plan.clip * (1 + relative(plan.places(plan.capacity))) + math.sqrt(plan.model.parameters) * plan.grid


def noise_std(plan: PrivacyPlan, members: int) -> float:
    """What the standard deviation of each coordinate of a sum of ``members`` sites must be: σ·Δ·sqrt(|U| / h)."""
    honest = 1 if plan.mode == "local" else plan.sites - plan.colluders - plan.dropouts
    return plan.noise_multiplier * sensitivity(plan) * math.sqrt(members / honest)


def spread(plan: PrivacyPlan, members: int) -> float:
    """The noise of a group's score, in records."""
    return noise_std(plan, members) / plan.clip


def residuals(plan: PrivacyPlan, releases: tuple[Release, ...], known: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(rounds, D)``: what is left of each sum without ``known``, in units of the noise it must have."""
    return np.stack([(r.values - known) / noise_std(plan, len(r.members)) for r in releases])
