"""Keys for rows and persons. They show which rows repeat, without keeping anybody's identifier.

A pseudonym is an HMAC under the site's secret. It is the same at every ingestion of this site, different at every
other site, and says nothing without the secret. It never enters the released table.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from fedveil.common.errors import ConfigError

pc: Any = pyarrow.compute  # its functions are made at import time, where type checkers cannot see them

MIN_SECRET = 32


def pseudonyms(values: Sequence[str], secret: bytes, name: str) -> list[str]:
    """HMAC-SHA256 of ``name || 0x00 || value``, cut to 128 bits, in hex; "" stays "".

    Args:
        secret: at least 32 random bytes that stay at the site.
        name: the identifier's column, so that equal values of two columns get different pseudonyms.
    """
    if len(secret) < MIN_SECRET:
        raise ConfigError(f"a pseudonym secret of {len(secret)} bytes is too short", hint="use 32 random bytes")
    base = hmac.new(secret, b"pseudonym\0" + name.encode() + b"\0", hashlib.sha256)
    out = []
    for value in values:
        mac = base.copy()
        mac.update(value.encode())
        out.append(mac.hexdigest()[:32] if value else "")
    return out


class RowKeys:
    """128-bit keys of rows that arrive in batches. Equal rows have equal keys.

    Distinct texts are hashed with BLAKE2b under a key that lives as long as this object. Columns are combined by a
    polynomial in a random point per column and 64-bit half. That any two different rows among n have the same key has
    a probability below about n^2 / 2^127. The keys are not stored anywhere.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._parts: list[NDArray[np.uint64]] = []

    def add(self, texts: Sequence[pa.Array], rows: int) -> None:
        """Add one batch: the texts of each column, (rows,) each."""
        key = np.zeros((rows, 2), np.uint64)
        for i, text in enumerate(texts):
            encoded = pc.dictionary_encode(text)
            digests = b"".join(self._hash(i, v.encode()) for v in encoded.dictionary.to_pylist())
            table = np.frombuffer(digests, np.uint64).reshape(-1, 2)
            point = np.frombuffer(self._hash(i, b"", b"point"), np.uint64) | np.uint64(1)
            key = key * point + table[encoded.indices.to_numpy(zero_copy_only=False)]
        self._parts.append(key)

    def codes(self) -> NDArray[np.int64]:
        """(n,) codes of all rows so far. Two codes are equal exactly if the rows' keys are."""
        keys = np.concatenate(self._parts) if self._parts else np.zeros((0, 2), np.uint64)
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        ordered = keys[order]
        fresh = np.ones(len(keys), bool)
        fresh[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        out = np.empty(len(keys), np.int64)
        out[order] = np.cumsum(fresh) - 1
        return out

    def _hash(self, column: int, value: bytes, person: bytes = b"row") -> bytes:
        return hashlib.blake2b(
            value, digest_size=16, key=self._key, salt=column.to_bytes(8, "little"), person=person
        ).digest()


def first_of_each(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the first row of every code, in the rows' order."""
    return np.sort(np.unique(codes, return_index=True)[1])
