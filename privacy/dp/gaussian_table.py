"""How a discrete Gaussian is proposed: a short alias table, and comparisons of random bits that are exact at any depth.

A draw's size is y = k·s + u, with s a power of two and 0 <= u < s. The table gives k with probability proportional to
exp(-(k·s)²/(2σ²)), u is uniform, and y is kept with probability exp(-(u² + 2·u·k·s)/(2σ²)): the product is the law.
At least 94 % of the proposals are kept (for σ >= 8; below, s = 1 and all are).

Probabilities are real numbers, random words are not. So a few bits are compared first. Where these are the leading bits
of the threshold itself, or too near to what double precision knows of it, 256 more bits are drawn and compared with
the threshold to 280 bits or more. Hence the law is that of the paper, cut at 16 standard deviations (a mass below
2^-183), to within 2^-250 a draw.

Sources: Canonne, Kamath & Steinke, "The Discrete Gaussian for Differential Privacy", 2020 (the law); Walker 1977 and
Vose 1991 (alias tables).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Context, Decimal, Inexact, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CELLS = 256
KEEP_BITS, ACCEPT_BITS, MORE_BITS = 24, 32, 256
_FINE = 8  # σ/s is at least this wherever s > 1: so many proposals are kept
_CONTEXT = Context(prec=130)  # decimal digits: 430 bits
_CONTEXT.traps[Inexact] = False


class Table(NamedTuple):
    """What one σ needs.

    Attributes:
        shift: s = 2^shift.
        keep: ``(256,)`` leading bits of each cell's threshold: below it the cell keeps its own k.
        alias: ``(256,)`` the k that a cell gives otherwise.
        exact: each threshold as an integer of ``KEEP_BITS + MORE_BITS`` bits.
    """

    shift: int
    keep: NDArray[np.uint32]
    alias: NDArray[np.intp]
    exact: tuple[int, ...]


@lru_cache(16)
def table(std: float) -> Table:
    """The alias table of σ = ``std``, at least 1/2, exact to 2^-280."""
    shift = max(0, math.frexp(std / _FINE)[1] - 1)
    with localcontext(_CONTEXT):
        weights = [_exp(Fraction(k << shift) ** 2 / (2 * Fraction(std) ** 2)) for k in range(CELLS)]
        total = sum(weights)
        left = [weight * CELLS / total for weight in weights]
        alias = list(range(CELLS))
        small = [i for i in range(CELLS) if left[i] < 1]
        large = [i for i in range(CELLS) if left[i] >= 1]
        while small and large:
            low, high = small.pop(), large[-1]
            alias[low] = high
            left[high] -= 1 - left[low]
            if left[high] < 1:
                small.append(large.pop())
        for i in small + large:  # what rounding left over: these cells are full
            left[i] = Decimal(1)
        exact = tuple(min(int(v * (1 << KEEP_BITS + MORE_BITS)), 1 << KEEP_BITS + MORE_BITS) for v in left)
    keep = np.array([v >> MORE_BITS for v in exact], np.uint32)
    return Table(shift, keep, np.array(alias), exact)


def acceptance(std: float, base: int, rest: int) -> int:
    """exp(-(u² + 2·u·k·s)/(2σ²)) for k·s = ``base`` and u = ``rest``, as an integer of ``ACCEPT_BITS + MORE_BITS``."""
    with localcontext(_CONTEXT):
        return int(_exp(Fraction(rest * (rest + 2 * base)) / (2 * Fraction(std) ** 2)) * (1 << ACCEPT_BITS + MORE_BITS))


def below(leading: int, threshold: int, more: Callable[[], int]) -> bool:
    """Whether a uniform number with these ``leading`` bits is below ``threshold``; ``more()`` gives the others."""
    return (leading << MORE_BITS | more()) < threshold


def _exp(minus: Fraction) -> Decimal:
    return (-Decimal(minus.numerator) / Decimal(minus.denominator)).exp()
