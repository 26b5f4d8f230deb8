"""Typed, bounded reading of JSON that somebody else wrote. A :class:`VerificationError` says where it is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedveil.common.errors import VerificationError
from fedveil.common.units import MAX_SITES

MAX_METRICS = 64
_HEX = frozenset("0123456789abcdef")


def mapping(value: Any, where: str) -> dict[str, Any]:
    """``value``, if it is a JSON object."""
    if not isinstance(value, dict):
        raise VerificationError(f"{where} is not a JSON object")
    return value


def integer(body: Mapping[str, Any], key: str, where: str, *, low: int = 0, high: int = 1 << 53) -> int:
    """The whole number under ``key``, in [low, high]; ``true`` is none."""
    value = body.get(key)
    if type(value) is not int or not low <= value <= high:
        raise VerificationError(f"{where}: {key} is not a whole number in {low}..{high}")
    return value


def number(body: Mapping[str, Any], key: str, where: str, *, low: float = 0.0, high: float = 1e18) -> float:
    """The finite number under ``key``, in [low, high]."""
    value = body.get(key)
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
        raise VerificationError(f"{where}: {key} is not a number in {low:g}..{high:g}")
    return float(value)  # type: ignore[arg-type]


def text(body: Mapping[str, Any], key: str, where: str, *, limit: int = 256) -> str:
    """The printable text under ``key``, of at most ``limit`` characters."""
    value = body.get(key)
    if not isinstance(value, str) or len(value) > limit or not value.isprintable():
        raise VerificationError(f"{where}: {key} is not a printable text of at most {limit} characters")
    return value


def hexadecimal(body: Mapping[str, Any], key: str, where: str, *, length: int = 64) -> str:
    """The lower-case hexadecimal digits under ``key``."""
    value = body.get(key)
    if not isinstance(value, str) or len(value) != length or not _HEX.issuperset(value):
        raise VerificationError(f"{where}: {key} is not {length} lower-case hexadecimal digits")
    return value


def public_key(value: Any, where: str) -> str:
    """A public key as 64 lower-case hexadecimal digits. White space around ``value`` and capitals are accepted."""
    digits = value.strip().lower() if isinstance(value, str) else None
    return hexadecimal({"key": digits}, "key", where)


def sites(body: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The list of different site names under ``key``, in its order."""
    value = body.get(key)
    if not isinstance(value, list) or len(value) > MAX_SITES or not all(isinstance(x, str) for x in value):
        raise VerificationError(f"{where}: {key} is not a list of site names")
    if len(set(value)) != len(value):
        raise VerificationError(f"{where}: {key} names a site twice")
    return tuple(value)


def head(value: Any, where: str) -> tuple[int, str]:
    """A journal's head: ``[rows, hash of the last row]``."""
    if not isinstance(value, list) or len(value) != 2:
        raise VerificationError(f"{where}: a head is not [rows, hash]")
    pair = {"rows": value[0], "hash": value[1]}
    return integer(pair, "rows", where, high=1 << 22), hexadecimal(pair, "hash", where)


def metrics(value: Any, where: str) -> dict[str, float]:
    """Finite numbers by name."""
    found = mapping(value, where)
    if len(found) > MAX_METRICS:
        raise VerificationError(f"{where}: more than {MAX_METRICS} metrics")
    for name, x in found.items():
        if len(name) > 64 or not name.isprintable() or type(x) not in (int, float) or not math.isfinite(x):
            raise VerificationError(f"{where}: a metric is not a finite number under a short name")
    return {name: float(x) for name, x in found.items()}
