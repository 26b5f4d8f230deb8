"""One column of the agreed table: its role, domain, recoding and encoding, and the rules that make it consistent."""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from fedveil.common.contract import dates
from fedveil.common.contract.base import MAX_DEPTH, MAX_LEAVES, MISSING, Bound, Code, Leaf, Name, Strict, short
from fedveil.common.contract.column_rules import check, shorthands

Role = Literal["identifier", "quasi", "sensitive", "feature", "target", "drop"]


class Step(NamedTuple):
    """One level of a hierarchy: its labels in order, and what each label holds.

    Attributes:
        labels: distinct texts.
        groups: for a category: the leaves of every label. () for a number.
        cuts: for a number: the cut points between the labels' intervals. () for a category.
    """

    labels: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    cuts: tuple[float, ...]


class Mask(Strict):
    """Raw texts are cut to their first characters before anything else: ``94110`` with ``keep = 3`` is ``941**``.

    Attributes:
        keep: characters kept.
        length: characters a raw text has, white space and hyphens removed; others are not masked, hence unseen.
    """

    keep: Annotated[int, Field(ge=1, le=32)]
    length: Annotated[int, Field(ge=1, le=32)]


class Column(Strict):
    """One column of the agreed table.

    Attributes:
        name: header of the column, 1 to 128 printable characters.
        role: ``identifier`` and ``drop`` are never released or trained on (and may be absent from the file);
            ``quasi`` is released recoded to ``levels``; ``sensitive`` is what l-diversity protects; ``feature`` is
            released as it is; ``target`` is what the model predicts. There is no default.
        type: ``number`` or ``category``; None only for identifier and drop. A draft may say ``date``: a number of days
            since 1970-01-01, read in ``format``, with bounds and cuts written as ISO dates.
        unit: unit of measurement, for readers ("mmHg", "years").
        low, high: public bounds of a number, both inclusive, in ``unit``; never taken from data.
        format: how a date is written, of %Y, %m, %d and one separator; "" for plain numbers.
        values: ordered leaves of a category. The order is the order of the encoding and of the classes.
        unseen: what a value outside ``values`` means: an error, or the leaf "other" (which ``values`` must then hold).
        unseen_limit: fraction of the cells, in [0, 1], beyond which values taken for "other" are an error after all.
        missing_codes: texts that mean "no value", compared after trimming white space; in a number's column also by
            value ("0" means 0.0 too).
        missing: ``error`` refuses a table with missing values in this column; ``indicator`` adds an indicator feature.
        levels: fixed recoding: cut points of a number, groups of leaves of a category. A draft may say
            ``{every = 10, origin = 20}`` for a number, or "month", "quarter", "year", "decade" for a date.
        hierarchy: of a category: one line per leaf with its label at every level, leaves first. A draft may name a CSV
            file (also ARX's), or say "mask".
        ladder: hierarchy of a number: cut points per level, finest first. A draft may name a file as ``hierarchy``.
        level: fixed recoding to a level of the hierarchy (0: the leaves), instead of ``levels``.
        mask: cut raw texts before they are compared with ``values``.
        threshold: for a target that is a number: class 1 is ``value > threshold``, class 0 the rest.
        as_feature: whether a quasi-identifier (default yes) or a sensitive column (default no) is trained on, in
            recoded form.
        encoding: ``labels``: one input per label of the fixed recoding. ``sets``: a released cell is a set of leaves
            and enters as a soft one-hot over the leaves (category) or as scaled midpoint and width (number), so that
            tables that were generalised in any other way have the same inputs.
        outliers: what a number outside the public bounds is: an error, moved to the bound, or "no value".
        pseudonym: an identifier is replaced by its HMAC under the site's secret, to find a person's other rows.
        reviewed: somebody has looked at the column: nearly unique values and texts that look like identifiers are
            reported, not refused.
    """

    name: Name
    role: Role
    type: Literal["number", "category"] | None = None
    unit: Annotated[str, Field(max_length=128)] = ""
    low: Bound | None = None
    high: Bound | None = None
    format: Annotated[str, Field(max_length=32)] = ""
    values: Annotated[tuple[Leaf, ...], Field(max_length=MAX_LEAVES)] = ()
    unseen: Literal["error", "other"] = "error"
    unseen_limit: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.05
    missing_codes: Annotated[tuple[Code, ...], Field(max_length=64)] = ("",)
    missing: Literal["error", "indicator"] = "error"
    levels: (
        Annotated[tuple[Bound, ...], Field(max_length=MAX_LEAVES)]
        | Annotated[tuple[tuple[Leaf, ...], ...], Field(max_length=MAX_LEAVES)]
        | None
    ) = None
    hierarchy: Annotated[tuple[tuple[Leaf, ...], ...], Field(max_length=MAX_LEAVES)] = ()
    ladder: Annotated[tuple[tuple[Bound, ...], ...], Field(max_length=MAX_DEPTH)] = ()
    level: Annotated[int, Field(ge=0, lt=MAX_DEPTH)] | None = None
    mask: Mask | None = None
    threshold: Bound | None = None
    as_feature: bool | None = None
    encoding: Literal["labels", "sets"] = "labels"
    outliers: Literal["error", "clamp", "missing"] = "error"
    pseudonym: bool = False
    reviewed: bool = False

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, data: Any) -> Any:
        return shorthands(data)

    @model_validator(mode="after")
    def _consistent(self) -> Column:
        check(self)
        return self

    @property
    def loaded(self) -> bool:
        """Whether the column is read for release and training (all roles but identifier and drop)."""
        return self.role not in ("identifier", "drop")

    @property
    def is_feature(self) -> bool:
        """Whether the column enters the model's input."""
        if self.as_feature is not None:
            return self.as_feature
        return self.role in ("feature", "quasi")

    @property
    def recoded(self) -> bool:
        """Whether a fixed recoding is declared, by ``levels`` or by ``level``."""
        return self.levels is not None or self.level is not None

    @property
    def coded(self) -> bool:
        """Whether the released column holds labels (else: numbers)."""
        return self.type == "category" or self.recoded or self.role == "target"

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The levels of the hierarchy, finest first; a category's first step is its leaves. () without a hierarchy."""
        if self.ladder:
            return tuple(Step(self._intervals(cuts), (), cuts) for cuts in self.ladder)
        if not self.hierarchy:
            return ()
        steps = []
        for level in range(len(self.hierarchy[0])):
            held: dict[str, list[str]] = {}
            for row in self.hierarchy:
                held.setdefault(row[level], []).append(row[0])
            steps.append(Step(tuple(held), tuple(map(tuple, held.values())), ()))
        return tuple(steps)

    @cached_property
    def cuts(self) -> tuple[float, ...]:
        """Cut points of a recoded number or of a thresholded target; () otherwise."""
        if self.type != "number":
            return ()
        if self.role == "target":
            return () if self.threshold is None else (self.threshold,)
        if self.level is not None:
            return self.ladder[self.level - 1]
        return tuple(c for c in self.levels or () if isinstance(c, float))

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Groups of leaves of a category, in order; one group per leaf where no levels are declared."""
        if self.type != "category":
            return ()
        if self.level is not None:
            return self.steps[self.level].groups
        if self.levels is None:
            return tuple((v,) for v in self.values)
        return tuple(g for g in self.levels if isinstance(g, tuple))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """What a released cell of a coded column may say, in order ("" beside it where missing values are allowed)."""
        if self.type == "category":
            return self.steps[self.level].labels if self.level is not None else tuple("|".join(g) for g in self.groups)
        if self.role == "target" and self.threshold is not None:
            return (f"<={self.text(self.threshold)}", f">{self.text(self.threshold)}")
        return self._intervals(self.cuts) if self.recoded else ()

    def text(self, x: float) -> str:
        """A number of this column as a label writes it: an ISO date where the column holds dates."""
        return dates.iso(x) if self.format else short(x)

    def _intervals(self, cuts: tuple[float, ...]) -> tuple[str, ...]:
        if self.low is None or self.high is None:
            return ()
        edges = [self.text(e) for e in (self.low, *cuts, self.high)]
        pairs = list(itertools.pairwise(edges))
        return tuple(f"[{a},{b}{']' if i == len(pairs) - 1 else ')'}" for i, (a, b) in enumerate(pairs))

    @cached_property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the model inputs this column gives; a function of the contract alone."""
        if not self.is_feature:
            return ()
        if self.encoding == "sets":
            own = [f"={v}" for v in self.values] if self.type == "category" else ["", "=width"]
        else:
            own = [f"={v}" for v in self.labels] if self.coded else [""]
        return tuple(f"{self.name}{x}" for x in ([*own, f"={MISSING}"] if self.missing == "indicator" else own))
