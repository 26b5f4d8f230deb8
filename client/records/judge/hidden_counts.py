"""What a report shows of its counts: those under k are hidden, and cannot be computed from what is shown.

Figures are computed from other figures and not from the counts. A count from 1 to k - 1 becomes "<k" first. Sums, rates
and row counts are then made from what is left, so they are the same whatever the hidden count is. If the whole is known
and the rest of it would be small, or would give a hidden part away, all parts read "hidden".

The guarantee is for one report of a table of at least 2k rows, with k at least 3 (:func:`least`): every hidden count
has at least two values that agree with all that is shown. It is not claimed that no inequality between figures narrows
them down. Nor are counts hidden from somebody who knows rows of the table or has two reports: full reports of two
tables that differ by one row show that row's bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Figure = int | str

HIDDEN = "hidden"
MAX_BARS = 40
WIDTHS = (1, 2, 5, 10)


def least(k: int) -> int:
    """The k under which reports hide counts: at least 3, because "<2" would say 1."""
    return max(k, 3)


def shown(count: int, k: int) -> Figure:
    """A count, or "<k" where it is from 1 to k - 1."""
    return f"<{k}" if 0 < count < k else count


def total(figures: Sequence[Figure]) -> Figure:
    """A sum of figures that are shown elsewhere. It is a bound if one of them is hidden there."""
    seen = sum(f for f in figures if isinstance(f, int))
    hidden = [f for f in figures if isinstance(f, str)]
    if not hidden:
        return seen
    return hidden[0] if len(hidden) == 1 and not seen else f">{seen}"


def split(parts: Sequence[int], whole: int, k: int) -> list[Figure]:
    """Parts of a known whole. The rest of the whole is not shown, but could be computed.

    All parts but the empty ones are hidden if the rest is from 1 to k - 1. The same if it would be smaller than k with
    the hidden parts as large as they can be.
    """
    figures = [shown(p, k) for p in parts]
    unknown = sum(isinstance(f, str) for f in figures)
    rest = whole - sum(f for f in figures if isinstance(f, int)) - unknown * (k - 1)
    if rest < k and (unknown or rest > 0):
        return [HIDDEN if p else 0 for p in parts]
    return figures


def chain(rows: int, drops: Sequence[tuple[int, bool]], k: int) -> list[tuple[Figure, Figure]]:
    """What the stages that can drop rows have found, and how many rows were left after each.

    Args:
        drops: for each stage in order, the rows found and whether they were dropped.
    """
    out: list[tuple[Figure, Figure]] = []
    left, unknown, lost = rows, 0, False
    for found, dropped in drops:
        low = left - unknown * (k - 1)
        figure = HIDDEN if lost else _found(found, low, k, exact=not unknown)
        if dropped and isinstance(figure, int):
            left -= figure
        elif dropped:
            unknown += 1
            lost = lost or figure == HIDDEN
        out.append((figure, HIDDEN if lost else f"<{left}" if unknown else shown(left, k)))
    return out


def _found(found: int, low: int, k: int, *, exact: bool) -> Figure:
    """Rows found among at least ``low``."""
    if low < 2 * k:
        return 0 if exact and not found else HIDDEN
    if found and low - found < k and (not exact or low > found):
        return HIDDEN
    return shown(found, k)


def bars(bins: Sequence[tuple[str, int]], others: Sequence[Figure], k: int) -> list[list[Any]]:
    """Labels and counts of a column, at the finest of a few widths at which every bin is empty or holds at least k.

    Args:
        others: the column's further figures. Together with the bins they add up to the rows. If one of them is hidden,
            or from 1 to k - 1, there are no bars at all.
    """
    if any(isinstance(n, str) or 0 < n < k for n in others):
        return []
    for width in WIDTHS:
        groups = [bins[i : i + width] for i in range(0, len(bins), width)]
        counts = [sum(n for _, n in g) for g in groups]
        if len(groups) <= MAX_BARS and all(n == 0 or n >= k for n in counts):
            labels = [joined([label for label, _ in g]) for g in groups]
            return [[label, n] for label, n in zip(labels, counts, strict=True)]
    return []


def joined(labels: Sequence[str]) -> str:
    """The label of neighbouring bins drawn as one."""
    return labels[0] if len(labels) == 1 else f"{labels[0]} ... {labels[-1]}"


def rate(bad: Figure, of: Figure, k: int) -> float | str:
    """The share that is not ``bad``. A bound if ``bad`` is under k; hidden if a figure is hidden in another way."""
    bad = shown(bad, k) if isinstance(bad, int) else bad
    if isinstance(of, str) or of < k:
        return HIDDEN
    if isinstance(bad, str):
        return f">{1 - k / of:.4f}" if bad == f"<{k}" else HIDDEN
    return round(1 - bad / of, 4)
