"""What this site remembers of the other sites' journals, so that nobody can set one back unnoticed."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from fedveil.common import canonical
from fedveil.common.errors import FedveilError, HelperRefusal, JournalError
from fedveil.common.files import write_durably
from fedveil.common.identity import Roster
from fedveil.common.journal import Head
from fedveil.common.units import SiteId
from fedveil.privacy.joining import MAX_LEDGERS, Copy, carried, heads_of, share

MAX_BYTES = 1 << 22


class PeerHeads:
    """The newest head of every peer's ledgers that this site has seen signed. It only moves forward.

    A peer has a ledger for each of its data sets. If a peer has more than :data:`MAX_LEDGERS`, the one that has not
    moved for the longest time is forgotten.

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
                raise JournalError(f"{path} is not a list of journal heads", hint="restore it, or ask the peers") from e

    def copies(self) -> dict[SiteId, list[list[int | str]]]:
        """The JSON form that goes into this site's signed join statement, of at most its share of bytes.

        It says nothing about sites that are not on the roster. If not everything fits, the newest ledgers come first.
        If not even one ledger of each peer fits, this site draws a subset of the peers. It draws anew when journals
        have moved, so in every run. Nobody else knows the draw, not even the server, which names the sessions. Hence,
        over all sites' statements, many cover each peer, as long as a statement has room for a fair part of the peers.
        """
        sites = list(self._heads) if self._roster is None else [m.site for m in self._roster.sites]
        known = sorted((s for s in sites if s in self._heads), key=self._drawn)
        return carried(self._heads, known, share(len(sites) + (self._roster is None)))

    def keep(self, heads: dict[SiteId, Copy]) -> None:
        """Remember ``heads`` that are new or ahead of the known ones. They are on disk when this returns."""
        ahead = {s: c for s, c in heads.items() if (known := self._known(s, c)) is None or c.head.rows > known.rows}
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
            all_ = {site: [[*c.head, c.ledger] for c in by.values()] for site, by in self._heads.items()}
            write_durably(self._path, canonical.dumps(all_))

    def follow(self, heads: dict[SiteId, Copy]) -> None:
        """As :meth:`keep`, for heads of journals that are being written. They must not be behind the known heads.

        Raises:
            HelperRefusal: it names the site whose journal went back in time, or has as many rows but another last row.
        """
        for site, copy in sorted(heads.items()):
            known = self._known(site, copy)
            if known is None:
                continue
            same = copy.head.rows == known.rows
            if copy.head.rows < known.rows or (same and copy.head.hash != known.hash):
                raise HelperRefusal(
                    f"the journal of {site!r} went back in time: {copy.head.rows} rows, {known.rows} before",
                    hint="its disk was restored, or its journal rewritten; no sum that it is in is opened",
                )
        self.keep(heads)

    def _drawn(self, site: SiteId) -> bytes:
        return hashlib.sha256(self._salt + site.encode()).digest()

    def _known(self, site: SiteId, copy: Copy) -> Head | None:
        """Where this ledger of ``site`` stood last; None if it was never seen."""
        known = self._heads.get(site, {}).get(copy.ledger)
        return known.head if known is not None else None
