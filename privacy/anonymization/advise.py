"""Which coarser levels of the contract would pass.

Joining bins joins classes. A joined class has the rows and the sensitive values of its parts, so k-anonymity and
distinct l-diversity can only improve (monotone: Machanavajjhala et al. 2007, Theorem 4.2). So if the table fails even
with every quasi-identifier dropped, nothing passes. Of the changes that pass, only the minimal ones are worth naming.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from fedveil.common.contract import DataContract
from fedveil.privacy.anonymization.hierarchy import Level, level_of


@dataclass
class Members:
    """One class: how many rows it has, and the values seen of every sensitive attribute."""

    rows: int
    seen: tuple[set[str], ...]


Classes = dict[tuple[str, ...], Members]  # by labels of the quasi-identifiers
Removal = frozenset[tuple[int, int]]

MAX_WORK = 2_000_000
MAX_WAYS = 8


def passing_levels(classes: Classes, contract: DataContract) -> tuple[str, ...]:
    """Minimal coarsenings under which k and l hold, in words, the smallest change first; at most ``MAX_WAYS``.

    Empty exactly when no combination of the contract's levels passes. The search is exhaustive while it touches fewer
    than ``MAX_WORK`` classes. Beyond that it still finds at least one minimal change that passes.
    """
    levels = [level_of(c) for c in contract.quasi]
    boundaries = [(j, i) for j, level in enumerate(levels) for i in range(level.boundaries)]
    everything = frozenset(boundaries)
    if not _passes(classes, everything, levels, contract):
        return ()
    found: list[Removal] = []
    work = 0
    for removal in _by_size(boundaries):
        if work > MAX_WORK or len(found) >= MAX_WAYS:
            break
        work += 1
        if any(f <= removal for f in found) or not _allowed(removal, levels):
            continue
        work += len(classes)
        if _passes(classes, removal, levels, contract):
            found.append(removal)
    if not found:
        found.append(_descend(classes, everything, levels, contract))
    return tuple(_describe(f, levels) for f in found)


def _by_size(boundaries: list[tuple[int, int]]) -> Iterable[Removal]:
    return (frozenset(s) for n in range(len(boundaries) + 1) for s in itertools.combinations(boundaries, n))


def _descend(classes: Classes, start: Removal, levels: list[Level], contract: DataContract) -> Removal:
    """Put boundaries back one by one while the table passes: a minimal change, not always the smallest."""
    kept = start
    # The boundary to "no value" is a column's last. It has to come back before the column's other boundaries.
    for boundary in sorted(start, reverse=True):
        smaller = kept - {boundary}
        if _allowed(smaller, levels) and _passes(classes, smaller, levels, contract):
            kept = smaller
    return kept


def _of(removal: Removal, column: int) -> set[int]:
    return {i for j, i in removal if j == column}


def _allowed(removal: Removal, levels: list[Level]) -> bool:
    return all(level.allows(_of(removal, j)) for j, level in enumerate(levels))


def _passes(classes: Classes, removal: Removal, levels: list[Level], contract: DataContract) -> bool:
    maps = []
    for j, column in enumerate(contract.quasi):
        maps.append(dict(zip((*column.labels, ""), levels[j].joined(_of(removal, j)), strict=False)))
    joined: dict[tuple[int, ...], Members] = {}
    for labels, part in classes.items():
        key = tuple(m[label] for m, label in zip(maps, labels, strict=True))
        whole = joined.setdefault(key, Members(0, tuple(set() for _ in part.seen)))
        whole.rows += part.rows
        for all_seen, seen in zip(whole.seen, part.seen, strict=True):
            all_seen.update(seen)
    least = contract.l if contract.l > 1 else 0  # l = 1 asks for nothing, not even for one value
    return all(m.rows >= contract.k and all(len(s) >= least for s in m.seen) for m in joined.values())


def _describe(removal: Removal, levels: list[Level]) -> str:
    return " together with ".join(level.describe(part) for j, level in enumerate(levels) if (part := _of(removal, j)))
