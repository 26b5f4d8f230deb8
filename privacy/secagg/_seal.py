"""Polynomials modulo q through Microsoft SEAL, as shipped in TenSEAL: the only module that touches TenSEAL.

The ring is Z_q[x]/(x^4096 + 1) with q = 1012 * 2^46 + 1. Products, transforms, additions and the final decryption
run in SEAL: the first three on numpy's memory (:mod:`fedveil.privacy.secagg._ring`), decryption through its objects
(``tenseal.sealapi``). Those read and write only paths, so the bytes pass through anonymous memory files
(``memfd_create``), which no other user can open and which vanish when closed: no key ever reaches a disk. SEAL
compresses what it writes with the zstd that the same library carries and exports; the reader below calls that.

The layout of SEAL's streams and the behaviour of the bindings are pinned: another version of TenSEAL is refused,
and the first use of a plaintext modulus runs a known-answer test against plain integer arithmetic.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import SecureSumError, WireError
from fedveil.privacy.secagg._ring import Blocks, Ring
from fedveil.privacy.secagg.interface import Integers
from fedveil.privacy.secagg.params import CKKS_SCALE_BITS, N, Q

VERSION = "0.3.18"
_MAGIC = b"\x5e\xa1\x10\x04\x03"  # SEAL's stream header: magic, header size 16, version 4.3 of the stream's writer
_NONE, _ZSTD = 0, 2
_HEADER = 16
_TRANSFORM = "c94a11cecff93add4caa69f452898c19d4fde0017fc315486da65eba2fdde932"  # of the self-test's input


class Engine(Ring):
    """SEAL set up for one plaintext modulus 2^plain_bits. Stateless after construction: safe to share by threads."""

    def __init__(self, plain_bits: int) -> None:
        self._sa = _sealapi()
        super().__init__(_library())
        self.plain_modulus = 1 << plain_bits
        parameters = self._sa.EncryptionParameters(self._sa.SCHEME_TYPE.BFV)
        parameters.set_poly_modulus_degree(N)
        parameters.set_coeff_modulus([self._sa.Modulus(Q)])
        parameters.set_plain_modulus(self.plain_modulus)
        self._context = self._sa.SEALContext(parameters, True, self._sa.SEC_LEVEL_TYPE.TC256)
        if not self._context.parameters_set():
            raise SecureSumError(f"SEAL refused the parameters: {self._context.parameters_error_message()}")
        self._evaluator = self._sa.Evaluator(self._context)
        self._key_id, self._data_id = self._identifiers()

    def decryptor(self, s: NDArray[np.int64]) -> Any:
        """A SEAL ``Decryptor`` under the secret polynomial ``s``, (N,) small signed coefficients."""
        plain = self._polynomial(s)
        self._evaluator.transform_to_ntt_inplace(plain, self._context.first_parms_id())
        with _memory() as f:
            plain.save(_path(f))
            body = bytes(_read(f)[32:])
            stream = self._key_id + body
            _write(f, _stream(stream))
            key = self._sa.SecretKey()
            key.load(self._context, _path(f))
        return self._sa.Decryptor(self._context, key)

    def decrypt(self, decryptor: Any, c0: Blocks, c1: Blocks) -> Blocks:
        """Messages in [0, 2^plain_bits), (blocks, N), of the ciphertexts (c0, c1), coefficients in [0, q)."""
        out = np.zeros_like(c0)
        plain = self._sa.Plaintext()
        with _memory() as source, _memory() as target:
            for j in range(len(c0)):
                decryptor.decrypt(self._load(source, np.stack([c0[j], c1[j]])), plain)
                plain.save(_path(target))
                raw = _read(target)
                # parms_id, coefficient count, scale, nested header, word count
                (count,) = struct.unpack_from("<Q", raw, 64)
                if not 0 <= count <= N or len(raw) < 72 + 8 * count:
                    raise SecureSumError("SEAL wrote a plaintext of unknown form")
                out[j, :count] = np.frombuffer(raw, "<u8", count, 72)
        return out

    def _polynomial(self, s: NDArray[np.int64]) -> Any:
        """A SEAL plaintext holding ``s`` modulo the plaintext modulus."""
        words = np.where(s < 0, s + self.plain_modulus, s).astype("<u8").tobytes()
        nested = _stream(struct.pack("<Q", N) + words)
        plain = self._sa.Plaintext()
        with _memory() as f:
            _write(f, _stream(bytes(32) + struct.pack("<Qd", N, 1.0) + nested))
            plain.load(self._context, _path(f))
        return plain

    def _load(self, f: int, rows: Blocks) -> Any:
        """A ciphertext whose polynomials are the coefficients ``rows``, two of them."""
        words = np.ascontiguousarray(rows, "<u8").tobytes()
        fixed = self._data_id + struct.pack("<BQQQdQ", False, len(rows), N, 1, 1.0, 1)
        _write(f, _stream(fixed + _stream(struct.pack("<Q", rows.size) + words)))
        ciphertext = self._sa.Ciphertext()
        ciphertext.load(self._context, _path(f))
        return ciphertext

    def _identifiers(self) -> tuple[bytes, bytes]:
        """The parameter identifiers that SEAL's streams of keys and of ciphertexts begin with."""
        generator = self._sa.KeyGenerator(self._context)
        ciphertext = self._sa.Ciphertext()
        encryptor = self._sa.Encryptor(self._context, generator.secret_key())
        encryptor.encrypt_symmetric(self._sa.Plaintext("1"), ciphertext)
        with _memory() as f:
            generator.secret_key().save(_path(f))
            key = bytes(_read(f)[:32])
            ciphertext.save(_path(f))
            return key, bytes(_read(f)[:32])


