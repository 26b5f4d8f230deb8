"""Generalisation hierarchies, read from CSV files (also in ARX's ``;`` form), and the rules that make one valid.

A category's hierarchy is a table with one line per leaf: the leaf, its label one level up, two levels up, and so on. A
number's hierarchy is a ladder of cut points, finest first. Both are trees, so every coarsening merges whole classes.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from fedveil.common.contract.base import MAX_DEPTH, MAX_LEAVES, OTHER, refuse, repeated
from fedveil.common.errors import ContractError

Rows = tuple[tuple[str, ...], ...]
Ladder = tuple[tuple[float, ...], ...]
MAX_FILE_BYTES = 1 << 22
ANYTHING = "*"


def read_rows(path: Path) -> Rows:
    """The lines of a hierarchy file: UTF-8 (with or without BOM), separated by ``;``, ``,`` or tabs, no header.

    Raises:
        ContractError: not readable, too large, empty, or its lines have unequal depth.
    """
    try:
        with path.open("rb") as f:
            data = f.read(MAX_FILE_BYTES + 1)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        data, text = b"", None
    if text is None or len(data) > MAX_FILE_BYTES:
        raise ContractError(f"the hierarchy {path} cannot be read", hint="a UTF-8 file of at most 4 MiB")
    first = text.partition("\n")[0]
    separator = max(";,\t", key=first.count)
    try:
        rows = [[c.strip() for c in r] for r in csv.reader(text.splitlines(), delimiter=separator, strict=True) if r]
    except csv.Error as e:
        raise ContractError(
            f"the hierarchy {path} is not well-formed CSV", hint="one line per leaf; close every double quote"
        ) from e
    if not rows or len(rows) > MAX_LEAVES:
        raise ContractError(
            f"the hierarchy {path} has {len(rows)} lines", hint=f"write 1 to {MAX_LEAVES} lines, one for each leaf"
        )
    _equal_depth([tuple(r) for r in rows], path.name)
    return tuple(tuple(r) for r in rows)


def mask_rows(leaves: Sequence[str]) -> Rows:
    """A hierarchy: every level masks one more character from the right (``941**``, ``94***``, ``9****``, ``*****``).

    The leaf "other" is not masked before the last level.
    """
    masked = [v for v in leaves if v != OTHER]
    width = max(map(len, masked), default=1)
    kept = max((len(v.rstrip("*")) for v in masked), default=1)

    def label(leaf: str, level: int) -> str:
        if leaf == OTHER and level < kept:
            return OTHER
        return leaf if level == 0 else leaf[: kept - level] + "*" * (width - kept + level)

    return tuple(tuple(label(leaf, level) for level in range(kept + 1)) for leaf in leaves)


def check_rows(rows: Rows, values: Sequence[str], name: str) -> None:
    """Refuse a table that is not a tree over exactly the leaves ``values``.

    Raises:
        ContractError: unequal depth; a leaf twice (two parents); a value not covered; a leaf that is no value; a label
            with two parents, or that names different groups of leaves on different levels.
    """
    _equal_depth(rows, name)
    leaves = [r[0] for r in rows]
    twice = repeated(leaves)
    refuse(twice, f"leaves of the hierarchy of {name!r} have two parents", "give every leaf one line")
    refuse(
        [v for v in values if v not in set(leaves)],
        f"the hierarchy of {name!r} has no line for these leaves",
        "add a line for each",
    )
    unknown = [v for v in leaves if v not in set(values)]
    refuse(unknown, f"the hierarchy of {name!r} holds leaves that are not values", "add them to values")
    for level in range(1, len(rows[0]) - 1):
        parents: dict[str, str] = {}
        for r in rows:
            if parents.setdefault(r[level], r[level + 1]) != r[level + 1]:
                refuse([r[level]], f"level {level} of the hierarchy of {name!r}: a label has two parents", "merge them")
    _one_meaning(rows, name)


def _one_meaning(rows: Rows, name: str) -> None:
    """A label must name the same set of leaves on every level, because a released cell does not say its level."""
    meaning: dict[str, frozenset[str]] = {}
    for level in range(len(rows[0])):
        groups: dict[str, set[str]] = {}
        for r in rows:
            groups.setdefault(r[level], set()).add(r[0])
        for label, leaves in groups.items():
            if meaning.setdefault(label, frozenset(leaves)) != leaves:
                hint = (
                    "rename one: a group may not be called as one of several leaves in it ('other' with 'rare' in it)"
                )
                refuse([label], f"the hierarchy of {name!r} uses one label for two different groups", hint)
    if len(meaning.get(ANYTHING, rows)) != len(rows):
        refuse(
            [ANYTHING],
            f"a label of the hierarchy of {name!r} means any value",
            "rename it, or use it only at the top level",
        )


def check_ladder(ladder: Ladder, low: float, high: float, name: str) -> None:
    """Refuse cut points that are not a tree of intervals between the bounds.

    Raises:
        ContractError: too deep, a boundary twice or out of order, a cut at or beyond a bound (a gap), or a coarser
            level with a boundary that the finer one lacks (a bin with two parents).
    """
    if not 1 <= len(ladder) <= MAX_DEPTH:
        raise ContractError(f"the hierarchy of {name!r} has {len(ladder)} levels", hint=f"declare 1 to {MAX_DEPTH}")
    for cuts in ladder:
        if any(a >= b for a, b in itertools.pairwise(cuts)):
            raise ContractError(
                f"the cut points of {name!r} do not increase", hint="write each once, the smallest first"
            )
        if any(not low < cut < high for cut in cuts):
            raise ContractError(
                f"a cut point of {name!r} is not between its bounds", hint="cut points lie above low and below high"
            )
    for level, (fine, coarse) in enumerate(itertools.pairwise(ladder), 2):
        if not set(coarse) <= set(fine):
            raise ContractError(
                f"level {level} of the hierarchy of {name!r}: a bin has two parents",
                hint="in a coarser level, use only cut points of the level before",
            )


def ladder_from_rows(rows: Rows, low: float, high: float, name: str) -> Ladder:
    """Cut points of a hierarchy file over whole numbers, as ARX writes them for ages.

    Values outside the bounds are left out; every whole number between the bounds must have a line.

    Raises:
        ContractError: a leaf that is no whole number, a gap, a leaf twice, or a label that is not one interval.
    """
    try:
        table = {int(r[0]): r for r in rows}
    except ValueError:
        table = None
    if table is None or len(table) != len(rows):
        raise ContractError(
            f"the hierarchy of the number {name!r} needs one line per whole number, each once",
            hint="start every line with a whole number; for others declare a ladder of cut points",
        )
    wanted = range(math.ceil(low), math.floor(high) + 1)
    absent = sum(v not in table for v in wanted)
    if absent:
        raise ContractError(
            f"the hierarchy of {name!r} has a gap: {absent} whole numbers between the bounds lack a line",
            hint="add a line for each, or declare narrower public bounds",
        )
    ladder = []
    for level in range(1, len(rows[0])):
        cuts, closed = [], set[str]()
        for a, b in itertools.pairwise(wanted):
            if table[a][level] != table[b][level]:
                cuts.append(float(b))
                closed.add(table[a][level])
                if table[b][level] in closed:
                    raise ContractError(
                        f"level {level} of the hierarchy of {name!r}: a label covers two intervals",
                        hint="give each interval a label of its own",
                    )
        ladder.append(tuple(c for c in cuts if low < c < high))
    return tuple(ladder)


def _equal_depth(rows: Sequence[tuple[str, ...]], name: str) -> None:
    depth = len(rows[0])
    uneven = sum(len(r) != depth for r in rows)
    if uneven:
        raise ContractError(
            f"the hierarchy {name!r} has unequal depth: {uneven} lines do not have {depth} levels",
            hint="repeat a label where a branch is shorter",
        )
    if not 2 <= depth <= MAX_DEPTH:
        raise ContractError(
            f"the hierarchy {name!r} has {depth} levels", hint=f"write 2 to {MAX_DEPTH} columns, leaves included"
        )
    if any(not cell for r in rows for cell in r):
        raise ContractError(f"the hierarchy {name!r} has an empty label", hint="write a label in every cell")
