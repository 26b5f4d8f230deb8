"""Columns of an Arrow table as integer codes, and what the codes mean at every level of generalisation.

A domain holds the values that occur, in an order that makes every label of the hierarchy a run of neighbours: numbers
by size, categories by their path from the root. The order depends on the set of values alone, so neither the order of
the rows nor a hash seed matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from fedveil.common.contract import MISSING, Column
from fedveil.common.errors import DataError
from fedveil.privacy.anonymization.attributes import TOP, Hierarchy, QuasiIdentifier, bins, text_of

Codes = NDArray[np.int32]
pc: Any = pyarrow.compute  # its functions are made at import time, where type checkers cannot see them


@dataclass(frozen=True)
class Domain:
    """The values of one quasi-identifier that occur, and their generalisations.

    Attributes:
        name: the column.
        leaves: (V,) texts, ordered; "missing" stands for cells without a value.
        numbers: (V,) the leaves as numbers, NaN for "missing"; None for categories.
        levels: by level, (V,) the label index of every leaf; level 0 is the identity, the last level all zeros.
        labels: by level, the labels.
        shown: (V,) the leaves as labels write them: ISO dates where the column holds dates.
        shares: by level, the NCP of each label: the part of the domain that it covers, 0 for one value, 1 for all.
        fixed_level: the level of the method ``fixed``; None where none was declared.
    """

    name: str
    leaves: tuple[str, ...]
    numbers: NDArray[np.float64] | None
    levels: tuple[Codes, ...]
    labels: tuple[tuple[str, ...], ...]
    shares: tuple[NDArray[np.float64], ...]
    shown: tuple[str, ...]
    fixed_level: int | None = None

    @property
    def size(self) -> int:
        """How many values occur."""
        return len(self.leaves)

    @property
    def positions(self) -> NDArray[np.float64]:
        """(V,) places on a line of length 1: by value for numbers, by rank otherwise."""
        rank = np.arange(self.size, dtype=np.float64)
        if self.numbers is None:
            return rank / max(self.size - 1, 1)
        x = self.numbers
        low, high = (np.nanmin(x), np.nanmax(x)) if (~np.isnan(x)).any() else (0.0, 0.0)
        # "Missing" lies at the end of the line, one whole line away from any number: it is joined last.
        return np.where(np.isnan(x), 2.0, (x - low) / (high - low if high > low else 1.0))


def domain_of(quasi: QuasiIdentifier, values: Iterable[Any]) -> Domain:
    """The domain of a column whose distinct cells are ``values`` (None: no value).

    Raises:
        DataError: a number is not finite, or values are not covered by the hierarchy; the message counts them.
    """
    raw = list(values)
    broken = sum(isinstance(v, float) and not math.isfinite(v) for v in raw)
    if broken:
        raise DataError(f"column {quasi.name!r}: {broken} values are not finite", hint="write no value instead")
    absent = any(v is None for v in raw)
    numeric = quasi.numeric
    if numeric is None:
        numeric = _all_numbers(raw) if quasi.hierarchy is None else quasi.hierarchy.numbers is not None
    present = {text_of(v): v for v in raw if v is not None}
    absent = absent or MISSING in present
    present.pop(MISSING, None)
    if numeric and (texts := sum(_no_number(t) for t in present)):
        raise DataError(
            f"column {quasi.name!r}: {texts} different values are not numbers",
            hint="declare numeric=False, or correct them at the source",
        )
    leaves = quasi.hierarchy.leaves if quasi.hierarchy else tuple(sorted(present)) or ("",)
    hierarchy = quasi.hierarchy or _flat(quasi, leaves, present, numeric)
    own = {leaf: i for i, leaf in enumerate(leaves)}
    if missing := sum(t not in own for t in present):
        raise DataError(
            f"column {quasi.name!r}: {missing} different values are not in its hierarchy",
            hint="add them to the hierarchy, or correct them at the source",
        )
    paths = {t: tuple(level[own[t]] for level in hierarchy.levels) for t in present}
    order = sorted(present, key=(lambda t: (float(t), t)) if numeric else (lambda t: paths[t][::-1]))
    if absent:  # its own category at every level below the top
        paths[MISSING] = (MISSING,) * hierarchy.height + (hierarchy.levels[-1][0],)
        order.append(MISSING)
    return _build(quasi, hierarchy, leaves, {t: paths[t] for t in order}, numeric)


def encode(column: Any, domain: Domain) -> Codes:
    """(n,) codes of an Arrow column.

    Raises:
        DataError: values are not in the domain; the message counts them.
    """
    index = {leaf: i for i, leaf in enumerate(domain.leaves)}
    out = lookup(column, index, index.get(MISSING, -1))
    if unknown := int((out < 0).sum()):
        raise DataError(
            f"column {domain.name!r}: {unknown} cells hold values that were not there when the recoding was fitted",
            hint="fit on the table that is to be released",
        )
    return out


def lookup(column: Any, index: Mapping[str, int], absent: int) -> Codes:
    """(n,) ``index`` of the text of every cell, ``absent`` where there is no value, -1 for texts not in ``index``."""
    keys, values = distinct(column)
    table = np.array([*(index.get(text_of(v), -1) if v is not None else absent for v in values), absent], np.int32)
    return table[keys]


def distinct(column: Any) -> tuple[NDArray[np.int64] | Codes, list[Any]]:
    """(n,) index of every cell into its column's distinct values, -1 where there is no value; and these values."""
    chunk = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_integer(chunk.type) and chunk.null_count == 0 and len(chunk):
        x = chunk.to_numpy(zero_copy_only=False)
        low, high = int(x.min()), int(x.max())
        if high - low < 4096:
            keys = (x.astype(np.int32) - low) if max(abs(low), abs(high)) < 1 << 30 else (x - low).astype(np.int32)
            return keys, list(range(low, high + 1))
    if isinstance(chunk, pa.ChunkedArray):
        chunk = pa.concat_arrays(chunk.chunks) if chunk.num_chunks else pa.array([], chunk.type)
    if not pa.types.is_dictionary(chunk.type):
        chunk = chunk.dictionary_encode()
    keys = chunk.indices
    if keys.null_count:
        keys = keys.fill_null(pa.scalar(-1, keys.type))
    return keys.to_numpy(zero_copy_only=False), chunk.dictionary.to_pylist()


