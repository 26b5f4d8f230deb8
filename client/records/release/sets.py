"""Generalised cells as sets of leaves, whatever method made them, and their encoding to inputs of one fixed width.

A raw value is a set of one. A category's set puts equal weight on its leaves, so its inputs sum to 1, "no value" being
one more leaf where the contract allows it; a number's set is an interval and gives its midpoint, scaled to [-1, 1], and
its width, scaled to [0, 1]. A cell without a value has midpoint 0 and width 1: nothing is known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from fedveil.common.contract import MISSING, OTHER, Column, DataContract
from fedveil.common.contract import dates as contract_dates
from fedveil.common.errors import DataError
from fedveil.privacy.anonymization.recoding import parse_set

pc: Any = pyarrow.compute  # its functions are made at import time, where type checkers cannot see them

ANYTHING = "*"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_INTERVAL = re.compile(rf"^[\[(]({_NUMBER}|\d{{4}}-\d\d-\d\d) ?, ?({_NUMBER}|\d{{4}}-\d\d-\d\d)[\])]$")


@dataclass(frozen=True)
class Leaves:
    """A set of a category's leaves; "missing" stands for "no value"."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """All numbers from low to high; ``absent``: the set holds "no value" too."""

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


@dataclass(frozen=True)
class Encoded:
    """Inputs and classes of a released table.

    Attributes:
        X: (n, contract.width) float32 in [-1, 1]. y: (n,) int64.
        other: by column, how many cells held a value that the contract does not know and were taken for "other".
            Local knowledge.
    """

    X: NDArray[np.float32] = field(repr=False)
    y: NDArray[np.int64] = field(repr=False)
    other: Mapping[str, int] = field(repr=False)


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
            hint=f"the limit is {c.unseen_limit:g} of the rows: agree on the values that are in use",
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


def parse(label: str, c: Column) -> Set:
    """The set that a released label names: a leaf, ``a|b``, a label of the hierarchy, ``[20,30)``, ``20``, ``*`` or "".

    Raises:
        DataError: the label is none of these. The message does not repeat it.
    """
    if label in ("", MISSING):
        return Nothing()
    if label == ANYTHING:
        return Full()
    if c.type != "category":
        return _parsed_interval(label, c)
    named = next((g for s in c.steps for name, g in zip(s.labels, s.groups, strict=True) if name == label), None)
    if label in c.values or named is None:
        own = dict(zip(c.labels, c.groups, strict=True)).get(label)
        return Leaves(own or ((label,) if label in c.values else parse_set(label) or ()))
    return Leaves(named)


def _parsed_interval(label: str, c: Column) -> Interval:
    first, absent = label.removesuffix(f"|{MISSING}"), label.endswith(f"|{MISSING}")
    found = _INTERVAL.match(first)
    ends = found.groups() if found else (first, first)
    try:
        low, high = (float(contract_dates.days(e, "") if "-" in e[1:] and c.format else e) for e in ends)
    except ValueError:
        low = high = None
    if low is None or high is None:
        raise DataError(f"column {c.name!r}: labels that are no interval reached the encoding")
    return Interval(low, high, absent)


def encode_released(table: pa.Table, contract: DataContract) -> Encoded:
    """Encode a released table of labels, made by any method, for columns with ``encoding = "sets"`` or as agreed.

    A column with ``encoding = "labels"`` needs exactly the contract's labels (fixed recoding).

    Raises:
        DataError: a column is missing, or a cell is no label that the contract can encode.
    """
    absent = [c.name for c in contract.loaded if c.name not in table.column_names]
    if absent:
        raise DataError(f"the released table lacks columns: {', '.join(map(repr, absent[:8]))}")
    X = np.zeros((table.num_rows, contract.width), np.float32)
    other: dict[str, int] = {}
    start = 0
    for c in contract.columns:
        if width := len(c.feature_names):
            block = X[:, start : start + width]
            labels, index = _distinct(table, c.name)
            if c.encoding == "sets":
                if n := fill(block, Cells(tuple(parse(v, c) for v in labels), index), c):
                    other[c.name] = n
            else:
                block[:] = np.array([_label_row(v, c, width) for v in labels]).reshape(-1, width)[index]
            start += width
    labels, index = _distinct(table, contract.target.name)
    classes = {v: i for i, v in enumerate(contract.target.labels)}
    if any(v not in classes for v in labels):
        raise DataError(f"column {contract.target.name!r}: values without a class reached the encoding")
    return Encoded(X, np.array([classes[v] for v in labels], np.int64)[index], other)


def _distinct(table: pa.Table, name: str) -> tuple[Sequence[str], NDArray[np.int64]]:
    text = pc.fill_null(table.column(name).cast(pa.string()), "").combine_chunks()
    encoded = pc.dictionary_encode(text)
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _label_row(label: str, c: Column, width: int) -> list[float]:
    row = [0.0] * width
    if label == "" and c.missing == "indicator":
        row[-1] = 1.0
    elif c.coded and label in c.labels:
        row[c.labels.index(label)] = 1.0
    elif (
        not c.coded
        and c.low is not None
        and c.high is not None
        and (cell := _parsed_interval(label, c)).low == cell.high
    ):
        row[0] = 2 * (cell.low - c.low) / (c.high - c.low) - 1
    else:
        raise DataError(
            f"column {c.name!r}: cells that the contract's labels do not say", hint="agree on encoding = 'sets'"
        )
    return row
