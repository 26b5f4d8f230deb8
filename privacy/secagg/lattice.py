"""Arithmetic of the sum of keys: public polynomials, small errors, the linear encoding, packed bytes.

The encoding Z -> Z_q, m -> delta * m mod q, is a homomorphism of groups for integers of any sign and size. An opened
sum therefore reveals delta * (sum of m) + (sum of e), in which nothing depends on how the sum was split.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedveil.common.buffers import Filled
from fedveil.common.errors import SecureSumError, WireError
from fedveil.common.threads import mapped, spans
from fedveil.privacy.secagg.params import BLOCK_BYTES, COEFFICIENT_BYTES, HALF_BITS, KeysumParams, N, Q

CHUNK = 16  # blocks worked on at a time: 64 Ki coefficients stay in the cache
_Q = np.uint64(Q)
_MASK_56 = np.uint64((1 << 56) - 1)
_MASK_HALF = np.uint64((1 << HALF_BITS) - 1)
_ZEROS = bytes(1 << 20)
_ITEM = np.dtype(f"V{COEFFICIENT_BYTES}")


class Stream:
    """AES-256 in counter mode as a stream of 64-bit words; one key, one stream."""

    def __init__(self, key: bytes) -> None:
        self._encryptor: Any = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def fresh(cls) -> Stream:
        """A stream nobody can predict: its key comes from the operating system."""
        return cls(os.urandom(32))

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next ``count`` words."""
        out = np.empty(8 * count + 16, np.uint8)
        done = 0
        while done < 8 * count:
            step = min(8 * count - done, len(_ZEROS))
            done += self._encryptor.update_into(memoryview(_ZEROS)[:step], out.data[done : done + step + 15])
        return out[: 8 * count].view("<u8")


class Uniform:
    """Polynomials with coefficients uniform in [0, q), from a stream by rejection of words of 56 bits.

    They come in one sequence: the size of the pieces taken does not matter.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._left = np.empty(0, np.uint64)

    def take(self, blocks: int) -> NDArray[np.uint64]:
        """The next ``blocks`` polynomials, (blocks, N)."""
        need = blocks * N
        found = [self._left]
        have = self._left.size
        while have < need:
            # 1.2 % of the words are rejected.
            words = self._stream.words((need - have) * 82 // 81 + 64)
            words &= _MASK_56
            accepted = words[words < _Q]
            found.append(accepted)
            have += accepted.size
        joined = np.concatenate(found)
        self._left = joined[need:].copy()
        return joined[:need].reshape(blocks, N)


class PublicPolynomials(Uniform):
    """The round's public polynomials a_1, a_2, ... in SEAL's transform domain.

    The stream's key is H("a" || session || round || nonce): the server chooses labels, not polynomials.
    """

    def __init__(self, session: str, round: int, nonce: str) -> None:
        label = f"fedveil/keysum/a/1|{session}|{round}|{nonce}"
        super().__init__(Stream(hashlib.sha256(label.encode()).digest()))


def small(stream: Stream, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Centred binomial integers of variance 21 in [-42, 42]: popcount of 42 bits minus popcount of 42 bits."""
    count = int(np.prod(shape))
    words = stream.words(2 * count)
    words &= _MASK_HALF
    bits = np.bitwise_count(words).view(np.int8)
    return np.subtract(bits[:count], bits[count:], dtype=np.int64).reshape(shape)


def rows(values: NDArray[np.int64 | np.int32], part: slice, params: KeysumParams) -> NDArray[np.int64]:
    """``(blocks, k, N)``: the values of a vector, ``(D,)``, that lie in the blocks of ``part``; zeros after its end."""
    k, size = params.per_coefficient, (part.stop - part.start) * params.per_coefficient * N
    given = values[part.start * k * N : part.stop * k * N]
    if given.size == size:
        return given.astype(np.int64, copy=False).reshape(-1, k, N)
    piece = np.zeros(size, np.int64)
    piece[: given.size] = given
    return piece.reshape(-1, k, N)


def encode(values: NDArray[np.int64], params: KeysumParams) -> NDArray[np.int64]:
    """Pack and encode.

    Args:
        values: (blocks, k, N) integers of any size; value c of coefficient i is ``values[:, c, i]``.

    Returns:
        (blocks, N) integers x in (-2^19, q) with x = delta * sum_c values[c] * B^c modulo q.
    """
    k, base, delta, bits = params.per_coefficient, params.base, params.delta, params.plain_bits
    largest = max(int(values.max()), -int(values.min()))
    if largest * sum(base**c for c in range(k)) >= 1 << 62:
        exact = values.astype(object)
        message = sum(exact[:, c] * base**c for c in range(k))
        return np.asarray(delta * message % Q).astype(np.int64)
    packed = values[:, k - 1].copy()
    for c in range(k - 2, -1, -1):
        packed *= base
        packed += values[:, c]
    # delta * 2^bits = -1 modulo q: whole multiples of the plaintext modulus become small, and no product overflows.
    wraps = packed >> bits
    packed &= (1 << bits) - 1
    packed *= delta
    packed -= wraps
    return packed


