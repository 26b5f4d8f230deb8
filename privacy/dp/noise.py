"""Integer noise from the operating system's randomness.

A discrete Gaussian on Z (Canonne, Kamath & Steinke, "The Discrete Gaussian for Differential Privacy", 2020). It skips
or favours no integer. It is drawn from AES-256-CTR key streams whose keys are fresh from ``os.urandom`` for every
chunk of every release: nothing can be forked or reused.

How it is drawn is told in :mod:`fedveil.privacy.dp.gaussian_table`: the law is met to within 2^-180 a draw, tails
included.
"""

from __future__ import annotations

import math
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedveil.common.errors import PlanError
from fedveil.common.threads import each, spans
from fedveil.privacy.dp.debug_noise import replayed
from fedveil.privacy.dp.gaussian_table import ACCEPT_BITS, CELLS, KEEP_BITS, MORE_BITS, Table, acceptance, below, table

MAX_STD = float(1 << 48)
_PROPOSALS = 1 << 17  # at a time: few enough for the cache, and enough for threads that meet between them
_CHUNK = 1 << 19  # draws under one key
_NARROW = 22  # k < 2^8, so that 2·k·s + u stays below 2^31
_ZEROS = bytes(1 << 20)
_NEAR = 1.5  # of 2^32: double precision knows the threshold to far less than this


class KeyStream:
    """Uniform bits from AES-256-CTR under a key that is drawn when the object is made and never leaves it."""

    def __init__(self) -> None:
        self._encryptor = Cipher(algorithms.AES(replayed(32) or os.urandom(32)), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """``(count,)`` independent uniform 64-bit words."""
        out = np.empty(8 * count + 16, np.uint8)
        for at in range(0, 8 * count, len(_ZEROS)):
            step = min(8 * count - at, len(_ZEROS))
            self._encryptor.update_into(memoryview(_ZEROS)[:step], out.data[at : at + step + 15])
        return out[: 8 * count].view("<u8")

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """Uniform multiples of 2^-53 in [0, 1), in the shape asked for."""
        return ((self.words(math.prod(shape)) >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)

    def below(self, bound: int, count: int) -> NDArray[np.int64]:
        """``(count,)`` uniform integers in [0, bound), without modulo bias (rejection)."""
        limit = np.uint64((1 << 64) // bound * bound - 1)
        out = self.words(count)
        bad = np.flatnonzero(out > limit)
        if bad.size:
            out = out.copy()
            while bad.size:
                out[bad] = self.words(bad.size)
                bad = bad[out[bad] > limit]
        return (out % np.uint64(bound)).astype(np.int64)


def discrete_gaussian(std: float, size: int, stream: KeyStream | None = None) -> NDArray[np.int64]:
    """``(size,)`` independent draws from the discrete Gaussian N_Z(0, std²).

    They are drawn in chunks of 2^19 over the threads of :mod:`fedveil.common.threads`, each under a key of its own.

    Args:
        std: the parameter σ in grid units, in [0.5, 2^48]. From 2 upwards the variance is σ² to within 1e-30.
        size: how many.
        stream: for tests, all draws from this one; by default a fresh :class:`KeyStream` for each chunk.
    """
    if not (0.5 <= std <= MAX_STD):
        raise PlanError(f"noise of {std!r} grid units is outside [0.5, 2^48]", hint="another noise multiplier")
    proposals = table(std)
    out = np.empty(size, np.int64)
    if stream is not None or size <= _CHUNK:
        _fill(out, std, proposals, stream or KeyStream())
    else:
        # The keys are drawn here, one after the other, so that it does not matter which thread comes first.
        drawn = ((part, KeyStream()) for part in spans(size, _CHUNK))
        each(lambda one: _fill(out[one[0]], std, proposals, one[1]), drawn)
    return out


def _fill(out: NDArray[np.int64], std: float, proposals: Table, stream: KeyStream) -> None:
    """Fill ``out`` with draws from one stream."""
    done = 0
    while done < out.size:
        got = _accepted(std, proposals, min(_PROPOSALS, int(1.1 * (out.size - done)) + 64), stream)[: out.size - done]
        out[done : done + got.size] = got
        done += got.size


def _accepted(std: float, t: Table, count: int, stream: KeyStream) -> NDArray[np.signedinteger]:
    """The accepted ones among ``count`` proposals; of 4 bytes each where twice the largest size fits."""
    kind = np.int32 if t.shift <= _NARROW else np.int64
    bits = stream.words(count).view("<u4")
    cells, accept = bits[:count], bits[count:]
    base = (_cells(t, cells, stream) << t.shift).astype(kind, copy=False)
    words = stream.words(count if t.shift > 31 else -(-count // 2))
    rest = words if t.shift > 31 else words.view("<u4")[:count]
    sign = (rest.view(f"<i{rest.itemsize}") >> (8 * rest.itemsize - 1)).astype(kind, copy=False)  # 0, or -1: negative
    rest &= np.array((1 << t.shift) - 1, rest.dtype)
    x = base + rest.astype(kind, copy=False)
    keep = (sign == 0) | (x != 0)
    if t.shift:
        # exp(-(u² + 2·u·k·s)/(2σ²)) against the random number, both times 2^32.
        chance = (base + x).astype(np.float64)
        chance *= rest
        chance *= -1 / (2 * std * std)
        np.exp(chance, out=chance)
        chance *= 2.0**ACCEPT_BITS
        chance -= accept
        keep &= chance > 0
        for i in np.flatnonzero(np.abs(chance, out=chance) < _NEAR):
            real = below(int(accept[i]), acceptance(std, int(base[i]), int(rest[i])), lambda: _more(stream))
            keep[i] = real and not (sign[i] and x[i] == 0)
    x ^= sign
    x -= sign
    return x[keep]


def _cells(t: Table, bits: NDArray[np.uint32], stream: KeyStream) -> NDArray[np.int64]:
    """k of each proposal, from 8 bits for the cell and 24 against its threshold."""
    cell = (bits & np.uint32(CELLS - 1)).astype(np.intp)
    given, threshold = bits >> np.uint32(32 - KEEP_BITS), t.keep.take(cell)
    k = np.where(given < threshold, cell, t.alias.take(cell))
    for i in np.flatnonzero(given == threshold):
        own = below(int(given[i]), t.exact[cell[i]], lambda: _more(stream))
        k[i] = cell[i] if own else t.alias[cell[i]]
    return k


def _more(stream: KeyStream) -> int:
    return int.from_bytes(stream.words(MORE_BITS // 64).tobytes(), "little")
