"""ε once more, for the verifier: written apart from :mod:`fedveil.privacy.dp.accounting`, straight on dp-accounting.

A mistake in the code that made a claim must not repeat itself in the code that checks it. They share only the library
and, where it applies (every record in every step), a closed form that needs no library.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from dp_accounting.rdp import RdpAccountant

from fedveil.common.errors import VerificationError
from fedveil.privacy.dp import fourier_pld
from fedveil.privacy.dp.events import MAX_LOSS, MIN_NOISE_MULTIPLIER, SampledGaussian

_DIFFERENT = 64  # events of one ledger that are composed on one grid
_OFTEN = 1 << 40  # after so many steps, the conversion to ε is lost beside the divergence

# The verifier's own, coarser table of orders: a bound need not be the best one to be a bound. All of them are in the
# ledger's table too: a better bound than the ledger's own would refuse what the ledger states.
_ORDERS = (1.1, 1.5, 2.0, 2.5, 3.0, 3.5, *map(float, range(4, 64)), 80.0, 128.0, 256.0, 512.0, 1024.0)


def _grid(q: float, sigma: float) -> float:
    """How finely losses of SGM(q, σ) are told apart: eight times finer than q/σ, from 1e-6 to 1e-3.

    And no finer than 2^-14 of the largest loss that a step can have, negligible chances aside.
    """
    x = 10 / sigma + 1 / sigma**2  # the log of the two densities' ratio, 10 σ out on the far side
    largest = x if x >= 700 else math.log1p(q * math.expm1(x))
    fine = max(q / sigma / 8, largest / (1 << 14), 1e-6)
    return fine if fine < 1e-3 else 1e-3


def _mechanism(q: float, sigma: float) -> dp_event.DpEvent:
    gaussian = dp_event.GaussianDpEvent(sigma)
    return gaussian if q == 1 else dp_event.PoissonSampledDpEvent(q, gaussian)


@lru_cache(maxsize=256)
def by_pld(q: float, sigma: float, steps: int, delta: float) -> float:
    """ε of ``steps`` times SGM(q, σ) by privacy loss distributions; 0 for no steps."""
    if steps == 0:
        return 0.0
    accountant = PLDAccountant(value_discretization_interval=_grid(q, sigma))
    accountant.compose(_mechanism(q, sigma), steps)
    return float(accountant.get_epsilon(_safe(delta, q, steps)))


def _safe(delta: float, q: float, steps: int) -> float:
    """δ without what double precision may hide in it: 1e-16 for every sampled step that is convolved.

    Raises:
        VerificationError: nothing is left, which no plan allows.
    """
    hidden = 0.0 if q == 1 else 1e-16 * steps
    if hidden >= delta:
        raise VerificationError(f"delta = {delta:g} drowns in the rounding of {steps} composed steps")
    return delta - hidden


@lru_cache(maxsize=64)
def deltas_by_pld(q: float, sigma: float, steps: int, epsilons: tuple[float, ...]) -> tuple[float, ...]:
    """δ at each of ``epsilons``; at most 1, which rounding may pass."""
    accountant = PLDAccountant(value_discretization_interval=_grid(q, sigma))
    accountant.compose(_mechanism(q, sigma), steps)
    return tuple(min(1.0, float(accountant.get_delta(e))) for e in epsilons)


@lru_cache(maxsize=256)
def by_pld_replacing(q: float, sigma: float, steps: int, delta: float) -> float:
    """ε of ``steps`` times SGM(q, σ) when one record is replaced, by privacy loss distributions; 0 for no steps.

    σ stays relative to what one record adds: here the library's PLD counts both records, its RDP does not.
    """
    if steps == 0:
        return 0.0
    accountant = PLDAccountant(NeighboringRelation.REPLACE_ONE, value_discretization_interval=_grid(q, sigma))
    accountant.compose(_mechanism(q, sigma), steps)
    return float(accountant.get_epsilon(_safe(delta, q, steps)))


def replacing_bound(q: float, sigma: float, steps: int, delta: float) -> float:
    """An upper bound of :func:`by_pld_replacing` by Rényi DP.

    The smaller of two: every record in every step at twice the distance (exact for q = 1), and a removal followed by
    an addition, which is (2ε, (1 + e^ε) δ') where one of them is (ε, δ') (group privacy).
    """
    whole = by_rdp(1.0, sigma / 2, steps, delta)
    if q == 1 or steps == 0:
        return whole
    small = delta / 2
    for _ in range(12):  # ε grows slowly as δ' falls: a few steps reach a δ' that fits
        one = by_rdp(q, sigma, steps, small)
        if one > 300:
            return whole
        if (1 + math.exp(one)) * small <= delta:
            return min(whole, 2 * one)
        small = delta / (1 + math.exp(one)) / 2
    return whole


@lru_cache(maxsize=256)
def by_rdp(q: float, sigma: float, steps: int, delta: float) -> float:
    """ε of ``steps`` times SGM(q, σ) by Rényi DP; 0 for no steps."""
    if steps == 0:
        return 0.0
    accountant = RdpAccountant(orders=list(_ORDERS))
    accountant.compose(_mechanism(q, sigma), steps)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def by_fourier(counted: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """ε of ``(q, σ, how often)`` by :mod:`fedveil.privacy.dp.fourier_pld`, which needs no library of accountants."""
    return fourier_pld.epsilon(counted, delta)


@lru_cache(maxsize=256)
def by_group(q: float, sigma: float, steps: int, delta: float, size: int) -> float:
    """ε of ``size`` units that come or go together, by the accountant of :func:`by_fourier`."""
    return fourier_pld.epsilon(((q, sigma, steps),), delta, size=size)


def group_range(q: float, sigma: float, steps: int, delta: float, size: int) -> float:
    """The least that Rényi DP with any table of orders (:func:`rdp_range`) gives for ``size`` units together.

    Two bounds of a step, of which the smaller one counts: a step that none of them is in with probability
    (1 - q)^size, else all; and all of them in every step.
    """
    some = -math.expm1(size * math.log1p(-q)) if q < 1 else 1.0
    return min(rdp_range(rate, sigma / size, steps, delta)[0] for rate in {some, 1.0})


def least(events: Iterable[SampledGaussian], delta: float) -> float:
    """What a whole ledger's charges cost at least, however they were chosen: all of them fixed before, by Fourier PLD.

    0, which bounds nothing, for a ledger of more than 64 different events, or one beyond what a distribution can hold.
    """
    counted = Counter((e.sample_rate, e.noise_multiplier) for e in events)
    lost = sum(n * SampledGaussian(q, sigma).loss for (q, sigma), n in counted.items())
    if len(counted) > _DIFFERENT or lost > MAX_LOSS or sum(counted.values()) * 1e-14 > delta:
        return 0.0
    return by_fourier(tuple((q, sigma, n) for (q, sigma), n in sorted(counted.items())), delta)


def by_filter(events: Iterable[SampledGaussian], order: float, delta: float) -> float:
    """ε of a whole ledger at one Rényi order: what its filter must say.

    A thousandth of δ is set aside once a sample may have outgrown its places.
    """
    found = list(events)
    counted = tuple(sorted(Counter((e.sample_rate, e.noise_multiplier) for e in found).items()))
    return _at_order(counted, order, delta * (0.999 if any(e.overflow for e in found) else 1.0))


@lru_cache(maxsize=256)
def _at_order(counted: tuple[tuple[tuple[float, float], int], ...], order: float, delta: float) -> float:
    if not counted:
        return 0.0
    accountant = RdpAccountant(orders=[order])
    for (q, sigma), times in counted:
        accountant.compose(_mechanism(q, sigma), times)
    found = float(accountant.get_epsilon(delta))
    if math.isfinite(found) or order == math.ceil(order):
        return found

    # The library's series did not converge: divergence grows with the order, so the next whole one bounds it.
    total = 0.0
    for (q, sigma), times in counted:
        value = _divergence(q, sigma, order)
        total += times * (value if math.isfinite(value) else _divergence(q, sigma, float(math.ceil(order))))
    return total + _offset(order, delta)


def _offset(order: float, delta: float) -> float:
    return math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


def _divergence(q: float, sigma: float, order: float) -> float:
    """Rényi divergence of one step; ``inf`` where the library's series does not converge."""
    accountant = RdpAccountant(orders=[order])
    accountant.compose(_mechanism(q, sigma), _OFTEN)
    return (float(accountant.get_epsilon(1e-5)) - _offset(order, 1e-5)) / _OFTEN


