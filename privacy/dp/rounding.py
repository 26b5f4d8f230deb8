"""What the clipped sum's own arithmetic may add to one record's share: a formula, part of a plan's sensitivity.

Sums over places are float64, in blocks: m <= :data:`MAX_MICROBATCH` places in a microbatch, at most
:data:`LONGEST_BLOCK` microbatches in a block, then the blocks. A sum of k terms in any order is off by at most
(k - 1)·u / (1 - (k - 1)·u) times the sum of the terms' magnitudes, with u = 2^-53 (Higham, Accuracy and Stability of
Numerical Algorithms, 2002, section 4.2). The magnitudes of P clipped gradients add up to at most P·C in L2 norm.
"""

from __future__ import annotations

import math

MAX_MICROBATCH = 1024
LONGEST_BLOCK = 1024
_UNIT = 2.0**-53


def margin(parameters: int) -> float:
    """What is taken off the clip, relative to it, so that no gradient that is added is longer than C.

    A norm over D values, in any order, is off by at most D·u; a factor and its product by a few u more.
    """
    return 2 * (parameters + 32) * _UNIT


def relative(places: int) -> float:
    """How far apart, beyond C, two neighbouring sums over at most P ``places`` may be by rounding, divided by C.

    Two sums, each off by at most depth·u·P·C. The depth is what one term passes through: two products, its microbatch,
    its block, the blocks. A last microbatch that is filled up adds fewer than 1024 places.
    """
    whole = places + MAX_MICROBATCH
    lost = (MAX_MICROBATCH + LONGEST_BLOCK + math.ceil(whole / LONGEST_BLOCK) + 4) * _UNIT
    return 2 * whole * lost / (1 - lost) if lost < 0.5 else math.inf
