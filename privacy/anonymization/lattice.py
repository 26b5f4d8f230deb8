"""Full-domain recoding: one level per attribute for the whole table, the best of all combinations.

The search is in the spirit of Flash (Kohlmayer, Prasser, Eckert, Kuhn, PASSAT 2012): greedy paths upwards from the most
promising undecided node, binary search on each path, predictive tagging, and roll-up (a node is evaluated on the
classes of a finer node, not on the rows). What is minimised is the certainty penalty per cell, suppressed rows counting
as fully general. Its part without suppression is a sum over attributes, so it bounds every node from below: a node
above the best loss found is never evaluated, and the result is the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import AnonymityError, UsageError
from fedveil.privacy.anonymization.domains import Domain
from fedveil.privacy.anonymization.tuples import Constraints, Tuples, combinations

Index = NDArray[np.int64]
MAX_NODES = 200_000
CACHED = 48  # evaluated nodes kept for roll-up
TIE = 1e-12


@dataclass(frozen=True)
class Node:
    """One evaluated combination of levels.

    Attributes:
        levels: by attribute.
        suppressed: rows in classes that fail.
        loss: in [0, 1], see the module.
        feasible: whether the suppressed rows are within the limit.
    """

    levels: tuple[int, ...]
    suppressed: int
    loss: float
    feasible: bool


def nodes_of(domains: Sequence[Domain]) -> int:
    """Size of the lattice."""
    return int(np.prod([float(len(d.levels)) for d in domains]))


def all_nodes(domains: Sequence[Domain], method: str) -> NDArray[np.int64]:
    """(N, q) every combination of levels, lexicographically.

    Raises:
        UsageError: there are more than ``MAX_NODES``.
    """
    if (size := nodes_of(domains)) > MAX_NODES:
        raise UsageError(
            f"{len(domains)} quasi-identifiers span {size} combinations of levels, {method!r} searches {MAX_NODES}",
            hint="use method 'mondrian', drop levels from the hierarchies, or declare fewer quasi-identifiers",
        )
    return np.indices([len(d.levels) for d in domains]).reshape(len(domains), -1).T.copy()


def separable_losses(tuples: Tuples, domains: Sequence[Domain]) -> list[NDArray[np.float64]]:
    """By attribute, (levels,) mean certainty penalty over the rows, divided by the number of attributes."""
    out = []
    for d, code in zip(domains, tuples.codes, strict=True):
        rows = np.bincount(code, tuples.weights, d.size)
        means = [float((rows * s[lut]).sum()) / max(tuples.rows, 1) for lut, s in zip(d.levels, d.shares, strict=True)]
        out.append(np.array(means) / len(domains))
    return out


class Lattice:
    """The search for the optimal node.

    Args:
        limit: share of rows, in [0, 1], that may be suppressed.
    """

    def __init__(
        self, tuples: Tuples, domains: Sequence[Domain], constraints: Constraints, *, limit: float = 0.0
    ) -> None:
        self._nodes = all_nodes(domains, "optimal")
        self._tuples, self._domains, self._constraints = tuples, domains, constraints
        self._rows = tuples.rows
        self._limit = int(limit * self._rows + 1e-9)
        self._losses = separable_losses(tuples, domains)
        self._bound = np.zeros(len(self._nodes))
        for j, loss in enumerate(self._losses):
            self._bound += loss[self._nodes[:, j]]
        shape = [len(d.levels) for d in domains]
        self._strides = np.array([int(np.prod(shape[j + 1 :])) for j in range(len(shape))])
        self._dead = np.zeros(len(self._nodes), bool)
        self._below = self._dead.reshape(shape)  # the same flags, by level of each attribute
        self._seen: dict[int, Node] = {}
        self._cache: dict[int, Tuples] = {}
        self.best: Node | None = None

    @property
    def evaluated(self) -> int:
        """How many nodes were evaluated."""
        return len(self._seen)

    def search(self) -> Node:
        """The feasible node of least loss; of equal losses the lexicographically first.

        Raises:
            AnonymityError: no node is feasible.
        """
        for start in np.lexsort((np.arange(len(self._nodes)), self._bound)).tolist():
            if self._hopeless(start):
                break  # the bounds ascend
            if start in self._seen or self._dead[start]:
                continue
            self._climb(self._path(start))
        if self.best is None:
            self._constraints.require_satisfiable()
            raise AnonymityError(
                f"no combination of levels suppresses at most {self._limit} of {self._rows} rows",
                hint="raise the suppression limit, relax the criteria, or use method 'mondrian'",
            )
        return self.best

    def classes(self, node: Sequence[int]) -> tuple[Index, int, Index]:
        """(u,) released class of every tuple (-1: suppressed), their number, and one tuple of each."""
        luts, widths = self._labels(node)
        inverse, first = combinations([lut[c] for lut, c in zip(luts, self._tuples.codes, strict=True)], widths)
        ok = self._constraints.surviving(inverse, len(first))
        place = np.where(ok, np.cumsum(ok) - 1, -1)
        return place[inverse], int(ok.sum()), first[ok]

    def evaluate(self, node: Sequence[int]) -> Node:
        """One node's suppression and loss."""
        return self._evaluate(int((np.asarray(node) * self._strides).sum()))

    def _hopeless(self, i: int) -> bool:
        return self.best is not None and self._bound[i] > self.best.loss + TIE

    def _path(self, start: int) -> list[int]:
        """Undecided nodes from ``start`` upwards, each the cheapest step."""
        path, current = [start], start
        while True:
            node = self._nodes[current]
            steps = [
                (float(self._bound[up]), up)
                for j, s in enumerate(self._strides.tolist())
                if node[j] + 1 < len(self._domains[j].levels)
                and not self._dead[up := current + s]
                and up not in self._seen
                and not self._hopeless(up)
            ]
            if not steps:
                return path
            current = min(steps)[1]
            path.append(current)

    def _climb(self, path: list[int]) -> None:
        """Binary search for the lowest feasible node; what is learned on the way is kept."""
        a, b = 0, len(path) - 1
        while a <= b:
            middle = (a + b) // 2
            if self._evaluate(path[middle]).feasible:
                b = middle - 1
            else:
                a = middle + 1
        if path[0] not in self._seen and not self._dead[path[0]]:
            self._evaluate(path[0])

    def _evaluate(self, i: int) -> Node:
        if i in self._seen:
            return self._seen[i]
        levels = tuple(self._nodes[i].tolist())
        suppressed, too_small, kept_loss = self._measure(i, levels)
        loss = (kept_loss + suppressed) / max(self._rows, 1)
        node = Node(levels, suppressed, loss, suppressed <= self._limit)
        self._seen[i] = node
        if node.feasible and self._improves(node):
            self.best = node
        if too_small > self._limit:
            # Predictive tagging: classes of a finer node are parts of these, so at least as many rows are too few.
            self._below[tuple(slice(level + 1) for level in levels)] = True
        return node

    def _improves(self, node: Node) -> bool:
        if self.best is None or node.loss < self.best.loss - TIE:
            return True
        return node.loss <= self.best.loss + TIE and node.levels < self.best.levels

    def _share(self, levels: tuple[int, ...], codes: NDArray[np.int32]) -> NDArray[np.float64]:
        out = np.zeros(codes.shape[1])
        for j, level in enumerate(levels):
            d = self._domains[j]
            out += d.shares[level][d.levels[level][codes[j]]]
        return out / len(levels)

    def _measure(self, i: int, levels: tuple[int, ...]) -> tuple[int, int, float]:
        """Rows suppressed, rows in classes of fewer than k, and summed loss of the rest."""
        part, classes, groups = self._base(i).rolled(*self._labels(levels))
        if not self._constraints.attribute:
            if len(self._cache) < CACHED:
                self._cache[i] = part
            enough = part.weights >= self._constraints.k
            suppressed = int(part.weights[~enough].sum())
            loss = float((part.weights[enough] * self._share(levels, part.codes[:, enough])).sum())
            return suppressed, suppressed, loss
        constraints = Constraints(self._constraints.models, part)
        if len(self._cache) < CACHED:
            self._cache[i] = part
        ok = constraints.surviving(classes, groups)
        sizes = np.bincount(classes, part.weights, groups).astype(np.int64)
        kept = ok[classes]
        share = self._share(levels, part.codes[:, kept])
        return (
            int(sizes[~ok].sum()),
            int(sizes[sizes < self._constraints.k].sum()),
            float((part.weights[kept] * share).sum()),
        )

    def _labels(self, node: Sequence[int]) -> tuple[list[NDArray[np.int32]], list[int]]:
        pairs = list(zip(self._domains, node, strict=True))
        return [d.levels[level] for d, level in pairs], [len(d.labels[level]) for d, level in pairs]

    def _base(self, i: int) -> Tuples:
        """The smallest evaluated node that is at least as fine as node ``i`` in every attribute."""
        known = list(self._cache)
        finer = (self._nodes[known] <= self._nodes[i]).all(axis=1) if known else np.zeros(0, bool)
        candidates = [self._cache[c] for c, ok in zip(known, finer.tolist(), strict=True) if ok]
        return min([*candidates, self._tuples], key=lambda t: t.count)
