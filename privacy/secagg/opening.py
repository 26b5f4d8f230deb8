"""Opening a sum of ciphertexts under the sum of their keys, chunk by chunk, and judging the errors found in it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import SecureSumError
from fedveil.privacy.secagg import lattice
from fedveil.privacy.secagg._seal import Engine
from fedveil.privacy.secagg.params import VARIANCE, KeysumParams, N

# A block's mean squared error stays below 1.5 times its variance except with probability exp(-193): errors are
# strictly sub-Gaussian (sums of Rademacher variables), so that the chi-square bound 1.5^2048 * exp(-1024) holds.
# Under a wrong key it is about delta^2 / 12, at least forty times as much for any parameters that choose() returns.
EXCESS = 1.5


def phases(
    engine: Engine, params: KeysumParams, sums: NDArray[np.uint64], public: lattice.Uniform, key: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """(first block, c0 + a * key modulo q) of each chunk of ``sums``: delta * message + errors, and a blinding if any.

    The first block is decrypted by SEAL too; :class:`SecureSumError` if the two differ by more than one rounding.
    """
    for first in range(0, len(sums), lattice.CHUNK):
        c0 = sums[first : first + lattice.CHUNK]
        a = public.take(len(c0))
        noisy = lattice.reduce((c0 + engine.multiply(a, key)).view(np.int64))
        if first == 0:
            message = engine.decrypt(engine.decryptor(key), c0[:1], engine.inverse(a[:1]))
            _check(noisy[:1], message, params)
        yield first, noisy


def values(noisy: NDArray[np.uint64], params: KeysumParams, members: int) -> NDArray[np.int64] | None:
    """The packed values of a chunk.

    Args:
        noisy: (blocks, N) of :func:`phases`, without blinding; changed in place.
        members: how many contributions were added.

    Returns:
        (blocks, k, N) integers, or None if a block's errors are not those of a sum of honest sites.

    Raises:
        SecureSumError: a packed value left its place: the sum left the bound of the plan.
    """
    noisy += np.uint64(params.delta * lattice.message_offset(params))
    noisy = lattice.reduce(noisy.view(np.int64))
    message, error = _round(noisy, params)
    if float(np.einsum("ij,ij->i", error, error).max()) > EXCESS * VARIANCE * members * N:
        return None
    return lattice.unpack_values(message, params)


def bounded(opened: NDArray[np.int64], bound: int) -> NDArray[np.int64]:
    """``opened``, if every value is within ``bound``; :class:`SecureSumError` otherwise."""
    if opened.size and max(int(opened.max()), -int(opened.min())) > bound:
        raise SecureSumError("the sum left the bound declared in the plan", hint="the plan's range is too small")
    return opened


def _round(noisy: NDArray[np.uint64], params: KeysumParams) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
    """Nearest messages and the errors. At the seam delta * t = -1 makes an error one larger, which is harmless."""
    delta = np.uint64(params.delta)
    message = (noisy + delta // np.uint64(2)) // delta
    error = (noisy - message * delta).view(np.int64).astype(np.float64)
    message &= np.uint64((1 << params.plain_bits) - 1)
    return message, error


def _check(noisy: NDArray[np.uint64], message: NDArray[np.uint64], params: KeysumParams) -> None:
    modulus = 1 << params.plain_bits
    apart = (_round(noisy, params)[0] - message).view(np.int64) % modulus
    if int(np.minimum(apart, modulus - apart).max()) > 1:
        raise SecureSumError("SEAL's decryption differs from this module's", hint="reinstall the pinned TenSEAL")
