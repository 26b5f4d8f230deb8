"""Which columns identify, which are sensitive, and how values generalise: the engine's own small specification.

It serves a table that no federation ever sees. A signed :class:`~fedveil.common.contract.DataContract` says the same
things. :meth:`TableSpec.from_contract` turns it into this specification.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fedveil.common.contract import MISSING, Column, DataContract
from fedveil.common.errors import ContractError

TOP = "*"
_EXAMPLE = "TableSpec((QuasiIdentifier('age'),), (Sensitive('diagnosis'),), ('name',), ('cost',))"
MAX_LEAVES = 1 << 20


@dataclass(frozen=True)
class Hierarchy:
    """How the values of one attribute generalise, level by level.

    Attributes:
        levels: by level, the label of every leaf, in the same order; level 0 holds the leaves themselves and the last
            level one single label.
        name: the attribute, for messages.
    """

    levels: tuple[tuple[str, ...], ...]
    name: str = ""

    def __post_init__(self) -> None:
        where = f"the hierarchy of {self.name!r}"
        if len(self.levels) < 2 or not self.levels[0]:
            raise ContractError(f"{where} has no level above its values", hint="one row per value: value;group;...;*")
        if any(len(level) != len(self.levels[0]) for level in self.levels):
            raise ContractError(f"{where} has levels of unequal length", hint="write one label per value and level")
        if len(set(self.levels[0])) != len(self.levels[0]):
            raise ContractError(f"{where} lists a value twice", hint="give every value one row")
        if len(set(self.levels[-1])) != 1:
            raise ContractError(
                f"{where} does not end in one label", hint="use one label for all values at the top level"
            )
        for level, (finer, coarser) in enumerate(itertools.pairwise(self.levels)):
            if len(set(zip(finer, coarser, strict=True))) != len(set(finer)):
                raise ContractError(
                    f"{where}: a label of level {level} has two parents", hint="give it one label above"
                )
        self._check_labels(where)

    def _check_labels(self, where: str) -> None:
        """A label names the same leaves wherever it stands. Otherwise a released cell would have two meanings."""
        meaning: dict[str, tuple[int, ...]] = {}
        for level in self.levels:
            members: dict[str, list[int]] = {}
            for leaf, label in enumerate(level):
                members.setdefault(label, []).append(leaf)
            for label, leaves in members.items():
                if meaning.setdefault(label, tuple(leaves)) != tuple(leaves):
                    raise ContractError(f"{where} uses the label {label[:64]!r} for two different groups")

    @property
    def leaves(self) -> tuple[str, ...]:
        """The values themselves."""
        return self.levels[0]

    @property
    def height(self) -> int:
        """Number of generalisation steps from a value to the top."""
        return len(self.levels) - 1

    @cached_property
    def numbers(self) -> tuple[float, ...] | None:
        """The leaves as numbers; None unless every one of them is a finite number."""
        return _as_numbers(self.leaves)

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[str]], *, name: str = "") -> Hierarchy:
        """From rows ``value, group, ..., top``; a top "*" is added where the rows do not end in one label.

        Raises:
            ContractError: no rows, rows of unequal depth, a value twice, a label with two parents or two meanings.
        """
        table = [tuple(map(str, row)) for row in rows]
        if not table or len(table) > MAX_LEAVES:
            raise ContractError(f"the hierarchy of {name!r} has {len(table)} rows", hint="one row per value")
        if len({len(row) for row in table}) != 1:
            raise ContractError(f"the hierarchy of {name!r} has rows of unequal depth", hint="pad the short rows")
        levels = list(zip(*table, strict=True))
        if len(levels) == 1 or len(set(levels[-1])) != 1:
            levels.append((TOP,) * len(table))
        return cls(tuple(levels), name)

    @classmethod
    def from_csv(cls, path: Path, *, name: str = "") -> Hierarchy:
        """From a file of such rows without a header: the format of ARX.

        Raises:
            ContractError: the file cannot be read, or see :meth:`from_rows`.
        """
        try:
            with path.open(newline="", encoding="utf-8-sig") as f:
                rows = [row for row in csv.reader(f, delimiter=";", strict=True) if row]
        except (OSError, ValueError, csv.Error) as e:  # no UTF-8, a name with a zero byte
            raise ContractError(f"the hierarchy {path} cannot be read", hint="a UTF-8 file: value;group;...;*") from e
        return cls.from_rows(rows, name=name or path.stem)


@dataclass(frozen=True)
class QuasiIdentifier:
    """A column by which a person could be recognised.

    Args:
        name: the column.
        hierarchy: how it generalises to labels; without one, a value or "*" (Mondrian needs none).
        numeric: whether values are numbers, so that sets are intervals; None: as the column's or hierarchy's type says.
        fixed_level: the level that the method ``fixed`` recodes to.
        column: a contract's number: its cut points are the levels above the values.
    """

    name: str
    hierarchy: Hierarchy | None = None
    numeric: bool | None = None
    fixed_level: int | None = None
    column: Column | None = None

    def __post_init__(self) -> None:
        top = self.hierarchy.height if self.hierarchy else len(bins(self.column)) + 1 if self.column else 1
        if self.fixed_level is not None and type(self.fixed_level) is not int:
            raise ContractError(f"column {self.name!r}: the fixed level is not a whole number", hint=f"one of 0..{top}")
        if self.fixed_level is not None and not 0 <= self.fixed_level <= top:
            raise ContractError(f"column {self.name!r}: the fixed level is not one of 0..{top}")
        if self.numeric and self.hierarchy is not None and self.hierarchy.numbers is None:
            raise ContractError(
                f"column {self.name!r} is numeric, but values of its hierarchy are not numbers",
                hint="leave numeric out, or take these values out of the hierarchy",
            )


@dataclass(frozen=True)
class Sensitive:
    """A column whose value must not be learned.

    Args:
        name: the column.
        values: its values in order, each once; needed for the ordered distance of texts (numbers are ordered by
            themselves). A value named twice would stretch that distance's scale.
        hierarchy: needed for the hierarchical distance.
    """

    name: str
    values: tuple[str, ...] = ()
    hierarchy: Hierarchy | None = None

    def __post_init__(self) -> None:
        if len(set(self.values)) != len(self.values):
            raise ContractError(f"column {self.name!r} lists a value twice", hint="name every value once, in order")


@dataclass(frozen=True)
class TableSpec:
    """The role of every column of a table.

    Attributes:
        quasi: recoded.
        sensitive: released as they are, protected by the criteria.
        identifiers: never released.
        keep: released as they are; neither identifying nor sensitive.
    """

    quasi: tuple[QuasiIdentifier, ...]
    sensitive: tuple[Sensitive, ...] = ()
    identifiers: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    source: DataContract | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for what, columns, kind in (("quasi", self.quasi, QuasiIdentifier), ("sensitive", self.sensitive, Sensitive),
                                    ("identifiers", self.identifiers, str), ("keep", self.keep, str)):  # fmt: skip
            if not isinstance(columns, (tuple, list)) or not all(isinstance(c, kind) for c in columns):
                raise ContractError(f"{what} is not a tuple of {kind.__name__}", hint=_EXAMPLE)
        if not self.quasi:
            raise ContractError("no column is a quasi-identifier", hint="without one there is nothing to anonymise")
        names = [*(c.name for c in self.quasi), *(c.name for c in self.sensitive), *self.identifiers, *self.keep]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ContractError(f"column {twice[0]!r} has two roles", hint="give every column one role")

    @property
    def released(self) -> tuple[str, ...]:
        """The columns of the released table, in order."""
        return (*(c.name for c in self.quasi), *(c.name for c in self.sensitive), *self.keep)

    def sensitive_column(self, name: str) -> Sensitive:
        """The sensitive column ``name``.

        Raises:
            ContractError: it is not declared sensitive.
        """
        for c in self.sensitive:
            if c.name == name:
                return c
        raise ContractError(f"column {name!r} is not declared sensitive", hint="a criterion protects sensitive columns")

    @classmethod
    def from_contract(cls, contract: DataContract) -> TableSpec:
        """The same roles; fixed levels become the levels of the hierarchies.

        The target counts as sensitive where the contract says so. A number's levels are the contract's intervals.
        """
        sensitive = tuple(Sensitive(c.name, c.values) for c in contract.sensitive)
        names = {c.name for c in sensitive}
        return cls(
            tuple(_quasi(c) for c in contract.quasi),
            sensitive,
            tuple(c.name for c in contract.columns if not c.loaded),
            tuple(c.name for c in contract.loaded if c.role != "quasi" and c.name not in names),
            contract,
        )


def _quasi(c: Column) -> QuasiIdentifier:
    if c.type == "category":
        return _category(c)
    own = c.levels is not None
    return QuasiIdentifier(c.name, numeric=True, fixed_level=1 if own else c.level, column=c)


def bins(c: Column) -> tuple[tuple[tuple[float, ...], tuple[str, ...]], ...]:
    """A contract's number: by level above the values, the cut points and the intervals' labels."""
    if c.levels is not None:
        return ((c.cuts, c.labels),)
    return tuple((step.cuts, step.labels) for step in c.steps)


def _category(c: Column) -> QuasiIdentifier:
    if c.levels is None and c.steps:
        leaves = [row[0] for row in c.hierarchy]
        levels, fixed = [tuple(level) for level in zip(*c.hierarchy, strict=True)], c.level
    else:
        grouped = {leaf: "|".join(g) for g in c.groups for leaf in g}
        leaves, levels = list(c.values), [c.values]
        if any(grouped[v] != v for v in leaves):
            levels.append(tuple(grouped[v] for v in leaves))
        fixed = len(levels) - 1 if c.recoded else None
    if len(levels) == 1 or len(set(levels[-1])) != 1:
        levels.append((TOP,) * len(leaves))
    return QuasiIdentifier(c.name, Hierarchy(tuple(levels), c.name), numeric=False, fixed_level=fixed)


def text_of(value: object) -> str:
    """A cell as the text that hierarchies use: whole numbers without a decimal point, no value as "missing"."""
    if value is None:
        return MISSING
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def _as_numbers(texts: Sequence[str]) -> tuple[float, ...] | None:
    try:
        out = tuple(float(t) for t in texts)
    except ValueError:
        return None
    return out if all(map(math.isfinite, out)) else None
