"""The values from which training starts: the same bits on every machine, so that sites can step a model themselves.

torch's own generator gives other last bits on another CPU, because the vector units compute logarithms and cosines
differently. Here everything is exact or correctly rounded by IEEE 754: integers, powers of two, one square root, one
division. So sites, server and auditor agree on a start without sending it.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

_SUMMED = 12  # uniform words in one value: their sum has a variance of one (Irwin and Hall, 1927)
_CENTRE = _SUMMED * 65535 / 2
_CHUNK = 1 << 18  # values from one call of SHAKE-256


def normals(count: int, fan_in: int, seed: int, what: str) -> NDArray[np.float32]:
    """``(count,)`` float32 values of mean 0 and variance 1/``fan_in``, close to a normal distribution, at most 6 σ.

    Each is the sum of twelve uniform 16-bit words out of SHAKE-256, centred and scaled.

    Args:
        fan_in: at least 1.
        seed: public, from 0 up. what: tells several draws under one seed apart.
    """
    scale, out = 65536.0 * math.sqrt(fan_in), np.empty(count, np.float32)
    for first in range(0, count, _CHUNK):
        size = min(_CHUNK, count - first)
        label = f"fedveil/initial/1|{seed}|{what}|{first // _CHUNK}"
        data = hashlib.shake_256(label.encode()).digest(2 * _SUMMED * size)
        words = np.frombuffer(data, "<u2").reshape(size, _SUMMED).sum(1, dtype=np.int64)
        out[first : first + size] = (words - _CENTRE) / scale
    return out
