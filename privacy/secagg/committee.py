"""A committee that opens sums for a large consortium: how many of it may collude, and how many answers it needs.

Among m helpers drawn at random out of n sites of which c collude, the number of colluders is hypergeometric. The rule
allows for up to c_m of them, where P(more than c_m) <= 2^-40. A committee then follows the rule of section 4 of
docs/protocol.md in its own figures: T = floor((m + c_m) / 2) + 1 answers open a sum, and no two sets can be agreed on.
The bound is about a draw that nobody steered, made after the colluders were fixed. :func:`elect` draws from a seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import comb

from fedveil.common.errors import SecureSumError
from fedveil.common.units import SiteId

FAILURE_BITS = 40


@dataclass(frozen=True)
class Committee:
    """Figures of a committee.

    Attributes:
        size: m, the number of helpers.
        colluders: c_m, how many of them may collude.
        dropouts: its share of the drop-outs, rounded down.
        threshold: T, how many answers open a sum.
    """

    size: int
    colluders: int
    dropouts: int
    threshold: int


@cache
def colluders(n: int, c: int, m: int) -> int:
    """c_m, the smallest number that the colluders among ``m`` of ``n`` sites exceed with probability <= 2^-40.

    Exact, in integers. For m = n it is c.
    """
    if not (0 <= c < n and 1 <= m <= n):
        raise SecureSumError(f"no committee of {m} helpers is possible among {n} sites of which {c} collude")
    total, tail, most = comb(n, m), 0, min(c, m)
    for count in range(most, 0, -1):
        tail += comb(c, count) * comb(n - c, m - count)
        if tail << FAILURE_BITS > total:
            return count
    return 0


def committee(n: int, c: int, d: int, m: int) -> Committee:
    """The figures of a committee of ``m`` out of ``n`` sites of which ``c`` collude and ``d`` drop out.

    Raises:
        SecureSumError: its share of the drop-outs leaves fewer than T answers; the hint names a size that is enough.
    """
    found = _figures(n, c, d, m)
    if not _answers(found):
        enough = next((size for size in range(m + 1, n + 1) if _answers(_figures(n, c, d, size))), None)
        raise SecureSumError(
            f"a committee of {m} of {n} sites needs {found.threshold} answers; {found.dropouts} of it may be missing",
            hint=f"choose at least {enough} helpers" if enough else "allow for fewer colluders or drop-outs",
        )
    return found


def elect(sites: Sequence[SiteId], m: int, seed: bytes) -> tuple[SiteId, ...]:
    """``m`` of ``sites``, in their order: those with the smallest SHA-256 of the seed and the name.

    Args:
        seed: at least 16 bytes that nobody could choose, e.g. the hash of nonces to which all sites committed before
            any was shown, and of the roster.
    """
    if not 1 <= m <= len(sites) or len(seed) < 16:
        raise SecureSumError(
            f"no committee of {m} out of {len(sites)} sites can be drawn from a seed of {len(seed)} bytes"
        )
    rank = {site: hashlib.sha256(b"fedveil/committee/1\0" + seed + b"\0" + site.encode()).digest() for site in sites}
    chosen = set(sorted(sites, key=lambda site: rank[site])[:m])
    return tuple(site for site in sites if site in chosen)


def _figures(n: int, c: int, d: int, m: int) -> Committee:
    among = colluders(n, c, m)
    return Committee(m, among, m * d // n, (m + among) // 2 + 1)


def _answers(figures: Committee) -> bool:
    return figures.threshold <= figures.size - figures.dropouts
