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
from operator import mul
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.common import canonical
from fedveil.common.errors import WireError
from fedveil.common.threads import spans
from fedveil.privacy.secagg import lattice
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.params import BLOCK_BYTES, COEFFICIENT_BYTES, N, Q

ROWS = 5
BYTES = ROWS * COEFFICIENT_BYTES
# Products of 26 signed bits and limbs of 16 bits, added up over N = 2^12 coefficients, stay below 2^53. So a sum in
# double precision is exact, in whatever order a library adds.
_V_BITS, _LIMB_BITS, _LIMBS = 26, 16, 4
_MASK_56 = np.uint64((1 << 56) - 1)
# Blocks in one product of matrices: so few that the library of NumPy starts no threads of its own for it.
_AT_ONCE = 8
Fingerprint = tuple[int, ...]
Drawn = list[list[int]]


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
    """The weights of one challenge, and what they have summed so far; those of the blocks are drawn in order."""

    def __init__(self, challenge: str) -> None:
        words = _stream("v", challenge).words(N * ROWS) & np.uint64((1 << _V_BITS) - 1)
        by_coefficient = (words.astype(np.float64) - (1 << (_V_BITS - 1))).reshape(N, ROWS)
        self._v = np.ascontiguousarray(by_coefficient.T)
        self._u = _stream("u", challenge)
        self._sums = [0] * ROWS

    def draw(self, blocks: int) -> Drawn:
        """The weights of the next blocks, by row."""
        return (self._u.words(blocks * ROWS) & _MASK_56).reshape(-1, ROWS).T.tolist()

    def part(self, blocks: NDArray[np.uint64], drawn: Drawn) -> Fingerprint:
        """What ``(blocks, N)`` coefficients below 2^56 add under the weights drawn for them; threads may share it.

        The rows are whole integers here, of any sign.
        """
        limbs = np.ascontiguousarray(blocks, "<u8").view("<u2").reshape(len(blocks), N, _LIMBS)
        sums = [0] * ROWS
        for some in spans(len(blocks), _AT_ONCE):
            for i in range(_LIMBS):
                inner = (self._v @ limbs[some, :, i].astype(np.float64).T).astype(np.int64).tolist()
                for k, row in enumerate(inner):
                    sums[k] += sum(map(mul, row, drawn[k][some])) << (_LIMB_BITS * i)
        return tuple(sums)

    def add(self, part: Fingerprint) -> None:
        """Count one :meth:`part`; in any order."""
        self._sums = [(x + y) % Q for x, y in zip(self._sums, part, strict=True)]

    @property
    def sums(self) -> Fingerprint:
        """The fingerprint of what was counted."""
        return tuple(self._sums)


def of(challenge: str, ciphertext: bytes) -> Fingerprint:
    """The fingerprint of a packed ciphertext; :class:`WireError` if a coefficient is not below q."""
    weights = Weights(challenge)
    pieces = ((data, weights.draw(len(data) // BLOCK_BYTES)) for _, data in lattice.chunks(ciphertext))
    # Not over threads: the work on a piece is short, and threads that wait for each other make it longer.
    for data, drawn in pieces:
        weights.add(weights.part(lattice.from_bytes(data), drawn))
    return weights.sums


def of_blocks(challenge: str, blocks: NDArray[np.uint64]) -> Fingerprint:
    """The fingerprint of ``(blocks, N)`` coefficients."""
    weights = Weights(challenge)
    pieces = ((blocks[some], weights.draw(some.stop - some.start)) for some in spans(len(blocks), lattice.CHUNK))
    for some, drawn in pieces:
        weights.add(weights.part(some, drawn))
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
