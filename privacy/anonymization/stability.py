"""How many rows of a release one record can change, and what an ε computed on the release therefore speaks of.

Differential privacy does not survive steps that look at the data. If the whole pipeline from original records to
released rows changes at most c rows per record (add/remove distance), then a mechanism that is (ε, δ)-DP for groups of
c released rows is (ε, δ)-DP for one original record. For a Gaussian on full batches that is noise σ/c. On sampled
batches it is a group event. It is never c·ε. If no c exists, ε speaks of released rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedveil.common.errors import UsageError
from fedveil.privacy.anonymization.criteria import Criterion, KAnonymity

Step = Literal["row-wise", "exact duplicates removed", "near duplicates removed", "data-fitted"]
STEPS: tuple[str, ...] = ("row-wise", "exact duplicates removed", "near duplicates removed", "data-fitted")
DATA_DRIVEN = ("mondrian", "optimal", "peel", "auto")


@dataclass(frozen=True)
class Stability:
    """Attributes:
    factor: 1; a group of this many rows; or None, not bounded.
    unit: what ε speaks of.
    sentence: why, in plain words.
    """

    factor: int | None
    unit: Literal["original record", "group of released rows", "released row"]
    sentence: str


def stability(
    method: str, models: Sequence[Criterion], *, suppression_limit: float = 0.0, steps: Sequence[Step] = ()
) -> Stability:
    """The factor of a whole pipeline. It belongs to the procedure: allowed suppression counts even if unused.

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
        raise UsageError(f"method {method!r} is unknown", hint="one of fixed, mondrian, optimal, peel, auto")
    if unknown := [s for s in steps if s not in STEPS]:
        raise UsageError(f"step {unknown[0]!r} is unknown", hint=f"one of {', '.join(STEPS)}")
    if reason := _unbounded(method, models, suppression_limit, steps):
        return Stability(
            None,
            "released row",
            f"{reason}: one record can change any number of released rows, so ε speaks of rows of the released table, "
            "not of the original records.",
        )
    k = max([m.k for m in models if isinstance(m, KAnonymity)], default=1)
    if suppression_limit > 0 and k > 1:
        return Stability(
            k,
            "group of released rows",
            f"Levels are fixed and only classes of fewer than {k} rows are suppressed: one record can bring back or "
            f"take away a class of {k} rows, so ε for an original record follows from accounting for a group of {k} "
            f"released rows (never {k} times ε).",
        )
    return Stability(
        1,
        "original record",
        "Every row is recoded by itself to levels agreed beforehand and none is suppressed for what other rows hold: "
        "one record changes one released row, so ε speaks of the original records.",
    )


def _unbounded(method: str, models: Sequence[Criterion], limit: float, steps: Sequence[Step]) -> str:
    if method in DATA_DRIVEN:
        return f"The levels are chosen by looking at the data ({method})"
    for step in ("data-fitted", "near duplicates removed"):
        if step in steps:
            return f"A step before the recoding depends on other rows ({step})"
    other = [m for m in models if not isinstance(m, KAnonymity)]
    if limit > 0 and other:
        return f"Rows are suppressed for {other[0].name}, which depends on other rows' sensitive values"
    return ""
