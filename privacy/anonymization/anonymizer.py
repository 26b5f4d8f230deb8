"""The whole engine as one object: criteria, a method, a table in, a table out. Works without any federation.

anonymizer = Anonymizer(spec, models=[KAnonymity(5), DistinctL(3, "diagnosis")], suppression_limit=0.05)
released = anonymizer.fit_transform(table)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from fedveil.common.contract import DataContract
from fedveil.common.errors import AnonymityError, ContractError, UsageError
from fedveil.privacy.anonymization import recoding as rc
from fedveil.privacy.anonymization.attributes import TableSpec
from fedveil.privacy.anonymization.buckets import released
from fedveil.privacy.anonymization.counting import ClassOf, Prepared, prepare
from fedveil.privacy.anonymization.criteria import Criterion, DistinctL, KAnonymity, TCloseness
from fedveil.privacy.anonymization.domains import Domain
from fedveil.privacy.anonymization.lattice import MAX_NODES, Lattice, nodes_of
from fedveil.privacy.anonymization.mondrian import mondrian
from fedveil.privacy.anonymization.peel import peel
from fedveil.privacy.anonymization.prepare import bind
from fedveil.privacy.anonymization.recoding import Recoding
from fedveil.privacy.anonymization.rows import Rows, TableRows
from fedveil.privacy.anonymization.stability import Stability, stability
from fedveil.privacy.anonymization.tuples import Constraints, Tuples

Method = Literal["auto", "fixed", "mondrian", "optimal", "peel"]


@dataclass(frozen=True)
class Outcome:
    """What a search found. Counts and losses are local knowledge of whoever holds the table.

    Attributes:
        method: the search that was used.
        rows, suppressed: rows of the table, and how many of them are not released.
        classes: number of classes.
        ncp: normalised certainty penalty in [0, 1]; suppressed rows count as fully general.
        node: the levels of full-domain recoding, by quasi-identifier; None for local recoding.
    """

    method: str
    rows: int
    suppressed: int
    classes: int
    ncp: float
    node: tuple[int, ...] | None


@dataclass(frozen=True)
class Fitted:
    """A recoding, what it was found on, and the class of every row."""

    prepared: Prepared
    found: Recoding
    classes: ClassOf

    @property
    def outcome(self) -> Outcome:
        """Figures of the recoding."""
        return outcome_of(self.found, self.prepared.tuples)


class Anonymizer:
    """Recode a table so that every class of equal quasi-identifiers meets every criterion.

    Args:
        spec: roles and hierarchies.
        models: the criteria.
        method: ``fixed`` (declared levels), ``optimal`` (one level per column, the best of all), ``peel`` (levels by
            region, labels of the hierarchies), ``mondrian`` (sets of values, least loss), or ``auto``: peel where
            every column of more than 5 values has a hierarchy and the lattice is not too large, else mondrian.
        suppression_limit: share of rows in [0, 1] that may be left out (``mondrian`` leaves none out).

    Guarantees: the released rows meet every criterion among themselves. Their order is uniformly random, and they carry
    no index. The input is never changed. The recoding depends on the multiset of rows alone.

    Raises:
        ContractError, UsageError: the specification is inconsistent.
    """

    def __init__(
        self,
        spec: TableSpec,
        models: Sequence[Criterion] = (),
        *,
        method: Method = "auto",
        suppression_limit: float = 0.0,
    ) -> None:
        if method not in get_args(Method):
            raise UsageError(f"method {method!r} is unknown", hint=f"one of {', '.join(get_args(Method))}")
        check_limit(suppression_limit)
        self.spec, self.models = spec, bind(models, spec)
        self.method: Method = method
        self.suppression_limit = suppression_limit
        self._fitted: Fitted | None = None

    def fit_transform(self, table: pa.Table) -> pa.Table:
        """The released rows of ``table``: recoded, without identifiers, in random order.

        Raises:
            DataError: columns, values or rows that do not fit the specification.
            AnonymityError: the criteria cannot be met. The message says which, and the best value that can be reached.
            UsageError: too many quasi-identifiers for ``optimal`` or ``peel``.
        """
        if not isinstance(table, pa.Table):
            raise UsageError(f"a pyarrow.Table is needed, not {type(table).__name__}")
        rows = TableRows(table)
        self._fitted = fitted = self.recoded(rows)
        return pa.concat_tables(released(rows, self.spec, fitted.classes, fitted.found))

    def recoded(self, rows: Rows, lap: Callable[[str], None] = lambda name: None) -> Fitted:
        """The recoding of any rows. ``lap`` is called when a phase ends. Raises what :meth:`fit_transform` raises."""
        prepared = prepare(rows, self.spec, self.models, lap=lap)
        levels = [q.fixed_level for q in self.spec.quasi]
        given = None if None in levels else tuple(level for level in levels if level is not None)
        found = search(self.method, prepared.tuples, prepared.frame.domains, self.models,
                       limit=self.suppression_limit, given=given)  # fmt: skip
        lap("search")
        return Fitted(prepared, found, ClassOf(prepared, found))

    @property
    def outcome(self) -> Outcome:
        """Figures of the newest release.

        Raises:
            UsageError: there was none.
        """
        if self._fitted is None:
            raise UsageError("nothing was released yet", hint="call fit_transform(table) first")
        return self._fitted.outcome

    @property
    def stability(self) -> Stability:
        """How many released rows one record can change (:mod:`.stability`), if all steps before it are row-wise."""
        return stability(self.method, self.models, suppression_limit=self.suppression_limit)


def contract_models(contract: DataContract) -> tuple[Criterion, ...]:
    """The criteria a contract asks for."""
    diverse = [DistinctL(contract.l, c.name) for c in contract.sensitive] if contract.l > 1 else []
    t = contract.t
    close = [] if t is None else [TCloseness(t, c.name, distance=contract.t_distance) for c in contract.sensitive]
    return (KAnonymity(contract.k), *diverse, *close)


def check_limit(limit: float) -> None:
    """Refuse a suppression limit outside [0, 1].

    Raises:
        ContractError: it looks like a percentage, or is no share at all.
    """
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise ContractError(
            f"suppression_limit is not a number but {type(limit).__name__}", hint="0.05 for 5 % of the rows"
        )
    if not 0 <= limit <= 1:
        hint = f"{limit / 100:g} is {limit:g} %" if 1 < limit <= 100 else "give a share of the rows, such as 0.05"
        shown = f" = {limit:g}" if abs(limit) < 1e300 else ""  # a longer whole number fits into no float
        raise ContractError(f"suppression_limit{shown} is not a share in [0, 1]", hint=hint)


def search(
    method: Method,
    tuples: Tuples,
    domains: Sequence[Domain],
    models: Sequence[Criterion],
    *,
    limit: float,
    given: tuple[int, ...] | None = None,
) -> Recoding:
    """Find a recoding of weighted tuples.

    Args:
        given: the level of every quasi-identifier, for ``fixed``.

    Raises:
        AnonymityError, UsageError, ContractError: see :class:`Anonymizer`.
    """
    constraints = Constraints(models, tuples)
    constraints.require_satisfiable()
    if method == "auto":
        method = "peel" if _labelled(domains) else "mondrian"
    return _METHODS[method](tuples, domains, constraints, {"limit": limit, "given": given})


def _labelled(domains: Sequence[Domain]) -> bool:
    """Whether numbers and larger categories have levels between value and "*", and the lattice can be searched."""
    between = all(len(d.levels) > 2 or d.size <= 5 for d in domains)
    return between and nodes_of(domains) <= MAX_NODES


def _mondrian(t: Tuples, domains: Sequence[Domain], constraints: Constraints, options: Mapping[str, Any]) -> Recoding:
    classes, count = mondrian(t, domains, constraints)
    return rc.by_sets("mondrian", domains, classes, count, t.codes)


def _optimal(t: Tuples, domains: Sequence[Domain], constraints: Constraints, options: Mapping[str, Any]) -> Recoding:
    lattice = Lattice(t, domains, constraints, limit=options["limit"])
    node = lattice.search().levels
    classes, count, members = lattice.classes(node)
    return rc.by_levels("optimal", domains, classes, np.tile(np.array(node), (count, 1)), members, t.codes)


def _peel(t: Tuples, domains: Sequence[Domain], constraints: Constraints, options: Mapping[str, Any]) -> Recoding:
    out = peel(t, domains, constraints, limit=options["limit"])
    return rc.by_levels("peel", domains, out.classes, out.nodes, out.members, t.codes)


def _fixed(t: Tuples, domains: Sequence[Domain], constraints: Constraints, options: Mapping[str, Any]) -> Recoding:
    node = options["given"]
    if node is None:
        missing = next(d.name for d in domains if d.fixed_level is None)
        raise ContractError(f"column {missing!r} has no fixed level", hint="QuasiIdentifier(..., fixed_level=1)")
    lattice = Lattice(t, domains, constraints, limit=options["limit"])
    found = lattice.evaluate(node)
    if not found.feasible:
        raise AnonymityError(
            f"the fixed levels leave {found.suppressed} of {t.rows} rows in classes that fail",
            hint="choose coarser levels, or allow more suppression (which changes the stability factor)",
        )
    classes, count, members = lattice.classes(node)
    return rc.by_levels("fixed", domains, classes, np.tile(np.array(node), (count, 1)), members, t.codes)


_METHODS: Mapping[str, Callable[[Tuples, Sequence[Domain], Constraints, Mapping[str, Any]], Recoding]] = {
    "mondrian": _mondrian, "optimal": _optimal, "peel": _peel, "fixed": _fixed,
}  # fmt: skip


def outcome_of(found: Recoding, tuples: Tuples) -> Outcome:
    """Figures of a recoding."""
    kept = found.classes >= 0
    w, c = tuples.weights[kept], found.classes[kept]
    suppressed = tuples.rows - int(w.sum())
    loss = sum(float((w * cell.shares[c]).sum()) for cell in found.cells)
    q = len(found.cells)
    node = None
    if found.nodes is not None and found.method in ("optimal", "fixed") and len(found.nodes):
        node = tuple(int(x) for x in found.nodes[0])
    return Outcome(found.method, tuples.rows, suppressed, found.count, (loss / q + suppressed) / tuples.rows, node)
