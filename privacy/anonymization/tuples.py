"""Rows as weighted distinct tuples, and the criteria evaluated on classes of tuples.

One grouping turns the rows into distinct tuples with weights; every search works on these, so its cost does not depend
on the number of rows, and a row that occurs w times is the same as a row of weight w.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import AnonymityError
from fedveil.privacy.anonymization import codes as grouping
from fedveil.privacy.anonymization.bounds import rows_lost
from fedveil.privacy.anonymization.criteria import AlphaK, Criterion, KAnonymity, Reference

SPARSE = 16  # places of a table for each tuple, up to which it is filled and read faster than tuples are sorted

Codes = NDArray[np.int32]
Index = NDArray[np.int64]
CHUNK_CELLS = 1 << 23  # cells of a class-by-value table held at once


@dataclass(frozen=True)
class Tuples:
    """Distinct combinations of quasi-identifiers (and of the sensitive values that a criterion looks at).

    Attributes:
        codes: (q, u) int32 leaf codes.
        weights: (u,) int64 rows that carry each.
        sensitive: by column, (u,) int32 codes, -1 for "no value"; empty if no criterion needs them.
        references: by column, the counts of its values in the whole table, and its hierarchy.
    """

    codes: Codes
    weights: NDArray[np.int64]
    sensitive: Mapping[str, Codes] = field(default_factory=dict)
    references: Mapping[str, Reference] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of tuples."""
        return self.codes.shape[1]

    @property
    def rows(self) -> int:
        """Number of rows they stand for."""
        return int(self.weights.sum())


def combinations(columns: Sequence[NDArray[np.integer]], widths: Sequence[int]) -> tuple[Index, Index]:
    """The combination of every tuple (m,), numbered in lexicographic order, and one tuple of each combination.

    Columns are joined one by one and renumbered densely whenever a table of all combinations would be much larger than
    the number of tuples. It sorts only where even two columns give such a table.
    """
    m = len(columns[0])
    limit = max(1 << 14, SPARSE * m)
    inverse, span = np.zeros(m, np.int64), 1
    for column, width in zip(columns, widths, strict=True):
        if span * width > limit:
            inverse, span = _dense(inverse, span)
        if span * width > limit:
            _, inverse = np.unique(inverse * width + column, return_inverse=True)
            inverse, span = inverse.reshape(-1), int(inverse.max(initial=-1)) + 1
        else:
            inverse *= width
            inverse += column
            span *= width
    inverse, span = _dense(inverse, span)
    first = np.empty(span, np.int64)
    first[inverse] = np.arange(m)
    return inverse, first


def _dense(numbers: Index, span: int) -> tuple[Index, int]:
    """``numbers`` below ``span`` as 0, 1, ... in their order, and how many there are."""
    seen = np.zeros(span, bool)
    seen[numbers] = True
    present = np.flatnonzero(seen)
    place = np.empty(span, np.int64)
    place[present] = np.arange(len(present))
    return place[numbers], len(present)


