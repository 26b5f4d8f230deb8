"""Between ε and the noise multiplier: the smallest σ that keeps a promise, and what a σ costs."""

from __future__ import annotations

import math
from collections.abc import Callable

from fedveil.common.errors import PlanError
from fedveil.privacy.dp.accounting import MAX_PLD_EPSILON, epsilon_pld, epsilon_rdp
from fedveil.privacy.dp.events import MIN_NOISE_MULTIPLIER, SampledGaussian

MAX_EPSILON, MAX_NOISE_MULTIPLIER = float(MAX_PLD_EPSILON), 1e6
_RELATIVE = 1e-4


def noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Smallest σ (within 0.01 %, never below the target) such that ``steps`` of SGM(q, σ) are (ε, δ)-DP by PLD."""
    return _smallest(
        lambda s: epsilon_pld([(SampledGaussian(sample_rate, s), steps)], delta) <= epsilon,
        f"no noise multiplier up to {MAX_NOISE_MULTIPLIER:g} reaches epsilon = {epsilon:g} at delta = {delta:g} in "
        f"{steps} steps",
    )


def epsilon(noise_multiplier: float, delta: float, sample_rate: float, steps: int) -> float:
    """ε at ``delta`` of ``steps`` of SGM(q, σ) by PLD: what :func:`noise_multiplier` inverts.

    Raises:
        PlanError: the noise is below what calibration ever gives, or the steps cost more than any plan may claim.
    """
    if noise_multiplier < MIN_NOISE_MULTIPLIER:
        raise PlanError(
            f"a noise multiplier of {noise_multiplier:g} gives no privacy to speak of",
            nearest={"noise_multiplier": MIN_NOISE_MULTIPLIER},
        )
    found = epsilon_pld([(SampledGaussian(sample_rate, noise_multiplier), steps)], delta)
    if found > MAX_EPSILON:
        raise PlanError(
            f"{steps} steps at noise multiplier {noise_multiplier:g} cost epsilon = {found:.4g}: over {MAX_EPSILON:g}",
            hint="fewer steps, or more noise",
            nearest={"noise_multiplier": _three_digits(_least_noise(delta, sample_rate, steps))},
        )
    return found


def _smallest(holds: Callable[[float], bool], impossible: str) -> float:
    low, high = MIN_NOISE_MULTIPLIER, 1.0
    while not holds(high):
        low, high = high, 2 * high
        if high > MAX_NOISE_MULTIPLIER:
            raise PlanError(impossible, hint="fewer steps, a larger epsilon or a larger delta")
    while high - low > _RELATIVE * high:
        mid = (low + high) / 2
        low, high = (low, mid) if holds(mid) else (mid, high)
    return high


def _least_noise(delta: float, sample_rate: float, steps: int) -> float:
    """A σ that costs at most ``MAX_EPSILON``: by RDP, because loss distributions of such widths take seconds each."""
    return _smallest(
        lambda s: epsilon_rdp([(SampledGaussian(sample_rate, s), steps)], delta) <= MAX_EPSILON,
        f"no noise multiplier up to {MAX_NOISE_MULTIPLIER:g} costs less than {MAX_EPSILON:g} in {steps} steps",
    )


def _three_digits(x: float) -> float:
    """``x`` > 0 rounded up to three significant digits."""
    unit = 10.0 ** (math.floor(math.log10(x)) - 2)
    return float(f"{math.ceil(x / unit) * unit:.12g}")
