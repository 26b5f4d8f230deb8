"""t-closeness of a released file, computed from its bytes with plain dictionaries, not with the code that wrote it.

Li, Li, Venkatasubramanian, ICDE 2007, section 4: the earth mover's distance between the distribution of a sensitive
attribute in each class and in the whole table, for equal and for ordered ground distance.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fedveil.common.contract import DataContract
from fedveil.common.errors import AnonymityError

ROUNDING = 1e-12


def require_closeness(path: Path, contract: DataContract) -> dict[str, float]:
    """Refuse a released CSV file in which a class is farther than the contract's t from the table.

    Returns:
        By sensitive attribute, the largest distance of a class; empty where the contract asks for no t.

    Raises:
        AnonymityError: naming the attribute and in how many classes it fails.
    """
    if contract.t is None:
        return {}
    names = [c.name for c in contract.loaded]
    quasi = [names.index(c.name) for c in contract.quasi]
    with path.open(newline="", encoding="utf-8") as f:
        rows = list(csv.reader(f, strict=True))[1:]
    failed, worst = [], {}
    for c in contract.sensitive:
        at = names.index(c.name)
        whole = Counter(r[at] for r in rows if r[at])
        classes: dict[tuple[str, ...], Counter[str]] = {}
        for r in rows:
            classes.setdefault(tuple(r[i] for i in quasi), Counter())[r[at]] += 1
        for counts in classes.values():
            counts.pop("", None)
        distances = [distance(k, whole, c.labels, contract.t_distance) for k in classes.values()]
        worst[c.name] = max(distances)
        if far := sum(d > contract.t + ROUNDING for d in distances):
            failed.append(f"t = {contract.t:g} for {c.name!r} fails in {far} classes")
    if failed:
        raise AnonymityError(
            "the released table is not close enough: " + "; ".join(failed),
            hint="agree on coarser levels, or a larger t",
        )
    return worst


def distance(own: Counter[str], whole: Counter[str], labels: Sequence[str], ground: str) -> float:
    """Earth mover's distance in [0, 1] of two counts over ``labels``; 1 for a class without any value."""
    n, total = sum(own.values()), sum(whole.values())
    if not n:
        return 1.0
    gaps = [own[v] / n - whole[v] / total for v in labels]
    if ground == "equal":
        return sum(map(abs, gaps)) / 2
    moved = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    return sum(map(abs, moved)) / max(len(gaps) - 1, 1)
