"""What this site remembers of the other sites' journals, so that none of them can be wound back unseen."""

from __future__ import annotations

from pathlib import Path

from fedveil.common import canonical
from fedveil.common.errors import FedveilError, HelperRefusal, JournalError
from fedveil.common.files import write_durably
from fedveil.common.units import SiteId
from fedveil.privacy.joining import Copy, heads_of

MAX_BYTES = 1 << 22


class PeerHeads:
    """The newest journal head of every peer that this site has seen signed; only ever moves forward.

    Args:
        path: where they are kept; None keeps them in memory (the simulator).

    Raises:
        JournalError: the file is not what this class wrote.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._heads: dict[SiteId, Copy] = {}
        if path is not None and path.exists():
            try:
                self._heads = heads_of(canonical.loads(path.read_bytes(), limit=MAX_BYTES))
            except FedveilError as e:
                raise JournalError(f"{path} is not a list of journal heads", hint="restore it, or ask the peers") from e

    def copies(self) -> dict[str, list[int | str]]:
        """The JSON form that goes into this site's signed join statement."""
        return {site: [*copy.head, copy.ledger] for site, copy in self._heads.items()}

    def keep(self, heads: dict[SiteId, Copy]) -> None:
        """Remember ``heads`` that are of another ledger or ahead of what is known; on disk when this returns."""
        ahead = {s: c for s, c in heads.items() if s not in self._heads or self._newer(s, c)}
        if not ahead:
            return
        self._heads |= ahead
        if self._path is not None:
            write_durably(self._path, canonical.dumps(self.copies()))

    def follow(self, heads: dict[SiteId, Copy]) -> None:
        """:meth:`keep`, for heads of journals that are being written: they must not lie behind what is known.

        Raises:
            HelperRefusal: naming the site whose journal went back in time, or stands still with another last row.
        """
        for site, copy in sorted(heads.items()):
            known = self._heads.get(site)
            if known is None or known.ledger != copy.ledger:
                continue
            same = copy.head.rows == known.head.rows
            if copy.head.rows < known.head.rows or (same and copy.head.hash != known.head.hash):
                raise HelperRefusal(
                    f"the journal of {site!r} went back in time: {copy.head.rows} rows, {known.head.rows} before",
                    hint="its disk was restored, or its journal rewritten; no sum that it is in is opened",
                )
        self.keep(heads)

    def _newer(self, site: SiteId, copy: Copy) -> bool:
        known = self._heads[site]
        return copy.ledger != known.ledger or copy.head.rows > known.head.rows