@cache
def engine(plain_bits: int) -> Engine:
    """The engine for a plaintext modulus, after its self-test passed; :class:`SecureSumError` otherwise."""
    made = Engine(plain_bits)
    _self_test(made)
    return made


@cache
def _tenseal() -> ModuleType:
    try:
        import tenseal
    except ImportError as e:
        raise SecureSumError("TenSEAL is not installed", hint="pip install 'fedveil[client]'") from e
    if tenseal.__version__ != VERSION:
        raise SecureSumError(
            f"TenSEAL {tenseal.__version__} is installed", hint=f"this release needs exactly {VERSION}"
        )
    return tenseal


def _sealapi() -> Any:
    return importlib.import_module(f"{_tenseal().__name__}.sealapi")


@cache
def _library() -> ctypes.CDLL:
    """SEAL's library: its own functions, and the decompressor it carries (zstd's stable C API)."""
    library = ctypes.CDLL(_sealapi()._sealapi_cpp.__file__)  # noqa: SLF001  # the extension module behind sealapi
    library.ZSTD_decompress.restype = ctypes.c_size_t
    library.ZSTD_decompress.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t]
    library.ZSTD_isError.restype = ctypes.c_uint
    library.ZSTD_isError.argtypes = [ctypes.c_size_t]
    return library


@contextmanager
def _memory() -> Iterator[int]:
    """An anonymous file in memory, gone at the end."""
    fd = os.memfd_create("fedveil", os.MFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _write(fd: int, data: bytes) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)


def _stream(body: bytes) -> bytes:
    return _MAGIC + struct.pack("<BHQ", _NONE, 0, _HEADER + len(body)) + body


def _read(fd: int, room: int = 16 * N + 4096) -> memoryview:
    """The body of the SEAL stream in ``fd``, decompressed; at most ``room`` bytes."""
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    if len(data) < _HEADER or data[:5] != _MAGIC or data[5] not in (_NONE, _ZSTD):
        raise SecureSumError("SEAL wrote a stream of unknown form", hint=f"TenSEAL {VERSION} is needed")
    if data[5] == _NONE:
        return memoryview(data)[_HEADER:]
    out = np.empty(room, np.uint8)
    size = _library().ZSTD_decompress(out.ctypes.data, room, data[_HEADER:], len(data) - _HEADER)
    if _library().ZSTD_isError(size):
        raise SecureSumError("SEAL wrote a stream that cannot be decompressed", hint=f"TenSEAL {VERSION} is needed")
    return out[:size].data


