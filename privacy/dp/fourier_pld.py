"""ε of composed sampled Gaussians, a third time: privacy loss distributions of our own, on NumPy alone.

Shares no line and no library with :mod:`fedveil.privacy.dp.accounting`. Every rounding goes the safe way, so the result
is an upper bound:

* **Grid.** The mass of an interval of losses is split between the interval's two ends, so that its probability under
  both neighbours stays what it is. Whoever merges the two again has the first pair back: post-processing. So the split
  pair tells at least as much. (The same points as by "connecting the dots", Doroshenko et al., PETS 2022.)
* **Tails.** Losses beyond the grid count as infinite above, and are rounded up to its first point below.
* **Composition.** The transform of n equal steps is the n-th power of one step's. What falls out of the window at its
  upper end comes back in at the lower one. A Chernoff bound of its mass is added to δ.
* **Rounding.** 1e-16 for every step that is composed is taken off δ (measured against the closed form: less).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import VerificationError

_CUT = 1e-9  # the part of δ that is given to each tail
_CELLS = 1 << 22  # the most that a window has; a wider one gets a coarser grid
_ROUNDING = 1e-16
_NO_EXP = 700.0
_erfc = np.frompyfunc(math.erfc, 1, 1)

Values = NDArray[np.float64]
_Step = tuple[int, Values, float, int]  # first cell, masses, mass at infinity, how often


def epsilon(events: Iterable[tuple[float, float, int]], delta: float, interval: float | None = None) -> float:
    """An upper bound of ε at ``delta`` of all ``events``, under add-or-remove-one adjacency; 0 for none.

    Args:
        events: ``(q, σ, how often)``, fixed before the first release.
        interval: width of the grid of losses; by default a 32nd of q/σ, the widest of all events.

    Raises:
        VerificationError: ``delta`` drowns in the rounding of so many steps, or ε is beyond what a double can divide.
    """
    events = [(q, s, n) for q, s, n in events if n]
    inverse = sum(n / s / s for q, s, n in events if q == 1)
    sampled = [(q, s, n) for q, s, n in events if q < 1]
    if inverse:  # Gaussians compose to a Gaussian
        events = [*sampled, (1.0, 1 / math.sqrt(inverse), 1)]
    if not events:
        return 0.0
    left = delta - _ROUNDING * sum(n for _, _, n in events)
    if left <= 0:
        raise VerificationError(f"delta = {delta:g} drowns in the rounding of so many composed steps")
    h = interval or max(_interval(q, s) for q, s, _ in events)
    return max(_epsilon(events, left, h, removing) for removing in ((True, False) if sampled else (True,)))


def _interval(q: float, sigma: float) -> float:
    """A 32nd of a step's usual loss q/σ, at most 5e-4 and at least 5e-7; between a 2^15th and a 2^17th of its largest.

    The largest: 10 σ out.
    """
    largest = _loss(q, sigma, 1 + 10 * sigma)
    return max(min(5e-4, max(q / sigma / 32, largest / (1 << 15), 5e-7)), largest / (1 << 17))


def _loss(q: float, sigma: float, x: float) -> float:
    """log of the mixture's density over the Gaussian's, at ``x``."""
    far = (2 * x - 1) / (2 * sigma * sigma)
    return far if q == 1 else float(np.logaddexp(math.log1p(-q), math.log(q) + far))


def _epsilon(events: list[tuple[float, float, int]], delta: float, h: float, removing: bool) -> float:
    """One direction: ε that bounds the loss of the table that has the record (``removing``), or has not."""
    cut, count = _CUT * delta, sum(n for _, _, n in events)
    while True:
        steps = [(*_step(q, s, h, cut / count, removing), n) for q, s, n in events]
        low, high = -_reach(steps, h, cut, -1), _reach(steps, h, cut, 1)
        first, cells = math.floor(low / h), math.ceil(high / h) - math.floor(low / h) + 1
        if cells <= _CELLS:
            break
        h *= max(2.0, cells / _CELLS)
    lost = cut + sum(n * infinite for _, _, infinite, n in steps)
    losses, masses = _composed(steps, first, _smooth(cells))
    return _at(h * losses, masses, delta, lost)


def _step(q: float, sigma: float, h: float, cut: float, removing: bool) -> tuple[int, Values, float]:
    """One step's loss distribution on the multiples of ``h``: the first one, the masses from there on, at infinity."""
    z = math.sqrt(-2 * math.log(cut))  # beyond z standard deviations lies less than ``cut``
    first, last = math.floor(_loss(q, sigma, -z * sigma) / h) - 1, math.ceil(_loss(q, sigma, 1 + z * sigma) / h) + 1
    edges = h * np.arange(first, last + 1, dtype=np.float64)
    x = (edges if q == 1 else _unsampled(q, edges)) * sigma + 0.5 / sigma
    without, shifted = _between(x), _between(x - 1 / sigma)
    mixed = (1 - q) * without + q * shifted
    drawn, other = (mixed, without) if removing else (without[::-1], mixed[::-1])
    if not removing:  # the loss of the other direction is this one's negative
        first, edges = -last, -edges[::-1]
    p, under_other = drawn[1:-1], other[1:-1]  # without the tails
    up = np.clip((p - under_other * np.exp(np.minimum(edges[:-1], _NO_EXP))) / -math.expm1(-h), 0, p)
    masses = np.append(p - up, 0.0)
    masses[1:] += up
    masses[0] += drawn[0]
    return first, masses, float(drawn[-1])


