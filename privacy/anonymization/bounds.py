"""Rows that any release has to leave out of a class, and of the classes of every finer node: the search's lower bounds.

Let n rows be given, at most L of them suppressed, and C a class of a node. Let R be the rows that are released at this
node or a finer one. Each of their classes lies inside C or outside it. So the released rows of C, C ∩ R, are empty or a
union of released classes D. What every D meets carries over to the union as follows:

- k-anonymity: a class of fewer than k rows contains no D at all, and C ∩ R is empty or holds at least k rows.
- distinct l-diversity: D has at most the values of C, so a C with fewer than l contains no D.
- a bound on the share of an event, q_D(A) ≤ b for every D: as the share of a union is an average of its parts' shares,
  q(A) ≤ b for C ∩ R. With x of the s rows of C left out, at least s·q_C(A) - x of those that stay lie in A, so
  s·q_C(A) - x ≤ b·(s - x), that is x ≥ s·(q_C(A) - b) / (1 - b). This serves (α,k)-anonymity (one value, b = α),
  β-likeness (one value, b = (1 + β)·p_R) and t-closeness with the equal distance (any set of values, b = p_R(A) + t).
  For the share in the released table, p_R(A) ≤ p(A)·n / (n - L): at most, A loses no row and the table loses L.
- t-closeness with another ground distance of diameter 1: the distance is convex, so C ∩ R is within t of R; leaving a
  share x/s out of C moves its distribution by at most x/s, leaving L of n out of the table by at most L/n; by the
  triangle inequality d(C, table) ≤ x/s + t + L/n. Not so for an ordered distance whose ranks depend on the values left.

Every threshold is raised by MARGIN: what the criteria forgive (1e-12), and what floating point adds to a share or a
distance, must not be divided by 1 - b and multiplied by the rows. A larger threshold gives a weaker, true bound.

Criteria without such an argument count as 0. The sum over the classes of a node bounds from below what is suppressed
there and at all finer nodes. If it is above L, none of them is feasible.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedveil.privacy.anonymization.criteria import AlphaK, BetaLikeness, Criterion, DistinctL, TCloseness
from fedveil.privacy.anonymization.distances import Counts, Figures, Reference, distinct, emd

MARGIN = 1e-11  # on thresholds: above what the criteria forgive, and the rounding of sums of shares
SLACK = 1e-9  # relative, on rows; holds while 1 - b is not so small that its own rounding shows
_LEAST_REST = 1e-6


def rows_lost(m: Criterion, sizes: Counts, counts: Counts, whole: Reference | None, limit: int) -> Figures:
    """(g,) rows of each class that no release contains, at this node or a finer one; in [0, size].

    Args:
        sizes: (g,) rows of every class.
        counts: (g, v) rows of each value in every class.
        whole: counts in the whole table, before any suppression; None for criteria that look at single classes.
        limit: rows that may be suppressed in the table.
    """
    if isinstance(m, DistinctL):
        return np.where(distinct(counts) < m.l, sizes, 0.0)
    if isinstance(m, AlphaK):
        return _excess(sizes, counts.max(axis=1, initial=0) / np.maximum(sizes, 1), m.alpha)
    if whole is None or not isinstance(m, (TCloseness, BetaLikeness)):
        return np.zeros(len(sizes))
    present, n = counts.sum(axis=1), int(whole.counts.sum())
    if n <= limit:
        return np.zeros(len(sizes))
    q = counts / np.maximum(present, 1)[:, None]
    most = np.minimum(whole.counts / (n - limit), 1.0)
    if isinstance(m, BetaLikeness):
        allowed = np.minimum((1 + m.beta) * most, 1.0)
        return np.max(_excess(present[:, None], q, allowed[None]), axis=1, initial=0.0)
    if m.distance == "equal":
        over = q > most
        return _excess(present, (q * over).sum(axis=1), np.minimum(over @ most + m.t, 1.0))
    if m.distance == "ordered" and not whole.declared:
        return np.zeros(len(sizes))
    return _whole(present * (emd(counts, m.distance, whole) - m.t - limit / n - MARGIN)) * (present > 0)


def _excess(rows: Counts, share: Figures, allowed: float | Figures) -> Figures:
    """Rows to leave out until a share of at most ``allowed`` is left; none where everything is allowed."""
    bound = np.asarray(allowed) * (1 + MARGIN) + MARGIN
    rest = 1.0 - bound
    return np.where(rest > _LEAST_REST, _whole(rows * (share - bound) / np.maximum(rest, _LEAST_REST)), 0.0)


def _whole(rows: NDArray[np.float64]) -> Figures:
    """Rows are whole: rounded up, but never because of rounding errors."""
    return np.maximum(np.ceil(rows * (1 - SLACK) - 1e-6), 0.0)
