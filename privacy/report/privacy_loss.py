"""The privacy loss of a plan in the forms a reader needs: a curve, a price per step, the success of an attack."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from dp_accounting.pld import PLDAccountant

from fedveil.common.errors import VerificationError
from fedveil.privacy.dp.accounting import MAX_PLD_EPSILON, delta_curve, epsilon_pld, epsilon_rdp, replace_one_rdp
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.dp.places import SPARE
from fedveil.privacy.plan import PrivacyPlan

CURVE_POINTS = 33
STEP_POINTS = 16
FALSE_ALARMS = (0.001, 0.01, 0.05, 0.1)
GROUPS = (2, 3, 5)  # so many units of one person a report gives ε for
# Of a mixture's loss distribution: points under the largest loss of one step, and means.
_POINTS, _MAX_MIXED = 8192, 64
# Beyond these a loss distribution would need gigabytes; epsilon_pld falls back on RDP there, and the report says so.
_TOO_MUCH, _TOO_LITTLE_NOISE = float(MAX_PLD_EPSILON), 0.05
_NO_EXP = 700.0  # beyond it a float overflows, and nothing is ruled out

Curve = tuple[tuple[float, float], ...]


@lru_cache(maxsize=64)
def curve(event: SampledGaussian, steps: int, delta: float, claim: float) -> Curve:
    """``(ε, δ)`` points from ε = 0 to twice the claim (at least 2 beyond it), the claim among them."""
    top = max(2 * claim, claim + 2.0)
    grid = [top * i / (CURVE_POINTS - 1) for i in range(CURVE_POINTS)]
    points = delta_curve([(event, steps)], grid)
    return tuple(sorted([*points, (claim, delta)]))


def attack_rate(points: Iterable[tuple[float, float]], false_alarms: float) -> float:
    """Largest true-positive rate of any membership test whose false-positive rate is ``false_alarms``.

    Both inequalities of (ε, δ)-indistinguishability at every point of the curve (Kairouz, Oh & Viswanath 2015,
    Theorem 2.4): ``tpr <= e^ε fpr + δ`` and ``1 - fpr <= e^ε (1 - tpr) + δ``.
    """
    best = 1.0
    for e, d in points:
        best = min(best, math.exp(min(e, _NO_EXP)) * false_alarms + d, 1 - math.exp(-e) * (1 - false_alarms - d))
    return max(best, false_alarms)


def by_step(event: SampledGaussian, steps: int, delta: float) -> list[list[float]]:
    """``[step, ε by PLD, ε by RDP]`` at up to :data:`STEP_POINTS` steps, evenly spaced, the last one included."""
    at = sorted({max(1, round(steps * i / STEP_POINTS)) for i in range(1, STEP_POINTS + 1)})
    return [[k, epsilon_pld([(event, k)], delta), epsilon_rdp([(event, k)], delta)] for k in at]


def fallback(plan: PrivacyPlan) -> tuple[float, str]:
    """ε when all trust is broken, and by which accountant.

    With many honest shares, a site's own share is so small that a privacy loss distribution would need gigabytes. Then
    the RDP value is given, which is an upper bound too.
    """
    rough = epsilon_rdp([(plan.fallback_event, plan.steps)], plan.delta)
    if rough > _TOO_MUCH or plan.fallback_event.noise_multiplier < _TOO_LITTLE_NOISE:
        return rough, "RDP"
    return plan.fallback, "PLD"


def replace_one(plan: PrivacyPlan) -> tuple[float, str]:
    """ε when one record is replaced by another, and by which accountant (RDP where PLD would be too wide)."""
    rough = replace_one_rdp([(plan.event, plan.steps)], plan.delta)
    wide = rough > _TOO_MUCH or plan.noise_multiplier < 2 * _TOO_LITTLE_NOISE
    return (rough, "RDP") if wide else (plan.claim_replace_one, "PLD")


def groups(plan: PrivacyPlan) -> list[dict[str, Any]]:
    """ε of :data:`GROUPS` units that belong to one person: ``{"size", "epsilon", "accountant"}`` of each."""
    return [
        {"size": size, "epsilon": epsilon, "accountant": accountant}
        for size in GROUPS
        for epsilon, accountant in [group(plan.event, plan.steps, _left(plan, size), size)]
    ]


def group_epsilon(plan: PrivacyPlan, records: int) -> float | None:
    """ε of ``records`` units that change together (:func:`group`); None where a step has too few places for a bound."""
    if records == 1:
        return plan.claim
    left = _left(plan, records)
    return group(plan.event, plan.steps, left, records)[0] if left > 0 else None


def _left(plan: PrivacyPlan, size: int) -> float:
    """δ without the chance that a step has too few places for a group and the sample of all others.

    Places are made for groups of up to :data:`~fedveil.privacy.dp.places.SPARE` + 1. For larger ones nothing is left.
    """
    if not plan.overflow:
        return plan.delta
    return plan.delta - plan.overflow if size <= SPARE + 1 else 0.0


@lru_cache(maxsize=256)
def group(event: SampledGaussian, steps: int, delta: float, size: int) -> tuple[float, str]:
    """ε of ``size`` units that are added or removed together, at the same δ, and by which accountant.

    With every record in every step they move a sum ``size`` times as far. That is the noise multiplier σ/size, exactly.

    With Poisson sampling, J ~ Binomial(size, q) of them are in a step. N(0, σ²) and the mixture of N(j, σ²) with J's
    weights are a dominating pair of that step, in units of the clip, and a tight one (Ganesh 2024, "Tight Group-Level
    DP Guarantees for DP-SGD with Sampling via Mixture of Gaussians Mechanisms"). Why one dimension is enough: given all
    earlier results, each unit's part g_i of the sum is fixed, and |g_i| <= 1. With noise of variance 1, for shortness,
    the ratio of the two densities is then the mean, over samples S, of exp(<v_S, x> - |v_S|²/2), where v_S is the sum
    of the g_i in S. Every δ(ε), in both directions, is the mean of a convex function of that ratio under N(0, I). By
    Kahane's inequality (1986) it grows with the covariances <v_S, v_T>. None of them is above |S| |T|, which is what
    parallel parts of full length have. Steps compose although parts are chosen after earlier results, as dominating
    pairs do (Zhu, Dong & Wang 2022).

    The simpler bound SGM(1 - (1-q)^size, σ/size) holds too: no more than ``size`` are in a step, and with probability
    (1-q)^size none is. So, given the part's direction, the step is a mixture of that step and of smaller ones, and δ(ε)
    is convex. That bound is several times larger. It is used, by Rényi DP, where the mixture's loss distribution would
    be too wide to compute, or the bound of all of them in every step, whichever is smaller.

    Raises:
        VerificationError: ``size`` is below 1.
    """
    if size < 1:
        raise VerificationError("a group holds at least one")
    q, sigma = event.sample_rate, event.noise_multiplier / size
    if q == 1:
        whole = SampledGaussian(1.0, sigma)
        rough = epsilon_rdp([(whole, steps)], delta)
        wide = rough > _TOO_MUCH or sigma < _TOO_LITTLE_NOISE
        return (rough, "RDP") if wide else (epsilon_pld([(whole, steps)], delta), "PLD")
    largest = 10 / sigma + 1 / sigma**2  # of one step's loss: all of them are in it, and the noise is 10 σ out
    usual = size * q * (1 + (size - 1) * q) / (2 * event.noise_multiplier**2)  # E[J²] / (2 σ²), by convexity
    if size <= _MAX_MIXED and largest < _TOO_MUCH and steps * usual < _TOO_MUCH / 2:
        return _mixture(event, steps, delta, size), "PLD"
    some = SampledGaussian(min(1.0, -math.expm1(size * math.log1p(-q))), sigma)
    return min(epsilon_rdp([(e, steps)], delta) for e in (some, SampledGaussian(1.0, sigma))), "RDP"


def _mixture(event: SampledGaussian, steps: int, delta: float, size: int) -> float:
    """ε of ``steps`` mixtures of Gaussians with means 0 to ``size`` and binomial weights; rounded up on its grid.

    The grid is half of the usual loss of one step, and no finer than :data:`_POINTS` under the largest one: each point
    is the root of an equation, which costs time. Whatever the grid, the result is an upper bound.
    """
    q, sigma = event.sample_rate, event.noise_multiplier
    weights = [math.comb(size, j) * q**j * (1 - q) ** (size - j) for j in range(size + 1)]
    largest = 10 * size / sigma + (size / sigma) ** 2
    accountant = PLDAccountant(value_discretization_interval=max(size * q / sigma / 2, largest / _POINTS, 1e-6))
    accountant.compose(MixtureOfGaussiansDpEvent(sigma, [float(j) for j in range(size + 1)], weights), steps)
    left = delta - 1e-16 * steps  # what the composition by Fourier transforms may lose of δ
    found = float(accountant.get_epsilon(left)) if left > 0 else math.inf
    return found if math.isfinite(found) else epsilon_rdp([(SampledGaussian(1.0, sigma / size), steps)], delta)
