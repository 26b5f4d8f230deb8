"""Generalised cells of any method as sets of leaves, and their encoding to inputs of one fixed width.

A raw value is a set of one. A category's set puts equal weight on its leaves, so its inputs sum to 1. If the contract
allows "no value", that is one more leaf. A number's set is an interval. It gives its midpoint, scaled to [-1, 1], and
its width, scaled to [0, 1]. A cell without a value has midpoint 0 and width 1, because nothing is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.common.contract import MISSING, OTHER, Column
from fedveil.common.errors import DataError


@dataclass(frozen=True)
class Leaves:
    """A set of a category's leaves; "missing" stands for "no value"."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """All numbers from low to high. If ``absent``, the set holds "no value" too."""

    low: float
    high: float
    absent: bool = False


@dataclass(frozen=True)
class Full:
    """Every value that the contract allows: a suppressed cell."""


@dataclass(frozen=True)
class Nothing:
    """No value."""


Set = Leaves | Interval | Full | Nothing


@dataclass(frozen=True)
class Cells:
    """A column: its distinct sets, and the set of every row (n,)."""

    sets: tuple[Set, ...]
    index: NDArray[np.int64]


def fill(block: NDArray[np.float32], cells: Cells, c: Column) -> int:
    """Write a column's inputs into ``block`` (n, len(c.feature_names)); returns how many cells hold unknown leaves.

    Raises:
        DataError: no value where the contract allows none, a number outside the bounds, an unknown leaf where there is
            no "other", or more of them than ``unseen_limit``.
    """
    rows = np.zeros((len(cells.sets), block.shape[1]))
    unknown = np.zeros(len(cells.sets), bool)
    used = np.bincount(cells.index, minlength=len(cells.sets)) > 0
    for i in np.flatnonzero(used):
        if c.type == "category":
            rows[i], unknown[i] = _leaf_weights(cells.sets[i], c)
        else:
            rows[i] = _middle(cells.sets[i], c)
    block[:] = rows[cells.index]
    count = int(unknown[cells.index].sum())
    if count > c.unseen_limit * max(len(cells.index), 1):
        raise DataError(
            f"column {c.name!r}: {count} cells hold values that the contract does not know",
            hint=f"the limit is {c.unseen_limit:g} of the rows: add the values in use to the contract",
        )
    return count


def _leaf_weights(cell: Set, c: Column) -> tuple[NDArray[np.float64], bool]:
    leaves = (*c.values, MISSING) if c.missing == "indicator" else c.values
    place = {v: i for i, v in enumerate(leaves)}
    out = np.zeros(len(leaves))
    if isinstance(cell, Full):
        out[: len(c.values)] = 1 / len(c.values)
        return out, False
    held = (MISSING,) if isinstance(cell, Nothing) else cell.values if isinstance(cell, Leaves) else ()
    strange = [v for v in held if v not in place]
    if not held or (strange and (MISSING in strange or c.unseen != OTHER)):
        raise DataError(f"column {c.name!r}: cells without a leaf of the contract reached the encoding")
    for v in held:
        out[place.get(v, place.get(OTHER, 0))] += 1 / len(held)
    return out, bool(strange)


def _middle(cell: Set, c: Column) -> list[float]:
    if c.low is None or c.high is None:
        raise DataError(f"column {c.name!r} has no public bounds")
    span = c.high - c.low
    absent = isinstance(cell, Nothing) or (isinstance(cell, Interval) and cell.absent)
    if absent and c.missing == "error":
        raise DataError(f"column {c.name!r}: cells without a value reached the encoding")
    if isinstance(cell, Interval):
        if not c.low <= cell.low <= cell.high <= c.high:
            raise DataError(f"column {c.name!r}: cells outside the public bounds reached the encoding")
        out = [(cell.low + cell.high - 2 * c.low) / span - 1, (cell.high - cell.low) / span]
    elif isinstance(cell, Leaves):
        raise DataError(f"column {c.name!r}: cells that are no interval reached the encoding")
    else:
        out = [0.0, 1.0]
    return [*out, float(absent)] if c.missing == "indicator" else out
