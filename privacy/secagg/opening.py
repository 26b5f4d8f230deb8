"""Opening a sum of ciphertexts under the sum of their keys, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import SecureSumError
from fedveil.privacy.secagg import lattice, residuals
from fedveil.privacy.secagg._seal import Engine
from fedveil.privacy.secagg.params import KeysumParams


def phases(
    engine: Engine, params: KeysumParams, sums: NDArray[np.uint64], public: lattice.Uniform, key: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Of each chunk of ``sums`` its first block, and c0 + a * key modulo q: delta * message + errors, and a blinding.

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


def _check(noisy: NDArray[np.uint64], message: NDArray[np.uint64], params: KeysumParams) -> None:
    modulus = 1 << params.plain_bits
    apart = (residuals.rounded(noisy, params)[0] - message).view(np.int64) % modulus
    if int(np.minimum(apart, modulus - apart).max()) > 1:
        raise SecureSumError("SEAL's decryption differs from this module's", hint="reinstall the pinned TenSEAL")
