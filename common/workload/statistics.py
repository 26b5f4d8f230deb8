"""Which statistics a run asks for. Such a spec stands in a plan in place of a network. No torch, no data.

Every record becomes one vector φ of D numbers in [-1, 1]. It depends on that record and this spec only. A run opens
the noisy sum of φ over all records. Layout of φ, in order:

* 1 (the count);
* for each column with ``moments``: 1 if a value is present (only where values may be missing), x, and x² with
  ``moments = 2``, where x is the number scaled by its public bounds (low to -1, high to 1; a missing value gives 0);
* for each column with ``histogram``: one-hot over its bins, one more for "missing" where values may be missing;
* for a ``metric``: 1 if the model's prediction is right; with ``confusion`` also one-hot over (class, prediction).

All of φ is released together, so there is one sensitivity for all of it: the largest L2 norm that φ can have,
:attr:`StatsSpec.norm_bound`. One record more or less changes every statistic at once and costs one step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fedveil.common.contract import Column, DataContract
from fedveil.common.errors import PlanError
from fedveil.common.workload.model import ModelSpec

MAX_LENGTH = 1 << 15  # of φ; with the texts below, a plan stays under 1 MiB
MAX_TEXT = 1 << 17
WHAT = ("count", "mean", "variance", "histogram", "quantiles", "accuracy", "confusion")
EVALUATED = "evaluated"  # the buffer, and the file <name>.f32, with the weights of the model to evaluate
DEFAULT_BINS = 10
DEFAULT_QUANTILES = (0.25, 0.5, 0.75)

Source = Literal["number", "coded", "target"]
SlotKind = Literal["count", "present", "sum", "square", "histogram", "correct", "confusion"]
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ColumnStats(BaseModel):
    """Where one column of the contract stands in a site's encoded records, and what is asked about it.

    Attributes:
        column, unit: as in the contract.
        source: ``number`` (one scaled input), ``coded`` (one-hot inputs) or ``target`` (the class).
        at: position of the column's first input; 0 for the target.
        low, high: public bounds of a number, and of a number that the contract recodes to intervals.
        missing: whether one more input says "no value".
        labels: what a coded column may say, in the order of the encoding.
        moments: 0, or 1 for the mean, or 2 for mean and variance. Numbers only.
        histogram: whether the bins are counted: the labels, or for numbers the intervals between ``cuts``.
        cuts: inner bin edges in ``unit``, strictly between low and high; for a recoded number its levels.
    """

    model_config = _STRICT

    column: str = Field(min_length=1, max_length=128)
    unit: str = Field(default="", max_length=128)
    source: Source
    at: int = Field(ge=0, le=1 << 24)
    low: float | None = None
    high: float | None = None
    missing: bool = False
    labels: tuple[str, ...] = Field(default=(), max_length=1 << 16)
    moments: int = Field(default=0, ge=0, le=2)
    histogram: bool = False
    cuts: tuple[float, ...] = Field(default=(), max_length=1 << 16)

    @property
    def edges(self) -> tuple[float, ...]:
        """Bin edges of a number in ``unit``, both bounds included; () for categories."""
        return () if self.low is None or self.high is None else (self.low, *self.cuts, self.high)

    @property
    def bins(self) -> int:
        """Number of bins, without the one for missing values."""
        return len(self.labels) if self.labels else len(self.edges) - 1

    @property
    def inputs(self) -> int:
        """How many inputs the column has."""
        return {"number": 1, "coded": len(self.labels), "target": 0}[self.source] + self.missing

    def problem(self) -> str:
        """What is inconsistent; empty if nothing is."""
        edges = self.edges
        if (self.low is None) != (self.high is None) or any(a >= b for a, b in itertools.pairwise(edges)):
            return "bounds and cuts are not increasing"
        if self.source == "number" and (self.labels or not edges):
            return "a number has bounds and no labels"
        if self.source != "number" and (self.moments or not self.labels):
            return "a coded column has labels and no moments"
        if self.source != "number" and edges and len(edges) != len(self.labels) + 1:
            return "the intervals are not as many as the labels"
        if self.source == "target" and (self.at or self.missing):
            return "the target is no input"
        return "" if self.moments or self.histogram else "nothing is asked about it"


class MetricSpec(BaseModel):
    """How well a model, known to everybody, predicts the sites' own records.

    Attributes:
        network: its architecture.
        model_hash: SHA-256 (hex) of its weights, little-endian float32. A site evaluates no other weights.
        confusion: whether the counts of every (class, prediction) are asked for as well.
    """

    model_config = _STRICT

    network: ModelSpec
    model_hash: str = Field(min_length=64, max_length=64, pattern="^[0-9a-f]{64}$")
    confusion: bool = False


@dataclass(frozen=True)
class Slot:
    """Consecutive coordinates of φ: ``start`` to ``start + width``. ``column`` is None for count and metrics."""

    kind: SlotKind
    start: int
    width: int
    column: ColumnStats | None = None


class StatsSpec(BaseModel):
    """See the module's text. ``inputs`` and ``classes`` are those of the contract, as for a network.

    Attributes:
        quantiles: probabilities in (0, 1) to be read off every histogram of numbers. Post-processing: costs no budget.
    """

    model_config = _STRICT

    name: Literal["stats"] = "stats"
    inputs: int = Field(ge=1, le=1 << 24)
    classes: int = Field(ge=2, le=1 << 16)
    columns: tuple[ColumnStats, ...] = Field(default=(), max_length=4096)
    metric: MetricSpec | None = None
    quantiles: tuple[float, ...] = Field(default=(), max_length=64)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The layout of φ."""
        out: list[Slot] = []
        at = 0
        for kind, width, column in self._parts():
            out.append(Slot(kind, at, width, column))
            at += width
        return tuple(out)

    def _parts(self) -> Iterator[tuple[SlotKind, int, ColumnStats | None]]:
        yield "count", 1, None
        for c in self.columns:
            if c.moments:
                if c.missing:
                    yield "present", 1, c
                yield "sum", 1, c
                if c.moments == 2:
                    yield "square", 1, c
            if c.histogram:
                yield "histogram", c.bins + c.missing, c
        if self.metric is not None:
            yield "correct", 1, None
            if self.metric.confusion:
                yield "confusion", self.classes**2, None

    @property
    def parameters(self) -> int:
        """D, the length of φ."""
        return sum(width for _, width, _ in self._parts())

    @property
    def norm_bound(self) -> float:
        """The largest L2 norm of φ over all records that satisfy the contract. Some such record has this norm.

        Each part has a norm of at most 1: a number at one of its bounds has x = ±1 and x² = 1, a histogram counts
        every record in one bin, a right prediction counts once.
        """
        return math.sqrt(sum(1 for _ in self._parts()))

    def problem(self) -> str:
        """What is inconsistent in this spec; empty if nothing is."""
        for c in self.columns:
            if text := c.problem():
                return f"column {c.column!r}: {text}"
            if c.at + c.inputs > self.inputs or (c.source == "target" and len(c.labels) != self.classes):
                return f"column {c.column!r} is not among the contract's inputs and classes"
        if len({c.column for c in self.columns}) != len(self.columns):
            return "a column is named twice"
        if self.metric is not None:
            n = self.metric.network
            if (n.inputs, n.classes) != (self.inputs, self.classes) or n.problem():
                return "the model to evaluate does not fit the inputs and classes"
            if n.base:
                return "a model on a base from a file cannot be evaluated: the file is not sent"
        if any(not 0 < q < 1 for q in self.quantiles):
            return "a quantile is outside (0, 1)"
        if self.parameters > MAX_LENGTH:
            return f"{self.parameters} numbers are over the limit of 2^15"
        if sum(len(label) for c in self.columns for label in c.labels) > MAX_TEXT:
            return "the labels together are over the limit of 2^17 characters"
        return ""

    def misfit(self, contract: DataContract) -> str:
        """Where this spec reads the records in another way than the contract encodes them; empty if nowhere."""
        if (self.inputs, self.classes) != (contract.width, contract.classes):
            return "the numbers of inputs and classes"
        for c in self.columns:
            found = {d.name: d for d in contract.loaded}.get(c.column)
            if found is None or not (found.is_feature or found.role == "target"):
                return f"column {c.column!r}, which the contract does not give"
            if found.encoding == "sets":
                return f"column {c.column!r}, whose cells are encoded as sets"
            own = _located(contract, found)
            asked = {"moments", "histogram"} | ({"cuts"} if c.source == "number" else set())
            if own.model_dump(exclude=asked) != c.model_dump(exclude=asked):
                return f"column {c.column!r}"
        return ""


