"""SEAL's own arithmetic in Z_q[x]/(x^4096 + 1), on numpy's memory: transforms, products, sums; nothing is copied.

TenSEAL's bindings let coefficients in and out of SEAL only through files, which costs several times what the arithmetic
does. The library behind them exports the functions that its evaluator is made of, and these are called here by name:
``ntt_negacyclic_harvey``, ``inverse_ntt_negacyclic_harvey``, ``dyadic_product_coeffmod``, ``add_poly_coeffmod`` (SEAL
4.1, native/src/seal/util). Names and layouts belong to the pinned version; a known-answer test runs before their first
use (:mod:`fedveil.privacy.secagg._seal`). The interpreter's lock is free while SEAL works.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import SecureSumError
from fedveil.privacy.secagg.params import N, Q

Blocks = NDArray[np.uint64]

_UTIL = "_ZN4seal4util"
_SET_MODULUS = "_ZN4seal7Modulus9set_valueEm"
_TABLES = f"{_UTIL}9NTTTablesC1EiRKNS_7ModulusENS_16MemoryPoolHandleE"
_POOL = f"{_UTIL}16global_variables18global_memory_poolE"
_FORWARD = f"{_UTIL}21ntt_negacyclic_harveyENS0_7PtrIterIPmEERKNS0_9NTTTablesE"
_INVERSE = f"{_UTIL}29inverse_ntt_negacyclic_harveyENS0_7PtrIterIPmEERKNS0_9NTTTablesE"
_PRODUCT = f"{_UTIL}23dyadic_product_coeffmodENS0_7PtrIterIPKmEES4_mRKNS_7ModulusENS1_IPmEE"
_SUM = f"{_UTIL}17add_poly_coeffmodENS0_7PtrIterIPKmEES4_mRKNS_7ModulusENS1_IPmEE"
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_ROW = 8 * N


class Ring:
    """The ring, by SEAL's functions in ``library``. Stateless after construction: safe to share by threads.

    Raises:
        SecureSumError: the library lacks one of the functions.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._forward = _function(library, _FORWARD, _POINTER, _POINTER)
        self._inverse = _function(library, _INVERSE, _POINTER, _POINTER)
        self._product = _function(library, _PRODUCT, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER)
        self._sum = _function(library, _SUM, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER)
        # Both objects are larger than SEAL's: a Modulus has 48 bytes, an NTTTables 272. They live as long as this one
        # and are never destroyed by SEAL, so that the count of the borrowed memory pool's owners need not be kept.
        self._modulus, self._tables = np.zeros(16, np.uint64), np.zeros(128, np.uint64)
        _function(library, _SET_MODULUS, _POINTER, ctypes.c_uint64)(self._modulus.ctypes.data, Q)
        try:
            pool = (ctypes.c_char * 16).in_dll(library, _POOL)
        except ValueError as e:
            raise _unknown() from e
        # A handle is passed by address, and the call may empty it: so a copy is passed.
        handle = np.frombuffer(bytes(pool), np.uint64).copy()
        make = _function(library, _TABLES, _POINTER, ctypes.c_int, _POINTER, _POINTER)
        make(self._tables.ctypes.data, N.bit_length() - 1, self._modulus.ctypes.data, handle.ctypes.data)

    def multiply(self, a: Blocks, s: NDArray[np.int64]) -> Blocks:
        """a_j * s for each row.

        Args:
            a: (blocks, N) in SEAL's transform domain, each below q.
            s: (N,) small signed coefficients.

        Returns:
            (blocks, N) coefficients in [0, q).
        """
        transformed = self.transformed(s)
        try:
            return self.product(_rows(a).copy(), transformed)
        finally:
            transformed.fill(0)

    def transformed(self, s: NDArray[np.int64]) -> Blocks:
        """(1, N): the small signed coefficients ``s``, (N,), in SEAL's transform domain."""
        out = _rows(np.where(s < 0, s + Q, s).astype(np.uint64)[None])
        self._forward(out.ctypes.data, self._tables.ctypes.data)
        return out

    def product(self, a: Blocks, s: Blocks) -> Blocks:
        """a_j * s for each row, in place of ``a``.

        Args:
            a: (blocks, N), contiguous, in SEAL's transform domain, each below q.
            s: of :meth:`transformed`.

        Returns:
            ``a``, which now holds coefficients in [0, q).
        """
        if _rows(a) is not a or s.shape != (1, N):
            raise SecureSumError("polynomials that SEAL cannot multiply in place")
        first, at, modulus, tables = a.ctypes.data, s.ctypes.data, self._modulus.ctypes.data, self._tables.ctypes.data
        for row in range(first, first + len(a) * _ROW, _ROW):
            self._product(row, at, N, modulus, row)
            self._inverse(row, tables)
        return a

    def inverse(self, a: Blocks) -> Blocks:
        """The rows of ``a``, out of SEAL's transform domain: (blocks, N) coefficients in [0, q)."""
        out = _rows(a).copy()
        for row in range(0, len(out) * _ROW, _ROW):
            self._inverse(out.ctypes.data + row, self._tables.ctypes.data)
        return out

    def add_into(self, total: Blocks, blocks: Blocks) -> None:
        """Add ``blocks`` to ``total`` in place: both (blocks, N), contiguous, coefficients in [0, q)."""
        blocks = _rows(blocks)
        if total.shape != blocks.shape or total.dtype != np.uint64 or not total.flags.c_contiguous:
            raise SecureSumError(f"polynomials of shape {blocks.shape} cannot be added to {total.shape}")
        into = total.ctypes.data
        self._sum(into, blocks.ctypes.data, total.size, self._modulus.ctypes.data, into)


def _rows(a: Blocks) -> Blocks:
    """``a`` as SEAL reads it; it must be (blocks, N)."""
    if a.ndim != 2 or a.shape[1] != N:
        raise SecureSumError(f"polynomials of shape {a.shape}, not (blocks, {N})")
    return np.ascontiguousarray(a, np.uint64)


def _function(library: ctypes.CDLL, name: str, *arguments: Any) -> Any:
    try:
        found = library[name]
    except AttributeError as e:
        raise _unknown() from e
    found.restype, found.argtypes = None, arguments
    return found


def _unknown() -> SecureSumError:
    return SecureSumError(
        "the SEAL in the installed TenSEAL lacks a function", hint="use the pinned TenSEAL on Linux, x86-64 or arm64"
    )