def occurring(column: Any) -> set[Any]:
    """The distinct cells of an Arrow column, None among them if some have no value."""
    if isinstance(column, pa.ChunkedArray) and not pa.types.is_dictionary(column.type):
        return set(pc.unique(column).to_pylist())
    keys, values = distinct(column)
    seen = np.bincount(np.asarray(keys, np.int64) + 1, minlength=len(values) + 1)
    return {v for v, c in zip([None, *values], seen, strict=True) if c}


def order_sensitive(values: Sequence[Any], declared: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The values of a sensitive column in order: declared, or numbers by size, or texts alphabetically.

    Raises:
        DataError: values are not among the declared ones; the message counts them.
    """
    texts = {text_of(v): v for v in values if v is not None}
    if declared:
        if unknown := len(set(texts) - set(declared)):
            raise DataError(f"column {name!r}: {unknown} values are not among the declared ones")
        return declared
    if _all_numbers(list(texts.values())):
        return tuple(sorted(texts, key=lambda t: (float(t), t)))
    return tuple(sorted(texts))


def _all_numbers(values: list[Any]) -> bool:
    return all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in values)


def _flat(quasi: QuasiIdentifier, leaves: tuple[str, ...], present: Mapping[str, Any], numeric: bool) -> Hierarchy:
    """Values and "*", with a contract's bins between them; no label depends on which other values occur."""
    column, top = quasi.column, (TOP,) * len(leaves)
    if not numeric or column is None:
        return Hierarchy((tuple(map(escape, leaves)), top), quasi.name)
    if not present:
        return Hierarchy((*(leaves for _ in range(len(bins(column)) + 1)), top), quasi.name)
    x = np.array([float(t) for t in leaves])
    if column.low is not None and column.high is not None and bool(((x < column.low) | (x > column.high)).any()):
        count = int(((x < column.low) | (x > column.high)).sum())
        raise DataError(f"column {quasi.name!r}: {count} different values are outside the contract's bounds")
    levels = [tuple(_text(t, column) for t in leaves)]
    for cuts, labels in bins(column):
        levels.append(tuple(labels[i] for i in np.searchsorted(np.asarray(cuts), x, side="right").tolist()))
    return Hierarchy((*levels, top), quasi.name)


def _text(leaf: str, column: Column | None) -> str:
    """A number as labels write it: whole days of a contract's date as an ISO date."""
    if column is None or not column.format or leaf == MISSING or not float(leaf).is_integer():
        return leaf
    return column.text(float(leaf))


def escape(value: str) -> str:
    """A value as one member of a set label: ``\\`` before ``|`` and ``\\``, and ``\\*`` for a value that reads ``*``.

    A cell that was suppressed in the input is its own category, never "any value". It changes no other label.
    """
    out = value.replace("\\", "\\\\").replace("|", "\\|")
    return "\\" + out if out == TOP else out


def _no_number(text: str) -> bool:
    try:
        return not math.isfinite(float(text))
    except ValueError:
        return True


def _build(
    quasi: QuasiIdentifier, hierarchy: Hierarchy, declared: Sequence[str], paths: Mapping[str, tuple[str, ...]],
    numeric: bool,
) -> Domain:  # fmt: skip
    """The domain of the values in ``paths``, in their order, each with its label at every level."""
    leaves = tuple(paths)
    numbers = np.array([np.nan if t == MISSING else float(t) for t in leaves]) if numeric else None
    values = np.array([float(t) for t in declared]) if numbers is not None and not np.isnan(numbers).all() else None
    levels, labels, shares = [], [], []
    for i in range(hierarchy.height + 1):
        ids: dict[str, int] = {}
        levels.append(np.array([ids.setdefault(p[i], len(ids)) for p in paths.values()], np.int32))
        shares.append(_shares(levels[-1], numbers, values, hierarchy, i, tuple(ids)))
        # A declared value that reads "*" must not be taken for "any value" either.
        labels.append(tuple(escape(t) if t == TOP else t for t in ids) if i == 0 else tuple(ids))
    shown = tuple(_text(t, quasi.column) for t in leaves)
    return Domain(quasi.name, leaves, numbers, tuple(levels), tuple(labels), tuple(shares), shown, quasi.fixed_level)


def _shares(
    codes_: Codes,
    numbers: NDArray[np.float64] | None,
    values: NDArray[np.float64] | None,
    hierarchy: Hierarchy,
    level: int,
    labels: tuple[str, ...],
) -> NDArray[np.float64]:
    """A label's part of the occurring domain: by length for numbers, by number of values for categories.

    ``values`` are the hierarchy's leaves as numbers.
    """
    present = np.bincount(codes_, minlength=len(labels))
    by_count = (present - 1) / max(len(codes_) - 1, 1)
    if numbers is None or values is None:
        return by_count
    low, high = np.nanmin(numbers), np.nanmax(numbers)
    if high <= low:
        return by_count
    out = np.zeros(len(labels))
    declared: dict[str, list[float]] = {}
    for label, value in zip(hierarchy.levels[level], values.tolist(), strict=True):
        declared.setdefault(label, []).append(value)
    for i, label in enumerate(labels):
        members = declared.get(label, [low])
        out[i] = max(0.0, min(max(members), high) - max(min(members), low)) / (high - low)
    if level == hierarchy.height:
        out[:] = 1.0
    return out
