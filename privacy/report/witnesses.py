"""By how many other members each row of a site's ledger is held, from what these have signed.

A member's join statement carries copies of heads that their owner has signed; a copy that he has not signed is hearsay
and counts nothing. A member that signed a report has verified it, with the head of every ledger in it. Whoever holds a
head holds all rows up to it, since each names the one before.

A row counts as witnessed when more than t + d other members hold it: then an honest one who is not absent does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fedveil.common.journal import Copy, Row
from fedveil.privacy.plan import PrivacyPlan

Held = list[list[int]]
_MOST = 8  # ranges that are spelled out


def held(
    site: str, public: str, joined: Mapping[str, Any], seen: Iterable[tuple[str, Copy]], rows: int,
    signers: Collection[str] = (),
) -> Held:  # fmt: skip
    """``[[rows, peers], ...]``: so many peers hold the first so many rows; rows ascend, and so peers fall.

    Args:
        public: the site's key (hex).
        joined: the site's own join statement, which names its ledger.
        seen: who has seen which head of the site's journals.
        rows: of the ledger as it was handed over.
        signers: who signed a report that names its head.
    """
    most = {peer: rows for peer in signers if peer != site}
    for peer, copy in seen:
        mine = peer != site and copy.ledger == joined.get("ledger") and 0 < copy.head.rows <= rows
        if mine and copy.signed_by(site, public):
            most[peer] = max(most.get(peer, 0), copy.head.rows)
    return [[n, sum(m >= n for m in most.values())] for n in sorted(set(most.values()))]


def peers_at(found: Held, row: int) -> int:
    """How many peers hold all of the first ``row`` rows."""
    return max((peers for rows, peers in found if rows >= row), default=0)


def witnessed(found: Held, needed: int) -> int:
    """How many rows, from the first one on, so many peers hold."""
    return max((rows for rows, peers in found if peers >= needed), default=0)


def said(
    site: str, public: str, joined: Mapping[str, Any], seen: Iterable[tuple[str, Copy]], ledger: list[Row],
    plan: PrivacyPlan, signers: Collection[str],
) -> str:  # fmt: skip
    """A remark: the ranges of rows with the peers that hold them, and whether the last row counts as witnessed.

    Args:
        ledger: the site's rows. The others are as :func:`held` takes them.
    """
    rows, needed = len(ledger), plan.quorum
    found = held(site, public, joined, seen, rows, signers)
    peers, ranges, first = peers_at(found, rows), list[str](), 1
    for last, k in found if found and found[-1][0] == rows else [*found, [rows, 0]]:
        ranges.append(f"{first} to {last} by {k}")
        first = last + 1
    more = ["..."] if len(ranges) > _MOST else []
    state = "its head is witnessed" if peers >= needed else f"its head is seen by {peers} of the needed {needed} peers"
    return f"; rows are held: {', '.join(ranges[:_MOST] + more)}; {state}"
