"""Classes of one node of the lattice, computed from the classes of a finer node instead of from rows.

Neighbouring attributes are joined into a few blocks of at most ``BLOCK`` combinations of leaves. Those that occur are
numbered. Generalising a class is then one look-up per block in a small table, whatever the number of attributes. Sizes
come first and decide most nodes; the classes' sensitive values are rolled up only where they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.privacy.anonymization.domains import Domain
from fedveil.privacy.anonymization.tuples import SPARSE, Tuples, combinations

Index = NDArray[np.int64]
Figures = NDArray[np.float64]
BLOCK = 1 << 14
TABLES = 512  # tables kept


@dataclass(frozen=True)
class Entries:
    """The distinct (class, sensitive values) of a node.

    Attributes:
        owner: (e,) the class of each.
        values: weights and sensitive values; without codes of quasi-identifiers.
    """

    owner: Index
    values: Tuples

    def rolled(self, place: Index, classes: int) -> Entries:
        """The entries of ``classes`` coarser classes. ``place`` names the coarser class of each class of this node."""
        t = self.values
        widths = [len(t.references[name].counts) + 1 for name in t.sensitive]
        owner = place[self.owner]
        inverse, first = combinations([owner, *(v + 1 for v in t.sensitive.values())], [classes, *widths])
        size = len(first)
        weights = np.bincount(inverse, t.weights, size).astype(np.int64)
        sensitive = {name: v[first] for name, v in t.sensitive.items()}
        return Entries(owner[first], Tuples(np.empty((0, size), np.int32), weights, sensitive, t.references))


class Part:
    """The classes of one node.

    Attributes:
        columns: by block, (c,) the combination of leaves of one tuple of each class.
        sizes: (c,) rows of each class; whole numbers below 2^53.
    """

    def __init__(self, columns: list[Index], sizes: Figures, source: tuple[Part, Index] | Entries) -> None:
        self.columns, self.sizes = columns, sizes
        self._source = source

    @property
    def count(self) -> int:
        """Number of classes."""
        return len(self.sizes)

    @property
    def entries(self) -> Entries:
        """Their sensitive values."""
        if not isinstance(self._source, Entries):
            finer, place = self._source
            self._source = finer.entries.rolled(place, self.count)
        return self._source


class Rollup:
    """Nodes of the lattice over one table's tuples.

    Args:
        attributes: whether sensitive values will be asked for.
    """

    def __init__(self, tuples: Tuples, domains: Sequence[Domain], *, attributes: bool) -> None:
        self._blocks = _blocks(domains)
        self._domains = domains
        self._leaves: list[list[NDArray[np.int32]]] = []  # by block and attribute, the leaves of each combination
        self._tables: dict[tuple[int, tuple[int, ...]], tuple[Index, int]] = {}
        columns = []
        for block in self._blocks:
            own = [tuples.codes[j] for j in block]
            inverse, first = combinations(own, [domains[j].size for j in block])
            self._leaves.append([c[first] for c in own])
            columns.append(inverse)
        everything = Entries(np.arange(tuples.count), tuples)
        self.base = Part(columns, tuples.weights.astype(np.float64), everything)
        if attributes:
            # Tuples that differ in sensitive values alone are one class.
            inverse, first = combinations(columns, [len(leaves[0]) for leaves in self._leaves])
            sizes = _summed(inverse, tuples.weights, len(first))
            self.base = Part([c[first] for c in columns], sizes, Entries(inverse, tuples))

    def sizes(self, part: Part, node: Sequence[int]) -> tuple[Index, Figures]:
        """The class at ``node`` of each class of ``part``, and the rows of every class. Some numbers may be unused."""
        tables = [self._table(b, node) for b in range(len(self._blocks))]
        columns = [table[c] for (table, _), c in zip(tables, part.columns, strict=True)]
        widths = [width for _, width in tables]
        span = 1
        for width in widths:
            span *= width
        if span > max(1 << 14, SPARSE * part.count):
            keys, first = combinations(columns, widths)
            return keys, _summed(keys, part.sizes, len(first))
        keys = columns[0]
        for column, width in zip(columns[1:], widths[1:], strict=True):
            keys *= width
            keys += column
        return keys, _summed(keys, part.sizes, span)

    @staticmethod
    def part(part: Part, keys: Index, span: int) -> Part:
        """The node of these keys as a part of its own, its classes numbered without gaps, in the order of the keys."""
        first = np.full(span, -1, np.int64)
        first[keys] = np.arange(part.count)
        present = np.flatnonzero(first >= 0)
        first[present], chosen = np.arange(len(present)), first[present]
        place = first[keys]
        return Part([c[chosen] for c in part.columns], _summed(place, part.sizes, len(present)), (part, place))

    def shares(self, part: Part, node: Sequence[int], chosen: Index) -> Figures:
        """(m,) mean certainty penalty of the classes ``chosen`` of ``part``, once generalised to ``node``."""
        out = np.zeros(len(chosen))
        for block, leaves, column in zip(self._blocks, self._leaves, part.columns, strict=True):
            table = np.zeros(len(leaves[0]))
            for j, leaf in zip(block, leaves, strict=True):
                d = self._domains[j]
                table += d.shares[node[j]][d.levels[node[j]]][leaf]
            out += table[column[chosen]]
        return out / len(self._domains)

    def _table(self, b: int, node: Sequence[int]) -> tuple[Index, int]:
        """The label combination of every leaf combination of a block, and how many occur."""
        block = self._blocks[b]
        key = (b, tuple(node[j] for j in block))
        if (found := self._tables.get(key)) is not None:
            return found
        labels = [self._domains[j].levels[node[j]][leaf] for j, leaf in zip(block, self._leaves[b], strict=True)]
        table, first = combinations(labels, [len(self._domains[j].labels[node[j]]) for j in block])
        if len(self._tables) < TABLES:
            self._tables[key] = table, len(first)
        return table, len(first)


def _summed(keys: Index, weights: NDArray[Any], span: int) -> Figures:
    """(span,) weight of each key; exact for whole numbers below 2^53."""
    return np.bincount(keys, weights, span).astype(np.float64, copy=False)


def _blocks(domains: Sequence[Domain]) -> list[list[int]]:
    """Neighbouring attributes, as many together as stay below ``BLOCK`` combinations."""
    blocks: list[list[int]] = []
    size = 1
    for j, d in enumerate(domains):
        if not blocks or size * d.size > BLOCK:
            blocks.append([])
            size = 1
        blocks[-1].append(j)
        size *= d.size
    return blocks
