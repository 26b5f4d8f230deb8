"""Fixed recoding: every cell of a quasi-identifier becomes the contract's level it lies in.

The map works on each row by itself and was agreed before anybody saw the data. So adding or removing one record of the
input adds or removes one row of the output (stability factor 1), and (ε, δ) of the released table's rows is (ε, δ) of
the original records. Row suppression breaks that: see :func:`stability_factor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.common.contract import DataContract
from fedveil.common.errors import DataError
from fedveil.privacy.anonymization import codes, criteria
from fedveil.privacy.anonymization.codes import Codes

Values = Mapping[str, "NDArray[np.float64] | NDArray[np.object_]"]


@dataclass(frozen=True)
class ReleasedTable:
    """A recoded table: only this may be written and trained on. Identifiers are not in it.

    Attributes:
        rows: number of rows.
        coded: by column, codes (n,) int32 into the column's labels, ``codes.ABSENT`` for "no value".
        numbers: by column, values (n,) float64 in the column's unit, NaN for "no value".
    """

    rows: int
    coded: Mapping[str, Codes]
    numbers: Mapping[str, NDArray[np.float64]]

    def take(self, index: NDArray[np.int64]) -> ReleasedTable:
        """The rows ``index``, in that order."""
        return ReleasedTable(
            len(index),
            {n: c[index] for n, c in self.coded.items()},
            {n: x[index] for n, x in self.numbers.items()},
        )


@dataclass(frozen=True)
class Recoded:
    """A recoded table and how many rows were suppressed (local knowledge: counts do not leave the site)."""

    table: ReleasedTable
    suppressed: int


def recode(columns: Values, rows: int, contract: DataContract) -> Recoded:
    """Apply the contract's levels and, if the contract allows it, suppress whole failing classes.

    Where suppression is not allowed, or would exceed the limit, failing classes stay in the table. The verification of
    the written file then refuses them, with advice.

    Args:
        columns: the loaded columns, each (rows,): numbers with NaN, texts with "" for "no value".

    Raises:
        DataError: a category holds values that are not among its leaves.
    """
    coded = {c.name: codes.encode(columns[c.name], c) for c in contract.loaded if c.coded}
    for name, code in coded.items():
        if unseen := int((code == codes.UNSEEN).sum()):
            raise DataError(
                f"column {name!r}: {unseen} values are not in the contract", hint="correct them at the source"
            )
    numbers = {c.name: np.asarray(columns[c.name], np.float64) for c in contract.loaded if not c.coded}
    table = ReleasedTable(rows, coded, numbers)
    return _suppress(table, contract) if contract.suppression_limit > 0 else Recoded(table, 0)


def failing_classes(table: ReleasedTable, contract: DataContract) -> tuple[codes.Groups, NDArray[np.bool_]]:
    """The classes of equal quasi-identifiers, and (g,) which of them break k, or l where the contract asks for it.

    l = 1 requires nothing. Otherwise a class whose sensitive values are all missing would fail at any size, and one
    record with a value would bring it back. :func:`stability_factor` rules that out.
    """
    groups = codes.group([table.coded[c.name] for c in contract.quasi], table.rows)
    k, ell = criteria.KAnonymity(contract.k), criteria.DistinctL(contract.l)
    bad = ~k.holds(groups.sizes, groups.sizes[:, None])
    for c in contract.sensitive if contract.l > 1 else ():
        bad |= ~ell.holds(groups.sizes, codes.histogram(groups, table.coded[c.name], len(c.labels)))
    return groups, bad


def stability_factor(contract: DataContract) -> int | None:
    """How many released rows one original record can change; None when that is not bounded.

    It belongs to the procedure, not to this table: suppression that is allowed counts even if it never happens.
    1: fixed recoding alone. k: suppression for k alone. One record more can bring back a class of k, and one less can
    take it away. Account for a group of k, never for k times ε. None: suppression for l, where one record can bring
    back a class of any size.
    """
    if contract.suppression_limit == 0:
        return 1
    return contract.k if contract.l <= 1 else None


def _suppress(table: ReleasedTable, contract: DataContract) -> Recoded:
    groups, bad = failing_classes(table, contract)
    rows = int(groups.sizes[bad].sum())
    if rows > contract.suppression_limit * table.rows:
        return Recoded(table, 0)
    return Recoded(table.take(np.flatnonzero(~bad[groups.inverse])), rows)