def reduce(x: NDArray[np.int64]) -> NDArray[np.uint64]:
    """``x`` modulo q for x in (-q, 2q), in place; the unsigned minimum picks the one representative in [0, q)."""
    u = x.view(np.uint64)
    np.minimum(u, u + _Q, out=u)
    return np.minimum(u, u - _Q, out=u)


def message_offset(params: KeysumParams) -> int:
    """What an opened message is shifted by, so that every packed value is a digit in [0, B)."""
    bound = params.base // 2
    return sum(bound * params.base**c for c in range(params.per_coefficient))


def unpack_values(messages: NDArray[np.uint64], params: KeysumParams, out: NDArray[np.int64]) -> None:
    """Fill ``out``, (blocks, k, N), with the values in [-bound, bound] of shifted messages, (blocks, N).

    Raises:
        SecureSumError: a message holds no k digits: a sum left the bound of the plan.
    """
    k, base = params.per_coefficient, np.uint64(params.base)
    if messages.size and int(messages.max()) >= params.base**k:
        raise SecureSumError("the sum left the bound declared in the plan", hint="the plan's range is too small")
    rest = messages
    for c in range(k - 1):
        above = rest // base
        out[:, c] = rest - above * base
        rest = above
    out[:, k - 1] = rest
    out -= params.base // 2


def to_bytes(coefficients: NDArray[np.uint64]) -> bytes:
    """Coefficients below 2^56 as 7 little-endian bytes each."""
    return _low(coefficients).tobytes()


def _low(coefficients: NDArray[np.uint64]) -> NDArray[np.void]:
    """The low 7 bytes of each coefficient, one item each: numpy copies such items faster than single bytes."""
    whole = np.ascontiguousarray(coefficients, "<u8")
    return np.ndarray((whole.size,), _ITEM, whole, 0, (8,))


class Packed:
    """The bytes of :func:`to_bytes` of many coefficients, filled chunk by chunk in any order; never held twice.

    Args:
        blocks: how many polynomials there will be.
    """

    def __init__(self, blocks: int) -> None:
        self._out = Filled(blocks * BLOCK_BYTES)

    def put(self, first: int, coefficients: NDArray[np.uint64]) -> memoryview:
        """``(blocks, N)`` coefficients from block ``first`` on; returns their bytes, to be let go of before the end."""
        at = first * BLOCK_BYTES
        part = self._out.room[at : at + coefficients.size * COEFFICIENT_BYTES]
        np.frombuffer(part, _ITEM)[:] = _low(coefficients)
        return part

    def value(self) -> bytes:
        """All of them; nothing can be put any more."""
        return self._out.value()


def from_bytes(data: bytes | memoryview) -> NDArray[np.uint64]:
    """The (blocks, N) coefficients of :func:`to_bytes`; :class:`WireError` if one is not below q."""
    coefficients = np.empty(len(data) // COEFFICIENT_BYTES, np.uint64)
    np.bitwise_and(_words(data), _MASK_56, out=coefficients[:-1])
    coefficients[-1] = _last(data)
    if int(coefficients.max()) >= Q:
        raise WireError("a ciphertext holds a coefficient outside the ring")
    return coefficients.reshape(-1, N)


def examined(data: bytes) -> tuple[str, bool]:
    """The SHA-256 (hex) of packed coefficients, and whether each is below q: in one pass, over threads."""
    digest, inside = hashlib.sha256(), True
    for chunk, within in mapped(lambda p: (p[1], _in_ring(p[1])), chunks(data)):
        digest.update(chunk)
        inside &= within
    return digest.hexdigest(), inside


def _in_ring(data: memoryview) -> bool:
    # The byte of the next coefficient is moved out: what is left, times 256, keeps its order.
    return int((_words(data) << np.uint64(8)).max()) < Q << 8 and _last(data) < Q


def _words(data: bytes | memoryview) -> NDArray[np.uint64]:
    """Words of 8 bytes at every seventh one: each holds a coefficient and, on top, the lowest byte of the next."""
    return np.ndarray((len(data) // COEFFICIENT_BYTES - 1,), "<u8", data, 0, (COEFFICIENT_BYTES,))


def _last(data: bytes | memoryview) -> int:
    return int.from_bytes(data[-COEFFICIENT_BYTES:], "little")


def chunks(data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """The bytes of packed polynomials a few at a time, each time with the number of the first, from 0."""
    view = memoryview(data)
    for part in spans(len(view) // BLOCK_BYTES, CHUNK):
        yield part.start, view[part.start * BLOCK_BYTES : part.stop * BLOCK_BYTES]
