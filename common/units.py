"""Types of values that must not be mixed up, and the names that a site may have."""

from __future__ import annotations

import re
from typing import NewType

from fedveil.common.errors import ConfigError

Epsilon = NewType("Epsilon", float)
Delta = NewType("Delta", float)
SiteId = NewType("SiteId", str)

MAX_SITES = 10_000
MAX_DAYS = 3650  # the longest time for which a certificate is valid
_SITE_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")


def site_id(value: str) -> SiteId:
    """A site's name: 1 to 64 characters out of a-z, 0-9 and '-', beginning and ending with a letter or digit.

    Raises:
        ConfigError: anything else.
    """
    if not _SITE_ID.fullmatch(value):
        raise ConfigError(
            f"site id {value[:80]!r} is not a valid name",
            hint="use 1 to 64 characters out of a-z, 0-9 and '-'",
        )
    return SiteId(value)
