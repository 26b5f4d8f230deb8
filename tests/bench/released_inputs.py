"""Turns released tables of labels, whatever method made them, into a network's inputs, to measure training on them.

A site trains on the contract's fixed levels, which :mod:`fedveil.client.records.release.encode` encodes without labels.
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

from fedveil.client.records.release.sets import Cells, Full, Interval, Leaves, Nothing, Set, fill
from fedveil.common.contract import MISSING, Column, DataContract
from fedveil.common.contract import dates as contract_dates
from fedveil.common.errors import DataError
from fedveil.privacy.anonymization.recoding import parse_set

pc: Any = pyarrow.compute  # its functions are made at import time, where type checkers cannot see them

ANYTHING = "*"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_INTERVAL = re.compile(rf"^[\[(]({_NUMBER}|\d{{4}}-\d\d-\d\d) ?, ?({_NUMBER}|\d{{4}}-\d\d-\d\d)[\])]$")


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
