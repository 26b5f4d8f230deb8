"""From a clipped sum to integers on the plan's grid.

Order matters: clamp, round, *then* add noise. The clamp is 1-Lipschitz, so it does not grow the sensitivity;
rounding to nearest moves every coordinate by at most half a grid width, so that two neighbouring sums, at most
C apart, are at most C + sqrt(D)·γ apart on the grid. A noisy value is never clamped or rounded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import DataError


def to_grid(values: NDArray[np.float64], clamp: float, width: float) -> NDArray[np.int64]:
    """``(D,)`` integers: ``values`` clamped to ±``clamp`` and divided by ``width``, to nearest.

    Raises:
        DataError: a value is NaN (the caller's sum is broken; nothing may be released from it).
    """
    if not np.isfinite(values).all():
        raise DataError("the clipped sum holds a NaN or an infinity", hint="this is a fault of the program: report it")
    return np.rint(np.clip(values, -clamp, clamp) / width).astype(np.int64)
