"""Is it the noise that the plan claims? Each check takes standardised residuals: N(0, 1) if the claim is true.

All p-values are exact or conservative up to the stated normal approximation, two-sided, and corrected (Bonferroni)
for what a check looks at more than once: a correct program fails a check with probability alpha at most.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedveil.privacy.audit.evidence import Finding

POWER = 0.999
BLOCK = 1024  # coordinates
Residuals = NDArray[np.float64]


def two_sided(statistic: float, freedom: float) -> float:
    """p-value of a chi-square statistic that may be too small as well as too large."""
    return min(1.0, 2 * min(float(stats.chi2.cdf(statistic, freedom)), float(stats.chi2.sf(statistic, freedom))))


def multiplier(z: Residuals, claimed: float, confidence: float) -> tuple[float, float, float]:
    """The noise multiplier of a sum of h shares that the residuals show, with its two-sided confidence interval."""
    return of_square(float((z**2).sum()), z.size, claimed, confidence)


def of_square(square: float, samples: int, claimed: float, confidence: float) -> tuple[float, float, float]:
    """:func:`multiplier` from the sum of the squares of ``samples`` residuals."""
    tail = (1 - confidence) / 2
    high = claimed * math.sqrt(square / float(stats.chi2.ppf(tail, samples)))
    low = claimed * math.sqrt(square / float(stats.chi2.isf(tail, samples)))
    return claimed * math.sqrt(square / samples), low, high


def weakest(samples: int, alpha: float, power: float = POWER) -> float:
    """The largest factor on the noise's standard deviation, below 1, that ``samples`` residuals find with ``power``."""
    return math.sqrt(float(stats.chi2.ppf(alpha / 2, samples) / stats.chi2.ppf(power, samples)))


def variance(z: Residuals, claimed: float, alpha: float, confidence: float, members: int, name: str) -> Finding:
    """Chi-square on the variance against (σΔ)²·|U|/h, two-sided: a missing share shows even where |U| > h.

    Args:
        members: the largest |U|. It tells how many missing shares would show.
    """
    measured, low, high = multiplier(z, claimed, confidence)
    factor = weakest(z.size, alpha)
    shares = min(members, math.floor(members * (1 - factor**2)) + 1)
    return Finding(
        name, "variance of the opened noise against σ²Δ²·|U|/h", two_sided(float((z**2).sum()), z.size), alpha,
        measured, claimed, z.size, f"noise x{factor:.3f}; {shares} of {members} shares missing", (low, high),
    )  # fmt: skip


def every_round(z: Residuals, alpha: float) -> Finding:
    """The variance of each round by itself."""
    each = [two_sided(float((row**2).sum()), row.size) for row in z]
    worst = int(np.argmin(each))
    return Finding(
        "noise: every round", "variance of each round's noise against the claim", min(1.0, len(each) * each[worst]),
        alpha, float(z[worst].std()), 1.0, z.size, f"noise x{weakest(z.shape[1], alpha / len(z)):.3f} in one round",
    )  # fmt: skip


def every_coordinate(z: Residuals, alpha: float) -> Finding:
    """The variance of each coordinate over the rounds: it finds a part of the model without noise."""
    squares = (z**2).sum(0)
    p = 2 * np.minimum(stats.chi2.cdf(squares, len(z)), stats.chi2.sf(squares, len(z)))
    worst = int(np.argmin(p))
    return Finding(
        "noise: every coordinate", "variance of each coordinate over the rounds against the claim",
        min(1.0, float(p[worst]) * p.size), alpha, math.sqrt(float(squares[worst]) / len(z)), 1.0, z.size,
        f"noise x{weakest(len(z), alpha / p.size):.3f} in one coordinate",
    )  # fmt: skip


def mean(z: Residuals, alpha: float, name: str = "noise: mean") -> Finding:
    """Mean over everything, and of each coordinate over the rounds (which is normal, exactly)."""
    total = float(z.sum()) / math.sqrt(z.size)
    along = np.abs(z.sum(0)) / math.sqrt(len(z))
    p = min(2 * float(stats.norm.sf(abs(total))), 2 * float(stats.norm.sf(along.max())) * z.shape[1])
    least = (stats.norm.isf(alpha / 4) + stats.norm.ppf(POWER)) / math.sqrt(z.size)
    return Finding(
        name, "mean of what is left without the known sum, in all and by coordinate", min(1.0, 2 * p), alpha,
        float(z.mean()), 0.0, z.size, f"a shift of {least:.2g} standard deviations",
    )  # fmt: skip


def shape(z: Residuals, cell: float, alpha: float) -> Finding:
    """Kolmogorov-Smirnov against N(0, 1) on a grid of width ``cell``; conservative on a grid.

    A sum lies on the plan's grid: the empirical distribution is compared with the normal one at the cells' edges.
    """
    x = np.sort(z, axis=None)
    n, rank = x.size, np.arange(1, x.size + 1)
    over = float((rank / n - stats.norm.cdf(x + cell / 2)).max())
    under = float((stats.norm.cdf(x - cell / 2) - (rank - 1) / n).max())
    distance = max(over, under, 0.0)
    limit = float(stats.kstwobign.isf(alpha)) / math.sqrt(n)
    return Finding(
        "noise: shape", "distribution of the noise against the normal one (Kolmogorov-Smirnov)",
        kolmogorov(distance, n), alpha, distance, 0.0, n,
        f"a distance of {2 * limit:.3g} between the distribution functions",
    )  # fmt: skip


