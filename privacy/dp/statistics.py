"""Statistics of records as one vector per record, and their clipped sum: the site's half of ``fedveil stats``.

The layout of a record's vector is that of :mod:`fedveil.common.workload.statistics`. It is a function of the record,
the spec and (for metrics) the record's own prediction alone: nothing is fitted, no record's vector depends on another.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import DataError
from fedveil.common.workload.statistics import ColumnStats, Slot, StatsSpec
from fedveil.privacy.dp.rounding import MAX_BLOCK, margin

_CELLS = 1 << 22  # numbers of one block of vectors: 32 MiB


def vectors(
    spec: StatsSpec, X: NDArray[np.float32], y: NDArray[np.int64], predicted: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """φ of every record, ``(n, D)``.

    Args:
        X: ``(n, spec.inputs)`` as encoded: numbers in [-1, 1], coded columns one-hot.
        y: ``(n,)`` classes.
        predicted: ``(n,)`` predicted classes; needed where the spec has a metric.

    Guarantee: a row's L2 norm is at most ``spec.norm_bound`` (up to rounding) for records that satisfy the contract;
    a record with a NaN, an infinity or a class that does not exist gives zeros: it does not count.

    Raises:
        DataError: the shapes do not fit the spec, or predictions are missing.
    """
    n = len(X)
    if X.shape != (n, spec.inputs) or y.shape != (n,):
        raise DataError("the encoded records do not fit the statistics' inputs")
    if spec.metric is not None and (predicted is None or predicted.shape != (n,)):
        raise DataError("a metric needs one prediction for each record")
    out = np.zeros((n, spec.parameters))
    rows = np.flatnonzero(_usable(spec, X, y))
    X, y = np.clip(X[rows], -1.0, 1.0), y[rows]
    guesses = None if predicted is None else predicted[rows]
    for slot in spec.slots:
        out[rows, slot.start : slot.start + slot.width] = _block(spec, slot, X, y, guesses)
    return out


def _usable(spec: StatsSpec, X: NDArray[np.float32], y: NDArray[np.int64]) -> NDArray[np.bool_]:
    """``(n,)``: which records count."""
    return np.isfinite(X).all(axis=1) & (y >= 0) & (y < spec.classes)


def clipped_sum(
    spec: StatsSpec,
    X: NDArray[np.float32],
    y: NDArray[np.int64],
    clip: float,
    predicted: NDArray[np.int64] | None = None,
    rows: int = 1,
) -> NDArray[np.float64]:
    """``(D,)`` float64: the sum over places of ``φ · min(1, clip / ‖φ‖)``.

    Args:
        rows: R. ``X`` holds places of R rows each, and φ is the mean over a place's rows that count: a person's.

    Guarantee: one record (or person) more at a place that is empty otherwise changes it by at most ``clip`` in L2 norm,
    whatever it holds and whatever the spec says of its own norm (up to what the plan adds to the sensitivity).

    Raises:
        DataError: see :func:`vectors`.
    """
    total = np.zeros(spec.parameters)
    block = max(1, min(MAX_BLOCK, _CELLS // (spec.parameters * rows))) * rows
    clip *= 1 - margin(spec.parameters)
    for i in range(0, len(X), block):
        part = slice(i, i + block)
        phi = vectors(spec, X[part], y[part], None if predicted is None else predicted[part])
        if rows > 1:
            counts = _usable(spec, X[part], y[part]).reshape(-1, rows).sum(1)
            phi = phi.reshape(-1, rows, spec.parameters).sum(1) / np.maximum(counts, 1)[:, None]
        norms = np.sqrt(np.einsum("ij,ij->i", phi, phi))
        total += (phi * np.minimum(1.0, clip / np.maximum(norms, 1e-30))[:, None]).sum(axis=0)
    return total


def bin_of(column: ColumnStats, x: NDArray[np.float32]) -> NDArray[np.int64]:
    """Bin of each scaled value in [-1, 1]: bin i holds [edge i, edge i + 1), the last one its upper edge too.

    The edges are scaled and rounded exactly as the encoding does it, so that a value which equals an edge in the
    table's unit lands on the same side at every site.
    """
    low, *cuts, high = column.edges
    scaled = np.asarray([2.0 * ((c - low) / (high - low)) - 1.0 for c in cuts], np.float64).astype(np.float32)
    return np.searchsorted(scaled, x, side="right").astype(np.int64)


def _block(
    spec: StatsSpec,
    slot: Slot,
    X: NDArray[np.float32],
    y: NDArray[np.int64],
    predicted: NDArray[np.int64] | None,
) -> NDArray[np.float64]:
    """``(n, slot.width)``: the coordinates of one slot."""
    c = slot.column
    if slot.kind == "count":
        return np.ones((len(X), 1))
    if c is not None:
        return _column_block(slot, c, X, y)
    if predicted is None:
        raise DataError("a metric needs one prediction for each record")
    if slot.kind == "correct":
        return (predicted == y).astype(np.float64)[:, None]
    known = (predicted >= 0) & (predicted < spec.classes)
    return _one_hot(np.where(known, y * spec.classes + predicted, 0), slot.width) * known[:, None]


def _column_block(slot: Slot, c: ColumnStats, X: NDArray[np.float32], y: NDArray[np.int64]) -> NDArray[np.float64]:
    if c.source == "target":
        return _one_hot(y, slot.width)
    if c.source == "coded":
        return X[:, c.at : c.at + slot.width].astype(np.float64)
    x = X[:, c.at].astype(np.float64)
    present = X[:, c.at + 1] == 0 if c.missing else np.ones(len(X), np.bool_)
    if slot.kind == "histogram":
        return _one_hot(np.where(present, bin_of(c, X[:, c.at]), c.bins), slot.width)
    values = {"present": np.ones(len(X)), "sum": x, "square": x * x}[slot.kind]
    return np.where(present, values, 0.0)[:, None]


def _one_hot(index: NDArray[np.int64], width: int) -> NDArray[np.float64]:
    out = np.zeros((len(index), width))
    out[np.arange(len(index)), index] = 1.0
    return out
