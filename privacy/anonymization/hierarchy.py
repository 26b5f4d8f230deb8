"""Levels of a column and how neighbouring bins may be joined.

A :class:`Level` is a partition of a column's domain into ordered bins. Coarser partitions arise by joining neighbours:
m bins have m - 1 boundaries, and removing a set of them gives a coarser level. For numbers these are all coarser
partitions into intervals that use the same cut points; for categories the order of the groups is the contract's.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from fedveil.common.contract import Column, dates
from fedveil.common.errors import ContractError


@dataclass(frozen=True)
class Level:
    """An ordered partition of one column's domain.

    Attributes:
        column: the column's name.
        bins: for every bin what it holds: an interval's two edges, or a group's leaves.
        ordered: True for intervals (neighbours share an edge), False for groups of leaves.
        absent: whether "no value" is one more bin, the last.
        dates: whether the edges are days since 1970-01-01.
    """

    column: str
    bins: tuple[tuple[float, float], ...] | tuple[tuple[str, ...], ...]
    ordered: bool
    absent: bool = False
    dates: bool = False

    def __post_init__(self) -> None:
        if not self.bins or any(not b for b in self.bins):
            raise ContractError(f"a level of {self.column!r} has an empty bin")
        if not self.ordered:
            leaves = [v for b in self.bins for v in b]
            if len(set(leaves)) != len(leaves):
                raise ContractError(f"a value of {self.column!r} lies in two groups")
            return
        edges = [(float(lo), float(hi)) for lo, hi in self.bins]
        if any(lo >= hi for lo, hi in edges):
            raise ContractError(f"an interval of {self.column!r} is empty")
        for (_, end), (start, _) in itertools.pairwise(edges):
            if start != end:
                what = "a gap" if start > end else "a value in two intervals"
                raise ContractError(f"the intervals of {self.column!r} leave {what}")

    @property
    def boundaries(self) -> int:
        """How many boundaries lie between neighbouring bins."""
        return len(self.bins) - 1 + self.absent

    def allows(self, removed: Collection[int]) -> bool:
        """Whether a contract can say this: "no value" joins the rest only when the whole column is dropped."""
        if not set(removed) <= set(range(self.boundaries)):
            return False
        return not (self.absent and self.boundaries - 1 in removed and len(set(removed)) < self.boundaries)

    def joined(self, removed: Collection[int]) -> tuple[int, ...]:
        """For each bin its number after the boundaries ``removed`` (0-based) are taken away."""
        if not self.allows(removed):
            raise ContractError(f"column {self.column!r} cannot be coarsened like this")
        return tuple(itertools.accumulate((int(i not in removed) for i in range(self.boundaries)), initial=0))

    def describe(self, removed: Collection[int]) -> str:
        """The change in words: cut points and groups of the contract only, never a record's value."""
        if len(set(removed)) == self.boundaries and (self.boundaries > 1 or self.absent):
            return f"dropping the column {self.column!r}"
        parts = []
        for i in sorted(removed):
            if self.ordered:
                cut = float(self.bins[i][1])
                parts.append(f"the cut at {dates.iso(cut) if self.dates else f'{cut:g}'}")
            else:
                left, right = ("|".join(map(str, b)) for b in self.bins[i : i + 2])
                parts.append(f"the boundary between {left!r} and {right!r}")
        return f"dropping {' and '.join(parts)} of {self.column!r}"


def level_of(column: Column) -> Level:
    """The contract's level of a quasi-identifier."""
    absent = column.missing == "indicator"
    if column.type == "category":
        return Level(column.name, column.groups, ordered=False, absent=absent)
    if column.low is None or column.high is None:
        raise ContractError(f"column {column.name!r} has no public bounds")
    edges = (column.low, *column.cuts, column.high)
    return Level(column.name, tuple(itertools.pairwise(edges)), ordered=True, absent=absent, dates=bool(column.format))
