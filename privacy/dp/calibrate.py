"""Between ε and the noise multiplier: the smallest σ that keeps a promise, and what a σ costs."""

from __future__ import annotations

from collections.abc import Callable

from fedveil.common.errors import PlanError
from fedveil.privacy.dp.accounting import epsilon_pld
from fedveil.privacy.dp.events import SampledGaussian

MAX_EPSILON = 1000.0
_MIN, _MAX, _RELATIVE = 0.2, 1e6, 1e-4


def noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Smallest σ (within 0.01 %, never below the target) such that ``steps`` of SGM(q, σ) are (ε, δ)-DP by PLD."""
    return _smallest(
        lambda s: epsilon_pld([(SampledGaussian(sample_rate, s), steps)], delta) <= epsilon,
        f"no noise multiplier below {_MAX:g} reaches epsilon = {epsilon:g} at delta = {delta:g} in {steps} steps",
    )


def epsilon(noise_multiplier: float, delta: float, sample_rate: float, steps: int) -> float:
    """ε at ``delta`` of ``steps`` of SGM(q, σ) by PLD: what :func:`noise_multiplier` inverts.

    Raises:
        PlanError: the noise is below what calibration ever gives, or the steps cost more than any plan may claim.
    """
    if noise_multiplier < _MIN:
        raise PlanError(
            f"a noise multiplier of {noise_multiplier:g} gives no privacy to speak of",
            nearest={"noise_multiplier": _MIN},
        )
    found = epsilon_pld([(SampledGaussian(sample_rate, noise_multiplier), steps)], delta)
    if found > MAX_EPSILON:
        raise PlanError(
            f"{steps} steps at noise multiplier {noise_multiplier:g} cost epsilon = {found:.4g}: over {MAX_EPSILON:g}",
            hint="fewer steps, or more noise",
        )
    return found


def _smallest(holds: Callable[[float], bool], impossible: str) -> float:
    low, high = _MIN, 1.0
    while not holds(high):
        low, high = high, 2 * high
        if high > _MAX:
            raise PlanError(impossible, hint="fewer steps, a larger epsilon or a larger delta")
    while high - low > _RELATIVE * high:
        mid = (low + high) / 2
        low, high = (low, mid) if holds(mid) else (mid, high)
    return high
