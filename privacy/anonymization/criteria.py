"""Anonymity criteria over classes of rows with equal quasi-identifiers.

A criterion says for each class whether it holds. It sees the class sizes and, for one sensitive attribute, the counts
of its values in every class; so the same object serves any recoding.

Sources: k-anonymity: Sweeney, IJUFKS 10(5) 2002. Distinct, entropy and recursive (c,l)-diversity: Machanavajjhala,
Gehrke, Kifer, Venkitasubramaniam, TKDD 1(1) 2007, Definitions 4.1 to 4.3. t-closeness: Li, Li, Venkatasubramanian,
ICDE 2007, section 4. What they do not give: none composes over releases, and none is differential privacy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import ContractError

Counts = NDArray[np.int64]
PerClass = NDArray[np.bool_]


class Criterion(Protocol):
    """One requirement on every class."""

    @property
    def name(self) -> str:
        """Its name in evidence and messages."""
        ...

    def holds(self, sizes: Counts, counts: Counts) -> PerClass:
        """(g,) bool, given class sizes (g,) and the counts (g, v) of one sensitive attribute's values."""
        ...


@dataclass(frozen=True)
class KAnonymity:
    """At least ``k`` rows in every class; ``counts`` is ignored."""

    k: int
    name = "k-anonymity"

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ContractError(f"k = {self.k} is below 2")

    def holds(self, sizes: Counts, counts: Counts) -> PerClass:
        """See :class:`Criterion`."""
        return sizes >= self.k


@dataclass(frozen=True)
class DistinctL:
    """At least ``l`` different sensitive values in every class."""

    l: int  # noqa: E741 - the literature's name
    name = "distinct l-diversity"

    def __post_init__(self) -> None:
        if self.l < 1:
            raise ContractError(f"l = {self.l} is below 1")

    def holds(self, sizes: Counts, counts: Counts) -> PerClass:
        """See :class:`Criterion`."""
        return distinct(counts) >= self.l


@dataclass(frozen=True)
class EntropyL:
    """Entropy of the sensitive values at least log(l) in every class; l may be fractional (l >= 1)."""

    l: float  # noqa: E741
    name = "entropy l-diversity"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.l) and self.l >= 1):
            raise ContractError("entropy l-diversity needs l >= 1")

    def holds(self, sizes: Counts, counts: Counts) -> PerClass:
        """See :class:`Criterion`. Equality counts as met up to 1e-12, the rounding of the logarithms."""
        return entropy(counts) >= math.log(self.l) - 1e-12


@dataclass(frozen=True)
class RecursiveCL:
    """r_1 < c·(r_l + r_{l+1} + ... + r_m) in every class, for the counts r sorted from the largest."""

    c: float
    l: int  # noqa: E741
    name = "recursive (c,l)-diversity"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.c) and self.c > 0 and self.l >= 1):
            raise ContractError("recursive (c,l)-diversity needs c > 0 and l >= 1")

    def holds(self, sizes: Counts, counts: Counts) -> PerClass:
        """See :class:`Criterion`."""
        r = -np.sort(-counts, axis=1)
        return r[:, 0] < self.c * r[:, self.l - 1 :].sum(axis=1)


@dataclass(frozen=True)
class TCloseness:
    """Earth mover's distance of every class's distribution to the whole table's at most ``t``.

    Args:
        t: in [0, 1].
        distance: ground distance: ``equal`` (all values 1 apart) or ``ordered`` (|i - j| / (m - 1) by rank).
    """

    t: float
    distance: Literal["equal", "ordered"] = "equal"
    name = "t-closeness"

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise ContractError("t-closeness needs t in [0, 1]")

    def holds(self, sizes: Counts, counts: Counts) -> PerClass:
        """See :class:`Criterion`. Equality counts as met up to 1e-12."""
        return emd(counts, self.distance) <= self.t + 1e-12


def distinct(counts: Counts) -> Counts:
    """(g,) number of different values in each class."""
    return (counts > 0).sum(axis=1)


def entropy(counts: Counts) -> NDArray[np.float64]:
    """(g,) Shannon entropy in nats of each class's values; 0 for a class without any."""
    p = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1)


def emd(counts: Counts, distance: Literal["equal", "ordered"]) -> NDArray[np.float64]:
    """(g,) earth mover's distance in [0, 1] between each class's distribution and the table's.

    A class without a single value is at distance 1: it cannot be shown to be close.
    """
    sums = counts.sum(axis=1, keepdims=True)
    total = max(int(sums.sum()), 1)
    gap = counts / np.maximum(sums, 1) - counts.sum(axis=0) / total
    if distance == "equal":
        out = np.abs(gap).sum(axis=1) / 2
    else:
        out = np.abs(np.cumsum(gap, axis=1)).sum(axis=1) / max(counts.shape[1] - 1, 1)
    return np.where(sums[:, 0] > 0, out, 1.0)
