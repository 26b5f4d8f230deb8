"""``fedveil.split``: a researcher's own records, dealt out to virtual sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedveil.common.errors import DataError, UsageError
from fedveil.common.units import MAX_SITES
from fedveil.deploy.lab import tables
from fedveil.deploy.lab.partition import ByGroup, Iid, Index, Partition, Random, named
from fedveil.deploy.lab.sites import Sites


def split(
    data: Any,
    target: str | None = None,
    *,
    clients: int | None = None,
    test: float = 0.2,
    by: str | Partition | None = None,
    seed: int = 0,
) -> Sites:
    """Deal out records to virtual sites; a part is held out as the public test table.

    Args:
        data: a CSV or Parquet file, a data frame (pandas, polars, Arrow) or a mapping of columns, each with ``target``;
            a pair ``(X, y)`` of arrays; a map-style data set of pairs (torch); or the name of a bundled data set
            (``"digits"``, ``"diabetes"``, ``"trivial"``).
        target: the column with the class. Numbers are scaled to 0..1, texts become one input for each value.
        clients: number of sites; 20 by default.
        test: share of the records that is held out, by class.
        by: how they are dealt out: evenly by default, :class:`~fedveil.deploy.lab.partition.Dirichlet`,
            :class:`~fedveil.deploy.lab.partition.Shards`, :class:`~fedveil.deploy.lab.partition.Quantity`, a function
            of the same form, or the name of a column: then each of its values is a site.
        seed: of the held-out part and of the dealing. It never seeds noise.

    Raises:
        UsageError: what was wrong with the arguments, and what works.
        DataError: what was wrong with the records, and what works.
    """
    if not 0 < test < 1:
        raise UsageError(f"test = {test!r}", hint="the share that is held out, between 0 and 1")
    if isinstance(data, str) and target is None and "." not in data:
        from fedveil.deploy.lab import datasets

        if isinstance(by, str):
            raise UsageError(f"the data set {data!r} has no column {by!r}", hint="Dirichlet, Shards or Quantity")
        count, rule = 20 if clients is None else clients, by
        made = _repeatable(lambda s: datasets.load(data, count, s, by=rule), seed)
    else:
        found, source = _encoded(data, target, by if isinstance(by, str) else None)
        made = _repeatable(lambda s: _dealt(found, source, clients, test, by, s), seed)
    return replace(made, dealt={"target": target, "test": test, "by": named(by)})


def _repeatable(deal: Callable[[int], Sites], seed: int) -> Sites:
    return replace(deal(seed), again=lambda s: _repeatable(deal, s))


def _dealt(
    found: tables.Encoded, source: str, clients: int | None, test: float, by: str | Partition | None, seed: int
) -> Sites:
    rng = np.random.default_rng(seed)  # noqa: TID251 - public data
    held, kept = held_out(found.y, len(found.labels), test, rng)
    names: tuple[str, ...] = ()
    if found.groups is not None:
        if clients not in (None, len(found.group_names)):
            raise UsageError(
                f"the column {by!r} has {len(found.group_names)} values, not {clients}", hint="leave out clients"
            )
        names, count = found.group_names, len(found.group_names)
        rule: Partition = ByGroup(found.groups[kept])
    else:
        count = 20 if clients is None else clients
        rule = by if callable(by) else Iid()
    if not 1 <= count <= MAX_SITES:
        raise UsageError(f"{count} clients", hint=f"1 to {MAX_SITES}")
    parts = rule(found.y[kept], count, rng)
    return Sites(
        [(found.X[kept[i]], found.y[kept[i]]) for i in parts], found.X[held], found.y[held], len(found.labels),
        found.features, found.labels, names, source,
    )  # fmt: skip


def _encoded(data: Any, target: str | None, group: str | None) -> tuple[tables.Encoded, str]:
    if isinstance(data, tuple) and len(data) == 2:
        found, source = tables.arrays(*data), "arrays"
    elif (columns := tables.columns_of(data)) is not None:
        found = tables.encode(columns, target, group)
        source = Path(data).name if isinstance(data, str | Path) else "table"
    elif hasattr(data, "__getitem__"):
        found, source = tables.dataset(data), type(data).__name__
    else:
        raise UsageError(
            f"a {type(data).__name__} is no table", hint="a file, a data frame, (X, y), or a map-style data set"
        )
    if group is not None and found.groups is None:
        raise UsageError(f"arrays have no column {group!r}", hint="a table, or by=Dirichlet(...), Shards, Quantity")
    tables.too_wide(found.X.shape[1])
    if len(found.labels) < 2:
        raise DataError("the target has one value only", hint="two classes or more")
    return found, source


def held_out(y: Index, classes: int, test: float, rng: Random) -> tuple[Index, Index]:
    """Positions that are held out and the others, so that every class of two records or more is in both."""
    held: list[Index] = []
    for c in range(classes):
        rows = rng.permutation(np.flatnonzero(y == c))
        held.append(rows[: max(0, min(len(rows) - 1, max(1, round(test * len(rows)))))])
    out = np.sort(np.concatenate(held))
    return out, np.setdiff1d(np.arange(len(y)), out, assume_unique=True)
