"""One column of the agreed table: its role, domain, recoding and encoding, and the rules that make it consistent."""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from fedveil.common.contract import dates, hierarchies
from fedveil.common.contract.base import (
    MAX_DEPTH,
    MAX_LEAVES,
    MISSING,
    OTHER,
    Bound,
    Code,
    Leaf,
    Name,
    Strict,
    printable,
    refuse,
    repeated,
    short,
)  # fmt: skip
from fedveil.common.contract.shorthands import shorthands
from fedveil.common.errors import ContractError

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
        length: characters of a raw text without white space and hyphens. Other texts are not masked, hence unseen.
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
        unseen_limit: fraction of the cells, in [0, 1]. If more values than that are taken for "other", it is an error.
        missing_codes: texts that mean "no value", compared after trimming white space. In a number's column they are
            compared by value too ("0" also means 0.0).
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
        encoding: ``labels``: one input per label of the fixed recoding. ``sets``: a released cell is a set of leaves.
            Its inputs are a soft one-hot over the leaves (category), or its scaled midpoint and width (number). So
            tables that were generalised in any other way have the same inputs.
        outliers: what happens to a number outside the public bounds: an error, moved to the bound, or "no value".
        pseudonym: an identifier is replaced by its HMAC under the site's secret, to find a person's other rows.
        reviewed: somebody has looked at the column. Nearly unique values, and texts that look like identifiers, are
            then reported, not refused.
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
        _check(self)
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
        """What a released cell of a coded column may say, in order. Where values may be missing, it may also be ""."""
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


def _check(c: Column) -> None:
    """Refuse an inconsistent column.

    Raises:
        ContractError: see the rules in :mod:`fedveil.common.contract`.
    """
    printable(c.name, "a column name")
    if c.format:
        dates.pattern(c.format)
        if c.type != "number":
            raise ContractError(f"column {c.name!r} has a date format but is not a date", hint="set type = 'date'")
    if c.pseudonym and c.role != "identifier":
        raise ContractError(f"pseudonym has no meaning for {c.name!r}", hint="take it out: only an identifier has one")
    if c.loaded:
        _check_role(c)
        (_check_number if c.type == "number" else _check_category)(c)


def _check_role(c: Column) -> None:
    if c.type is None:
        raise ContractError(f"column {c.name!r} has no type", hint="set type to 'number', 'category' or 'date'")
    if c.recoded and c.role not in ("quasi", "sensitive"):
        raise ContractError(
            f"column {c.name!r} has levels but its role is {c.role!r}",
            hint="only quasi and sensitive columns have levels",
        )
    if c.levels is not None and c.level is not None:
        raise ContractError(f"column {c.name!r} has both levels and a level", hint="keep one of the two")
    if not c.recoded and (c.role == "quasi" or (c.role == "sensitive" and c.type == "number")):
        raise ContractError(f"column {c.name!r} has no levels", hint="declare its cut points or groups")
    if c.as_feature is not None and c.role not in ("quasi", "sensitive"):
        raise ContractError(
            f"as_feature has no meaning for {c.name!r}", hint="use it for quasi and sensitive columns only"
        )
    if c.threshold is not None and (c.role != "target" or c.type != "number"):
        raise ContractError(
            f"column {c.name!r} has a threshold", hint="take it out: only a target that is a number has one"
        )
    if c.role == "target" and c.missing != "error":
        raise ContractError("a missing target cannot be encoded", hint="set missing = 'error' for the target")
    if c.role == "target" and (c.encoding != "labels" or c.outliers == "missing"):
        raise ContractError(
            "the target takes no encoding and no outliers = 'missing'", hint="take them out of its column"
        )
    if c.outliers == "missing" and c.missing == "error":
        raise ContractError(
            f"column {c.name!r} turns outliers into missing values, but takes no missing values",
            hint="set missing = 'indicator', or another outliers",
        )
    refuse(repeated(c.missing_codes), f"missing codes of {c.name!r} are declared twice", "declare each once")


def _check_number(c: Column) -> None:
    if c.low is None or c.high is None:
        raise ContractError(f"column {c.name!r} has no public bounds", hint="declare low and high; never from the data")
    if c.low >= c.high:
        raise ContractError(f"column {c.name!r}: low is not below high", hint="swap them, or correct the public bounds")
    if c.values or c.unseen != "error" or c.mask or c.hierarchy:
        raise ContractError(
            f"column {c.name!r} is a number but lists values", hint="take the values out, or set type = 'category'"
        )
    if c.role == "target" and (c.threshold is None or not c.low <= c.threshold < c.high):
        raise ContractError(
            "the target needs a threshold with low <= threshold < high", hint="class 1 is value > threshold"
        )
    if c.ladder:
        hierarchies.check_ladder(c.ladder, c.low, c.high, c.name)
    if c.level is not None and not 1 <= c.level <= len(c.ladder):
        raise ContractError(
            f"level {c.level} of {c.name!r} is not in its hierarchy", hint=f"choose 1 to {len(c.ladder)}"
        )
    if c.levels is None:
        return
    if any(not isinstance(cut, float) for cut in c.levels):
        raise ContractError(
            f"the levels of the number {c.name!r} are not cut points", hint="for example levels = [50, 65]"
        )
    if c.cuts:
        hierarchies.check_ladder((c.cuts,), c.low, c.high, c.name)


def _check_category(c: Column) -> None:
    if c.low is not None or c.high is not None or c.ladder or c.outliers != "error":
        raise ContractError(
            f"column {c.name!r} is a category but has bounds", hint="take the bounds out, or set type = 'number'"
        )
    if not c.values:
        raise ContractError(f"column {c.name!r} lists no values", hint="declare its leaves in order")
    for v in c.values:
        printable(v, f"a value of {c.name!r}")
    refuse(repeated(c.values), f"values of {c.name!r} are declared twice", "declare each leaf once")
    refuse(
        sorted(set(c.values) & set(c.missing_codes)),
        f"missing codes of {c.name!r} are also values",
        "take each out of one of the two lists",
    )
    if c.unseen == "other" and OTHER not in c.values:
        raise ContractError(f"unseen = 'other' but {c.name!r} has no leaf 'other'", hint="add 'other' to values")
    if c.role == "target" and len(c.values) < 2:
        raise ContractError("the target has fewer than two classes", hint="list every class in values")
    if c.mask and c.mask.keep > c.mask.length:
        raise ContractError(
            f"the mask of {c.name!r} keeps more characters than there are", hint="set keep to at most length"
        )
    if c.hierarchy:
        hierarchies.check_rows(c.hierarchy, c.values, c.name)
    if c.level is not None and not 0 <= c.level < len(c.steps):
        raise ContractError(
            f"level {c.level} of {c.name!r} is not in its hierarchy", hint=f"choose 0 to {len(c.steps) - 1}"
        )
    if c.levels is not None:
        _check_groups(c)


def _check_groups(c: Column) -> None:
    if any(not isinstance(g, tuple) or not g for g in c.levels or ()):
        raise ContractError(f"the levels of {c.name!r} are not groups", hint="for example levels = [['a'], ['b', 'c']]")
    flat = [v for g in c.groups for v in g]
    refuse(repeated(flat), f"values of {c.name!r} are in two groups", "put every leaf into one group")
    refuse(
        [v for v in c.values if v not in set(flat)], f"no group of {c.name!r} holds these leaves", "add each to a group"
    )
    refuse(
        [v for v in flat if v not in set(c.values)], f"groups of {c.name!r} hold unknown leaves", "add them to values"
    )
    refuse(repeated(c.labels), f"two groups of {c.name!r} read alike", "rename a leaf that contains '|'")
