"""From noisy sums to estimates with standard errors: post-processing of a private vector, so it costs nothing.

Every coordinate of the opened sum carries independent noise of one known standard deviation s. There is no sampling
error, because the sums run over all records. Standard errors are s for counts and first-order (delta method) for
ratios. They cover the noise alone. Counts and histograms are unbiased as ``noisy``. What is projected into the range of
possible values is marked, and is biased near the edge of that range.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import DataError
from fedveil.common.workload.statistics import ColumnStats, Slot, StatsSpec

_FEW = 4.0  # a count below so many standard errors carries no ratio


def estimate(spec: StatsSpec, sums: NDArray[np.float64], std: float) -> dict[str, Any]:
    """All estimates of one opened sum, as JSON.

    Args:
        sums: ``(D,)`` in the layout of ``spec``.
        std: standard deviation of the noise in each coordinate.

    Returns:
        ``{"count", "columns": {name: {"mean", "variance", "std", "histogram", "quantiles"}}, "metrics"}``. An
        estimate is ``{"estimate", "standard_error"}`` in the column's unit (squared for a variance), with
        ``"projected": true`` where it was moved into its range; None where the count is lost in the noise.

    Raises:
        DataError: the sum has another length, or is not finite.
    """
    if sums.shape != (spec.parameters,) or not np.isfinite(sums).all() or not std >= 0:
        raise DataError("the opened sum does not fit the statistics asked for")
    columns: dict[str, Any] = {}
    total = float(sums[0])
    by_column: dict[str, dict[str, NDArray[np.float64]]] = {}
    metrics: dict[str, Any] = {}
    for slot in spec.slots:
        part = sums[slot.start : slot.start + slot.width]
        if slot.column is not None:
            by_column.setdefault(slot.column.column, {})[slot.kind] = part
        elif slot.kind != "count":
            metrics |= _metric(spec, slot, part, total, std)
    for c in spec.columns:
        columns[c.column] = _column(spec, c, by_column[c.column], total, std)
    count = _value(total, std, low=0.0)
    return {"noise_std": std, "count": count, "columns": columns, "metrics": metrics}


def scaler(estimates: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """``{column: (mean, standard deviation)}`` in the column's unit, of every column with both.

    For standardising a table without a further look at it. Where the variance is not above its standard error, the
    standard deviation of the uniform distribution over the column's bounds stands in.
    """
    out: dict[str, tuple[float, float]] = {}
    for name, c in estimates["columns"].items():
        mean, variance = c.get("mean"), c.get("variance")
        if mean is None or variance is None:
            continue
        sure = variance["estimate"] > max(variance["standard_error"], 0.0)
        low, high = c["bounds"]
        spread = math.sqrt(variance["estimate"]) if sure else (high - low) / math.sqrt(12)
        out[name] = (mean["estimate"], spread)
    return out


def _value(x: float, error: float, low: float = -math.inf, high: float = math.inf) -> dict[str, Any]:
    inside = min(max(x, low), high)
    out: dict[str, Any] = {"estimate": inside, "standard_error": error}
    return out if inside == x else out | {"projected": True}


def _metric(spec: StatsSpec, slot: Slot, part: NDArray[np.float64], total: float, std: float) -> dict[str, Any]:
    if slot.kind == "confusion":
        table = part.reshape(spec.classes, spec.classes)
        return {"confusion": {"noisy": table.tolist(), "standard_error": std, "rows": "class", "columns": "predicted"}}
    if total <= _FEW * std:
        return {"accuracy": None}
    right = float(part[0]) / total
    return {"accuracy": _value(right, std * math.sqrt(1 + right**2) / total, 0.0, 1.0)}


def _column(
    spec: StatsSpec, c: ColumnStats, parts: dict[str, NDArray[np.float64]], total: float, std: float
) -> dict[str, Any]:
    out: dict[str, Any] = {"unit": c.unit}
    if c.edges:
        out["bounds"] = [c.edges[0], c.edges[-1]]
    if c.moments:
        present = float(parts["present"][0]) if c.missing else total
        out |= _moments(c, parts, present, std)
        if c.missing:
            out["present"] = _value(present, std, low=0.0)
    if c.histogram:
        counts = parts["histogram"]
        kept = project(counts, max(total, 0.0))
        out["histogram"] = {
            "bins": list(c.labels) if c.labels else [list(p) for p in zip(c.edges, c.edges[1:], strict=False)],
            "noisy": counts[: c.bins].tolist(),
            "projected": kept[: c.bins].tolist(),
            "standard_error": std,
        }
        if c.missing:
            out["histogram"]["missing"] = {"noisy": float(counts[-1]), "projected": float(kept[-1])}
        if c.edges and spec.quantiles:
            out["quantiles"] = [quantile(c.edges, kept[: c.bins], p, std) for p in spec.quantiles]
    return out


def _moments(c: ColumnStats, parts: dict[str, NDArray[np.float64]], present: float, std: float) -> dict[str, Any]:
    """Mean and variance by ratios of sums; errors to first order in s / n (n the number of values present)."""
    if present <= _FEW * std:
        return {"mean": None} | ({"variance": None, "std": None} if c.moments == 2 else {})
    half, low = (c.edges[-1] - c.edges[0]) / 2, c.edges[0]
    m = float(parts["sum"][0]) / present
    unit = std / present
    mean = _value(low + half * (m + 1), half * unit * math.sqrt(1 + m * m), low, c.edges[-1])
    if c.moments == 1:
        return {"mean": mean}
    q = float(parts["square"][0]) / present
    # d(q - m²) by the three sums: 1/n, -2m/n, (2m² - q)/n.
    error = half**2 * unit * math.sqrt(1 + 4 * m * m + (2 * m * m - q) ** 2)
    variance = _value(half**2 * (q - m * m), error, 0.0, half**2)
    root = math.sqrt(variance["estimate"])
    spread = {"estimate": root, "standard_error": error / (2 * root) if root > 0 else math.sqrt(error)}
    return {"mean": mean, "variance": variance, "std": spread}


def project(counts: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    """The nearest vector (L2) without negative entries that adds up to ``total`` >= 0.

    Held, Wolfe & Crowder 1974: subtract one number from all and cut at zero.
    """
    if total <= 0:
        return np.zeros_like(counts)
    falling = np.sort(counts)[::-1]
    excess = (np.cumsum(falling) - total) / np.arange(1, len(counts) + 1)
    last = np.flatnonzero(falling > excess)[-1]
    return np.maximum(counts - excess[last], 0.0)


def quantile(edges: tuple[float, ...], counts: NDArray[np.float64], p: float, std: float) -> dict[str, Any]:
    """Where the non-negative histogram ``counts`` reaches the share ``p``: linear within a bin, monotone in p.

    ``resolution`` is the width of that bin: records may lie anywhere in it. The standard error is the noise of the
    counts up to there, divided by the bin's density; at most the whole range.
    """
    n = float(counts.sum())
    if n <= _FEW * std:
        return {"p": p, "estimate": None, "standard_error": None, "resolution": edges[-1] - edges[0]}
    reached = np.cumsum(counts)
    i = min(int(np.searchsorted(reached, p * n, side="left")), len(counts) - 1)
    width = edges[i + 1] - edges[i]
    before = float(reached[i] - counts[i])
    share = min(max((p * n - before) / float(counts[i]), 0.0), 1.0) if counts[i] > 0 else 0.5
    noise = std * math.sqrt(i + 1 + p * p)
    slope = width / float(counts[i]) if counts[i] > 0 else math.inf
    return {
        "p": p,
        "estimate": edges[i] + share * width,
        "standard_error": min(noise * slope, edges[-1] - edges[0]),
        "resolution": width,
    }
