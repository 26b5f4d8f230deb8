"""Figures of histograms: how diverse a class is, and how far it is from the whole table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import ContractError

Counts = NDArray[np.int64]
Figures = NDArray[np.float64]
Distance = Literal["equal", "ordered", "hierarchical"]


@dataclass(frozen=True)
class Reference:
    """What the classes of one sensitive attribute are compared with.

    Attributes:
        counts: (v,) counts of its values in the whole released table.
        tree: (levels, v) ancestor of every value at every level, leaves first, root last; None without a hierarchy.
        declared: whether values that do not occur keep their rank in the ordered distance.
    """

    counts: Counts
    tree: NDArray[np.int32] | None = None
    declared: bool = True


def distinct(counts: Counts) -> Counts:
    """(g,) number of different values in each class."""
    return (counts > 0).sum(axis=1)


def entropy(counts: Counts) -> Figures:
    """(g,) Shannon entropy in nats of each class's values; 0 for a class without any."""
    p = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1)


def emd(counts: Counts, distance: Distance, whole: Reference | None = None) -> Figures:
    """(g,) earth mover's distance in [0, 1] between each class's distribution and the whole table's.

    A class without a single value is at distance 1: it cannot be shown to be close.

    Raises:
        ContractError: the hierarchical distance without a hierarchy.
    """
    q, p = shares(counts, whole)
    gap = q - p
    if distance == "equal":
        out = np.abs(gap).sum(axis=1) / 2
    elif distance == "ordered":
        if whole is not None and not whole.declared:
            gap = gap[:, whole.counts > 0]
        out = np.abs(np.cumsum(gap, axis=1)).sum(axis=1) / max(gap.shape[1] - 1, 1)
    else:
        out = _tree_distance(gap, whole.tree if whole else None)
    return np.where(counts.any(axis=1), out, 1.0)


def _tree_distance(gap: Figures, tree: NDArray[np.int32] | None) -> Figures:
    """Li et al., section 4.2: mass that meets below a node moves there, at the node's height."""
    if tree is None or len(tree) < 2:
        raise ContractError("the hierarchical distance needs a hierarchy of the sensitive attribute")
    total, below, height = np.zeros(len(gap)), gap, len(tree) - 1
    for level in range(1, len(tree)):
        parent = np.zeros(below.shape[1], np.int64)
        parent[tree[level - 1]] = tree[level]
        nodes = int(tree[level].max()) + 1
        surplus, lack = np.zeros((len(gap), nodes)), np.zeros((len(gap), nodes))
        np.add.at(surplus.T, parent, np.maximum(below, 0).T)
        np.add.at(lack.T, parent, np.maximum(-below, 0).T)
        total += np.minimum(surplus, lack).sum(axis=1) * level / height
        below = surplus - lack
    return total


def shares(counts: Counts, whole: Reference | None) -> tuple[Figures, Figures]:
    """(g, v) shares of the values in every class, and (1, v) in the whole table (by default: these classes)."""
    reference = counts.sum(axis=0) if whole is None else whole.counts
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), (reference / max(int(reference.sum()), 1))[None]
