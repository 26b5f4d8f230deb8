"""How far a table has moved from an earlier one: total variation per column, on the contract's own levels.

Two quality reports are compared, as they are shown: the bars of a column (on the finest bins that both reports draw)
and its missing and invalid cells. Counts under k are hidden in both, so no figure here says more than the two reports
do. If a column has no bars in one of the reports, it is not compared. The earlier report counts only if the signed
lineage record of its folder names its hash. Figures stay at the site, like the reports.

The distance is the total variation, half the sum of |p - q| over the shares, in [0, 1]. It is the share of rows that
would have to change. Two samples of n and m rows of one population have a distance too. On average it is at most half
the sum of sqrt(p(1-p)(1/n + 1/m)) (Jensen). One row moves it by at most 1/n or 1/m, so it exceeds that average by
sqrt(ln(1/α)/2 · (1/n + 1/m)) with probability at most α (McDiarmid 1989). A distance above the sum of both, with
shares estimated from the two tables together, is not explained by chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedveil.client.records import lineage
from fedveil.client.records.judge import hidden_counts
from fedveil.common import canonical, identity
from fedveil.common.errors import DataError, VerificationError, WireError

QUALITY, LINEAGE, SIGNATURE = "quality.json", "lineage.json", "lineage.sig"
MAX_BYTES = 1 << 26
MAX_COUNT = 1 << 53
ALPHA = 1e-3  # false alarms per column
MATTERS = 0.05  # a distance up to this is not reported, however certain it is


@dataclass(frozen=True)
class Drift:
    """One column against the earlier table.

    Attributes:
        distance: total variation in [0, 1]; None if it cannot be computed.
        chance: the distance that chance explains, see the module.
        why: why there is no distance; "" otherwise.
    """

    column: str
    distance: float | None = None
    chance: float | None = None
    why: str = ""

    @property
    def moved(self) -> bool:
        """Whether the column is further away than chance explains, by enough to matter."""
        return self.distance is not None and self.distance > max(self.chance or 0.0, MATTERS)

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        figures = {
            n: x if x is None else round(x, 4) for n, x in (("distance", self.distance), ("chance", self.chance))
        }
        return {"column": self.column, **figures, "moved": self.moved, "why": self.why}


def earlier(work: Path, public: str = "") -> dict[str, Any]:
    """The quality report in a work folder, once its signed lineage record vouches for it.

    Args:
        public: the key that signed the record, 64 hexadecimal digits; by default the folder's own. The folder's own
            key proves that nobody who cannot read the folder has changed the report. It does not prove where the
            report is from, because whoever made the folder made the key.

    Raises:
        DataError: no such report, not one that this version writes, or no key of the folder (none is made here).
        VerificationError: the record is not signed by that key, or the report is not the one that it names.
    """
    if not (work / QUALITY).is_file() or not (work / LINEAGE).is_file():
        raise DataError(
            f"{work} holds no accepted table's reports",
            hint="give the --work folder of an earlier 'fedveil data check'",
        )
    if not public and not (work / lineage.KEY_FILE).is_file():
        raise DataError(
            f"{work} holds no key to check its lineage record",
            hint="give --against-public, the public key that signed it",
        )
    if not public:
        public = identity.public_hex(lineage.derived_key(lineage.site_secret(work)))
    record = lineage.read_signed(work / LINEAGE, work / SIGNATURE, public)
    with (work / QUALITY).open("rb") as f:
        data = f.read(MAX_BYTES + 1)
    require_named(work / QUALITY, data, record)
    try:
        report = canonical.loads(data)
    except WireError:
        report = None
    if not isinstance(report, dict) or not _is_report(report):
        raise DataError(f"{work / QUALITY} is not a quality report", hint="check the earlier table again")
    return report


def require_named(path: Path, data: bytes, record: Mapping[str, Any]) -> None:
    """Refuse a quality report (the bytes of ``path``) that is not the one a signed lineage record names.

    Raises:
        VerificationError: it is another one, or too large.
    """
    if len(data) > MAX_BYTES or record.get("quality") != canonical.sha256_hex(data):
        raise VerificationError(
            f"{path} is not the report that the signed lineage record names",
            hint="it was changed since, or written by an older version: check the earlier table again",
        )


def _is_report(report: Mapping[str, Any]) -> bool:
    """Whether the compared parts have a report's form. A signature does not prove that."""
    bars, columns = report.get("bars"), report.get("columns")
    if not isinstance(bars, dict) or not isinstance(columns, list) or not all(isinstance(c, dict) for c in columns):
        return False
    names = [c.get("column") for c in columns]
    if not all(isinstance(n, str) for n in names) or len(set(names)) != len(names):
        return False
    by_name = {c["column"]: c for c in columns}
    for name, drawn in bars.items():
        if not isinstance(drawn, list) or len(drawn) > hidden_counts.MAX_BARS or not all(map(_is_bar, drawn)):
            return False
        if drawn and not all(_is_count(by_name.get(name, {}).get(part)) for part in ("missing", "invalid")):
            return False
    return True


