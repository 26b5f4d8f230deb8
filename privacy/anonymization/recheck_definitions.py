"""The criteria once more, from their definitions, one class at a time, in plain Python: the verifier's own."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

from fedveil.common.errors import UsageError
from fedveil.privacy.anonymization import criteria as cr
from fedveil.privacy.anonymization.attributes import Sensitive

Histogram = Counter[str]
Verdict = tuple[bool, float]
SLACK = 1e-9


def judge(m: cr.Criterion, size: int, own: Histogram, whole: Histogram, column: Sensitive | None) -> Verdict:
    """Whether a class of ``size`` rows meets ``m``, and a figure that is larger the worse the class is.

    Raises:
        UsageError: a criterion this verifier does not know.
    """
    if isinstance(m, cr.KAnonymity):
        return size >= m.k, -float(size)
    if not +own:
        return _without_values(m, size)
    if isinstance(m, cr.DistinctL):
        return len(own) >= m.l, -float(len(own))
    if isinstance(m, cr.EntropyL):
        n = own.total()
        effective = math.prod((c / n) ** (-c / n) for c in own.values())
        return effective >= m.l * (1 - SLACK), -effective
    if isinstance(m, cr.RecursiveCL):
        r = sorted(own.values(), reverse=True)
        tail = sum(r[m.l - 1 :])
        return r[0] < Fraction(m.c) * tail, r[0] / tail if tail else math.inf
    if isinstance(m, cr.AlphaK):
        share = Fraction(max(own.values()), size)
        return size >= m.k and float(share) <= m.alpha + SLACK, float(share) if size >= m.k else 1.0
    if isinstance(m, cr.TCloseness):
        moved = distance(m, own, whole, column)
        return moved <= m.t + SLACK, moved
    if isinstance(m, (cr.BetaLikeness, cr.DeltaDisclosure)):
        return _relative(m, own, whole)
    raise UsageError(f"{m.name} cannot be verified")


def _without_values(m: cr.Criterion, size: int) -> Verdict:
    """A class in which no row has a sensitive value: no value is too frequent in it, and it is at distance 1."""
    if isinstance(m, cr.AlphaK):
        return size >= m.k, 0.0 if size >= m.k else 1.0
    if isinstance(m, cr.TCloseness):
        return m.t + SLACK >= 1, 1.0
    return False, math.inf


def _relative(m: cr.BetaLikeness | cr.DeltaDisclosure, own: Histogram, whole: Histogram) -> Verdict:
    q = {v: Fraction(own[v], own.total()) for v in whole}
    p = {v: Fraction(c, whole.total()) for v, c in whole.items()}
    if isinstance(m, cr.DeltaDisclosure):
        worst = max(abs(math.log2(q[v] / p[v])) if q[v] else math.inf for v in p)
        return worst < m.delta, worst
    worst, met = 0.0, True
    for v, share in p.items():
        gain = float((q[v] - share) / share)
        bound = min(m.beta, -math.log(share)) if m.enhanced else m.beta
        met &= gain <= bound + SLACK
        worst = max(worst, gain)
    return met, worst


def distance(m: cr.TCloseness, own: Histogram, whole: Histogram, column: Sensitive | None) -> float:
    """The least work that turns the table's distribution into the class's, by the definition of the ground distance.

    Raises:
        UsageError: a hierarchical distance without a hierarchy.
    """
    gap = {v: Fraction(own[v], own.total()) - Fraction(c, whole.total()) for v, c in whole.items()}
    if m.distance == "equal":
        return float(sum(g for g in gap.values() if g > 0))
    if m.distance == "ordered":
        order = list(column.values if column and column.values else ()) or _leaves(column) or sorted(gap, key=_rank)
        carried, work = Fraction(0), Fraction(0)
        for value in order[:-1]:
            carried += gap.get(value, Fraction(0))
            work += abs(carried)
        return float(work / max(len(order) - 1, 1))
    if column is None or column.hierarchy is None:
        raise UsageError("the hierarchical distance needs a hierarchy")
    paths = dict(zip(column.hierarchy.leaves, zip(*column.hierarchy.levels, strict=True), strict=True))
    height = column.hierarchy.height
    return float(_meet({paths[v]: g for v, g in gap.items()}, height, height)[0])


def _meet(gap: dict[tuple[str, ...], Fraction], level: int, height: int) -> tuple[Fraction, Fraction]:
    """Work below one node of the hierarchy, and its surplus of mass. ``level`` counts down from the root."""
    if level == 0:
        return Fraction(0), sum(gap.values(), Fraction(0))
    children: dict[str, dict[tuple[str, ...], Fraction]] = {}
    for path, g in gap.items():
        children.setdefault(path[level - 1], {})[path] = g
    results = [_meet(child, level - 1, height) for child in children.values()]
    surplus = sum((e for _, e in results if e > 0), Fraction(0))
    lack = -sum((e for _, e in results if e < 0), Fraction(0))
    work = sum((w for w, _ in results), Fraction(0)) + min(surplus, lack) * Fraction(level, height)
    return work, surplus - lack


def _leaves(column: Sensitive | None) -> list[str]:
    return list(column.hierarchy.leaves) if column and column.hierarchy else []


def _rank(text: str) -> tuple[int, float, str]:
    try:
        return (0, float(text), text)
    except ValueError:
        return (1, 0.0, text)
