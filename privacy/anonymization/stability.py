"""How many rows of a release one record can change, and what an ε computed on the release therefore speaks of.

Differential privacy does not survive steps that look at the data. If the whole pipeline from original records to
released rows changes at most c rows per record (add/remove distance), then a mechanism that is (ε, δ)-DP for groups of
c released rows is (ε, δ)-DP for one original record: for a Gaussian on full batches that is noise σ/c; on sampled
batches a group event. It is never c·ε. If no c exists, ε speaks of released rows alone.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from fedveil.common.errors import UsageError
from fedveil.privacy.anonymization.criteria import AlphaK, Criterion, KAnonymity, KMap

Step = Literal["row-wise", "exact duplicates removed", "near duplicates removed", "data-fitted"]
STEPS: tuple[str, ...] = ("row-wise", "exact duplicates removed", "near duplicates removed", "data-fitted")
DATA_DRIVEN = ("mondrian", "optimal", "peel", "auto")


@dataclass(frozen=True)
class Stability:
    """Attributes:
    factor: 1; a group of this many rows; or None, not bounded.
    unit: what ε speaks of.
    sentence: why, in plain words.
    refusal_uncovered: whether the pipeline may refuse depending on the data: that bit is released by no mechanism.
    """

    factor: int | None
    unit: Literal["original record", "group of released rows", "released row"]
    sentence: str
    refusal_uncovered: bool

    @property
    def by_group(self) -> bool:
        """Whether group accounting is needed to speak of original records."""
        return self.factor is not None and self.factor > 1


def stability(
    method: str, models: Sequence[Criterion], *, suppression_limit: float = 0.0, steps: Sequence[Step] = ()
) -> Stability:
    """The factor of a whole pipeline. It belongs to the procedure: suppression that is allowed counts though unused.

    Args:
        method: ``fixed``, ``mondrian``, ``optimal``, ``peel`` or ``auto``.
        models: the criteria.
        suppression_limit: share of rows that may be suppressed; 0 switches suppression off.
        steps: the other steps between the original records and the recoding: ``row-wise`` (declared corrections,
            bounds and codes of a contract, each row by itself), ``exact duplicates removed``, ``near duplicates
            removed``, ``data-fitted`` (quantiles, means, vocabularies, outlier limits from the data).

    Raises:
        UsageError: an unknown method or step.
    """
    if method not in ("fixed", *DATA_DRIVEN):
        raise UsageError(f"method {method!r} is unknown", hint="fixed, mondrian, optimal, peel or auto")
    if unknown := [s for s in steps if s not in STEPS]:
        raise UsageError(f"step {unknown[0]!r} is unknown", hint=", ".join(STEPS))
    # A criterion that can fail makes the site refuse (or suppress): only the absence of criteria makes no such bit.
    refuses = bool(models)
    if reason := _unbounded(method, models, suppression_limit, steps):
        return Stability(
            None,
            "released row",
            f"{reason}: one record can change any number of released rows, so ε speaks of rows of the released table, "
            "not of the original records.",
            refuses,
        )
    k = max([m.k for m in models if isinstance(m, KAnonymity)], default=1)
    if suppression_limit > 0 and k > 1:
        return Stability(
            k,
            "group of released rows",
            f"Levels are fixed and only classes of fewer than {k} rows are suppressed: one record can bring back or "
            f"take away a class of {k} rows, so ε for an original record follows from accounting for a group of {k} "
            f"released rows (never {k} times ε).",
            refuses,
        )
    return Stability(
        1,
        "original record",
        "Every row is recoded by itself to levels agreed beforehand and none is suppressed for what other rows hold: "
        "one record changes one released row, so ε speaks of the original records.",
        refuses,
    )


def _unbounded(method: str, models: Sequence[Criterion], limit: float, steps: Sequence[Step]) -> str:
    if method in DATA_DRIVEN:
        return f"The levels are chosen by looking at the data ({method})"
    for step in ("data-fitted", "near duplicates removed"):
        if step in steps:
            return f"A step before the recoding depends on other rows ({step})"
    other = [m for m in models if not isinstance(m, (KAnonymity, KMap)) or isinstance(m, AlphaK)]
    if limit > 0 and other:
        return f"Rows are suppressed for {other[0].name}, which depends on other rows' sensitive values"
    return ""


def measured_factor(
    pipeline: Callable[[pa.Table], pa.Table], table: pa.Table, *, removals: int = 20
) -> tuple[int, list[int]]:
    """Remove single records and count by how many rows the released tables differ: a lower bound of the true factor.

    Args:
        pipeline: from original table to released table; the order of rows does not matter.
        removals: how many different records are tried, drawn with the operating system's randomness.

    Returns:
        The largest add/remove distance between the releases with and without one record, and all distances.

    Raises:
        UsageError: fewer than two rows, or no removal asked for.
    """
    if table.num_rows < 2 or removals < 1:
        raise UsageError("measuring needs two rows and one removal at least")
    with_all = _rows(pipeline(table))
    distances = []
    chosen = secrets.SystemRandom().sample(range(table.num_rows), min(removals, table.num_rows))
    for gone in chosen:
        rest = pa.concat_tables([table.slice(0, gone), table.slice(gone + 1)])
        without = _rows(pipeline(rest))
        distances.append(sum(((with_all - without) + (without - with_all)).values()))
    return max(distances), distances


def _rows(table: pa.Table) -> Counter[tuple[object, ...]]:
    return Counter(zip(*(c.to_pylist() for c in table.columns), strict=True))