@lru_cache(maxsize=256)
def rdp_range(q: float, sigma: float, steps: int, delta: float) -> tuple[float, float]:
    """The range in which any table of orders that contains this one, and begins with it, bounds ε.

    The upper end is the least bound of this table: more orders only make it smaller. (Not :func:`by_rdp`: for a small
    loss the library knows a better bound, beside all orders.) The lower end: divergence grows with the order, and what
    turns it into ε falls. So between two neighbours of this table, nothing is less than the divergence of the first
    plus the addition of the second. 0.01 is left for the orders beyond the last one.
    """
    low, high, known = math.inf, math.inf, 0.0
    for order, following in zip(_ORDERS, (*_ORDERS[1:], math.inf), strict=True):
        if math.isfinite(value := _divergence(q, sigma, order)):
            known = max(value, 0.0)
            high = min(high, steps * known + _offset(order, delta))
        low = min(low, steps * known + (_offset(following, delta) if following < math.inf else 0.0))
    return max(0.0, low - 0.01), max(0.0, high)


def gaussian_delta(sigma: float, steps: int, epsilon: float) -> float:
    """Exact δ at ε of ``steps`` Gaussian releases of every record (Balle & Wang 2018, Theorem 8)."""
    mu = math.sqrt(steps) / sigma

    def tail(x: float) -> float:
        return 0.5 * math.erfc(x / math.sqrt(2))

    return tail(epsilon / mu - mu / 2) - math.exp(epsilon) * tail(epsilon / mu + mu / 2)


def detection(points: Sequence[Sequence[float]], false_alarms: float) -> float:
    """Largest rate at which members are found when ``false_alarms`` of the others are accused, by (ε, δ) points."""
    limits = [1.0]
    for e, d in points:
        factor = math.exp(min(e, 700.0))  # a larger one overflows, and rules nothing out either
        limits += [false_alarms * factor + d, 1 - (1 - d - false_alarms) / factor]
    return max(false_alarms, min(limits))


def refuse_absurd(q: float, sigma: float, steps: int) -> None:
    """Raise for steps whose loss distribution would take gigabytes; no plan that could be made has such ones.

    The same two bounds stand in :func:`fedveil.privacy.plan_rules.check`, which every plan has to pass.
    """
    if sigma < MIN_NOISE_MULTIPLIER:
        raise VerificationError(f"a noise multiplier of {sigma:g} is below any that calibration gives")
    if (lost := steps * SampledGaussian(q, sigma).loss) > MAX_LOSS:
        raise VerificationError(f"{steps} steps may lose {lost:.4g} on average, more than {MAX_LOSS:g}")
