"""What a search found: classes of tuples and what each class's cells say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.common.contract import MISSING
from fedveil.privacy.anonymization.attributes import TOP
from fedveil.privacy.anonymization.domains import Domain, escape

Index = NDArray[np.int64]
SUPPRESSED = -1


@dataclass(frozen=True)
class Cells:
    """The released cells of one quasi-identifier.

    Attributes:
        labels: the different labels.
        of_class: (c,) index of each class's label.
        shares: (c,) NCP of each class's cell: 0 one value, 1 the whole domain.
        leaves: by label, the leaf codes that it stands for. (A table of labels by V leaves would be too large to keep.)
    """

    labels: tuple[str, ...]
    of_class: NDArray[np.int32]
    shares: NDArray[np.float64]
    leaves: tuple[NDArray[np.int32], ...]


@dataclass(frozen=True)
class Recoding:
    """Attributes:
    method: the search that found it.
    classes: (u,) class of every tuple; ``SUPPRESSED`` for none.
    count: number of classes.
    cells: by quasi-identifier.
    nodes: (c, q) level of every class's cell; None for sets that no hierarchy names.
    """

    method: str
    classes: Index
    count: int
    cells: tuple[Cells, ...]
    nodes: NDArray[np.int64] | None = None


def by_levels(method: str, domains: Sequence[Domain], classes: Index, nodes: NDArray[np.int64], reps: Index,
              codes: NDArray[np.int32]) -> Recoding:  # fmt: skip
    """A recoding to labels of the hierarchies.

    Args:
        nodes: (c, q) the level of each class's cells.
        reps: (c,) one tuple of each class.
        codes: (q, u) leaf codes of the tuples.

    Classes that read alike (a group of one leaf is that leaf) become one class, which meets whatever both met.
    """
    cells, columns = [], []
    for j, d in enumerate(domains):
        ids: dict[str, int] = {}
        members: list[NDArray[np.int32]] = []
        of_class, shares = np.zeros(len(reps), np.int32), np.zeros(len(reps))
        for level in range(len(d.levels)):
            here = nodes[:, j] == level
            if not here.any():
                continue
            own = d.levels[level][codes[j, reps[here]]]
            table = np.zeros(len(d.labels[level]), np.int32)
            for code in np.unique(own).tolist():
                label = d.labels[level][code]
                if label not in ids:
                    ids[label] = len(ids)
                    members.append(np.flatnonzero(d.levels[level] == code).astype(np.int32))
                table[code] = ids[label]
            of_class[here], shares[here] = table[own], d.shares[level][own]
        cells.append(Cells(tuple(ids), of_class, shares, tuple(members)))
        columns.append(of_class)
    return _merge(method, classes, nodes, cells, columns)


def _merge(method: str, classes: Index, nodes: NDArray[np.int64], cells: list[Cells], columns: list) -> Recoding:
    if not len(nodes):
        return Recoding(method, classes, 0, tuple(cells), nodes)
    _, first, inverse = np.unique(np.stack(columns, axis=1), axis=0, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    merged = tuple(Cells(c.labels, c.of_class[first], c.shares[first], c.leaves) for c in cells)
    renumbered = np.where(classes < 0, SUPPRESSED, inverse[classes])
    return Recoding(method, renumbered, len(first), merged, nodes[first])


def by_sets(method: str, domains: Sequence[Domain], classes: Index, count: int, codes: NDArray[np.int32]) -> Recoding:
    """A recoding to the sets of values that each class really holds: intervals for numbers, lists for categories."""
    cells = [_set_cells(d, classes, count, codes[j]) for j, d in enumerate(domains)]
    return Recoding(method, classes, count, tuple(cells))


def _set_cells(d: Domain, classes: Index, count: int, codes: NDArray[np.int32]) -> Cells:
    pairs = np.sort(classes * d.size + codes)
    pairs = pairs[np.r_[True, pairs[1:] != pairs[:-1]]]
    owner, code = pairs // d.size, (pairs % d.size).astype(np.int32)
    starts = np.searchsorted(owner, np.arange(count))
    if d.numbers is not None:
        # A number's set is named by its two ends (and "missing"): sets with equal ends are one label.
        whole = np.isnan(d.numbers[code])
        low, high = np.full(count, d.size, np.int64), np.full(count, -1, np.int64)
        np.minimum.at(low, owner[~whole], code[~whole])
        np.maximum.at(high, owner[~whole], code[~whole])
        absent = np.zeros(count, bool)
        absent[owner[whole]] = True
        key = (low * (d.size + 2) + high + 1) * 2 + absent
        _, first, of_class = np.unique(key, return_index=True, return_inverse=True)
        ends = [(int(low[c]), int(high[c]), bool(absent[c])) for c in first]
        labels = tuple(_interval(d, *e) for e in ends)
        share = np.array([_interval_share(d, *e) for e in ends])
        leaves = tuple(_interval_leaves(d, *e) for e in ends)
        return Cells(labels, of_class.reshape(-1).astype(np.int32), share[of_class.reshape(-1)], leaves)
    of_class, first = _equal_sets(owner, code, starts, count)
    bounds = np.r_[starts, len(code)]
    leaves = tuple(code[bounds[c] : bounds[c + 1]] for c in first.tolist())
    labels = tuple(set_label([d.leaves[i] for i in s], d.size) for s in leaves)
    share = np.array([(len(s) - 1) / max(d.size - 1, 1) for s in leaves])
    return Cells(labels, of_class, share[of_class], leaves)


def _equal_sets(owner: Index, code: NDArray[np.int32], starts: Index, count: int) -> tuple[NDArray[np.int32], Index]:
    """(c,) number of each class's set, and one class per different set. Exact: by length, then code by code."""
    length = np.diff(np.r_[starts, len(code)])
    number = np.unique(length, return_inverse=True)[1].reshape(-1).astype(np.int64)
    rank = np.arange(len(code)) - starts[owner]
    for r in range(int(length.max(initial=0))):
        here = rank == r
        step = np.zeros(count, np.int64)
        step[owner[here]] = code[here] + 1
        number = np.unique(number * (int(step.max()) + 1) + step, return_inverse=True)[1].reshape(-1)
    _, first, of_class = np.unique(number, return_index=True, return_inverse=True)
    return of_class.reshape(-1).astype(np.int32), first


