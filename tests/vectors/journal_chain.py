"""A second reading of docs/protocol.md and common/journal.py: hash chain and signatures of a journal, in plain Python.

Ed25519 is written here after RFC 8032, section 5.1, with integers alone; nothing is imported from the package nor from
a library of cryptography. Slow (milliseconds a signature), and meant to be: every line can be read beside the RFC.

    python tests/vectors/journal_chain.py JOURNAL PUBLIC_HEX OWNER    prints the head (exit 0) or what is wrong (exit 1)
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
ROOT_OF_MINUS_ONE = pow(2, (P - 1) // 4, P)
DOMAIN = b"fedveil/journal/1"
NAMES = {"v", "n", "owner", "at", "kind", "body", "prev", "hash", "sig"}

Point = tuple[int, int, int, int]  # extended coordinates: x = X/Z, y = Y/Z, xy = T/Z


class Refused(Exception):
    """The journal does not hold; ``row`` is the first row concerned."""

    def __init__(self, row: int, why: str) -> None:
        super().__init__(f"row {row}: {why}")
        self.row = row


# ---- Ed25519 (RFC 8032, section 5.1)


def add(p: Point, q: Point) -> Point:
    a, b = (p[1] - p[0]) * (q[1] - q[0]) % P, (p[1] + p[0]) * (q[1] + q[0]) % P
    c, d = 2 * p[3] * q[3] * D % P, 2 * p[2] * q[2] % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P


def multiply(k: int, p: Point) -> Point:
    out = (0, 1, 1, 0)
    while k:
        if k & 1:
            out = add(out, p)
        p, k = add(p, p), k >> 1
    return out


def equal(p: Point, q: Point) -> bool:
    return (p[0] * q[2] - q[0] * p[2]) % P == 0 and (p[1] * q[2] - q[1] * p[2]) % P == 0


def x_of(y: int, sign: int) -> int | None:
    if y >= P:
        return None
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    if square == 0:
        return None if sign else 0
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * ROOT_OF_MINUS_ONE % P
    if (x * x - square) % P:
        return None
    return P - x if x & 1 != sign else x


def point(data: bytes) -> Point | None:
    number = int.from_bytes(data, "little")
    y, sign = number & (1 << 255) - 1, number >> 255
    x = x_of(y, sign)
    return None if x is None else (x, y, 1, x * y % P)


_Y = 4 * pow(5, P - 2, P) % P
_X = x_of(_Y, 0)
BASE: Point = (_X or 0, _Y, 1, (_X or 0) * _Y % P)


def signature_holds(public: bytes, message: bytes, signature: bytes) -> bool:
    if len(public) != 32 or len(signature) != 64:
        return False
    a, r = point(public), point(signature[:32])
    s = int.from_bytes(signature[32:], "little")
    if a is None or r is None or s >= L:
        return False
    k = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % L
    return equal(multiply(s, BASE), add(r, multiply(k, a)))


# ---- the chain


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name twice")
    return out


def digits(value: Any, length: int) -> bool:
    return isinstance(value, str) and len(value) == length and set(value) <= set("0123456789abcdef")


def read(i: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode(), object_pairs_hook=once)
        if not isinstance(row, dict) or set(row) != NAMES or canonical(row) != line:
            raise ValueError
        whole = type(row["n"]) is int and type(row["at"]) is int and type(row["v"]) is int and row["v"] == 1
        words = type(row["owner"]) is str and type(row["kind"]) is str and type(row["body"]) is dict
        if not whole or not words or not digits(row["prev"], 64) or not digits(row["hash"], 64):
            raise ValueError
        if not digits(row["sig"], 128):
            raise ValueError
    except (ValueError, RecursionError) as e:
        raise Refused(i, "no well-formed row") from e
    return row


def check(data: bytes, public: str, owner: str) -> tuple[int, str]:
    """The head ``(rows, hash)`` of a journal; :class:`Refused` at the first row that does not hold."""
    parts = data.split(b"\n")
    if parts.pop():
        raise Refused(len(parts), "no end of line")
    rows = [read(i, line) for i, line in enumerate(parts)]
    before = "0" * 64
    for i, row in enumerate(rows):
        if row["n"] != i or row["owner"] != owner or row["prev"] != before:
            raise Refused(i, "out of order, or of another journal")
        core = {k: v for k, v in row.items() if k not in ("hash", "sig")}
        if hashlib.sha256(canonical(core)).hexdigest() != row["hash"]:
            raise Refused(i, "changed")
        if not signature_holds(bytes.fromhex(public), DOMAIN + b"\0" + row["hash"].encode(), bytes.fromhex(row["sig"])):
            raise Refused(i, "not signed")
        before = row["hash"]
    return len(rows), before


if __name__ == "__main__":
    try:
        count, head = check(Path(sys.argv[1]).read_bytes(), sys.argv[2], sys.argv[3])
        sys.stdout.write(f"{count} {head}\n")
    except Refused as e:
        sys.exit(f"refused: {e}")