def kolmogorov(distance: float, samples: int) -> float:
    """How likely a distance this large between distribution functions is, asymptotically."""
    return float(stats.kstwobign.sf(distance * math.sqrt(samples)))


def rounds_apart(runs: list[Residuals], alpha: float) -> Finding:
    """Correlation between the noise of any two sums, of one run or of two: no noise may be used twice.

    For independent normal vectors in R^D, the squared cosine is Beta(1/2, (D - 1) / 2), exactly.
    """
    worst, p = 0.0, 1.0
    for width in {z.shape[1] for z in runs}:
        rows = np.concatenate([z for z in runs if z.shape[1] == width])
        lengths = np.linalg.norm(rows, axis=1)
        rows = rows / np.where(lengths > 0, lengths, 1)[:, None]
        cosines = np.abs(np.triu(rows @ rows.T, 1))
        pairs = len(rows) * (len(rows) - 1) // 2
        top = min(1.0, float(cosines.max()))
        p = min(p, pairs * float(stats.beta.sf(top**2, 0.5, (width - 1) / 2)))
        worst = max(worst, top)
    width = min(z.shape[1] for z in runs)
    least = (stats.norm.isf(alpha / 2 / sum(map(len, runs)) ** 2) + stats.norm.ppf(POWER)) / math.sqrt(width)
    return Finding(
        "noise: rounds independent", "largest correlation between the noise of two sums", min(1.0, 2 * p), alpha,
        worst, 0.0, sum(z.size for z in runs), f"a correlation of {least:.2g}",
    )  # fmt: skip


def coordinates_apart(z: Residuals, alpha: float) -> Finding:
    """Correlation between coordinates at any distance: no noise may be repeated along the model.

    The (circular) autocorrelation of each sum, averaged over the sums; normal with variance 1 / (rounds · D).
    """
    length = z.shape[1]
    power = np.abs(np.fft.rfft(z, axis=1)) ** 2
    auto = np.fft.irfft(power.sum(0), length) / max(float((z**2).sum()), 1e-300)
    lags = np.abs(auto[1 : length // 2])
    p = 2 * float(stats.norm.sf(float(lags.max()) * math.sqrt(z.size))) * lags.size
    least = (stats.norm.isf(alpha / 2 / lags.size) + stats.norm.ppf(POWER)) / math.sqrt(z.size)
    return Finding(
        "noise: coordinates independent", "largest correlation between coordinates at a fixed distance", min(1.0, p),
        alpha, float(lags.max()), 0.0, z.size, f"a correlation of {least:.2g}",
    )  # fmt: skip


def every_block(z: Residuals, alpha: float, name: str = "noise: every block") -> Finding:
    """The variance of each block of consecutive coordinates over all rounds: a long stretch without noise."""
    starts = np.arange(0, z.shape[1], BLOCK)
    squares = np.add.reduceat((z**2).sum(0), starts)
    numbers = np.diff([*starts, z.shape[1]]) * len(z)
    p = 2 * np.minimum(stats.chi2.cdf(squares, numbers), stats.chi2.sf(squares, numbers))
    worst = int(np.argmin(p))
    least = weakest(int(numbers[0]), alpha / p.size)
    return Finding(
        name, f"variance of each block of {BLOCK} coordinates, of {z.shape[1]} in all, against the claim",
        min(1.0, float(p[worst]) * p.size), alpha, math.sqrt(float(squares[worst] / numbers[worst])), 1.0, z.size,
        f"noise x{least:.3f} in one block",
    )  # fmt: skip


def largest(top: float, samples: int, alpha: float, name: str) -> Finding:
    """The largest absolute residual against its exact law: of n normal values it is at most x with (1 - 2Q(x))^n.

    Two-sided: a value that is too small shows a bounded support, one that is too large a heavy tail.
    """
    middle = float(stats.norm.isf(-math.expm1(math.log(0.5) / samples) / 2))
    bounded = float(stats.norm.isf(-math.expm1(math.log(alpha / 2) / samples) / 2))
    return Finding(
        name, "largest of the noise, in standard deviations, against its law", extreme(top, samples), alpha, top,
        middle, samples, f"values bounded at {bounded:.2f} standard deviations",
    )  # fmt: skip


def extreme(top: float, samples: int) -> float:
    """Two-sided p-value of the largest absolute value of ``samples`` standard normal ones."""
    one = min(1.0, 2 * float(stats.norm.sf(top)))
    below = math.exp(samples * math.log1p(-one)) if one < 1 else 0.0
    above = -math.expm1(samples * math.log1p(-one)) if one < 1 else 1.0
    return min(1.0, 2 * min(below, above))
