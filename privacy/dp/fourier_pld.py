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

_NEWTON, _NEAR = 64, 1e-12  # the most steps; a change in standard deviations below which there are no more

Values = NDArray[np.float64]
Weights = tuple[float, ...]
_Step = tuple[int, Values, float, int]  # first cell, masses, mass at infinity, how often


def epsilon(
    events: Iterable[tuple[float, float, int]], delta: float, interval: float | None = None, size: int = 1
) -> float:
    """An upper bound of ε at ``delta`` of all ``events``, under add-or-remove adjacency; 0 for none.

    Args:
        events: ``(q, σ, how often)``, fixed before the first release.
        interval: width of the grid of losses; by default a 32nd of size·q/σ, the widest of all events.
        size: so many units come or go together. Each is sampled by itself, and all pull in one direction, which is the
            worst there is: then a step is a mixture of Gaussians with means 0 to ``size`` and binomial weights.

    Raises:
        VerificationError: ``delta`` drowns in the rounding of so many steps, or ε is beyond what a double can divide.
    """
    events = [(q, s / size if q == 1 else s, n) for q, s, n in events if n]
    inverse = sum(n / s / s for q, s, n in events if q == 1)
    sampled = [(q, s, n) for q, s, n in events if q < 1]
    if inverse:  # Gaussians compose to a Gaussian
        events = [*sampled, (1.0, 1 / math.sqrt(inverse), 1)]
    if not events:
        return 0.0
    left = delta - _ROUNDING * sum(n for _, _, n in events)
    if left <= 0:
        raise VerificationError(f"delta = {delta:g} drowns in the rounding of so many composed steps")
    steps = [((0.0, 1.0) if q == 1 else _weights(q, size), s, n) for q, s, n in events]
    h = interval or max(_interval(w, s) for w, s, _ in steps)
    return max(_epsilon(steps, left, h, removing) for removing in ((True, False) if sampled else (True,)))


def _weights(q: float, size: int) -> Weights:
    """How likely it is that 0, 1, ..., ``size`` of the units are in a step."""
    return tuple(math.comb(size, j) * q**j * (1 - q) ** (size - j) for j in range(size + 1))


def _interval(weights: Weights, sigma: float) -> float:
    """A 32nd of a step's usual loss, at most 5e-4 and at least 5e-7; between a 2^15th and a 2^17th of its largest.

    The usual one: the mean over σ. The largest: 10 σ out.
    """
    usual = sum(j * w for j, w in enumerate(weights)) / sigma
    largest = _loss(weights, sigma, len(weights) - 1 + 10 * sigma)
    return max(min(5e-4, max(usual / 32, largest / (1 << 15), 5e-7)), largest / (1 << 17))


def _loss(weights: Weights, sigma: float, x: float) -> float:
    """log of the mixture's density over the Gaussian's, at ``x``."""
    each = [math.log(w) + j * (2 * x - j) / (2 * sigma * sigma) for j, w in enumerate(weights) if w]
    return float(np.logaddexp.reduce(each))


def _epsilon(events: list[tuple[Weights, float, int]], delta: float, h: float, removing: bool) -> float:
    """One direction: ε that bounds the loss of the table that has the record (``removing``), or has not."""
    cut, count = _CUT * delta, sum(n for _, _, n in events)
    while True:
        steps = [(*_step(w, s, h, cut / count, removing), n) for w, s, n in events]
        low, high = -_reach(steps, h, cut, -1), _reach(steps, h, cut, 1)
        first, cells = math.floor(low / h), math.ceil(high / h) - math.floor(low / h) + 1
        if cells <= _CELLS:
            break
        h *= max(2.0, cells / _CELLS)
    lost = cut + sum(n * infinite for _, _, infinite, n in steps)
    losses, masses = _composed(steps, first, _smooth(cells))
    return _at(h * losses, masses, delta, lost)


def _step(weights: Weights, sigma: float, h: float, cut: float, removing: bool) -> tuple[int, Values, float]:
    """One step's loss distribution on the multiples of ``h``: the first one, the masses from there on, at infinity."""
    z, most = math.sqrt(-2 * math.log(cut)), len(weights) - 1  # beyond z standard deviations lies less than ``cut``
    first = math.floor(_loss(weights, sigma, -z * sigma) / h) - 1
    last = math.ceil(_loss(weights, sigma, most + z * sigma) / h) + 1
    edges = h * np.arange(first, last + 1, dtype=np.float64)
    x = _outcomes(weights, sigma, edges)
    each = [_between(x - j / sigma) for j in range(most + 1)]
    without, mixed = each[0], sum((w * p for w, p in zip(weights, each, strict=True)), np.zeros_like(each[0]))
    drawn, other = (mixed, without) if removing else (without[::-1], mixed[::-1])
    if not removing:  # the loss of the other direction is this one's negative
        first, edges = -last, -edges[::-1]
    p, under_other = drawn[1:-1], other[1:-1]  # without the tails
    up = np.clip((p - under_other * np.exp(np.minimum(edges[:-1], _NO_EXP))) / -math.expm1(-h), 0, p)
    masses = np.append(p - up, 0.0)
    masses[1:] += up
    masses[0] += drawn[0]
    return first, masses, float(drawn[-1])


def _outcomes(weights: Weights, sigma: float, losses: Values) -> Values:
    """Where, in standard deviations, a step has these losses; -inf at and below log of the first weight.

    Without its first term, the log of the densities' ratio is a log-sum-exp of lines, so convex. Each line alone gives
    a place that is too far out. Newton's method comes down from the nearest of them, and needs few steps.
    """
    none = weights[0]
    some = np.minimum(losses, _NO_EXP)  # beyond, the first weight is nothing beside the ratio
    ratio = np.exp(some) - none if none < 0.5 else np.expm1(some) + math.fsum(weights[1:])  # neither cancels
    slopes = np.arange(1, len(weights)) / sigma
    offsets = np.log(weights[1:]) - slopes * slopes / 2
    with np.errstate(divide="ignore"):
        target = np.where(losses > _NO_EXP, losses, np.log(np.maximum(ratio, 0)))
    out = ((target[:, None] - offsets) / slopes).min(axis=1)
    finite = np.isfinite(out)
    x, target = out[finite], target[finite]
    for _ in range(_NEWTON if len(slopes) > 1 else 0):
        terms = offsets + slopes * x[:, None]
        top = terms.max(axis=1)
        parts = np.exp(terms - top[:, None])
        total = parts.sum(axis=1)
        change = (top + np.log(total) - target) * total / (parts * slopes).sum(axis=1)
        x = x - change
        if float(np.abs(change).max(initial=0.0)) < _NEAR:
            break
    out[finite] = x
    return out


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
