"""Poisson sampling of records from the operating system's randomness."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import PlanError
from fedveil.privacy.dp.noise import KeyStream


def poisson_sample(records: int, rate: float) -> NDArray[np.bool_]:
    """``(records,)`` mask: each record is in with probability ``rate`` (to 2^-64), independently of all others.

    Rate 1 takes every record. The mask and its size must not leave the site.
    """
    if not 0 < rate <= 1:
        raise PlanError(f"sample rate {rate!r} is not in (0, 1]")
    if rate == 1:
        return np.ones(records, bool)
    return KeyStream().words(records) < np.uint64(int(rate * 2.0**64))
