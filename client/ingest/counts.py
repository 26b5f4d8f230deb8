"""What a report shows of its counts: those under k are hidden, and cannot be computed from what is shown.

A count between 1 and k - 1 is shown as "<k", a rate that would give it away as a bound, a sum with a hidden part as a
bound too. Two row counts are both shown only if they are equal or k apart. A column has bars only if none of its counts
is hidden, on the finest bins that are empty or hold at least k: so no hidden count is a difference of what is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAX_BARS = 40
WIDTHS = (1, 2, 5, 10)


def shown(count: int, k: int) -> int | str:
    """A count, or "<k" where it is from 1 to k - 1."""
    return f"<{k}" if 0 < count < k else count


def shown_sum(parts: Sequence[int], k: int) -> int | str:
    """A sum of counts that are shown elsewhere; a bound where one of them is hidden there."""
    if sum(parts) < k or not any(0 < p < k for p in parts):
        return shown(sum(parts), k)
    return f">{sum(p for p in parts if p >= k)}"


def shown_rows(counts: Sequence[int], k: int) -> dict[int, int | str]:
    """How row counts are shown, the first of them in full: two full ones are equal or at least k apart."""
    first = counts[0]
    out: dict[int, int | str] = {first: shown(first, k)}
    for order in (sorted({c for c in counts if c > first}), sorted({c for c in counts if c < first}, reverse=True)):
        last = first
        for c in order:
            if abs(c - last) >= k:
                out[c] = shown(c, k)
                last = c
            else:
                out[c] = f"<{last + k}" if c > last else f">{max(last - k, 0)}"
    return out


def bars(bins: Sequence[tuple[str, int]], others: Sequence[int], k: int) -> list[list[Any]]:
    """Labels and counts of a column: the finest of few widths at which every bin is empty or holds at least k.

    Args:
        others: the column's further counts; where one of them is from 1 to k - 1 there are no bars at all.
    """
    if any(0 < n < k for n in others):
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


def rate(bad: int, of: int, k: int) -> float | str:
    """The share that is not ``bad``; a bound where that share would give a small count away."""
    if of < k:
        return "hidden"
    return f">{1 - k / of:.4f}" if 0 < bad < k else round(1 - bad / of, 4)
