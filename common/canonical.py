"""Canonical JSON: one byte string per value, so that hashes and signatures have one meaning.

Keys are sorted by code point. There is no white space, and the text is UTF-8. A float has Python's shortest round-trip
form. NaN and infinities are refused. The form is close to RFC 8785. It differs in numbers: integers of any size are
written in full, and floats keep Python's exponent form. RFC 8785 limits integers to 2^53. Here a limit of 300 digits
holds for what is parsed only.
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
_DIGITS = 300  # the most digits of a whole number, so that every accepted one is within a float's range
_FEW = 1 << 20  # a text may hold so many values of any length, and one more for every 8 bytes of text


def dumps(value: Any) -> bytes:
    """Canonical bytes of a JSON value (dict with string keys, list, str, int, float, bool, None)."""
    try:
        return _ENCODER.encode(value).encode()
    except (TypeError, ValueError, RecursionError) as e:
        raise WireError(f"value has no canonical JSON form: {type(e).__name__}") from e


def loads(data: bytes | str, *, limit: int = 1 << 26) -> Any:
    """Parse UTF-8 JSON of at most ``limit`` bytes; whatever is returned has a canonical form of its own.

    Refused are duplicate keys, NaN, infinities, halves of a character (lone surrogates), and whole numbers of more
    than 300 digits, which no float can hold. So nobody who reads the value has to check for them again.

    Text with too many values for its length is refused before it is parsed: an empty list takes 2 bytes of text, but
    64 of memory. Nothing that is written here is so dense.

    Raises:
        WireError: the text is not such JSON, or is too long or too dense.
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
        if _SURROGATE.search(data):  # only an escape can write half a character, because UTF-8 holds none
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
    """A finite float. Python alone would silently read ``1e999`` as an infinity."""
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