def request(
    contract: DataContract,
    what: Sequence[str],
    *,
    columns: Sequence[str] = (),
    bins: int = DEFAULT_BINS,
    quantiles: Sequence[float] = DEFAULT_QUANTILES,
    metric: MetricSpec | None = None,
) -> StatsSpec:
    """The spec of what was asked for. Everything else is taken from the contract.

    Args:
        what: names out of :data:`WHAT`; ``accuracy`` and ``confusion`` are asked for by ``metric``.
        columns: names of features or of the target; by default all to which ``what`` applies.
        bins: equally wide bins of a number that the contract does not recode.

    Raises:
        PlanError: an unknown name, a column that is not encoded, or nothing that applies.
    """
    if unknown := sorted(set(what) - set(WHAT)):
        raise PlanError(f"unknown statistic {unknown[0]!r}", hint=f"one of {', '.join(WHAT)}")
    if not 1 <= bins <= 4096:
        raise PlanError(f"{bins} bins are not possible", hint="choose 1 to 4096 bins")
    known = {c.name: c for c in contract.loaded if c.is_feature or c.role == "target"}
    for name in columns:
        if name not in known:
            raise PlanError(
                f"column {name!r} is not a feature or the target", hint=f"choose among: {', '.join(known)}"[:512]
            )
    moments = 2 if "variance" in what else int("mean" in what)
    counted = bool({"histogram", "quantiles"} & set(what))
    wanted = [
        asked
        for name in columns or (n for n, c in known.items() if c.encoding != "sets")
        if (asked := _asked(_located(contract, known[name]), moments, counted, bins)) is not None
    ]
    if columns and len(wanted) != len(columns):
        refused = sorted(set(columns) - {c.column for c in wanted})
        raise PlanError(
            f"column {refused[0]!r} has no such statistic: {', '.join(what)}",
            hint="a categorical column has a histogram; a number has mean and variance too",
        )
    if not wanted and (moments or counted):
        raise PlanError("no column of the contract has such a statistic", hint="ask for histogram, or for count alone")
    probabilities = tuple(quantiles) if "quantiles" in what else ()
    spec = StatsSpec(
        inputs=contract.width, classes=contract.classes, columns=tuple(wanted), metric=metric, quantiles=probabilities
    )
    if problem := spec.problem():
        raise PlanError(f"these statistics cannot be asked for: {problem}")
    return spec


