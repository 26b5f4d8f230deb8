"""The audit slab: plans and records whose clipped sums are known in advance.

Training: the model is logistic with two classes and starts at zero. A record of the slab is ``B`` in one feature and 0
in all others, of class 0. Its gradient is ``(-1, +1) / 2`` times that feature and the bias, far longer than the clip.
So, clipped, it is a known vector of length C. A *group* is a site's records on one feature. No two groups share one.
The learning rate is so small that the weights stay at zero for every practical purpose, so that all rounds are alike.

Mode ``client``: the same records, all of a site on one feature. Every local step moves along the same direction, by far
more than the clip. So a site with records adds one clip along it, whatever their number.

Statistics: one number with a histogram of many bins. A record is in one bin. It adds 1 there, and 1 to the count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import UsageError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import ColumnStats, StatsSpec
from fedveil.privacy.audit.evidence import Part, Release
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.dp.rounding import relative
from fedveil.privacy.plan import Optimizer, PrivacyPlan, Workload, make_plan

LEARNING_RATE = 1e-12
QUIET = 0.25
MOST_BINS = 1 << 14  # a plan of statistics names every one of them
Kind = Literal["record", "client", "stats"]


def kind_of(plan: PrivacyPlan) -> Kind:
    """Which slab a plan is examined on."""
    return "stats" if plan.task == "stats" else "client" if plan.mode == "client" else "record"


def sampled(plan: PrivacyPlan) -> bool:
    """Whether a step takes a part of the units."""
    return plan.sample_rate < 1


def derived(
    plan: PrivacyPlan,
    *,
    model: Workload,
    steps: int,
    sample_rate: float,
    records: int,
    clip: float,
    quiet: bool = False,
    learning_rate: float = LEARNING_RATE,
) -> PrivacyPlan:
    """The mechanism of ``plan`` over another workload; this is the one place that says what is kept of it.

    Args:
        quiet: a noise multiplier of at most :data:`QUIET`, so that single records can be seen under the noise.

    Raises:
        PlanError: so many steps cannot be planned.
    """
    noise = min(plan.noise_multiplier, QUIET) if quiet else plan.noise_multiplier
    return make_plan(
        mode=plan.mode, sum=plan.sum, sites=plan.sites, records=max(1, records), sample_rate=sample_rate,
        noise_multiplier=noise, delta=plan.delta, steps=steps, clip=clip, model=model,
        optimizer=_held_still(plan, learning_rate), contract_hash=plan.contract_hash, few_clients=plan.few_clients,
        local_steps=plan.local_steps, local_batch=plan.local_batch, reveal_to=plan.reveal_to,
        colluders=plan.colluders, dropouts=plan.dropouts, committee=plan.committee, committee_seed=plan.committee_seed,
    )  # fmt: skip


def _held_still(plan: PrivacyPlan, learning_rate: float) -> Optimizer:
    """Steps so short that every round starts from the same weights; clients descend as far as they do."""
    if plan.mode != "client":
        return Optimizer(learning_rate=learning_rate, momentum=0.0)
    own = plan.optimizer.proximal
    return Optimizer(learning_rate=learning_rate, momentum=0.0, proximal=own, server_rate=LEARNING_RATE)


def slab_plan(
    plan: PrivacyPlan, *, inputs: int, steps: int, sample_rate: float, records: int, quiet: bool = False
) -> PrivacyPlan:
    """The mechanism of ``plan`` (mode, sum, sites, tolerances, clip, noise multiplier) over the slab's model.

    Raises:
        PlanError: so many steps cannot be planned.
    """
    model, clip, rate = ModelSpec(name="logistic", inputs=inputs, classes=2), plan.clip, LEARNING_RATE
    kind = kind_of(plan)
    if kind == "client":
        rate = 1.0  # of the local steps, each of which is then far longer than the clip
    if isinstance(plan.model, StatsSpec):
        model = _histogram(inputs)
        clip *= model.norm_bound / plan.model.norm_bound
    return derived(
        plan, model=model, steps=steps, sample_rate=sample_rate, records=records, clip=clip, quiet=quiet,
        learning_rate=rate,
    )  # fmt: skip


def _histogram(bins: int) -> StatsSpec:
    cuts = tuple(i / bins for i in range(1, bins))
    column = ColumnStats(column="x", source="number", at=0, low=0.0, high=1.0, histogram=True, cuts=cuts)
    return StatsSpec(inputs=1, classes=2, columns=(column,))


@dataclass(frozen=True)
class Slab:
    """Records by site and group.

    Attributes:
        counts: ``(sites, groups)`` how many records; group g of site i is on feature ``i * groups + g``.
        inputs: the model's features (of statistics: bins), at least as many as groups.
        clip: C.
        kind: what a unit is.
    """

    counts: NDArray[np.int64]
    inputs: int
    clip: float
    kind: Kind = "record"

    def __post_init__(self) -> None:
        if self.counts.size > self.inputs:
            raise UsageError(f"{self.counts.size} groups do not fit on {self.inputs} features")

    @property
    def units(self) -> NDArray[np.int64]:
        """``(sites, groups)``: how many units the sum holds of each group: records, or in mode ``client`` one site."""
        return np.minimum(self.counts, 1) if self.kind == "client" else self.counts

    @property
    def scale(self) -> float:
        """B, so large that every gradient is at least 500 clips long."""
        return 1000.0 * max(1.0, self.clip)

    @property
    def own(self) -> float:
        """How much of a unit's contribution lies on its group's direction; the rest is the bias, or the count."""
        return 1.0 if self.kind == "stats" else self.clip * self.scale / math.hypot(self.scale, 1.0)

    def parts(self) -> list[Part]:
        """``(X, y)`` of every site."""
        out: list[Part] = []
        for i, groups in enumerate(self.counts):
            features = i * groups.size + np.repeat(np.arange(groups.size), groups)
            if self.kind == "stats":
                X = (-1 + (2 * features[:, None] + 1) / self.inputs).astype(np.float32)  # the middle of the bin
            else:
                X = np.zeros((features.size, self.inputs), np.float32)
                X[np.arange(features.size), features] = self.scale
            out.append((X, np.zeros(features.size, np.int64)))
        return out

    def known(self, units: NDArray[np.integer]) -> NDArray[np.float64]:
        """``(D,)``: the clipped sum over ``units`` (sites, groups)."""
        flat, total = units.reshape(-1), float(units.sum())
        if self.kind == "stats":
            return np.concatenate([[total], flat, np.zeros(self.inputs - flat.size)])
        weights = np.zeros((2, self.inputs))
        weights[1, : flat.size] = flat * self.own / math.sqrt(2)
        weights[0] = -weights[1]
        bias = total * self.own / self.scale / math.sqrt(2)
        return np.concatenate([weights.reshape(-1), [-bias, bias]])

    def scores(self, release: Release) -> NDArray[np.float64]:
        """``(sites, groups)``: how many units the sum holds of each group, plus noise of :func:`spread` of them."""
        if self.kind == "stats":
            return release.values[1 : 1 + self.counts.size].reshape(self.counts.shape)
        weights = release.values[: 2 * self.inputs].reshape(2, self.inputs)
        along = (weights[1] - weights[0])[: self.counts.size] / math.sqrt(2)
        return along.reshape(self.counts.shape) / self.own


def sensitivity(plan: PrivacyPlan) -> float:
    """Δ = K·(C·(1 + rounding) + sqrt(D)·γ), written out: what the noise multiplier is relative to."""
    grid = math.sqrt(plan.model.parameters) * plan.grid * (1 + 2.0**-6)
    return steps_of(plan) * (plan.clip * (1 + relative(plan.places(plan.capacity))) + grid)


def steps_of(plan: PrivacyPlan) -> int:
    """K, written out: how many sums with noise of their own a site adds up in a round."""
    return plan.local_steps if plan.mode == "local" else 1


def honest(plan: PrivacyPlan) -> int:
    """h, written out: how many shares of noise the claim counts on."""
    return 1 if plan.mode == "local" else plan.sites - plan.colluders - plan.dropouts


def noise_std(plan: PrivacyPlan, members: int) -> float:
    """What the standard deviation of each coordinate of a sum of ``members`` sites must be: σ·Δ·sqrt(|U| / h)."""
    return plan.noise_multiplier * sensitivity(plan) * math.sqrt(members / honest(plan))


def spread(plan: PrivacyPlan, members: int) -> float:
    """The noise of a group's score, in units."""
    return noise_std(plan, members) / (1.0 if plan.task == "stats" else plan.clip * steps_of(plan))


def price(plan: PrivacyPlan) -> SampledGaussian:
    """What one step costs, from the numbers in ``plan.json`` and not from the code that charges."""
    raw = plan.to_json()
    rate = float(raw["sample_rate"])
    counted = rate < 1 and raw["mode"] != "client"  # a client has one place, and needs no other
    overflow = 1e-6 * float(raw["delta"]) / int(raw["steps"]) if counted else 0.0
    return SampledGaussian(rate, float(raw["noise_multiplier"]), overflow)


def residuals(plan: PrivacyPlan, releases: tuple[Release, ...], known: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(rounds, D)``: what is left of each sum without ``known``, in units of the noise it must have."""
    return np.stack([(r.values - known) / noise_std(plan, len(r.members)) for r in releases])


def shares(plan: PrivacyPlan, releases: tuple[Release, ...]) -> dict[int, NDArray[np.float64]]:
    """By site, ``(rounds, D)`` what it handed to the sum over no records, in units of the noise its share must have."""
    std = noise_std(plan, 1)
    by: dict[int, list[NDArray[np.float64]]] = {}
    for r in releases:
        for site, values in r.shares.items():
            by.setdefault(site, []).append(values / std)
    return {site: np.stack(rows) for site, rows in sorted(by.items())}
