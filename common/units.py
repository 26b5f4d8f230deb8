"""Numbers that carry a meaning, with the bounds inside which they have one.

The validators raise :class:`~fedveil.common.errors.ConfigError` and return the value, so that they can
stand where the value is first used.
"""

from __future__ import annotations

import math
import re
from typing import NewType

from fedveil.common.errors import ConfigError

Epsilon = NewType("Epsilon", float)
Delta = NewType("Delta", float)
SiteId = NewType("SiteId", str)
Round = NewType("Round", int)

MAX_SITES = 4096
_SITE_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")


def epsilon(value: float) -> Epsilon:
    """ε in (0, 1000]."""
    if not (math.isfinite(value) and 0 < value <= 1000):
        raise ConfigError(f"epsilon = {value!r} is not in (0, 1000]", hint="ordinary values are 0.5 to 10")
    return Epsilon(float(value))


def delta(value: float) -> Delta:
    """δ in (0, 0.01]."""
    if not (math.isfinite(value) and 0 < value <= 0.01):
        raise ConfigError(f"delta = {value!r} is not in (0, 0.01]", hint="choose it well below 1 / number of records")
    return Delta(float(value))


def site_id(value: str) -> SiteId:
    """A site's name: 1 to 64 characters out of a-z, 0-9 and '-', beginning and ending with a letter or digit."""
    if not _SITE_ID.fullmatch(value):
        raise ConfigError(
            f"site id {value[:80]!r} is not a valid name",
            hint="use 1 to 64 characters out of a-z, 0-9 and '-'",
        )
    return SiteId(value)
