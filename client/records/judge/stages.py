"""The stages that look at the whole table, the record of every stage, and what each means for differential privacy.

Stability: by how many rows the output can change when one record of the source is added or removed. Row-by-row stages
have factor 1. Dropping exact repetitions has factor 1 too: the output is the set of distinct rows, which changes by at
most one. Near duplicates and fences fitted to the data are not bounded here: one record can decide about others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil.client.records.read.corrections import Correction
from fedveil.client.records.read.intake import RawTable
from fedveil.client.records.read.pseudonym import first_of_each
from fedveil.common.contract import DataContract
from fedveil.privacy.anonymization import fixed

FENCE = 3.0  # interquartile ranges beyond the quartiles (Tukey 1977: "far out")
MIN_FENCED = 20


@dataclass(frozen=True)
class Stage:
    """One stage as it was carried out. Its counts stay at the site."""

    name: str
    rows_in: int
    rows_out: int
    cells: int
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Stability:
    """What one stage does to neighbouring tables: a factor (None if it is not bounded), and why.

    It depends on the contract alone, so it may leave the site.
    """

    stage: str
    factor: int | None
    why: str

    def to_json(self) -> dict[str, Any]:
        """For evidence and reports."""
        return {"stage": self.stage, "factor": self.factor, "why": self.why}


def stability(contract: DataContract) -> tuple[Stability, ...]:
    """Every stage of the pipeline in order, recoding included."""
    q, alone = contract.quality, "each row by itself"
    recoding = fixed.stability_factor(contract)
    why = {1: "fixed levels, no suppression", None: "suppression for diversity can bring back a class of any size"}
    return (
        Stability("consent and retention", 1, alone),
        Stability("identifiers", 1, alone),
        Stability("types, missing codes and bounds", 1, alone),
        Stability("declared corrections", 1, f"{alone}, declared before the table was read"),
        Stability("exact duplicates", 1, "counted only" if q.duplicates == "keep" else "the set of distinct rows"),
        Stability("near duplicates", 1, "counted only") if q.near_duplicates == "count" else Stability(
            "near duplicates", None, "which row is kept depends on other rows"
        ),
        Stability("outliers", 1, "counted only") if q.fitted_outliers == "count" else Stability(
            "outliers", None, "the fence is fitted to all rows"
        ),
        Stability("recoding", recoding, why.get(recoding, "suppression for k: a class of k comes or goes together")),
        Stability("normalisation", 1, "the contract's public bounds"),
    )  # fmt: skip


def total(stages: Sequence[Stability]) -> int | None:
    """The factor of the whole pipeline: the product; None if one stage is not bounded."""
    factors = [s.factor for s in stages]
    return None if None in factors else int(np.prod([f for f in factors if f is not None]))


def reduce(raw: RawTable, contract: DataContract, corrections: Sequence[Correction]) -> tuple[RawTable, list[Stage]]:
    """Treat duplicates and outliers as the contract says; also returns the record of all stages so far, in order."""
    t, q = raw.tally, contract.quality
    seen = list(t.columns.values())
    left_out = t.usable.refused + t.usable.expired + t.usable.undated
    n = raw.rows
    stages = [
        Stage("read", t.read, t.read, 0, {}),
        Stage("consent and retention", t.read, t.read - left_out, 0, _usage(contract)),
        Stage("identifiers", n, n, t.identifiers, {"pseudonyms": [c.name for c in contract.columns if c.pseudonym]}),
        Stage("scan for identifiers", n, n, sum(sum(f.values()) for f in t.found.values()), {}),
        Stage("unreadable", n, n, sum(s.unreadable for s in seen), {}),
        Stage("missing codes", n, n, sum(s.coded for s in seen), {}),
        Stage(
            "declared corrections", n, n, sum(s.corrected for s in seen), {"rules": [r.to_json() for r in corrections]}
        ),
        Stage("moved to bounds or to no value", n, n, sum(s.moved for s in seen), {}),
        Stage("taken for other", n, n, sum(s.other for s in seen), {}),
    ]
    repeated = first_of_each(raw.identity)
    raw, stage = _kept(raw, repeated, "exact duplicates", drop=q.duplicates == "drop")
    stages.append(stage)
    if raw.near is not None:
        raw, stage = _kept(raw, first_of_each(raw.near), "near duplicates", drop=q.near_duplicates == "drop")
        stages.append(stage)
    inside = np.flatnonzero(~far_out(raw, contract))
    raw, stage = _kept(raw, inside, "outliers", drop=q.fitted_outliers == "drop")
    stages.append(stage)
    return raw, stages


def _usage(contract: DataContract) -> dict[str, Any]:
    rules = {"consent": contract.consent, "retention": contract.retention}
    return {name: rule.model_dump(mode="json") for name, rule in rules.items() if rule is not None}


def _kept(raw: RawTable, index: NDArray[np.int64], name: str, *, drop: bool) -> tuple[RawTable, Stage]:
    found = raw.rows - len(index)
    drop = drop and found > 0 and len(index) > 0
    out = raw.take(index) if drop else raw
    return out, Stage(name, raw.rows, out.rows, found, {"action": "dropped" if drop else "counted"})


def far_out(raw: RawTable, contract: DataContract) -> NDArray[np.bool_]:
    """Rows with a number beyond three interquartile ranges of the column's quartiles. Short columns have no fence."""
    out = np.zeros(raw.rows, bool)
    for c in contract.loaded:
        if c.type != "number" or c.role == "target":
            continue
        x = raw.columns[c.name]
        present = x[~np.isnan(x)]
        if len(present) < MIN_FENCED:
            continue
        low, high = np.percentile(present, [25, 75])
        reach = FENCE * (high - low)
        if reach > 0:
            out |= (x < low - reach) | (x > high + reach)  # both are false for NaN
    return out
