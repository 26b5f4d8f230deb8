"""Linear fingerprints of ciphertexts: what shows that a sum is that of its members' ciphertexts.

A fingerprint is :data:`ROWS` numbers modulo q. Each is a linear function of all coefficients of a ciphertext, whose
weights follow from a *challenge*, the hash of everything that an opening claims. So fingerprints add up as ciphertexts
do. The weight of coefficient i of block j in row k is ``u[j, k] * v[i, k]``.

Guarantee: two ciphertexts that differ anywhere have one fingerprint with a probability below 2^-129 over the
challenges. Take a block in which they differ. In each row the difference of this block times v is zero modulo the prime
q with a chance of at most 2^-26. If it is not zero, u makes the whole difference zero with a chance of at most 2^-55.
Assumption: SHA-256 and AES-256-CTR give weights that nobody can tell from uniform ones before the challenge is fixed.
Whoever makes the challenge can try again: each try is a new chance of 2^-129.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.common import canonical
from fedveil.common.errors import WireError
from fedveil.privacy.secagg import lattice
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.params import COEFFICIENT_BYTES, N, Q

ROWS = 5
BYTES = ROWS * COEFFICIENT_BYTES
# Products of 26 signed bits and limbs of 16 bits, added up over N = 2^12 coefficients, stay below 2^53. So a sum in
# double precision is exact, in whatever order a library adds.
_V_BITS, _LIMB_BITS, _LIMBS = 26, 16, 4
_MASK_56 = np.uint64((1 << 56) - 1)
Fingerprint = tuple[int, ...]


def challenge(spec: SumSpec, round: int, nonce: str, members: str, total: str, answers: str) -> str:
    """What the weights follow from: SHA-256 (hex) of an opening.

    Args:
        members: the digest of U.
        total: SHA-256 of the packed sum of ciphertexts.
        answers: the digest of the T signed answers that open it.
    """
    return canonical.digest(
        ["keysum/challenge", spec.session, round, nonce, {"members": members, "sum": total, "answers": answers}]
    )


class Weights:
    """The weights of one challenge, and what they have summed so far; blocks are taken in order, a few at a time."""

    def __init__(self, challenge: str) -> None:
        words = _stream("v", challenge).words(N * ROWS) & np.uint64((1 << _V_BITS) - 1)
        self._v = (words.astype(np.float64) - (1 << (_V_BITS - 1))).reshape(N, ROWS)
        self._u = _stream("u", challenge)
        self._sums = [0] * ROWS

    def take(self, blocks: NDArray[np.uint64]) -> None:
        """Add the next ``(blocks, N)`` coefficients, each below 2^56."""
        limbs = np.ascontiguousarray(blocks, "<u8").view("<u2").reshape(len(blocks), N, _LIMBS)
        parts = [(limbs[:, :, i].astype(np.float64) @ self._v).tolist() for i in range(_LIMBS)]
        u = (self._u.words(len(blocks) * ROWS) & _MASK_56).reshape(-1, ROWS).tolist()
        for j, weights in enumerate(u):
            for k, weight in enumerate(weights):
                inner = sum(int(part[j][k]) << (_LIMB_BITS * i) for i, part in enumerate(parts))
                self._sums[k] = (self._sums[k] + weight * inner) % Q

    @property
    def sums(self) -> Fingerprint:
        """The fingerprint of what was taken."""
        return tuple(self._sums)


def of(challenge: str, ciphertext: bytes) -> Fingerprint:
    """The fingerprint of a packed ciphertext; :class:`WireError` if a coefficient is not below q."""
    weights, view, step = Weights(challenge), memoryview(ciphertext), lattice.CHUNK * N * COEFFICIENT_BYTES
    for at in range(0, len(view), step):
        weights.take(lattice.from_bytes(view[at : at + step]))
    return weights.sums


def added(fingerprints: list[Fingerprint]) -> Fingerprint:
    """The sum of fingerprints modulo q."""
    return tuple(sum(row) % Q for row in zip(*fingerprints, strict=True))


def to_bytes(fingerprint: Fingerprint) -> bytes:
    """:data:`BYTES` bytes."""
    return b"".join(x.to_bytes(COEFFICIENT_BYTES, "little") for x in fingerprint)


def from_bytes(data: Any) -> Fingerprint:
    """The fingerprint of :func:`to_bytes`; :class:`WireError` for another length or a number that is not below q."""
    if not isinstance(data, bytes) or len(data) != BYTES:
        raise WireError("a fingerprint has another length")
    pieces = [data[at : at + COEFFICIENT_BYTES] for at in range(0, BYTES, COEFFICIENT_BYTES)]
    found = tuple(int.from_bytes(piece, "little") for piece in pieces)
    if max(found) >= Q:
        raise WireError("a fingerprint holds a number that is not below q")
    return found


def _stream(what: str, challenge: str) -> lattice.Stream:
    return lattice.Stream(hashlib.sha256(f"fedveil/keysum/{what}/1|{challenge}".encode()).digest())
