"""Anonymity criteria over classes of rows with equal quasi-identifiers.

A criterion sees class sizes (g,) and, for one sensitive attribute, the counts (g, v) of its values in every class; so
the same object serves any recoding, any search and any cut. Each measures one figure per class and compares it with
its bound. Without suppression, each can be met only if the whole table as a single class meets it.

Sources: k-anonymity: Sweeney, IJUFKS 10(5) 2002. Distinct, entropy and recursive (c,l)-diversity: Machanavajjhala,
Gehrke, Kifer, Venkitasubramaniam, TKDD 1(1) 2007, Definitions 4.1 to 4.3. t-closeness: Li, Li, Venkatasubramanian,
ICDE 2007, section 4. (α,k)-anonymity: Wong, Li, Fu, Wang, KDD 2006. β-likeness: Cao, Karras, PVLDB 5(11) 2012.
δ-disclosure: Brickell, Shmatikov, KDD 2008. Their limits: none of them composes over releases, and none is differential
privacy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import ContractError
from fedveil.privacy.anonymization.distances import (
    Counts,
    Distance,
    Figures,
    Reference,
    distinct,
    emd,
    entropy,
    shares,
)

PerClass = NDArray[np.bool_]
ROUNDING = 1e-12
LARGEST = 1 << 53  # of a criterion's whole numbers: beyond it they are not exact as floats


class Criterion(Protocol):
    """One requirement on every class."""

    @property
    def name(self) -> str:
        """Its name in evidence and messages."""
        ...

    @property
    def column(self) -> str:
        """The sensitive attribute it protects; "" where it looks at class sizes alone."""
        ...

    @property
    def required(self) -> str:
        """The bound in words, for messages and evidence."""
        ...

    def measure(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> Figures:
        """(g,) the figure the bound is about. ``whole`` defaults to the sum of the classes given."""
        ...

    def holds(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> PerClass:
        """(g,) bool: which classes meet the bound."""
        ...


@dataclass(frozen=True)
class KAnonymity:
    """At least ``k`` rows in every class; ``counts`` is ignored."""

    k: int
    column: str = field(default="", init=False)
    name = "k-anonymity"

    def __post_init__(self) -> None:
        _whole_number("k", self.k, 2)

    @property
    def required(self) -> str:
        """See :class:`Criterion`."""
        return f"k = {self.k}"

    def measure(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> Figures:
        """Rows of every class."""
        return sizes.astype(np.float64)

    def holds(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> PerClass:
        """See :class:`Criterion`."""
        return sizes >= self.k


@dataclass(frozen=True)
class DistinctL:
    """At least ``l`` different sensitive values in every class."""

    l: int  # noqa: E741 - the literature's name
    column: str = ""
    name = "distinct l-diversity"

    def __post_init__(self) -> None:
        _whole_number("l", self.l, 1)

    @property
    def required(self) -> str:
        """See :class:`Criterion`."""
        return f"l = {self.l}"

    def measure(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> Figures:
        """Different values in every class."""
        return distinct(counts).astype(np.float64)

    def holds(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> PerClass:
        """See :class:`Criterion`."""
        return distinct(counts) >= self.l


@dataclass(frozen=True)
class EntropyL:
    """Entropy of the sensitive values at least log(l) in every class; l may be fractional (l >= 1)."""

    l: float  # noqa: E741
    column: str = ""
    name = "entropy l-diversity"

    def __post_init__(self) -> None:
        _number("l", self.l)
        if not (math.isfinite(self.l) and self.l >= 1):
            raise ContractError("entropy l-diversity needs l >= 1", hint="l = 2 allows no class with one value")

    @property
    def required(self) -> str:
        """See :class:`Criterion`."""
        return f"l = {self.l:g}"

    def measure(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> Figures:
        """exp(entropy): the effective number of values; 0 for a class without any."""
        return np.where(counts.any(axis=1), np.exp(entropy(counts)), 0.0)

    def holds(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> PerClass:
        """See :class:`Criterion`. Equality counts as met up to 1e-12, the rounding of the logarithms."""
        return (entropy(counts) >= math.log(self.l) - ROUNDING) & counts.any(axis=1)


@dataclass(frozen=True)
class RecursiveCL:
    """r_1 < c·(r_l + r_{l+1} + ... + r_m) in every class, for the counts r sorted from the largest."""

    c: float
    l: int  # noqa: E741
    column: str = ""
    name = "recursive (c,l)-diversity"

    def __post_init__(self) -> None:
        _positive("c", self.c)
        _whole_number("l", self.l, 1)

    @property
    def required(self) -> str:
        """See :class:`Criterion`."""
        return f"c = {self.c:g}, l = {self.l}"

    def measure(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> Figures:
        """r_1 / (r_l + ... + r_m): c has to be larger; infinite where fewer than l values occur."""
        first, tail = self._sums(counts)
        return np.where(tail > 0, first / np.maximum(tail, 1), np.inf)

    def holds(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> PerClass:
        """See :class:`Criterion`."""
        first, tail = self._sums(counts)
        return first < self.c * tail

    def _sums(self, counts: Counts) -> tuple[Counts, Counts]:
        r = -np.sort(-counts, axis=1)
        return r[:, 0], r[:, self.l - 1 :].sum(axis=1)


@dataclass(frozen=True)
class TCloseness:
    """Earth mover's distance of every class's distribution to the whole released table's at most ``t``.

    Args:
        t: in [0, 1].
        distance: ground distance: ``equal`` (all values 1 apart), ``ordered`` (|i - j| / (m - 1) by rank), or
            ``hierarchical`` (level of the lowest common ancestor / height of the attribute's hierarchy).
    """

    t: float
    column: str = ""
    distance: Distance = "equal"
    name = "t-closeness"

    def __post_init__(self) -> None:
        _number("t", self.t)
        if not 0 <= self.t <= 1:
            raise ContractError("t-closeness needs t in [0, 1]", hint="for example t = 0.2")
        if self.distance not in ("equal", "ordered", "hierarchical"):
            raise ContractError(
                "t-closeness has the distances equal, ordered and hierarchical", hint="distance='equal'"
            )

    @property
    def required(self) -> str:
        """See :class:`Criterion`."""
        return f"t = {self.t:g}, {self.distance}"

    def measure(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> Figures:
        """The distance of every class."""
        return emd(counts, self.distance, whole)

    def holds(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> PerClass:
        """See :class:`Criterion`. Equality counts as met up to 1e-12."""
        return emd(counts, self.distance, whole) <= self.t + ROUNDING


@dataclass(frozen=True)
class AlphaK:
    """At least ``k`` rows in every class, and no sensitive value in more than the share ``alpha`` of them."""

    alpha: float
    k: int
    column: str = ""
    name = "(α,k)-anonymity"

    def __post_init__(self) -> None:
        _number("α", self.alpha)
        if not 0 < self.alpha <= 1:
            raise ContractError("(α,k)-anonymity needs α in (0, 1]", hint="α is a share, not a percentage")
        _whole_number("k", self.k, 2)

    @property
    def required(self) -> str:
        """See :class:`Criterion`."""
        return f"α = {self.alpha:g}, k = {self.k}"

    def measure(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> Figures:
        """The largest share of one value; 1 for a class of fewer than k rows."""
        return np.where(sizes >= self.k, counts.max(axis=1, initial=0) / np.maximum(sizes, 1), 1.0)

    def holds(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> PerClass:
        """See :class:`Criterion`."""
        return (sizes >= self.k) & (counts.max(axis=1, initial=0) <= self.alpha * sizes + ROUNDING)


@dataclass(frozen=True)
class BetaLikeness:
    """Relative gain (q - p) / p of no value above ``beta``, for shares q in the class and p in the released table.

    Args:
        beta: positive.
        enhanced: the bound for a value of share p is min(β, -ln p), so that frequent values cannot become certain.
    """

    beta: float
    column: str = ""
    enhanced: bool = True
    name = "β-likeness"

    def __post_init__(self) -> None:
        _positive("β", self.beta)
        if not isinstance(self.enhanced, bool):
            raise ContractError("enhanced must be true or false", hint="for example enhanced = true")

    @property
    def required(self) -> str:
        """See :class:`Criterion`."""
        return f"β = {self.beta:g}" + (", enhanced" if self.enhanced else "")

    def measure(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> Figures:
        """The largest relative gain. With ``enhanced``: in units of the value's own bound, times β."""
        q, p = shares(counts, whole)
        safe = np.where(p > 0, p, 1.0)
        gain = np.where(p > 0, (q - p) / safe, np.where(q > 0, np.inf, 0.0))
        bound = np.minimum(self.beta, -np.log(safe)) if self.enhanced else np.full_like(p, self.beta)
        relative = np.where(gain <= ROUNDING, 0.0, gain / np.maximum(bound, ROUNDING)) * self.beta
        return np.where(counts.any(axis=1), relative.max(axis=1, initial=0.0), np.inf)

    def holds(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> PerClass:
        """See :class:`Criterion`."""
        return self.measure(sizes, counts, whole) <= self.beta * (1 + ROUNDING)


@dataclass(frozen=True)
class DeltaDisclosure:
    """|log2(q / p)| < ``delta`` for every value of the table: none is missing from a class."""

    delta: float
    column: str = ""
    name = "δ-disclosure"

    def __post_init__(self) -> None:
        _positive("δ", self.delta)

    @property
    def required(self) -> str:
        """See :class:`Criterion`."""
        return f"δ = {self.delta:g}"

    def measure(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> Figures:
        """The largest |log2(q / p)|; infinite where a value of the table is missing."""
        q, p = shares(counts, whole)
        both = (q > 0) & (p > 0)
        ratio = np.abs(np.log2(np.where(both, q, 1.0)) - np.log2(np.where(both, p, 1.0)))
        ratio = np.where(both, ratio, np.where((q > 0) | (p > 0), np.inf, 0.0))
        return np.where(counts.any(axis=1), ratio.max(axis=1, initial=0.0), np.inf)

    def holds(self, sizes: Counts, counts: Counts, whole: Reference | None = None) -> PerClass:
        """See :class:`Criterion`."""
        return self.measure(sizes, counts, whole) < self.delta


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ContractError(f"{name} is not a number but {type(value).__name__}", hint=f"write {name} without quotes")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ContractError(f"{name} is too large", hint=f"at most {LARGEST}")


def _positive(name: str, value: float) -> None:
    _number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ContractError(f"{name} is not a positive number", hint="give a finite number above 0")


def _whole_number(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ContractError(f"{name} is not a whole number", hint=f"{name} is at least {least}")
    _number(name, value)
    if value < least:
        raise ContractError(f"{name} = {value} is below {least}", hint=f"{name} is at least {least}")
