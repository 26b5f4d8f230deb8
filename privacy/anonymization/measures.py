"""What a recoding costs: information loss of the released table. Local knowledge: the figures depend on the records.

Sources: certainty penalty (NCP): Xu et al., KDD 2006. Discernibility: Bayardo, Agrawal, ICDE 2005. Average class size:
LeFevre et al., ICDE 2006. Precision: Sweeney, IJUFKS 10(5) 2002. Non-uniform entropy: de Waal, Willenborg 1999; Gionis,
Tassa 2009. Query error: LeFevre et al., TODS 33(3) 2008.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import UsageError
from fedveil.privacy.anonymization.domains import Domain
from fedveil.privacy.anonymization.recoding import Recoding
from fedveil.privacy.anonymization.tuples import Tuples

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Loss:
    """Attributes:
    ncp: normalised certainty penalty in [0, 1]; suppressed rows count 1.
    discernibility: sum of squared class sizes; a suppressed row counts as many as the table has rows.
    average_class: mean class size divided by ``k``; 1 is the best.
    precision: Sweeney's Prec in [0, 1], 1 for raw data; None for sets that have no level.
    entropy: non-uniform entropy, 0 for raw data and 1 where every cell is fully general.
    query_error: median relative error of counting queries over two columns, values spread evenly inside a class.
    """

    ncp: float
    discernibility: int
    average_class: float
    precision: float | None
    entropy: float
    query_error: float


def measure(tuples: Tuples, domains: Sequence[Domain], found: Recoding, *, k: int = 1, queries: int = 200) -> Loss:
    """All figures of a recoding.

    Raises:
        UsageError: k < 1, or no queries.
    """
    if k < 1 or queries < 1:
        raise UsageError("measures need k and the number of queries to be positive")
    kept = found.classes >= 0
    weights, classes = tuples.weights[kept], found.classes[kept]
    sizes = np.bincount(classes, weights, found.count).astype(np.int64)
    n, q = tuples.rows, len(domains)
    suppressed = n - int(sizes.sum())
    loss = sum(float((sizes * cell.shares).sum()) for cell in found.cells)
    occupied = int((sizes > 0).sum())
    return Loss(
        (loss / q + suppressed) / n,
        int((sizes**2).sum()) + suppressed * n,
        int(sizes.sum()) / max(occupied, 1) / k,
        _precision(domains, found, sizes, n, suppressed),
        _entropy(tuples, domains, found),
        query_error(tuples, domains, found, queries=queries),
    )


def _precision(
    domains: Sequence[Domain], found: Recoding, sizes: NDArray[np.int64], n: int, suppressed: int
) -> float | None:
    if found.nodes is None:
        return None
    heights = np.array([len(d.levels) - 1 for d in domains])
    lost = float((sizes[:, None] * (found.nodes / heights)).sum()) if found.count else 0.0
    return 1.0 - (lost / len(domains) + suppressed) / n


def _entropy(tuples: Tuples, domains: Sequence[Domain], found: Recoding) -> float:
    """Bits needed to tell a value from the others its label covers, relative to a fully general table."""
    bits, most = 0.0, 0.0
    kept = found.classes >= 0
    for j, (d, cell) in enumerate(zip(domains, found.cells, strict=True)):
        rows = np.bincount(tuples.codes[j], tuples.weights, d.size)
        surprise = -np.log2(np.maximum(rows, 1) / tuples.rows)
        covered = np.array([rows[leaves].sum() for leaves in cell.leaves] or [1.0])
        own = surprise[tuples.codes[j]]
        label = cell.of_class[found.classes[kept]]
        gained = -np.log2(np.maximum(covered[label], 1) / tuples.rows)
        left = own.copy()
        left[kept] -= gained
        bits += float((left * tuples.weights).sum())
        most += float((own * tuples.weights).sum())
    return bits / most if most > 0 else 0.0


def query_error(tuples: Tuples, domains: Sequence[Domain], found: Recoding, *, queries: int = 200) -> float:
    """Median of |estimate - truth| / truth over queries "rows with a value of A in this run and of B in that run".

    The queries are derived from a hash of their number: the same for every recoding of the same domains. Queries that
    no row answers are left out; 0 if none is left.
    """
    kept = found.classes >= 0
    sizes = np.bincount(found.classes[kept], tuples.weights[kept], found.count)
    errors = []
    for number in range(queries):
        wanted = _query(number, domains)
        truth = np.ones(tuples.count, bool)
        expected = sizes.copy()
        for j, chosen in wanted.items():
            truth &= chosen[tuples.codes[j]]
            cell = found.cells[j]
            inside = np.array([chosen[leaves].mean() for leaves in cell.leaves] or [0.0])
            expected = expected * inside[cell.of_class]
        rows = float(tuples.weights[truth].sum())
        if rows:
            errors.append(abs(float(expected.sum()) - rows) / rows)
    return float(np.median(errors)) if errors else 0.0


def _query(number: int, domains: Sequence[Domain]) -> dict[int, NDArray[np.bool_]]:
    """Runs of about a third of the values of one or two columns."""
    digest = np.frombuffer(hashlib.shake_256(f"query {number}".encode()).digest(32), np.uint32).astype(np.int64)
    columns = {int(digest[0]) % len(domains), int(digest[1]) % len(domains)}
    out = {}
    for place, j in enumerate(sorted(columns)):
        size = domains[j].size
        length = max(1, size // 3)
        start = int(digest[2 + place]) % (size - length + 1)
        out[j] = (np.arange(size) >= start) & (np.arange(size) < start + length)
    return out
