"""Poisson sampling of records from the operating system's randomness."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import PlanError
from fedveil.privacy.dp.debug_noise import replayed
from fedveil.privacy.dp.noise import KeyStream

_FEW = 512  # up to here the operating system is faster than setting up a cipher


def poisson_sample(records: int, rate: float) -> NDArray[np.bool_]:
    """``(records,)`` mask: each record is in with probability ``rate`` (to 2^-64), independently of all others.

    Rate 1 takes every record. The mask and its size must not leave the site.
    """
    if not 0 < rate <= 1:
        raise PlanError(f"sample rate {rate!r} is not in (0, 1]")
    if rate == 1:
        return np.ones(records, bool)
    return random_words(records) < np.uint64(int(rate * 2.0**64))


def random_words(count: int) -> NDArray[np.uint64]:
    """``(count,)`` independent uniform 64-bit words, straight from the operating system or by a key from there."""
    if count > _FEW:
        return KeyStream().words(count)
    return np.frombuffer(replayed(8 * count) or os.urandom(8 * count), "<u8")
