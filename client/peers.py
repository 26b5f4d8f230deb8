"""What this site remembers of the other sites' journals, so that nobody can set one back unnoticed."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from fedveil.common import canonical
from fedveil.common.errors import FedveilError, FreshLedger, HelperRefusal, JournalError
from fedveil.common.files import write_durably
from fedveil.common.identity import Roster
from fedveil.common.journal import Copy
from fedveil.common.units import SiteId
from fedveil.privacy.joining import MAX_LEDGERS, carried, genuine, heads_of, share

MAX_BYTES = 1 << 23


class PeerHeads:
    """The newest head of every peer's ledgers that this site has seen signed. It only moves forward.

    A peer has a ledger for each of its data sets. If a peer has more than :data:`MAX_LEDGERS`, the one that has not
    moved for the longest time is forgotten.

    Every copy carries its owner's signature. Those without one were written by an older version: this site goes on
    comparing with them, and passes them on to nobody.

    Args:
        path: where they are kept. None keeps them in memory (the simulator).
        roster: who takes part with this site. None: everybody who is remembered.

    Raises:
        JournalError: the file is not what this class wrote.
    """

    def __init__(self, path: Path | None = None, roster: Roster | None = None) -> None:
        self._path, self._roster = path, roster
        self._salt = secrets.token_bytes(16)
        self._heads: dict[SiteId, dict[str, Copy]] = {}  # by site and ledger; what moved last stands last
        if path is not None and path.exists():
            try:
                self._heads = heads_of(canonical.loads(path.read_bytes(), limit=MAX_BYTES))
            except FedveilError as e:
                raise JournalError(f"{path} is not a list of journal heads", hint="restore it from a backup") from e

    def copies(self) -> dict[SiteId, list[list[int | str]]]:
        """The JSON form that goes into this site's signed join statement, of at most its share of bytes.

        It says nothing about sites that are not on the roster, and nothing that the key there has not signed. If not
        everything fits, the newest ledgers come first. If not even one ledger of each peer fits, this site draws a
        subset of the peers. It draws anew when journals have moved, so in every run. Nobody else knows the draw, not
        even the server, which names the sessions. Hence, over all sites' statements, many cover each peer, as long as
        a statement has room for a fair part of the peers.
        """
        sites = list(self._heads) if self._roster is None else [m.site for m in self._roster.sites]
        signed = {
            s: by for s in sites if (by := {k: c for k, c in self._heads.get(s, {}).items() if self._passes(s, c)})
        }
        return carried(signed, sorted(signed, key=self._drawn), share(len(sites) + (self._roster is None)))

    def of(self, site: SiteId) -> list[Copy]:
        """What is known of the ledgers of ``site``; the one that moved last stands last."""
        return list(self._heads.get(site, {}).values())

    def keep(self, heads: dict[SiteId, Copy]) -> None:
        """Remember ``heads`` that are new or ahead of the known ones. They are on disk when this returns."""
        ahead = {s: c for s, c in heads.items() if self._is_news(s, c)}
        if not ahead:
            return
        for site, copy in ahead.items():
            by = self._heads.setdefault(site, {})
            by.pop(copy.ledger, None)
            by[copy.ledger] = copy
            if len(by) > MAX_LEDGERS:
                del by[next(iter(by))]
        self._salt = secrets.token_bytes(16)
        if self._path is not None:
            all_ = {site: [c.to_json() for c in by.values()] for site, by in self._heads.items()}
            write_durably(self._path, canonical.dumps(all_))

    def follow(self, heads: dict[SiteId, Copy]) -> None:
        """As :meth:`keep`, for heads of journals that are being written. They must not be behind the known heads.

        Raises:
            HelperRefusal: it names the site whose journal went back in time, or has as many rows but another last row.
            FreshLedger: it names the site whose journal is another one than that with which it joined.
        """
        for site, copy in sorted(heads.items()):
            known = self._heads.get(site, {}).get(copy.ledger)
            if known is None:
                if any(other.data_set == copy.data_set for other in self.of(site) if copy.data_set):
                    raise FreshLedger(
                        f"{site!r} contributes under another ledger of its data set than it joined with",
                        hint="no sum that it is in is opened",
                    )
                continue
            same, before = copy.head.rows == known.head.rows, known.head.rows
            if copy.head.rows < before or (same and copy.head.hash != known.head.hash):
                raise HelperRefusal(
                    f"the journal of {site!r} went back in time: it has {copy.head.rows} rows and had {before}",
                    hint="its disk was restored or its journal rewritten; no sum with its contribution is opened",
                )
        self.keep(heads)

    def _drawn(self, site: SiteId) -> bytes:
        return hashlib.sha256(self._salt + site.encode()).digest()

    def _passes(self, site: SiteId, copy: Copy) -> bool:
        return bool(copy.signature) if self._roster is None else genuine(site, copy, self._roster)

    def _is_news(self, site: SiteId, copy: Copy) -> bool:
        known = self._heads.get(site, {}).get(copy.ledger)
        if known is None or copy.head.rows > known.head.rows:
            return True
        return copy.head == known.head and bool(copy.signature) and not known.signature
