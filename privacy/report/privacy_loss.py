"""The privacy loss of a plan in the forms a reader needs: a curve, a price per step, the success of an attack."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

from fedveil.privacy.dp.accounting import MAX_PLD_EPSILON, delta_curve, epsilon_pld, epsilon_rdp, replace_one_rdp
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.plan import PrivacyPlan

CURVE_POINTS = 33
STEP_POINTS = 16
FALSE_ALARMS = (0.001, 0.01, 0.05, 0.1)
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


def group_epsilon(plan: PrivacyPlan, records: int) -> float | None:
    """ε of ``records`` records that change together: exact for q = 1 (sensitivity grows k-fold), else not computed."""
    if records == 1:
        return plan.claim
    if plan.event.sample_rate < 1:
        return None
    event = SampledGaussian(1.0, plan.noise_multiplier / records)
    rough = epsilon_rdp([(event, plan.steps)], plan.delta)
    wide = rough > _TOO_MUCH or event.noise_multiplier < _TOO_LITTLE_NOISE
    return rough if wide else epsilon_pld([(event, plan.steps)], plan.delta)