def _unsampled(q: float, losses: Values) -> Values:
    """The loss that a step without sampling has where one of rate q has these; -inf below log(1 - q)."""
    ratio = np.exp(losses) - (1 - q) if q >= 0.5 else np.expm1(losses) + q  # neither cancels where it counts
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(ratio, 0) / q)


def _between(cuts: Values) -> Values:
    """Mass of a standard Gaussian below, between and above the ascending ``cuts``, without cancellation in a tail."""
    cuts = np.concatenate(([-np.inf], cuts, [np.inf]))
    tail = 0.5 * np.asarray(_erfc(np.abs(cuts) / math.sqrt(2)), np.float64)
    a, b, left, right = tail[:-1], tail[1:], cuts[:-1] < 0, cuts[1:] < 0
    return np.maximum(np.where(left, np.where(right, b - a, 1 - a - b), a - b), 0.0)


def _reach(steps: list[_Step], h: float, cut: float, sign: int) -> float:
    """A bound that ``sign`` times the composed loss passes with a chance of at most ``cut`` (Chernoff).

    Any rate gives one. The best is looked for by halving a range, in which the bound falls and then rises.
    """
    grids = [(sign * h * np.arange(first, first + len(p)), p, n) for first, p, _, n in steps]
    need = -math.log(cut)
    usual = math.sqrt(2 * need / max(sum(n * float((p * x * x).sum()) for x, p, n in grids), 1e-300))
    found: dict[float, float] = {}

    def bound(octave: float) -> float:
        rate = usual * 2.0**octave
        return found.setdefault(octave, (need + sum(n * _log_mean_exp(rate * x, p) for x, p, n in grids)) / rate)

    low, high = -24.0, 2.0
    while high - low > 0.25:
        third = (high - low) / 3
        low, high = (low, high - third) if bound(low + third) < bound(high - third) else (low + third, high)
    return max(min(found.values()), h)


def _log_mean_exp(x: Values, p: Values) -> float:
    top = float(x[p > 0].max())
    return top + math.log(float((p * np.exp(np.minimum(x - top, 0))).sum()))  # no BLAS: its threads cost more


def _composed(steps: list[_Step], first: int, cells: int) -> tuple[Values, Values]:
    """The cells' numbers and masses of all steps together, modulo the window that begins at ``first``."""
    total = np.ones(cells // 2 + 1, complex)
    for start, p, _, n in steps:
        folded = np.bincount((start + np.arange(len(p))) % cells, p, cells)
        total *= _power(np.fft.rfft(folded), n)
    numbers = first + np.arange(cells)
    return numbers.astype(float), np.fft.irfft(total, cells)[numbers % cells]


def _power(base: NDArray[np.complex128], n: int) -> NDArray[np.complex128]:
    out = np.ones_like(base)
    while n:
        out = out * base if n & 1 else out
        base, n = base * base, n >> 1
    return out


def _smooth(n: int) -> int:
    """The next number from ``n`` on that is even and has no prime factor over 5: a transform is fast for it."""
    best, fives = 2 << n.bit_length(), 1
    while fives < best:
        threes = fives
        while threes < best:
            best = min(best, threes << max(1, (-(-n // threes) - 1).bit_length()))
            threes *= 3
        fives *= 5
    return best


def _at(losses: Values, masses: Values, delta: float, lost: float) -> float:
    """The ε at which δ(ε) = ``lost`` + the sum of (1 - e^(ε - loss)) over all larger losses has fallen to ``delta``."""
    losses, masses = losses[losses > 0], masses[losses > 0]
    above = np.cumsum(masses[::-1])[::-1]
    weighted = np.cumsum((masses * np.exp(-losses))[::-1])[::-1]
    beyond = np.flatnonzero(lost + above - np.exp(np.minimum(losses, _NO_EXP)) * weighted > delta)
    k = int(beyond[-1]) + 1 if beyond.size else 0
    if k == len(losses) or (k and losses[k] > _NO_EXP):
        raise VerificationError(f"epsilon at delta = {delta:g} is beyond what a loss distribution can hold")
    excess = lost + float(above[k]) - delta
    return max(0.0, math.log(excess / float(weighted[k]))) if excess > 0 and weighted[k] > 0 else 0.0
