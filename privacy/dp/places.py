"""A step of constant shape: how many places it has, and which record sits where.

Libraries of linear algebra round a row of a batch differently by its place in the batch. With weights that cancel, a
difference in the last bit becomes a whole clip. So no record may decide where another one is computed. Each step has
the same number of places, and each sampled record gets a place at random. Places that stay empty hold one constant
record, which is selected away. The proof is in ``docs/sensitivity.md``.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import PlanError
from fedveil.privacy.dp.sampling import poisson_sample, random_words

EMPTY = -1
SPARE = 4
_SLACK = 1e-3  # of a logarithm: more than double precision loses below


def places_needed(capacity: int, rate: float, overflow: float) -> int:
    """The fewest places that a step's sample outgrows with a probability of at most ``overflow``.

    Args:
        capacity: K, the most records (or persons) that the site may ever hold.
        rate: the chance of each to be in the sample.
        overflow: above 0 where ``rate`` is below 1.

    By Chernoff's bound for the others' sample, Binomial(K - 1, q): P[B >= P] <= exp(-(K - 1) · KL(P / (K - 1) || q)).
    :data:`SPARE` more, so that the same holds for five units that come together. K places always suffice; for ``rate``
    1 nothing less does.

    Raises:
        PlanError: a capacity below 1, a rate outside (0, 1], or no positive overflow where one is needed.
    """
    if capacity < 1 or not 0 < rate <= 1 or (rate < 1 and not overflow > 0):
        raise PlanError(f"no step has {capacity} records at a sample rate of {rate!r}", hint="a capacity of 1 or more")
    others = capacity - 1
    if rate == 1 or others < 1:
        return capacity
    needed = -math.log(overflow) + _SLACK + others * 4e-16
    low, high = math.floor(others * rate), capacity  # low is too few (or 0), high always enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _exponent(others, rate, middle) >= needed else (middle, high)
    return min(capacity, high + SPARE)


def _exponent(others: int, rate: float, places: int) -> float:
    """(K - 1) · KL(P / (K - 1) || q); for P above the mean, minus the logarithm of a bound of P[B >= P]."""
    share = places / others
    if share <= rate:
        return 0.0
    if places >= others:
        return -others * math.log(rate) if places == others else math.inf
    return others * (share * math.log(share / rate) + (1 - share) * math.log((1 - share) / (1 - rate)))


def seat(records: int, rate: float, places: int) -> NDArray[np.int64]:
    """``(places,)``: which record sits at each place, or :data:`EMPTY`. Sample and places are drawn anew for each call.

    Every record is in the sample with probability ``rate``, by itself. The sampled ones sit in a uniformly random
    injection into the places. If there are more than places, all stay empty: the step then releases noise only.
    """
    seats = np.full(places, EMPTY, np.int64)
    sampled = np.flatnonzero(poisson_sample(records, rate))
    if len(sampled) <= places:
        seats[_permutations(1, places)[0, : len(sampled)]] = sampled
    return seats


def seat_each(records: NDArray[np.int64], rate: float, places: int) -> NDArray[np.int64]:
    """``(S, places)``: the same for each of S sites with so many ``records``, each by itself, drawn in one go."""
    sites, most = len(records), int(records.max(initial=0))
    there = np.arange(most) < records[:, None]
    sampled = there & poisson_sample(sites * most, rate).reshape(sites, most)
    sampled &= sampled.sum(1, keepdims=True) <= places
    order = _permutations(sites, places)
    site, record = np.nonzero(sampled)
    seats = np.full((sites, places), EMPTY, np.int64)
    seats[site, order[site, np.cumsum(sampled, 1)[site, record] - 1]] = record
    return seats


def _permutations(sites: int, n: int) -> NDArray[np.int64]:
    """Uniform permutations: the orders of n random words. Equal words would favour one order, so they are redrawn."""
    while True:
        words = random_words(sites * n).reshape(sites, n)
        ordered = np.sort(words, axis=1)
        if (ordered[:, 1:] != ordered[:, :-1]).all():
            return np.argsort(words, axis=1)
