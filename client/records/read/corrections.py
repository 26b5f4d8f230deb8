"""Corrections that a site declares before it reads its table, and that its records name afterwards.

Each works on one cell by itself. So it cannot spread one record's influence (factor 1 for differential privacy), as
long as nobody looked at the table to choose it.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from fedveil.common.contract import DataContract
from fedveil.common.errors import ConfigError

pc: Any = pyarrow.compute  # its functions are made at import time, where type checkers cannot see them

_FIELDS = frozenset({"column", "reason", "equals", "to", "scale", "offset", "above", "below"})
MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Correction:
    """One declared correction of one column.

    Either a text is replaced (``equals`` by ``to``), or a number is rescaled: ``x * scale + offset``, for the values
    strictly ``above`` and strictly ``below`` the given limits only.

    Attributes:
        reason: why, for the record.
    """

    column: str
    reason: str
    equals: str | None = None
    to: str = ""
    scale: float = 1.0
    offset: float = 0.0
    above: float = -math.inf
    below: float = math.inf

    def __post_init__(self) -> None:
        finite = all(math.isfinite(x) for x in (self.scale, self.offset))
        rescales = (self.scale, self.offset) != (1.0, 0.0)
        if not self.reason or not finite or self.scale == 0 or rescales == (self.equals is not None):
            raise ConfigError(
                f"the correction of {self.column!r} is not one replacement or one rescaling with a reason",
                hint="give a reason, and either equals and to, or scale and offset (with above and below)",
            )

    def on_text(self, text: pa.Array) -> tuple[pa.Array, int]:
        """The texts after a replacement, and how many it changed."""
        if self.equals is None:
            return text, 0
        hit = pc.equal(text, self.equals)
        return pc.if_else(hit, self.to, text), int(pc.sum(hit).as_py() or 0)

    def on_numbers(self, values: NDArray[np.float64]) -> int:
        """Rescale in place; returns how many values were changed."""
        if self.equals is not None:
            return 0
        hit = (values > self.above) & (values < self.below)  # both are false for NaN
        values[hit] = values[hit] * self.scale + self.offset
        return int(hit.sum())

    def to_json(self) -> dict[str, Any]:
        """For the lineage record: declared texts and limits, which are not read from the table."""
        limits = {k: v for k in ("above", "below") if math.isfinite(v := getattr(self, k))}
        change = {"scale": self.scale, "offset": self.offset} if self.equals is None else {"to": self.to}
        equals = {} if self.equals is None else {"equals": self.equals}
        return {"column": self.column, "reason": self.reason, **equals, **change, **limits}


def check(corrections: Sequence[Correction], contract: DataContract) -> None:
    """Refuse corrections of columns that the contract does not load, and rescalings of categories.

    Raises:
        ConfigError: naming the column.
    """
    known = {c.name: c for c in contract.loaded}
    for c in corrections:
        if c.column not in known:
            raise ConfigError(
                f"a correction names {c.column[:64]!r}, which the contract does not load", hint="correct its name"
            )
        if c.equals is None and known[c.column].type != "number":
            raise ConfigError(f"a correction rescales {c.column!r}, which is not a number", hint="use equals and to")


def load(path: Path) -> tuple[Correction, ...]:
    """Read ``[[correction]]`` tables from a TOML file.

    Raises:
        ConfigError: unreadable, malformed or with unknown fields.
    """
    try:
        data = path.read_bytes()[: MAX_FILE_BYTES + 1]
        tables = tomllib.loads(data.decode()).get("correction") if len(data) <= MAX_FILE_BYTES else None
    except (OSError, ValueError, RecursionError):
        tables = None
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise ConfigError(f"{path} holds no [[correction]] tables", hint="see docs/data.md")
    out = []
    for t in tables:
        numbers = all(isinstance(t.get(k, 0.0), (int, float)) for k in ("scale", "offset", "above", "below"))
        texts = all(isinstance(t.get(k, ""), str) for k in ("column", "reason", "equals", "to"))
        if set(t) - _FIELDS or not {"column", "reason"} <= set(t) or not numbers or not texts:
            raise ConfigError(f"a correction in {path} is malformed", hint=f"fields: {', '.join(sorted(_FIELDS))}")
        out.append(Correction(**t))
    return tuple(out)
