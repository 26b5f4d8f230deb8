"""A person's rows together: the unit of a contract with ``rows_per_person``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedveil.common.contract import DataContract
from fedveil.common.errors import AnonymityError
from fedveil.privacy.anonymization import codes
from fedveil.privacy.anonymization.fixed import ReleasedTable

EMPTY = -1


def rows_of(persons: NDArray[np.int64], order: NDArray[np.int64], most: int, capacity: int | None) -> NDArray[np.int64]:
    """``(n', most)``: which of the shuffled rows belong to each person, :data:`EMPTY` for none.

    Args:
        persons: ``(n,)`` whose row each is, in the source's order.
        order: ``(n,)`` the shuffle: row i after it is row ``order[i]`` of the source.
        most: m. Of a person with more rows, the first m of the source are taken.
        capacity: K. Of more persons, the first K of the source are taken. None: all.
    """
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    _, first, whose = np.unique(persons, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))  # by the first row of each in the source
    whose = rank[whose]
    by_person = np.argsort(whose, kind="stable")
    starts = np.searchsorted(whose[by_person], np.arange(len(first)))
    turn = np.arange(len(by_person)) - starts[whose[by_person]]
    kept = len(first) if capacity is None else min(capacity, len(first))
    out = np.full((kept, most), EMPTY, np.int64)
    taken = (turn < most) & (whose[by_person] < kept)
    out[whose[by_person][taken], turn[taken]] = place[by_person[taken]]
    return out


def first_rows(persons: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """The rows that are among the first ``most`` of their person, in the source's order.

    Args:
        persons: ``(n,)`` whose row each is, in the source's order.
    """
    by_person = np.argsort(persons, kind="stable")
    own = persons[by_person]
    turn = np.arange(len(own)) - np.searchsorted(own, own)
    return np.sort(by_person[turn < most])


def require_k(table: ReleasedTable, persons: NDArray[np.int64], contract: DataContract) -> None:
    """Raise :class:`AnonymityError` unless every class of equal quasi-identifiers holds k different persons.

    Args:
        persons: ``(n,)`` whose row each is, in the order of ``table``.
    """
    groups = codes.group([table.coded[c.name] for c in contract.quasi], table.rows)
    pairs = np.unique(np.stack([groups.inverse, persons]), axis=1)
    failing = int((np.bincount(pairs[0]) < contract.k).sum())
    if failing:
        raise AnonymityError(
            f"k = {contract.k} fails in {failing} classes: they hold fewer persons than that, whatever their rows",
            hint="coarser levels in the contract, or a smaller k",
        )
