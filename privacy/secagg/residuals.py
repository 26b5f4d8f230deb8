"""What the phases of an opened sum hold: its values, if the errors in them are those of a sum of honest sites.

A phase is delta * message + error modulo q. Plain numpy: an auditor reads an opened sum without SEAL.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import SecureSumError
from fedveil.privacy.secagg import lattice
from fedveil.privacy.secagg.params import VARIANCE, KeysumParams, N

# A block's mean squared error stays below 1.5 times its variance except with probability exp(-193): errors are
# strictly sub-Gaussian (sums of Rademacher variables), so that the chi-square bound 1.5^2048 * exp(-1024) holds.
# Under a wrong key it is about delta^2 / 12, at least forty times as much for any parameters that choose() returns.
EXCESS = 1.5


class Reader:
    """Reads the values of a sum from its phases, which are given in order, a few blocks at a time.

    Args:
        members: how many contributions were added.
        length, bound: of the vector, and of the absolute value of each of its sums.
    """

    def __init__(self, params: KeysumParams, members: int, length: int, bound: int) -> None:
        self._params, self._members, self._length, self._bound = params, members, length, bound
        self._per_block = params.per_coefficient * N
        self._out = np.empty(params.blocks * self._per_block, np.int64)
        self._done = 0

    def take(self, phases: NDArray[np.uint64]) -> bool:
        """Read the next ``(blocks, N)`` phases, which are changed; False if a block's errors are not honest ones.

        Raises:
            SecureSumError: a packed value left its place: the sum left the bound of the plan.
        """
        found = values(phases, self._params, self._members)
        if found is None:
            return False
        self._out[self._done * self._per_block : (self._done + len(found)) * self._per_block] = found.reshape(-1)
        self._done += len(found)
        return True

    @property
    def values(self) -> NDArray[np.int64]:
        """``(length,)``; :class:`SecureSumError` if a value is beyond the bound."""
        opened = self._out[: self._length]
        if max(int(opened.max()), -int(opened.min())) > self._bound:
            raise SecureSumError("the sum left the bound declared in the plan", hint="the plan's range is too small")
        return opened


def values(phases: NDArray[np.uint64], params: KeysumParams, members: int) -> NDArray[np.int64] | None:
    """The packed values of ``(blocks, N)`` phases without blinding, which are changed in place.

    Returns:
        (blocks, k, N) integers, or None if a block's errors are not those of a sum of ``members`` honest sites.

    Raises:
        SecureSumError: a packed value left its place: the sum left the bound of the plan.
    """
    phases += np.uint64(params.delta * lattice.message_offset(params))
    phases = lattice.reduce(phases.view(np.int64))
    message, error = rounded(phases, params)
    if float(np.einsum("ij,ij->i", error, error).max()) > EXCESS * VARIANCE * members * N:
        return None
    return lattice.unpack_values(message, params)


def rounded(phases: NDArray[np.uint64], params: KeysumParams) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
    """Nearest messages and the errors. At the seam delta * t = -1 makes an error one larger, which is harmless."""
    delta = np.uint64(params.delta)
    message = (phases + delta // np.uint64(2)) // delta
    error = (phases - message * delta).view(np.int64).astype(np.float64)
    message &= np.uint64((1 << params.plain_bits) - 1)
    return message, error
