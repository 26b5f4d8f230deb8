"""What the clipped sum's own arithmetic may add to one record's share: a formula, part of a plan's sensitivity.

Sums over places are float64, in blocks of at most :data:`MAX_BLOCK` places, then the blocks. A sum in which every term
passes at most d roundings is off by at most d·u / (1 - d·u) times the sum of the terms' magnitudes, with u = 2^-53
(Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2). The magnitudes of P clipped gradients add
up to at most P·C in L2 norm.
"""

from __future__ import annotations

import math

MAX_MICROBATCH = 1024
LONGEST_BLOCK = 1024  # microbatches
MAX_BLOCK = MAX_MICROBATCH * LONGEST_BLOCK
# Dividing by the grid's width is off by up to 2^-8 of a width, for sums below 2^45 widths: twice, and to spare.
ON_GRID = 1 + 2.0**-6
_UNIT = 2.0**-53


def margin(parameters: int) -> float:
    """What is taken off the clip, relative to it, so that no gradient that is added is longer than C.

    A norm over D values, in any order, is off by at most D·u; a factor and its product by a few u more.
    """
    return 2 * (parameters + 32) * _UNIT


def relative(places: int) -> float:
    """How far apart, beyond C, two neighbouring sums over at most P ``places`` may be by rounding, divided by C.

    Two sums, each off by at most d·u·P·C. d is what one term passes through: two products, its block one place after
    the other, and the blocks. A microbatch that is summed by itself first passes no more. A last microbatch that is
    filled up adds fewer than 1024 places.
    """
    whole = places + MAX_MICROBATCH
    lost = (min(whole, MAX_BLOCK) + math.ceil(whole / LONGEST_BLOCK) + 4) * _UNIT
    return 2 * whole * lost / (1 - lost) if lost < 0.5 else math.inf
