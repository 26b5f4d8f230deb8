"""Released columns to the model's inputs. The encoding depends on the row and the contract only.

Nothing is fitted: no mean, no quantile, no vocabulary from data. So the encoding needs no budget, and every site's
matrix has the same width and meaning.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from fedveil.client.records.release.sets import Cells, Full, Interval, Leaves, Nothing, fill
from fedveil.common.contract import Column, DataContract
from fedveil.common.errors import DataError
from fedveil.privacy.anonymization import codes
from fedveil.privacy.anonymization.fixed import ReleasedTable


def encode(table: ReleasedTable, contract: DataContract) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """X (n, contract.width) float32 in [-1, 1], and y (n,) int64 in [0, contract.classes).

    Numbers are scaled by their public bounds (low to -1, high to 1). Coded columns are one-hot over the contract's
    labels. If values may be missing, there is one more column: 1 for "no value". A missing number counts as the
    midpoint of its bounds (0). For a missing label all labels are 0, so a coded column's inputs always sum to 1.
    Columns with ``encoding = "sets"`` are filled as :mod:`fedveil.client.records.release.sets` says.

    Raises:
        DataError: a value without a code reached the encoding.
    """
    X = np.zeros((table.rows, contract.width), np.float32)
    start = 0
    for c in contract.columns:
        width = len(c.feature_names)
        if width:
            block = X[:, start : start + width]
            if c.encoding == "sets":
                fill(block, as_sets(table, c), c)
            elif c.coded:
                _one_hot(block, table, c)
            else:
                _scaled(block, table, c)
            start += width
    y = table.coded[contract.target.name].astype(np.int64)
    if y.min(initial=0) < 0:
        raise DataError(f"column {contract.target.name!r}: values without a class reached the encoding")
    return X, y


def as_sets(table: ReleasedTable, c: Column) -> Cells:
    """The cells of a column under fixed recoding as sets: a group of leaves, an interval, or one number.

    Raises:
        DataError: a value without a label.
    """
    if not c.coded:
        values, index = np.unique(table.numbers[c.name], return_inverse=True)  # NaN comes last, once
        return Cells(tuple(Nothing() if v != v else Interval(v, v) for v in values.tolist()), index.astype(np.int64))
    code = table.coded[c.name]
    if (code < codes.ABSENT).any():
        raise DataError(f"column {c.name!r}: values without a label reached the encoding")
    if c.type == "category":
        sets = tuple(Leaves(g) for g in c.groups)
    elif c.low is not None and c.high is not None:
        edges = (c.low, *c.cuts, c.high)
        sets = tuple(Interval(a, b) for a, b in itertools.pairwise(edges))
    else:
        sets = (Full(),)
    return Cells((*sets, Nothing()), np.where(code == codes.ABSENT, len(sets), code).astype(np.int64))


def _one_hot(block: NDArray[np.float32], table: ReleasedTable, c: Column) -> None:
    code = table.coded[c.name]
    absent = code == codes.ABSENT
    if (code < codes.ABSENT).any() or (absent.any() and c.missing == "error"):
        raise DataError(f"column {c.name!r}: values without a label reached the encoding")
    # The last column of the block is the indicator: it holds the 1 of a missing cell.
    block[np.arange(table.rows), np.where(absent, block.shape[1] - 1, code)] = 1.0


def _scaled(block: NDArray[np.float32], table: ReleasedTable, c: Column) -> None:
    if c.low is None or c.high is None:
        raise DataError(f"column {c.name!r} has no public bounds")
    x = table.numbers[c.name]
    absent = np.isnan(x)
    if absent.any() and c.missing == "error":
        raise DataError(f"column {c.name!r}: cells without a value reached the encoding")
    block[:, 0] = np.where(absent, 0.0, 2.0 * ((x - c.low) / (c.high - c.low)) - 1.0)
    if c.missing == "indicator":
        block[:, 1] = absent
