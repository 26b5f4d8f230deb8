"""From a clipped sum to integers on the plan's grid.

Order matters: clamp, round, *then* add noise. The clamp is 1-Lipschitz, so it does not grow the sensitivity;
rounding to nearest moves every coordinate by at most half a grid width, so that two neighbouring sums, at most
C apart, are at most C + sqrt(D)·γ apart on the grid. A noisy value is never clamped or rounded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import DataError
from fedveil.common.threads import each, spans

_CHUNK = 1 << 17  # values at a time: they stay in the cache
_PIECE = 1 << 18  # of one thread


def to_grid(values: NDArray[np.float64], clamp: float, width: float) -> NDArray[np.int64]:
    """``(D,)`` integers: ``values`` clamped to ±``clamp`` and divided by ``width``, to nearest.

    Raises:
        DataError: a value is NaN or infinite (the caller's sum is broken; nothing may be released from it).
    """
    out = np.empty(values.shape, np.int64)
    given, made = values.reshape(-1), out.reshape(-1)

    def rounded(piece: slice) -> None:
        for part in spans(piece.stop, _CHUNK, piece.start):
            chunk = given[part]
            low, high = chunk.min(), chunk.max()
            if not (np.isfinite(low) and np.isfinite(high)):  # both are NaN where one value is
                raise DataError(
                    "the clipped sum holds a NaN or an infinity", hint="this is a fault of the program: report it"
                )
            # Always, also where nothing is cut off: time must not tell.
            made[part] = np.rint(np.clip(chunk, -clamp, clamp) / width)

    each(rounded, spans(given.size, _PIECE))
    return out