def _is_bar(bar: object) -> bool:
    return isinstance(bar, list) and len(bar) == 2 and isinstance(bar[0], str) and _is_count(bar[1])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def compare(now: Mapping[str, Any], before: Mapping[str, Any], bins: Mapping[str, Sequence[str]]) -> tuple[Drift, ...]:
    """Every column of the report ``now`` against the report ``before``.

    Args:
        bins: by column, the labels of its finest bins, in order.
    """
    return tuple(_column(name, now, before, labels) for name, labels in bins.items())


def _column(name: str, now: Mapping[str, Any], before: Mapping[str, Any], labels: Sequence[str]) -> Drift:
    if name not in before["bars"]:
        return Drift(name, why="not in the earlier table")
    ours, theirs = now["bars"][name], before["bars"][name]
    if not ours or not theirs:
        return Drift(name, why="a count under k is hidden")
    widths = [_width(bars, labels) for bars in (ours, theirs)]
    if None in widths:
        return Drift(name, why="the earlier contract had other levels")
    step = math.lcm(*(w for w in widths if w is not None))
    a, b = (
        [*_joined(bars, step // (width or 1)), *_others(report, name)]
        for bars, width, report in ((ours, widths[0], now), (theirs, widths[1], before))
    )
    if not sum(a) or not sum(b):
        return Drift(name, why="no cells")
    return Drift(name, _distance(a, b), _chance(a, b))


def _width(bars: Sequence[Sequence[Any]], labels: Sequence[str]) -> int | None:
    """How many of the finest bins each bar holds; None where the bars are not of these bins."""
    drawn = [bar[0] for bar in bars]
    return next(
        (
            w
            for w in hidden_counts.WIDTHS
            if [hidden_counts.joined(labels[i : i + w]) for i in range(0, len(labels), w)] == drawn
        ),
        None,
    )


def _joined(bars: Sequence[Sequence[Any]], step: int) -> list[int]:
    rows = [int(n) for _, n in bars]
    return [sum(rows[i : i + step]) for i in range(0, len(rows), step)]


def _others(report: Mapping[str, Any], name: str) -> list[int]:
    """Missing and invalid cells. If there are bars, neither count is hidden."""
    column = next(c for c in report["columns"] if c["column"] == name)
    return [int(column["missing"]), int(column["invalid"])]


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    n, m = sum(a), sum(b)
    return sum(abs(x / n - y / m) for x, y in zip(a, b, strict=True)) / 2


def _chance(a: Sequence[int], b: Sequence[int]) -> float:
    n, m = sum(a), sum(b)
    spread = 1 / n + 1 / m
    shares = [(x + y) / (n + m) for x, y in zip(a, b, strict=True)]
    mean = sum(math.sqrt(p * (1 - p) * spread) for p in shares) / 2
    return mean + math.sqrt(math.log(1 / ALPHA) / 2 * spread)
