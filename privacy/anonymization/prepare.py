"""A table's columns and values against its specification, and what the codes of its values mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedveil.common.errors import AnonymityError, ContractError, DataError, UsageError
from fedveil.privacy.anonymization.attributes import Hierarchy, TableSpec, text_of
from fedveil.privacy.anonymization.criteria import (
    AlphaK,
    Criterion,
    DistinctL,
    EntropyL,
    KAnonymity,
    RecursiveCL,
    Reference,
    TCloseness,
)
from fedveil.privacy.anonymization.domains import Domain, domain_of, lookup, order_sensitive
from fedveil.privacy.anonymization.tuples import Tuples

ABSENT, UNKNOWN = -1, -2
_SIMPLE = (
    pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating,
    pa.types.is_decimal, pa.types.is_temporal, pa.types.is_null,
)  # fmt: skip


@dataclass(frozen=True)
class Attribute:
    """The values of a sensitive column, in order, and their hierarchy as ancestor numbers (levels, v), or None.

    ``declared`` says that the values come from the specification and not from the table.
    """

    name: str
    values: tuple[str, ...]
    tree: NDArray[np.int32] | None
    declared: bool


@dataclass(frozen=True)
class Frame:
    """Domains of the quasi-identifiers and of the sensitive columns that the criteria look at."""

    domains: tuple[Domain, ...]
    attributes: tuple[Attribute, ...]


def bind(models: Sequence[Criterion], spec: TableSpec) -> tuple[Criterion, ...]:
    """The criteria with their columns filled in: a criterion without a column means the only sensitive one.

    Raises:
        ContractError: no criterion, or something else in its place; a column that is not declared sensitive or not
            named; a distance without what it needs.
        UsageError: what was given is no specification.
    """
    if not isinstance(spec, TableSpec):
        raise UsageError(
            f"a TableSpec or a DataContract is needed, not {type(spec).__name__}",
            hint="TableSpec((QuasiIdentifier('age'),), (Sensitive('diagnosis'),))",
        )
    wrong = [models] if not isinstance(models, (list, tuple)) else [m for m in models if not _is_criterion(m)]
    if wrong:
        raise ContractError(f"{type(wrong[0]).__name__} is not a list of criteria", hint="models=[KAnonymity(5)]")
    if not models:
        raise ContractError("no criterion is asked for", hint="models=[KAnonymity(5)]")
    return tuple(_bound(m, spec) for m in models)


def _is_criterion(m: object) -> bool:
    return not isinstance(m, type) and callable(getattr(m, "holds", None)) and isinstance(getattr(m, "name", None), str)


def _bound(m: Criterion, spec: TableSpec) -> Criterion:
    if isinstance(m, KAnonymity):
        return m
    if not m.column and len(spec.sensitive) != 1:
        raise ContractError(
            f"{m.name} does not say which of {len(spec.sensitive)} sensitive columns it protects",
            hint="name the column in the criterion",
        )
    column = spec.sensitive_column(m.column or spec.sensitive[0].name)
    if isinstance(m, TCloseness) and m.distance == "hierarchical" and column.hierarchy is None:
        raise ContractError(f"column {column.name!r} has no hierarchy for the hierarchical distance")
    return dataclasses.replace(m, column=column.name)  # type: ignore[type-var]


def check_schema(schema: Any, spec: TableSpec) -> None:
    """Every column of a table has one role, every declared column is there, and recoded ones hold simple values.

    Raises:
        DataError: the columns, by name.
    """
    _check_columns(schema.names, spec)
    _check_types(schema, spec)


def _check_columns(names: Sequence[str], spec: TableSpec) -> None:
    declared = {*spec.released, *spec.identifiers}
    problems = {
        "occur twice": sorted({n for n in names if list(names).count(n) > 1}),
        "are missing": sorted(set(spec.released) - set(names)),
        "have no role": sorted(set(names) - declared),
    }
    for what, columns in problems.items():
        if columns:
            listed = ", ".join(repr(c) for c in columns[:5])
            raise DataError(
                f"{len(columns)} columns {what}: {listed}",
                hint="declare every column as quasi-identifier, sensitive, identifier or keep",
            )


def _check_types(schema: Any, spec: TableSpec) -> None:
    names = [*(q.name for q in spec.quasi), *(s.name for s in spec.sensitive)]
    kinds = {n: schema.field(n).type for n in names}
    plain = {n: k.value_type if pa.types.is_dictionary(k) else k for n, k in kinds.items()}
    odd = [n for n, k in plain.items() if not any(test(k) for test in _SIMPLE)]
    if odd:
        listed = ", ".join(repr(n) for n in odd[:5])
        raise DataError(
            f"{len(odd)} columns hold neither numbers, dates nor texts: {listed}", hint="convert them, or keep them"
        )


def check_rows(rows: int, models: Sequence[Criterion]) -> None:
    """Refuse a table without rows, and a k above the number of rows.

    Raises:
        DataError: zero rows.
        AnonymityError: k > n.
    """
    if rows == 0:
        raise DataError("the table has no rows", hint="give a table with rows")
    for m in models:
        if isinstance(m, (KAnonymity, AlphaK)) and m.k > rows:
            raise AnonymityError(
                f"k = {m.k} is more than the table's {rows} rows", hint="lower k, or use a table with more rows"
            )


def frame_of(spec: TableSpec, models: Sequence[Criterion], cells: Mapping[str, Iterable[Any]]) -> Frame:
    """Domains from the distinct cells of every column concerned.

    Raises:
        DataError: values that are not finite, or not declared.
        AnonymityError: a criterion asks for more different values than a column has.
    """
    domains = tuple(domain_of(q, cells[q.name]) for q in spec.quasi)
    attributes = []
    for name in sensitive_names(models):
        column = spec.sensitive_column(name)
        values = [v for v in cells[name] if v != ""]  # an empty text is no value
        broken = sum(isinstance(v, float) and not np.isfinite(v) for v in values)
        if broken:
            raise DataError(f"column {name!r}: {broken} values are not finite", hint="write no value instead")
        declared = column.hierarchy.leaves if column.hierarchy and not column.values else column.values
        ordered = order_sensitive(values, declared, name)
        _check_order(models, name, values, column.values)
        here = {text_of(v) for v in values if v is not None}
        _check_diversity(models, name, len(here))
        attributes.append(Attribute(name, ordered, _tree(column.hierarchy, ordered), bool(declared)))
    return Frame(domains, tuple(attributes))


def sensitive_names(models: Sequence[Criterion]) -> tuple[str, ...]:
    """The columns that the criteria look at, each once, in a fixed order."""
    return tuple(sorted({m.column for m in models if m.column}))


def sensitive_codes(column: Any, attribute: Attribute) -> NDArray[np.int32]:
    """(n,) codes of a sensitive column, -1 for "no value": an empty cell, or an empty text.

    Raises:
        DataError: values that were not there when the recoding was fitted.
    """
    out = lookup(column, {v: i for i, v in enumerate(attribute.values)} | {"": UNKNOWN}, UNKNOWN)
    if unknown := int((out == -1).sum()):
        raise DataError(
            f"column {attribute.name!r}: {unknown} cells hold unknown values", hint="fit on the table to be released"
        )
    return np.where(out == UNKNOWN, np.int32(ABSENT), out)


def tuples_of(frame: Frame, combos: NDArray[np.int32], weights: NDArray[np.int64]) -> Tuples:
    """Tuples from distinct combinations (q + sensitive, u) and their weights."""
    q = len(frame.domains)
    sensitive = {a.name: combos[q + i] for i, a in enumerate(frame.attributes)}
    references = {}
    for a in frame.attributes:
        present = sensitive[a.name] >= 0
        counts = np.bincount(sensitive[a.name][present], weights[present], len(a.values)).astype(np.int64)
        references[a.name] = Reference(counts, a.tree, a.declared)
    return Tuples(np.ascontiguousarray(combos[:q]), weights, sensitive, references)


def _check_order(models: Sequence[Criterion], name: str, values: list[Any], declared: tuple[str, ...]) -> None:
    ordered = any(isinstance(m, TCloseness) and m.distance == "ordered" and m.column == name for m in models)
    if ordered and not declared and any(isinstance(v, str) for v in values):
        raise ContractError(
            f"column {name!r} holds texts without a declared order", hint="Sensitive(name, values=(...)) in order"
        )


def _check_diversity(models: Sequence[Criterion], name: str, values: int) -> None:
    for m in models:
        if isinstance(m, (DistinctL, EntropyL, RecursiveCL)) and m.column == name and m.l > values:
            raise AnonymityError(
                f"{m.name}: l = {m.l:g} is more than the {values} different values of column {name!r}",
                hint="lower l, or choose another criterion",
            )


def _tree(hierarchy: Hierarchy | None, values: tuple[str, ...]) -> NDArray[np.int32] | None:
    if hierarchy is None:
        return None
    place = {leaf: i for i, leaf in enumerate(hierarchy.leaves)}
    if unknown := sum(v not in place for v in values):
        raise ContractError(f"{unknown} declared values of {hierarchy.name!r} are not in its hierarchy")
    out = [np.arange(len(values), dtype=np.int32)]
    for level in hierarchy.levels[1:]:
        ids: dict[str, int] = {}
        out.append(np.array([ids.setdefault(level[place[v]], len(ids)) for v in values], np.int32))
    return np.stack(out)