def _asked(c: ColumnStats, moments: int, counted: bool, bins: int) -> ColumnStats | None:
    """``c`` with what is asked about it; None if nothing applies."""
    if c.source != "number":
        return c.model_copy(update={"histogram": True}) if counted else None
    if not (moments or counted) or c.low is None or c.high is None:
        return None
    step = (c.high - c.low) / bins
    cuts = tuple(c.low + i * step for i in range(1, bins)) if counted else ()
    return c.model_copy(update={"moments": moments, "histogram": counted, "cuts": cuts})


def _located(contract: DataContract, column: Column) -> ColumnStats:
    """Where and how ``column`` stands in the encoding. Nothing is asked about it yet.

    Raises:
        PlanError: its cells are encoded as sets of leaves. No statistic is defined for those.
    """
    if column.encoding == "sets":
        raise PlanError(
            f"column {column.name!r} is encoded as sets: a record may stand for several values at once",
            hint="ask for other columns; a contract with encoding = 'labels' allows this one",
        )
    at = sum(len(c.feature_names) for c in itertools.takewhile(lambda c: c.name != column.name, contract.columns))
    source: Source = "target" if column.role == "target" else "coded" if column.coded else "number"
    number = column.type == "number" and source != "target"
    return ColumnStats(
        column=column.name,
        unit=column.unit,
        source=source,
        at=0 if source == "target" else at,
        low=column.low if number else None,
        high=column.high if number else None,
        missing=column.missing == "indicator" and source != "target",
        labels=column.labels if source != "number" else (),
        cuts=column.cuts if source == "coded" else (),
    )
