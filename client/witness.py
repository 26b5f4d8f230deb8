"""A site as a witness: what it tells of journals when it joins a run, and what it makes of what the others tell."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fedveil.client.peers import PeerHeads
from fedveil.common.errors import FreshLedger, JournalError
from fedveil.common.journal import Copy
from fedveil.common.units import SiteId
from fedveil.privacy.joining import MAX_IMPORTS, Told, at_caps, fresh, left_out, names_of, seen_of
from fedveil.privacy.ledger import CLOCK_S, Ledger
from fedveil.privacy.secagg.rollback import check_head

_LOG = logging.getLogger("fedveil.client")


def told(ledger: Ledger, data_set: str, peers: PeerHeads) -> dict[str, Any]:
    """The part of a join statement about journals: this site's own, what it counts of older ones, the peers'.

    Raises:
        JournalError: the ledger is dated more than a day ahead of this machine's clock. Times of rows do not fall:
            new ones would be dated outside of their run.
    """
    if ledger.journal.ahead > CLOCK_S:
        raise JournalError(
            f"the last row of {ledger.journal.path} is dated more than a day ahead of this machine's clock",
            hint="set the clock; if it was ahead when the row was written: a new ledger, and 'fedveil ledger import'",
        )
    own = ledger.journal.copy(data_set)
    return {
        "head": list(own.head), "ledger": own.ledger, "data_set": own.data_set, "head_signature": own.signature,
        "imports": [[name, rows] for name, rows in [*ledger.tally.covers.items()][-MAX_IMPORTS:]],
        "peers": peers.copies(),
    }  # fmt: skip


def check_own(site: SiteId, ledger: Ledger, statements: Mapping[SiteId, Told]) -> None:
    """Refuse to help where copies that this site has signed itself show that its ledger was set back or replaced.

    All sites' signed statements are there, so the server cannot keep a copy back. A peer without a copy has never met
    this site. One copy is enough, as nobody else can have made it.

    Raises:
        HelperRefusal: a peer has seen a later journal, or another one with the same first row.
        FreshLedger: another ledger of this data set was seen, whose spending is not counted here.
    """
    for other, name in at_caps(statements):
        _LOG.warning("%s has lost its ledger %s...: it counts that one as having spent its whole cap", other, name[:16])
    rows, seen = ledger.journal.rows, seen_of(statements, site)
    copies = {s: copy.head for s, copy in seen if copy.ledger == rows[0].hash}
    check_head(ledger.head, copies, need=0, hash_at=lambda n: rows[n - 1].hash)
    own = statements[site]._replace(imports=ledger.tally.covers)
    if (known := own.ignores(copy for _, copy in seen)) is not None:
        raise fresh(site, known)


def barred(own: SiteId, data_set: str, peers: PeerHeads, statements: Mapping[SiteId, Told]) -> list[SiteId]:
    """The other sites that joined with another ledger than they may, by the statements and by this site's memory."""
    return [s for s in left_out(statements, data_set, peers.of) if s != own]


def refuse_barred(members: Iterable[str], barred: Collection[SiteId]) -> None:
    """Raise :class:`FreshLedger` for a set with a site that joined with another ledger than it may."""
    for site in members:
        if site in barred:
            raise FreshLedger(
                f"{site!r} joined with a ledger that does not count what was spent on the run's data set before",
                hint="no sum that it is in is opened; it has to restore the other ledger, or to import it",
            )


def check_data_set(site: SiteId, head: Copy, data_set: str) -> None:
    """Raise :class:`FreshLedger` if ``site`` speaks of a ledger of another data set than this run's."""
    if head.data_set != data_set:
        raise FreshLedger(
            f"{site!r} takes part with the ledger of another data set than the contract's",
            hint="one ledger for each data set, named by the contract; no sum that it is in is opened",
        )


def note_agreed(ledger: Ledger, session: str, round_: int, members: Iterable[str], digest: str) -> None:
    """Write down which set this site is about to sign, once; on disk when this returns.

    Raises:
        VerificationError: another set of this round was written down before.
    """
    said = (names_of(members), digest)
    if ledger.tally.agreed.get((session, round_)) != said:
        ledger.note("agreed", session=session, round=round_, members=said[0], digest=said[1])
