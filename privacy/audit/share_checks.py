"""What every site handed to the sum: each by itself, before anything was added or encrypted.

A sum of many shares hides what is wrong with one of them: half of the noise missing at one site of fifty changes the
sum's noise by 1 %, and a sum of shares that are cut off looks normal. So the shares are looked at one by one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedveil.privacy.audit.evidence import Finding, Run
from fedveil.privacy.audit.noise_checks import largest, two_sided, weakest

Shares = Mapping[int, NDArray[np.float64]]
_PREFIX = 16  # numbers of a release that tell its key's stream from another's


def every_site(shares: Shares, alpha: float) -> Finding:
    """The variance of each site's own noise against σ²Δ²/h, two-sided, corrected for the number of sites."""
    if not shares:
        return _nothing("sites: noise", "variance of each site's own share of the noise against σ²Δ²/h", alpha)
    p = {site: two_sided(float((z**2).sum()), z.size) for site, z in shares.items()}
    worst = min(p, key=lambda site: p[site])
    fewest = min(z.size for z in shares.values())
    return Finding(
        "sites: noise", f"variance of the own share of the noise of each of {len(p)} sites against σ²Δ²/h",
        min(1.0, len(p) * p[worst]), alpha, math.sqrt(float((shares[worst] ** 2).mean())), 1.0,
        sum(z.size for z in shares.values()), f"noise x{weakest(fewest, alpha / len(p)):.3f} at one site",
    )  # fmt: skip


def largest_share(runs: Sequence[Shares], alpha: float) -> Finding:
    """The largest value of all shares of several runs against its law: it finds a support that is bounded."""
    parts = [z for shares in runs for z in shares.values()]
    if not parts:
        return _nothing("sites: largest value", "largest of the noise against its law", alpha)
    top = max(float(np.abs(z).max()) for z in parts)
    return largest(top, sum(z.size for z in parts), alpha, "sites: largest value")


def nothing_lost(runs: Sequence[Run], grid: float, alpha: float) -> Finding:
    """The opened sum is exactly the sum of what its members handed in; over the releases that were kept whole."""
    off, count = 0.0, 0
    for r in (r for run in runs for r in run.releases if set(r.members) == set(r.shares)):
        off = max(off, float(np.abs(np.rint((r.values - sum(r.shares.values())) / grid)).max()))
        count += r.values.size
    return Finding(
        "sum: nothing added or lost", "opened sum against the sum of what its members handed in, in grid units",
        float(count > 0 and off == 0), alpha, off, 0.0, count, "one grid unit in one coordinate",
    )  # fmt: skip


def fresh_keys(run: Run, alpha: float) -> Finding:
    """No two releases begin with the same noise: of M releases under keys of b bits, M² / 2^(b+1) pairs would."""
    seen = [np.round(z[:_PREFIX], 12).tobytes() for r in run.releases for z in r.shares.values()]
    again = len(seen) - len(set(seen))
    bits = math.floor(2 * math.log2(max(len(seen), 2)) - math.log2(2 * math.log(1000)))
    return Finding(
        "noise: key", "releases whose noise begins like that of another one", float(bool(seen) and again == 0), alpha,
        float(again), 0.0, len(seen), f"a key of {bits} bits",
    )  # fmt: skip


def _nothing(name: str, asks: str, alpha: float) -> Finding:
    """Nothing was shown: that is no evidence, and the check fails."""
    return Finding(name, asks, 0.0, alpha, 0.0, 1.0, 0, "nothing: no share was shown")