def _self_test(made: Engine) -> None:
    """Transform, product, sum and decryption against plain integers; two layouts of the transform cannot mix."""
    index = np.arange(2 * N, dtype=np.uint64)
    a = (index * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(8)).reshape(2, N) % np.uint64(Q)
    s = np.zeros(N, np.int64)
    s[[0, 5, N - 1]] = 3, -42, 1
    plain, product = made.inverse(a), made.multiply(a, s)
    if hashlib.sha256(plain.astype("<u8").tobytes()).hexdigest() != _TRANSFORM:
        raise SecureSumError("SEAL's transform differs from the one pinned here", hint=f"TenSEAL {VERSION} is needed")
    p = plain.astype(object)
    by_last = np.concatenate([-p[:, 1:], p[:, :1]], axis=1)  # x^(N-1) = -1/x
    by_five = np.concatenate([-p[:, -5:], p[:, :-5]], axis=1)
    if not np.array_equal((3 * p - 42 * by_five + by_last) % Q, product.astype(object)):
        raise SecureSumError("SEAL's polynomial product failed its known-answer test")
    delta = (Q - 1) // made.plain_modulus
    message = (index * np.uint64(made.plain_modulus // N)).reshape(2, N) % np.uint64(made.plain_modulus)
    noise = (np.arange(2 * N) % 85 - 42).reshape(2, N)
    total = ((delta * message.astype(object) - product.astype(object)) % Q).astype(np.uint64)
    expected = (total.astype(object) + noise) % Q
    made.add_into(total, np.mod(noise, Q).astype(np.uint64))
    if not np.array_equal(total.astype(object), expected):
        raise SecureSumError("SEAL's sum of polynomials failed its known-answer test")
    if not np.array_equal(made.decrypt(made.decryptor(s), total, plain), message):
        raise SecureSumError("SEAL's decryption failed its known-answer test")


def ckks_key() -> bytes:
    """A fresh symmetric CKKS key with its parameters (4096, [54, 55], scale 2^21) as TenSEAL's bytes: a secret."""
    return _fresh_ckks().serialize(save_secret_key=True)


def _fresh_ckks() -> Any:
    ts = _tenseal()
    context = ts.context(
        ts.SCHEME_TYPE.CKKS, N, coeff_mod_bit_sizes=[54, 55], encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC
    )
    context.global_scale = 2.0**CKKS_SCALE_BITS
    return context


class Ckks:
    """TenSEAL's CKKS vectors of up to 2048 integers.

    Args:
        key: what :func:`ckks_key` returned; None for a server, which adds and cannot open. TenSEAL's
            ``make_context_public`` leaves a working decryptor in memory, so that a public context is always read
            from bytes that never held the key.

    Raises:
        SecureSumError: the key is not one.
    """

    def __init__(self, key: bytes | None) -> None:
        self._ts = _tenseal()
        try:
            self._context = self._ts.context_from(
                _fresh_ckks().serialize(save_secret_key=False) if key is None else key
            )
        except (ValueError, RuntimeError, TypeError) as e:
            raise SecureSumError("the shared key is malformed") from e
        if self._context.is_private() != (key is not None):
            raise SecureSumError("the shared key is malformed")

    def encrypt(self, values: Integers) -> bytes:
        """One ciphertext of up to 2048 integers below 2^31 in size, under fresh randomness of SEAL."""
        return self._ts.ckks_vector(self._context, values.astype(np.float64)).serialize()

    def load(self, data: bytes, slots: int) -> Any:
        """A ciphertext of ``slots`` values; :class:`WireError` if the bytes are not one."""
        try:
            vector = self._ts.ckks_vector_from(self._context, data)
            size = vector.size()
        except (ValueError, RuntimeError, TypeError) as e:
            raise WireError("bytes that are no CKKS ciphertext") from e
        if size != slots:
            raise WireError(f"a ciphertext of {size} values instead of {slots}")
        return vector

    def add(self, a: Any, b: Any) -> Any:
        """a + b, both left as they are; :class:`WireError` if they do not fit together."""
        try:
            return a + b
        except (ValueError, RuntimeError, TypeError) as e:
            raise WireError("CKKS ciphertexts that cannot be added") from e

    def decrypt(self, data: bytes, slots: int) -> NDArray[np.int64]:
        """The ``slots`` integers in a ciphertext; :class:`SecureSumError` if they are none."""
        try:
            values = np.asarray(self.load(data, slots).decrypt(), np.float64)
        except (ValueError, RuntimeError) as e:
            raise SecureSumError("a sum that does not open under the shared key") from e
        whole = np.rint(values)
        if not (np.isfinite(values).all() and np.abs(values).max() < 2.0**53 and np.abs(values - whole).max() < 0.25):
            raise SecureSumError("a sum that does not open to integers under the shared key")
        return whole.astype(np.int64)
