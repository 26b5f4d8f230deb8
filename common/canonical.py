"""Canonical JSON: one byte string per value, so that hashes and signatures have one meaning.

Keys sorted by code point, no white space, UTF-8, floats as Python's shortest round-trip form,
NaN and infinities refused. Close to RFC 8785; the one difference is that integers of any size are
written in full (RFC 8785 limits them to 2^53; here only what is parsed is limited, to 300 digits) and floats keep
Python's exponent form.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any

from fedveil.common.errors import WireError

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_DIGITS = 300  # of a whole number: every one that is accepted is within a float's range
_FEW = 1 << 20  # so many values may be as short as they like; beyond them each takes 8 bytes of text or more


def dumps(value: Any) -> bytes:
    """Canonical bytes of a JSON value (dict with string keys, list, str, int, float, bool, None)."""
    try:
        return _ENCODER.encode(value).encode()
    except (TypeError, ValueError, RecursionError) as e:
        raise WireError(f"value has no canonical JSON form: {type(e).__name__}") from e


def loads(data: bytes | str, *, limit: int = 1 << 26) -> Any:
    """Parse UTF-8 JSON of at most ``limit`` bytes; whatever is returned has a canonical form of its own.

    Duplicate keys, NaN and infinities, halves of a character (lone surrogates) and whole numbers of more than 300
    digits, which no float can hold, are refused: nobody who reads the value has to think of them again.

    An empty list is 2 bytes of text and 64 of memory: text that is dense with values, as nothing written here is, is
    refused before it is parsed.

    Raises:
        WireError: the text is none of these, too long or too dense.
    """
    try:
        data = data.encode() if isinstance(data, str) else data
        if len(data) > limit:
            raise WireError(f"JSON of {len(data)} bytes is over the limit of {limit}")
        if len(data) > _FEW and sum(map(data.count, (b",", b"[", b"{"))) > _FEW + len(data) // 8:
            raise WireError(f"JSON of {len(data)} bytes holds more values than text of that length may")
        # decoded here, because json.loads would also take UTF-16 and UTF-32
        value = json.loads(
            data.decode(),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_short,
        )
        if _SURROGATE.search(data):  # half a character is spelled by an escape; no UTF-8 holds one
            _ENCODER.encode(value).encode()
        return value
    except (ValueError, RecursionError) as e:
        raise WireError("malformed JSON") from e


def sha256_hex(data: bytes) -> str:
    """SHA-256 of ``data`` as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical form of ``value``."""
    return sha256_hex(dumps(value))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("duplicate key")
    return out


def _finite(text: str) -> float:
    """A float; ``1e999`` would silently become an infinity."""
    value = float(text)
    if math.isinf(value):
        raise ValueError("out of range")
    return value


def _short(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError("out of range")
    return int(text)


def _no_constant(name: str) -> Any:
    raise ValueError(name)
