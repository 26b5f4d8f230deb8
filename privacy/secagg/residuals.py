"""What the phases of an opened sum hold: its values, if the errors in them are those of a sum of honest sites.

A phase is delta * message + error modulo q. Plain numpy: an auditor reads an opened sum without SEAL.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import SecureSumError
from fedveil.common.threads import mapped
from fedveil.privacy.secagg import lattice
from fedveil.privacy.secagg.params import VARIANCE, KeysumParams, N

# A block's mean squared error stays below 1.5 times its variance except with probability exp(-193): errors are
# strictly sub-Gaussian (sums of Rademacher variables), so that the chi-square bound 1.5^2048 * exp(-1024) holds.
# Under a wrong key it is about delta^2 / 12, at least forty times as much for any parameters that choose() returns.
EXCESS = 1.5


class Reader:
    """Reads the values of a sum from its phases, a few blocks at a time; threads may read different blocks.

    Args:
        members: how many contributions were added.
        length, bound: of the vector, and of the absolute value of each of its sums.
    """

    def __init__(self, params: KeysumParams, members: int, length: int, bound: int) -> None:
        self._params, self._members, self._length, self._bound = params, members, length, bound
        self._out = np.empty((params.blocks, params.per_coefficient, N), np.int64)

    def take(self, first: int, phases: NDArray[np.uint64]) -> bool:
        """Read ``(blocks, N)`` phases from block ``first`` on, which are changed; False if errors are not honest ones.

        Raises:
            SecureSumError: a packed value left its place: the sum left the bound of the plan.
        """
        return values(phases, self._params, self._members, self._out[first : first + len(phases)])

    def take_all(self, packed: bytes | memoryview) -> bool:
        """Read all phases, 7 bytes each, over threads; :class:`WireError` if one is not below q."""
        read = mapped(lambda p: self.take(p[0], lattice.from_bytes(p[1])), lattice.chunks(packed))
        return all(read)

    @property
    def values(self) -> NDArray[np.int64]:
        """``(length,)``; :class:`SecureSumError` if a value is beyond the bound."""
        opened = self._out.reshape(-1)[: self._length]
        if max(int(opened.max()), -int(opened.min())) > self._bound:
            raise SecureSumError("the sum left the bound declared in the plan", hint="the plan's range is too small")
        return opened


def values(phases: NDArray[np.uint64], params: KeysumParams, members: int, out: NDArray[np.int64]) -> bool:
    """Read the packed values of ``(blocks, N)`` phases without blinding, which are changed in place.

    Args:
        out: (blocks, k, N), filled with them.

    Returns:
        Whether a block's errors are those of a sum of ``members`` honest sites; otherwise ``out`` means nothing.

    Raises:
        SecureSumError: a packed value left its place: the sum left the bound of the plan.
    """
    phases += np.uint64(params.delta * lattice.message_offset(params))
    phases = lattice.reduce(phases.view(np.int64))
    message, error = rounded(phases, params)
    if float(np.einsum("ij,ij->i", error, error).max()) > EXCESS * VARIANCE * members * N:
        return False
    lattice.unpack_values(message, params, out)
    return True


def rounded(phases: NDArray[np.uint64], params: KeysumParams) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
    """Nearest messages and the errors. At the seam delta * t = -1 makes an error one larger, which is harmless."""
    delta = np.uint64(params.delta)
    message = (phases + delta // np.uint64(2)) // delta
    error = (phases - message * delta).view(np.int64).astype(np.float64)
    message &= np.uint64((1 << params.plain_bits) - 1)
    return message, error
