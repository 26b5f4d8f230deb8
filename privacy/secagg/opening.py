"""Opening a sum of ciphertexts under the sum of their keys, chunk by chunk over threads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import SecureSumError
from fedveil.common.threads import mapped, spans
from fedveil.privacy.secagg import lattice, residuals
from fedveil.privacy.secagg._seal import Engine
from fedveil.privacy.secagg.params import KeysumParams


def read(
    engine: Engine,
    params: KeysumParams,
    sums: NDArray[np.uint64],
    public: lattice.Uniform,
    key: NDArray[np.int64],
    reader: residuals.Reader | None,
) -> bytes | None:
    """The packed phases, c0 + a * key modulo q: delta * message + errors, and a blinding if there is one.

    Args:
        sums: (blocks, N), the sum of ciphertexts.
        reader: is given the phases, where the values are to be read.

    Returns:
        None as soon as a block's errors are not those that ``reader`` takes.

    Raises:
        SecureSumError: SEAL decrypts the first block too, and the two differ by more than one rounding; or a value
            left the bound of the plan.
    """
    out, transformed = lattice.Packed(len(sums)), engine.transformed(key)

    def opened(chunk: tuple[slice, NDArray[np.uint64]]) -> bool:
        part, a = chunk
        c0, first = sums[part], engine.inverse(a[:1]) if part.start == 0 else None
        product = engine.product(a, transformed)
        phases = lattice.reduce(np.add(c0, product, out=product).view(np.int64))
        if first is not None:
            _check(phases[:1], engine.decrypt(engine.decryptor(key), c0[:1], first), params)
        out.put(part.start, phases).release()
        return reader is None or reader.take(part.start, phases)

    try:
        chunks = ((part, public.take(part.stop - part.start)) for part in spans(len(sums), lattice.CHUNK))
        return out.value() if all(mapped(opened, chunks)) else None
    finally:
        transformed.fill(0)


def _check(noisy: NDArray[np.uint64], message: NDArray[np.uint64], params: KeysumParams) -> None:
    modulus = 1 << params.plain_bits
    apart = (residuals.rounded(noisy, params)[0] - message).view(np.int64) % modulus
    if int(np.minimum(apart, modulus - apart).max()) > 1:
        raise SecureSumError("SEAL's decryption differs from this module's", hint="reinstall the pinned TenSEAL")