def set_label(values: Sequence[str], domain: int) -> str:
    """``a|b|c``, with ``\\`` before a ``|`` or ``\\`` inside a value; ``*`` for the whole domain.

    A value that itself reads ``*`` (a cell that came in suppressed) is written ``\\*``: its own category, never "any".
    """
    if len(values) == domain > 1:
        return TOP
    return "|".join(escape(v) for v in values)


def parse_set(label: str) -> tuple[str, ...] | None:
    """The values of a set label; None for ``*``."""
    if label == TOP:
        return None
    out, current, quoted = [], [], False
    for ch in label:
        if quoted or ch not in "\\|":
            current.append(ch)
            quoted = False
        elif ch == "\\":
            quoted = True
        else:
            out.append("".join(current))
            current = []
    return (*out, "".join(current))


def _interval(d: Domain, low: int, high: int, absent: bool) -> str:
    if high < 0:
        return MISSING
    text = d.shown[low] if low == high else f"[{d.shown[low]},{d.shown[high]}]"
    return f"{text}|{MISSING}" if absent else text


def _interval_share(d: Domain, low: int, high: int, absent: bool) -> float:
    if d.numbers is None or high < 0:
        return 0.0
    if absent:
        return 1.0
    whole = np.nanmax(d.numbers) - np.nanmin(d.numbers)
    return float((d.numbers[high] - d.numbers[low]) / whole) if whole > 0 else 0.0


def _interval_leaves(d: Domain, low: int, high: int, absent: bool) -> NDArray[np.int32]:
    out = np.arange(low, high + 1, dtype=np.int32) if high >= 0 else np.zeros(0, np.int32)
    return np.r_[out, np.int32(d.size - 1)].astype(np.int32) if absent else out
