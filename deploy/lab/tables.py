"""From what a researcher holds (a file, a data frame, arrays, a data set of torch) to numbers that a network takes.

A simulation may look at its records as it likes, so columns are scaled by what is in them. At real sites the data
contract says how, and nobody looks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import DataError, UsageError

MAX_CATEGORIES = 64
_MAX_CLASSES = 1 << 16
_MAX_INPUTS = 1 << 24
Column = NDArray[Any]


@dataclass(frozen=True)
class Encoded:
    """``X`` (n, inputs) float32 and ``y`` (n,) int64, with what the inputs and the classes are called."""

    X: NDArray[np.float32]
    y: NDArray[np.int64]
    features: tuple[str, ...]
    labels: tuple[str, ...]
    groups: NDArray[np.int64] | None = None
    group_names: tuple[str, ...] = ()


def columns_of(data: Any) -> dict[str, Column] | None:
    """The columns of a CSV or Parquet file, a data frame (pandas, polars, Arrow) or a mapping; None: none of these.

    Raises:
        DataError: a file that cannot be read.
    """
    if isinstance(data, str | Path):
        data = _read(Path(data))
    if isinstance(data, Mapping):
        return {str(name): _column(values) for name, values in data.items()}
    if hasattr(data, "column_names") and hasattr(data, "column"):  # Arrow
        return {str(name): _column(data.column(name).to_numpy(zero_copy_only=False)) for name in data.column_names}
    if hasattr(data, "columns") and hasattr(data, "__getitem__"):
        return {str(name): _column(data[name]) for name in data.columns}
    return None


def encode(columns: dict[str, Column], target: str | None, group: str | None = None) -> Encoded:
    """Numbers scaled to 0..1, an input for each category; missing numbers as the middle, with an input that says so.

    Args:
        target: the column with the class.
        group: a column that names the site of each record; it is no input.

    Raises:
        UsageError: no such column. DataError: a column that cannot be encoded, or a record without a class.
    """
    for name in (target, group):
        if name is not None and name not in columns:
            raise UsageError(f"the table has no column {name[:64]!r}", hint=f"it has {', '.join(list(columns)[:20])}")
    if target is None:
        raise UsageError("which column holds the class?", hint=f"target=... one of {', '.join(list(columns)[:20])}")
    if len({len(column) for column in columns.values()}) > 1:
        raise DataError("columns of different lengths", hint="one value of each column for each record")
    y, labels = classes_of(columns[target], f"the column {target!r}")
    inputs: list[NDArray[np.float32]] = []
    features: list[str] = []
    for name, column in columns.items():
        if name in (target, group):
            continue
        for feature, values in _encoded(name, column):
            features.append(feature)
            inputs.append(values)
    if not inputs:
        raise DataError("the table has no column besides its target", hint="a table with features")
    groups, names = (None, ()) if group is None else classes_of(columns[group], f"the column {group!r}")
    return Encoded(np.stack(inputs, 1), y, tuple(features), labels, groups, names)


def arrays(X: Any, y: Any) -> Encoded:
    """``X`` of n records of any shape, as they are; ``y`` their classes.

    Raises:
        DataError: other lengths, or values that are no finite numbers.
    """
    try:
        values = np.asarray(X, np.float32)
    except (TypeError, ValueError) as e:
        raise DataError("the inputs are not numbers", hint="numbers, or a table with a target column") from e
    if values.ndim < 2:
        raise DataError(f"inputs of shape {values.shape}", hint="one row for each record")
    classes, labels = classes_of(_column(y), "the target")
    if len(values) != len(classes):
        raise DataError(f"{len(values)} records and {len(classes)} classes", hint="one class for each record")
    flat = values.reshape(len(values), -1)
    if not np.isfinite(flat).all():
        raise DataError("an input is not a finite number", hint="fill in missing values first")
    return Encoded(flat, classes, (), labels)


def dataset(data: Any) -> Encoded:
    """A map-style data set: ``data[i]`` is a record and its class.

    Raises:
        DataError: it has no length, or gives something else.
    """
    try:
        count = len(data)
    except TypeError as e:
        raise DataError("the data set has no length", hint="a map-style data set, or arrays") from e
    try:
        pairs = [data[i] for i in range(count)]
        X = np.stack([np.asarray(x, np.float32) for x, _ in pairs])
        y = np.array([int(label) for _, label in pairs])
    except (TypeError, ValueError, KeyError, IndexError) as e:
        raise DataError(
            "the data set does not give pairs of a record and its class", hint="records of one shape, whole classes"
        ) from e
    return arrays(X, y)


def classes_of(column: Column, what: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """``(n,)`` classes from 0 up, in order of their values, and what each is called.

    Raises:
        DataError: a missing value, or more classes than a network can have.
    """
    missing = _missing(column)
    if missing.any():
        raise DataError(f"{what} is missing in {int(missing.sum())} records", hint="leave these records out first")
    if column.dtype.kind == "f" and not np.equal(column, np.rint(column)).all():
        raise DataError(f"{what} holds numbers that are no classes", hint="whole numbers or texts")
    values = column.astype(np.int64) if column.dtype.kind in "fb" else column
    values = values.astype(str) if values.dtype.kind == "O" else values
    known, found = np.unique(values, return_inverse=True)
    if len(known) > _MAX_CLASSES:
        raise DataError(f"{what} has {len(known)} different values", hint=f"at most {_MAX_CLASSES}")
    return found.reshape(-1).astype(np.int64), tuple(map(str, known))


def _encoded(name: str, column: Column) -> list[tuple[str, NDArray[np.float32]]]:
    missing = _missing(column)
    if column.dtype.kind in "fiub":
        values = column.astype(np.float64)
        known = values[~missing]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
        if not np.isfinite([low, high]).all():
            raise DataError(f"the column {name!r} holds an infinity", hint="leave these records out first")
        scaled = np.where(missing, 0.5, (values - low) / ((high - low) or 1.0))
        out = [(name, scaled.astype(np.float32))]
        return [*out, (f"{name} is missing", missing.astype(np.float32))] if missing.any() else out
    texts = np.where(missing, "", column.astype(str))
    known_texts = np.unique(texts)
    if len(known_texts) > MAX_CATEGORIES:
        raise DataError(
            f"the column {name!r} has {len(known_texts)} different texts",
            hint=f"at most {MAX_CATEGORIES} become inputs: leave it out, or group its values",
        )
    return [(f"{name}={text or 'missing'}", (texts == text).astype(np.float32)) for text in known_texts]


def _missing(column: Column) -> NDArray[np.bool_]:
    if column.dtype.kind == "f":
        return np.isnan(column)
    if column.dtype.kind == "O":
        return np.array([v is None or v != v for v in column], bool)
    return np.zeros(len(column), bool)


def _column(values: Any) -> Column:
    out = values.to_numpy() if hasattr(values, "to_numpy") else np.asarray(values)
    if out.ndim != 1:
        raise DataError(f"a column of shape {out.shape}", hint="one value for each record")
    if out.dtype.kind == "M":
        raise DataError("a column holds dates", hint="turn it into a number or a category first")
    return out


def _read(path: Path) -> Any:
    import pyarrow as pa
    from pyarrow import csv, parquet

    readers: dict[str, Callable[[Path], Any]] = {".csv": csv.read_csv, ".parquet": parquet.read_table}
    if path.suffix.lower() not in readers:
        raise UsageError(f"{path} is no .csv and no .parquet", hint="a table in one of these forms, or arrays")
    try:
        return readers[path.suffix.lower()](path)
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"{path} cannot be read as a table ({type(e).__name__})", hint="a table with a header") from e


def too_wide(inputs: int) -> None:
    """Raise :class:`DataError` for more inputs than a network can have."""
    if inputs > _MAX_INPUTS:
        raise DataError(f"records of {inputs} values", hint=f"at most {_MAX_INPUTS}")
