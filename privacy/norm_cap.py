"""How long an opened sum can be: a longer one is not the sum of honest sites, and nobody steps on it.

The bound follows from the plan alone, and is public like the sum. It fails for a run of honest sites with a probability
of at most 2^-39 a step. It bounds a sum's length, and says nothing about its direction.

    K·records(S)·C + K·sqrt(D)·γ·n/2 + γ·s·sqrt(m)·sqrt(D + 2·sqrt(D·L) + 2·L),     L = 40·ln 2

* records(S): so many records are in one step's sample at most (Bernstein's inequality for a binomial), each of them
  clipped to C. In mode ``client``: the clients. K: the plan's noisy steps of a round.
* Each of the n sites rounds D coordinates to the grid γ, by half a width at most.
* m members add discrete Gaussians of s grid units. These are sub-Gaussian with variance s² (Canonne, Kamath, Steinke,
  NeurIPS 2020), and so is the length of their sum (Hsu, Kakade, Zhang, Electron. Commun. Probab. 2012, Theorem 2.1).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import SumTooLong
from fedveil.common.threads import mapped, spans
from fedveil.privacy.dp.rounding import relative
from fedveil.privacy.plan import PrivacyPlan

_L = 40 * math.log(2)
_SPARE = 2  # the sites may hold so many times the declared records: nobody counts them, and a site's clamp allows this
_HALF = 1 << 23
_CHUNK = 1 << 16  # squares below 2^46 each: their sum stays below 2^62


def cap(plan: PrivacyPlan, members: int) -> int:
    """The largest length of an opened sum of ``members`` sites, in grid units, rounded up."""
    D, noise = plan.model.parameters, plan.share_std * math.sqrt(members)
    length = _in_sample(plan, members) * plan.clip * (1 + relative(plan.places(plan.capacity))) / plan.grid
    length += math.sqrt(D) * plan.sites / 2
    length = plan.noisy_steps * length + noise * math.sqrt(D + 2 * math.sqrt(D * _L) + 2 * _L)
    return math.ceil(min(length, 2.0**1000))  # a hostile plan may make it infinite


def check(plan: PrivacyPlan, opened: NDArray[np.int64], members: int) -> None:
    """Raise :class:`SumTooLong` if ``opened``, ``(D,)`` in grid units below 2^46, is longer than :func:`cap`.

    The length is compared in integers: every participant comes to the same answer.
    """
    if squared(opened) > (most := cap(plan, members)) ** 2:
        raise SumTooLong(
            f"the opened sum is longer than the {most * plan.grid:.6g} that the plan's records and noise can reach",
            hint="a member or the server altered it; the round stays charged, and the model is not moved",
        )


def squared(values: NDArray[np.int64]) -> int:
    """The squared length of integers below 2^46 in size, exact."""
    return sum(mapped(lambda part: _squared(values[part]), spans(values.size, _CHUNK)))


def _squared(chunk: NDArray[np.int64]) -> int:
    if max(int(chunk.max()), -int(chunk.min())) < _HALF:
        return int(chunk @ chunk)
    high, low = np.divmod(np.abs(chunk), _HALF)
    return (int(high @ high) << 46) + (int(high @ low) << 24) + int(low @ low)


def _in_sample(plan: PrivacyPlan, members: int) -> float:
    """So many records (clients) of ``members`` are in a step's sample at most, except with probability 2^-40."""
    whole = plan.mode == "client"
    # no member holds more than its capacity
    most = plan.sites if whole else min(_SPARE * plan.records, members * plan.capacity)
    if plan.sample_rate == 1:
        return most
    mean, variance = plan.sample_rate * most, plan.sample_rate * (1 - plan.sample_rate) * most
    return min(most, mean + _L / 3 + math.sqrt(_L * _L / 9 + 2 * _L * variance))
