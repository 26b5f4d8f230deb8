"""Full-domain recoding: one level per attribute for the whole table, the best of all combinations.

The search is in the spirit of Flash (Kohlmayer, Prasser, Eckert, Kuhn, PASSAT 2012): greedy paths upwards from the most
promising undecided node, binary search on each path, predictive tagging, and roll-up (a node is evaluated on the
classes of a finer node, not on the rows). The search minimises the certainty penalty per cell. Suppressed rows count as
fully general. The part without suppression is a sum over attributes, so it bounds every node from below. A node above
the best loss found is never evaluated, and the result is the optimum. Tagging works for every criterion that has a
bound in :mod:`.bounds`, although with suppression t-closeness itself is not monotone along the lattice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import AnonymityError, UsageError
from fedveil.privacy.anonymization.domains import Domain
from fedveil.privacy.anonymization.rollup import Part, Rollup
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
            f"{len(domains)} quasi-identifiers span {size} combinations of levels; {method!r} takes {MAX_NODES}",
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
        self._seen: dict[int, bool] = {}
        self._rollup = Rollup(tuples, domains, attributes=bool(constraints.attribute))
        self._parts = [self._rollup.base]
        self._levels = np.zeros((CACHED, len(domains)), np.int64)  # of the parts, in the same order
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
        luts = [d.levels[level] for d, level in zip(self._domains, node, strict=True)]
        widths = [len(d.labels[level]) for d, level in zip(self._domains, node, strict=True)]
        inverse, first = combinations([lut[c] for lut, c in zip(luts, self._tuples.codes, strict=True)], widths)
        ok = self._constraints.surviving(inverse, len(first))
        place = np.where(ok, np.cumsum(ok) - 1, -1)
        return place[inverse], int(ok.sum()), first[ok]

    def evaluate(self, node: Sequence[int]) -> Node:
        """One node's suppression and loss, all criteria looked at."""
        i = int((np.asarray(node) * self._strides).sum())
        keys, sizes = self._rollup.sizes(self._rollup.base, node)
        own = self._rollup.part(self._rollup.base, keys, len(sizes))
        failing = np.flatnonzero(~self._surviving(own))
        suppressed = int(own.sizes[failing].sum())
        loss = self._loss(i, tuple(node), own, failing)
        return Node(tuple(node), suppressed, loss, suppressed <= self._limit)

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
            if self._evaluate(path[middle]):
                b = middle - 1
            else:
                a = middle + 1
        if path[0] not in self._seen and not self._dead[path[0]]:
            self._evaluate(path[0])

    def _evaluate(self, i: int) -> bool:
        """Look at one node. True if finer nodes are worth looking at before coarser ones."""
        if i in self._seen:
            return self._seen[i]
        self._seen[i] = worth = self._judge(i, tuple(self._nodes[i].tolist()))
        return worth

    def _judge(self, i: int, levels: tuple[int, ...]) -> bool:
        finer = self._finer(i)
        keys, sizes = self._rollup.sizes(finer, levels)
        if self._rows - sizes[sizes >= self._constraints.k].sum() > self._limit:
            self._tag(levels)
            self._keep(i, finer, keys, len(sizes))
            return False
        few = np.flatnonzero((sizes < self._constraints.k)[keys])
        loss = self._loss(i, levels, finer, few)
        if self.best is not None and loss > self.best.loss + TIE:
            return True  # the other criteria can only add to it
        if not self._constraints.attribute:
            return self._found(Node(levels, int(finer.sizes[few].sum()), loss, True))
        own = self._keep(i, finer, keys, len(sizes))
        constraints = Constraints(self._constraints.models, own.entries.values)
        if constraints.lost(own.entries.owner, own.count, self._limit) > self._limit:
            self._tag(levels)
            return False
        ok = self._surviving(own)
        failing = np.flatnonzero(~ok)
        suppressed = int(own.sizes[failing].sum())
        if suppressed > self._limit:
            return False
        return self._found(Node(levels, suppressed, self._loss(i, levels, own, failing), True))

    def _surviving(self, own: Part) -> NDArray[np.bool_]:
        return Constraints(self._constraints.models, own.entries.values).surviving(own.entries.owner, own.count)

    def _loss(self, i: int, levels: tuple[int, ...], part: Part, suppressed: Index) -> float:
        """Mean loss at a node once some classes of a finer ``part`` are suppressed."""
        more = part.sizes[suppressed] * (1.0 - self._rollup.shares(part, levels, suppressed))
        return float(self._bound[i]) + float(more.sum()) / max(self._rows, 1)

    def _found(self, node: Node) -> bool:
        """A feasible node: coarser ones on its path lose more."""
        if self.best is None or node.loss < self.best.loss - TIE:
            self.best = node
        elif node.loss <= self.best.loss + TIE and node.levels < self.best.levels:
            self.best = node
        return True

    def _tag(self, levels: tuple[int, ...]) -> None:
        """Predictive tagging: what a node has to suppress, all finer nodes have to suppress too."""
        self._below[tuple(slice(level + 1) for level in levels)] = True

    def _keep(self, i: int, finer: Part, keys: Index, span: int) -> Part:
        """The node as a part of its own, kept for roll-up while there is room."""
        own = self._rollup.part(finer, keys, span)
        if len(self._parts) < CACHED:
            self._parts.append(own)
            self._levels[len(self._parts) - 1] = self._nodes[i]
        return own

    def _finer(self, i: int) -> Part:
        """The smallest part that is at least as fine as node ``i`` in every attribute."""
        fits = (self._levels[: len(self._parts)] <= self._nodes[i]).all(axis=1)
        return min((self._parts[p] for p in np.flatnonzero(fits).tolist()), key=lambda part: part.count)