class Constraints:
    """The criteria, bound to one table's tuples.

    Args:
        models: at least one criterion.
        tuples: what they are evaluated on.
    """

    def __init__(self, models: Sequence[Criterion], tuples: Tuples) -> None:
        self.models = tuple(models)
        self.tuples = tuples
        self.k = max([m.k for m in models if isinstance(m, (KAnonymity, AlphaK))], default=1)
        self.attribute = [m for m in models if not isinstance(m, KAnonymity)]

    def holds(
        self,
        classes: Index,
        groups: int,
        members: Index | None = None,
        references: Mapping[str, Reference] | None = None,
    ) -> NDArray[np.bool_]:
        """(groups,) whether every criterion holds.

        Args:
            classes: the class of each member.
            groups: number of classes.
            members: indices of tuples; all of them by default.
            references: what distributions are compared with; the whole table by default.
        """
        t = self.tuples
        w = t.weights if members is None else t.weights[members]
        sizes = np.bincount(classes, w, groups).astype(np.int64)
        ok = sizes >= self.k
        if not self.attribute or not ok.any():
            return ok
        # Only classes that are large enough are worth a histogram.
        place = np.cumsum(ok) - 1
        kept = np.flatnonzero(ok[classes])
        inner = place[classes[kept]]
        chosen = kept if members is None else members[kept]
        ok[ok] = self._attributes_hold(inner, sizes[ok], chosen, references or t.references)
        return ok

    def _attributes_hold(
        self, classes: Index, sizes: NDArray[np.int64], members: Index, references: Mapping[str, Reference]
    ) -> NDArray[np.bool_]:
        ok = np.ones(len(sizes), bool)
        for m in self.attribute:
            for start, stop, counts in self._histograms(m, classes, len(sizes), members):
                ok[start:stop] &= m.holds(sizes[start:stop], counts, references.get(m.column))
        return ok

    def _histograms(self, m: Criterion, classes: Index, groups: int, members: Index):
        """Histograms of the classes start..stop, a bounded number of cells at a time."""
        values, weights, domain = self.channel(m, members)
        step = max(1, CHUNK_CELLS // domain)
        if groups <= step:
            yield 0, groups, tabulate(classes, values, weights, groups, domain)
            return
        order = np.argsort(classes, kind="stable")
        ordered = classes[order]
        for start in range(0, groups, step):
            stop = min(start + step, groups)
            part = order[np.searchsorted(ordered, start) : np.searchsorted(ordered, stop)]
            yield start, stop, tabulate(classes[part] - start, values[part], weights[part], stop - start, domain)

    def channel(self, m: Criterion, members: Index) -> tuple[Codes, NDArray[np.int64], int]:
        """What a criterion counts: for each member its value and weight; and the number of values, at least 1."""
        t = self.tuples
        # An undeclared column without any value has no domain. One value that no row carries stands for it.
        return t.sensitive[m.column][members], t.weights[members], max(len(t.references[m.column].counts), 1)

    def surviving(self, classes: Index, groups: int) -> NDArray[np.bool_]:
        """(groups,) which classes can be released once the failing ones are suppressed.

        Suppression changes the released table, and with it the distribution that t-closeness, β-likeness and
        δ-disclosure compare with. So classes are suppressed until those left meet every criterion among themselves.
        """
        ok = self.holds(classes, groups)
        if not self.tuples.references or ok.all():
            return ok
        while ok.any():
            kept = np.flatnonzero(ok[classes])
            again = ok & self.holds(classes, groups, references=self.references_of(kept))
            if (again == ok).all():
                break
            ok = again
        return ok

    def lost(self, classes: Index, groups: int, limit: int) -> float:
        """Rows that no release with at most ``limit`` rows suppressed contains, at these or any finer classes."""
        sizes = np.bincount(classes, self.tuples.weights, groups)
        lost = np.zeros(groups)
        for m in self.attribute:
            reference = self.tuples.references.get(m.column)
            for start, stop, counts in self._histograms(m, classes, groups, np.arange(self.tuples.count)):
                own = rows_lost(m, sizes[start:stop], counts, reference, limit)
                np.maximum(lost[start:stop], own, out=lost[start:stop])
        # A class is released with at least k rows, or not at all.
        return float(np.where(sizes - lost < self.k, sizes, lost).sum())

    def references_of(self, members: Index) -> dict[str, Reference]:
        """The whole-table counts if only these tuples were released."""
        t = self.tuples
        out = {}
        for name, ref in t.references.items():
            values, domain = t.sensitive[name][members], len(ref.counts)
            zero = np.zeros(len(members), np.int64)
            out[name] = Reference(tabulate(zero, values, t.weights[members], 1, domain)[0], ref.tree, ref.declared)
        return out

    def require_satisfiable(self) -> None:
        """Refuse criteria that the whole table as one class fails: no recoding without suppression can meet them.

        Raises:
            AnonymityError: which criteria, on which column, and the best value that can be reached.
        """
        t = self.tuples
        n = t.rows
        broken = []
        everything, one = np.arange(t.count), np.zeros(t.count, np.int64)
        for m in self.models:
            size = np.array([n])
            if isinstance(m, KAnonymity):
                counts = size[:, None]
            else:
                values, weights, domain = self.channel(m, everything)
                counts = tabulate(one, values, weights, 1, domain)
            reference = t.references.get(m.column)
            if not m.holds(size, counts, reference)[0]:
                where = f" of column {m.column!r}" if m.column else ""
                best = float(m.measure(size, counts, reference)[0])
                broken.append(f"{m.name} ({m.required}){where}: the best reachable is {best:.4g}")
        if broken:
            raise AnonymityError(
                f"{n} rows cannot meet, even as a single class, " + "; ".join(broken),
                hint="relax these criteria, or bring more rows",
            )


def tabulate(classes: Index, values: Codes, weights: NDArray[np.int64], groups: int, domain: int) -> NDArray[np.int64]:
    """(groups, domain) weight of each value in each class; values below 0 are not counted."""
    if len(values) and int(values.min()) < 0:
        present = values >= 0
        classes, values, weights = classes[present], values[present], weights[present]
    flat = classes * domain + values
    return np.bincount(flat, weights, groups * domain).astype(np.int64).reshape(groups, domain)


class Keys:
    """Exact 64-bit keys of label combinations at any node of the lattice of levels.

    Args:
        codes: (q, m) leaf codes.
        levels: by attribute and level, the label of every leaf.
    """

    def __init__(self, codes: Codes, levels: Sequence[Sequence[Codes]]) -> None:
        widths = [int(lut[0].max()) + 1 for lut in levels]
        exact = math.prod(widths) < 1 << 62
        strides = np.cumprod([1, *widths[:-1]]).tolist() if exact else [1] * len(widths)
        self.exact = exact
        self.columns = [
            np.stack([lut[c].astype(np.int64) * s for lut in luts])
            for c, luts, s in zip(codes, levels, strides, strict=True)
        ]

    def at(self, node: Sequence[int]) -> NDArray[np.int64]:
        """(m,) one key per tuple: equal exactly where all labels at ``node`` are equal."""
        parts = [c[level] for c, level in zip(self.columns, node, strict=True)]
        if not self.exact:
            # The combinations do not fit into 64 bits: number those that occur.
            return grouping.group([p.astype(np.int32) for p in parts], len(parts[0])).inverse
        key = parts[0].copy()
        for p in parts[1:]:
            key += p
        return key

    def block(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """(b, m) the keys at several nodes (b, q)."""
        if not self.exact:
            return np.stack([self.at(node) for node in nodes.tolist()])
        key = self.columns[0][nodes[:, 0]]
        for j in range(1, len(self.columns)):
            key += self.columns[j][nodes[:, j]]
        return key

    def take(self, index: Index | NDArray[np.bool_]) -> Keys:
        """The keys of a part of the tuples."""
        out = object.__new__(Keys)
        out.exact, out.columns = self.exact, [c[:, index] for c in self.columns]
        return out
