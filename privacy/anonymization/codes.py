"""Columns as small integers, and rows as weighted distinct tuples.

Everything after the grouping is independent of the number of rows: a table of 10^5 rows over a contract with 4 classes
is 4 tuples with weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.common.contract import OTHER, Column
from fedveil.common.errors import DataError

Codes = NDArray[np.int32]

ABSENT = -1  # the cell has no value
UNSEEN = -2  # a category's value that is not among its leaves


@dataclass(frozen=True)
class Groups:
    """The distinct tuples of a code matrix.

    Attributes:
        tuples: (g, q) int32, one distinct tuple per line, in lexicographic order.
        sizes: (g,) int64, how many rows carry each; they sum to n.
        inverse: (n,) int64, the tuple of every row.
    """

    tuples: Codes
    sizes: NDArray[np.int64]
    inverse: NDArray[np.int64]


def encode(values: NDArray[np.float64] | NDArray[np.object_], column: Column) -> Codes:
    """Codes (n,) of a coded column: index into ``column.labels``, ``ABSENT``, or ``UNSEEN``.

    Args:
        values: numbers with NaN for "no value", or texts with "" for "no value".
    """
    if column.type == "number":
        return _interval_codes(np.asarray(values, np.float64), column)
    return _leaf_codes(values, column)


def group(columns: Sequence[Codes], rows: int) -> Groups:
    """Group ``rows`` rows by their codes in ``columns`` (each (n,), codes >= ``UNSEEN``); no columns: one class."""
    if any(c.shape != (rows,) for c in columns):
        raise DataError("columns of different lengths cannot be grouped")
    key = np.zeros(rows, np.int64)
    span = 1
    for c in columns:
        lowest, width = int(c.min(initial=0)), int(c.max(initial=0)) - int(c.min(initial=0)) + 1
        if span * width >= 1 << 62:
            # Renumber before the packed key overflows: order is kept, since np.unique sorts.
            distinct, key = np.unique(key, return_inverse=True)
            span = len(distinct)
        key = key * width + (c - lowest)
        span *= width
    # np.unique would sort stably, which is several times slower: any row of a class stands for all of it.
    order = np.argsort(key)
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    first, sizes = order[starts], np.diff(starts, append=rows)
    inverse = np.empty(rows, np.int64)
    inverse[order] = np.repeat(np.arange(len(starts)), sizes)
    tuples = np.stack([c[first] for c in columns], axis=1) if columns else np.zeros((len(first), 0), np.int32)
    return Groups(tuples.astype(np.int32), sizes.astype(np.int64), inverse)


def histogram(groups: Groups, sensitive: Codes, domain: int) -> NDArray[np.int64]:
    """Counts (g, domain) of each sensitive value in each group; rows without a value are not counted."""
    present = sensitive >= 0
    flat = groups.inverse[present] * domain + sensitive[present]
    return np.bincount(flat, minlength=len(groups.sizes) * domain).reshape(len(groups.sizes), domain)


def _interval_codes(values: NDArray[np.float64], column: Column) -> Codes:
    # A target's threshold belongs to the lower class (value > threshold), a cut point to the upper interval.
    side = "left" if column.role == "target" else "right"
    codes = np.searchsorted(np.asarray(column.cuts, np.float64), values, side=side).astype(np.int32)
    codes[np.isnan(values)] = ABSENT
    return codes


def _leaf_codes(values: NDArray, column: Column) -> Codes:
    index = {leaf: i for i, group_ in enumerate(column.groups) for leaf in group_}
    unseen = index[OTHER] if column.unseen == OTHER else UNSEEN
    lookup: Mapping[str, int] = {**index, "": ABSENT}
    return np.fromiter((lookup.get(v, unseen) for v in values), np.int32, len(values))
