"""The integer grid of a secure sum: how fine, and how far a site's coordinate may reach.

Sums travel modulo 2^46, or less where many sites' errors need more room. Several small values share one ciphertext
coefficient. A grid that is too coarse widens the sensitivity, and one that is too fine leaves no room. :func:`choose`
balances both, :func:`largest_sum` says what fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fedveil.common.errors import PlanError

MODULUS_BITS = 46
MIN_SHARE_STD = 64.0
_AIM_INFLATION = 0.01
_TAIL = 2.0**-40
_USUAL = 24.0


def choose(
    sites: int,
    clip: float,
    share: float,
    D: int,
    steps: int,
    per_site: float,
    *,
    whole: bool = False,
    bits: Callable[[int], int] = lambda values: MODULUS_BITS,
    times: int = 1,
) -> tuple[float, float]:
    """Grid width and clamp: the most values per ciphertext coefficient that leave every site its usual range.

    A site's coordinate reaches ``per_site * clip`` only if all its records pull one parameter the same way. So a
    packing must leave room for a clamp of 24 clips (fewer where many sites hold few records each, or that maximum if it
    is smaller).

    Args:
        share: σ of one site's share of the noise, in clips; of a round's K steps together, in K clips.
        whole: nothing may ever be cut off: the clamp is ``per_site`` clips exactly.
        bits: log2 of the modulus that the sum can offer for so many values per coefficient; 0: none.
        times: K, how many sums with their noise a site adds up before it sends them.

    Raises:
        PlanError: it does not fit.
    """
    wanted = per_site if whole else min(per_site, _USUAL, max(4.0, 480.0 / sites))
    clamp = grid = noise = room = 0.0
    step, senders = share * math.sqrt(times), sites * times
    for values in (4, 3, 2, 1):
        room = (1 << (bits(values) // values)) // 2 - 1
        if room < 1:
            continue
        grid = min(_AIM_INFLATION * clip / math.sqrt(D), step * clip / MIN_SHARE_STD)
        if values == 1 and not whole:
            grid /= 16
        noise = tail_factor(D * steps) * math.sqrt(senders) * step * clip * (1 + _AIM_INFLATION)
        clamp = min((room * 0.999 * grid - noise) / senders, per_site * clip)
        if clamp >= wanted * clip or values == 1:
            break
    if not clamp > 0:
        raise PlanError(
            "the noise alone does not fit into a ciphertext", hint="plan with a larger epsilon or fewer parameters"
        )
    if whole and clamp < wanted * clip:
        raise PlanError(
            "sums over so many records do not fit into a ciphertext", hint="plan with fewer declared records"
        )
    # The width that just fills the room: a finer grid costs nothing.
    return grid * min(1.0, (clamp * senders + noise) / (room * 0.999 * grid)), clamp


def tail_factor(draws: int) -> float:
    """z such that ``draws`` Gaussians all stay below z standard deviations, except with probability 2^-40."""
    return math.sqrt(2 * math.log(2 * draws / _TAIL))


def largest_sum(sums: int, sites: int, clamp: float, grid: float, share_std: float, draws: int) -> int:
    """Largest absolute coordinate of an opened sum in grid units, except with probability 2^-40 over ``draws``.

    ``sums`` were clamped and rounded before they were added up at ``sites``; each site's noise has ``share_std``.
    """
    bound = sums * (clamp / grid + 1) + tail_factor(draws) * math.sqrt(sites) * share_std
    return math.ceil(min(bound, 2.0**1000))  # a hostile grid may make it infinite
