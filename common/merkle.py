"""Merkle tree hashes and inclusion proofs: one row of a journal shown without the others.

As in RFC 6962, section 2.1: a leaf is ``SHA-256(0x00 || data)``, a node ``SHA-256(0x01 || left || right)``, and a tree
of n leaves splits at the largest power of two below n. The prefixes make sure that a node cannot be taken for a leaf.
A proof holds at most ``ceil(log2 n)`` hashes. It is valid only for a root that the reader has from elsewhere, signed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from fedveil.common.errors import VerificationError

MAX_LEAVES = 1 << 22
HASH_BYTES = 32
EMPTY = hashlib.sha256(b"").digest()


def leaf_hash(data: bytes) -> bytes:
    """``SHA-256(0x00 || data)``."""
    return hashlib.sha256(b"\0" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """``SHA-256(0x01 || left || right)``."""
    return hashlib.sha256(b"\1" + left + right).digest()


def root(leaves: Iterable[bytes]) -> bytes:
    """The tree hash over the data of all leaves, in order. Without leaves: SHA-256 of the empty string.

    Linear in time, logarithmic in memory, because subtrees of equal size are merged as soon as they are complete.
    """
    stack: list[tuple[int, bytes]] = []
    for data in leaves:
        height, digest = 0, leaf_hash(data)
        while stack and stack[-1][0] == height:
            digest = node_hash(stack.pop()[1], digest)
            height += 1
        stack.append((height, digest))
    if not stack:
        return EMPTY
    digest = stack.pop()[1]
    while stack:
        digest = node_hash(stack.pop()[1], digest)
    return digest


def prove(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The audit path of leaf ``index``, from its sibling upwards (RFC 6962, section 2.1.1).

    Raises:
        VerificationError: there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise VerificationError(f"there is no row {index}: the journal has {len(leaves)}", hint="rows count from 0")
    path: list[bytes] = []
    low, high = 0, len(leaves)
    while high - low > 1:
        split = low + (1 << (high - low - 1).bit_length() - 1)
        if index < split:
            path.append(root(leaves[split:high]))
            high = split
        else:
            path.append(root(leaves[low:split]))
            low = split
    return path[::-1]


def root_of_proof(data: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """The root that ``path`` leads to from leaf ``data`` at ``index`` in a tree of ``size`` leaves (RFC 9162, 2.1.3.2).

    Raises:
        VerificationError: the numbers are out of bounds, or the path has another length than such a tree gives.
    """
    if not 0 <= index < size <= MAX_LEAVES or any(len(h) != HASH_BYTES for h in path):
        raise VerificationError("the inclusion proof is malformed")
    at, last, digest = index, size - 1, leaf_hash(data)
    for sibling in path:
        if last == 0:
            raise VerificationError("the inclusion proof is longer than its tree is high")
        if at & 1 or at == last:
            digest = node_hash(sibling, digest)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            digest = node_hash(digest, sibling)
        at, last = at >> 1, last >> 1
    if last:
        raise VerificationError("the inclusion proof is shorter than its tree is high")
    return digest


def verify(expected: bytes, data: bytes, index: int, size: int, path: Sequence[bytes]) -> None:
    """Raise :class:`VerificationError` unless ``data`` is leaf ``index`` of the tree with this size and root."""
    if root_of_proof(data, index, size, path) != expected:
        raise VerificationError(
            "the inclusion proof does not lead to the root", hint="the row or the proof was changed"
        )
