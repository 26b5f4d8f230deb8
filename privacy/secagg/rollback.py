"""A helper restored from a backup must not help: it does not know what it signed after the backup was made."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedveil.common.errors import HelperRefusal
from fedveil.common.journal import Head
from fedveil.common.units import SiteId


def check_head(own: Head, copies: Mapping[SiteId, Head], *, need: int, hash_at: Callable[[int], str]) -> None:
    """Refuse to help if this site's journal is behind, or differs from, what its peers remember of it.

    Args:
        own: this site's journal head.
        copies: the newest head of this site's journal that each peer holds; the caller has verified that the peer
            signed it. They come through the server, which can hold copies back but not forge them.
        need: how many copies there must be; with more than c of them, one at least comes from an honest peer.
        hash_at: hash of this site's row ``rows - 1``, for ``rows`` in 1..own.rows.

    Raises:
        HelperRefusal: too few copies, a copy ahead of ``own``, or one from another branch.
    """
    if len(copies) < need:
        raise HelperRefusal(
            f"{len(copies)} peers sent their copy of this site's journal head; {need} are needed",
            hint="a helper that cannot compare may have been restored from a backup: start a new run",
        )
    for site, copy in sorted(copies.items()):
        if copy.rows > own.rows:
            raise HelperRefusal(
                f"the journal has {own.rows} rows here and {copy.rows} in the copy of {site!r}: it went back in time",
                hint="this site's disk was restored; it must not help in this run",
            )
        if copy.rows > 0 and copy.hash != (own.hash if copy.rows == own.rows else hash_at(copy.rows)):
            raise HelperRefusal(
                f"row {copy.rows - 1} of the journal is another one in the copy of {site!r}",
                hint="this site's journal was rewritten or restored; it must not help in this run",
            )
