"""A site's table to features, one straight line: read, assess, recode, shuffle, write, verify, encode.

Nothing in here fits anything to the data. Whatever fails stops the line before a released file exists.
"""

from __future__ import annotations

import csv
import io
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedveil import __version__
from fedveil.client.ingest import encode, lineage, quality, sources
from fedveil.common import canonical
from fedveil.common.contract import DataContract
from fedveil.privacy.anonymization import fixed, verify

RELEASED, LINEAGE = "released.csv", "lineage.json"
QUALITY_JSON, QUALITY_HTML = "quality.json", "quality.html"


@dataclass(frozen=True)
class Ingested:
    """A site's training data and what may be said about it.

    Attributes:
        X: (n, contract.width) float32 in [-1, 1].
        y: (n,) int64 class indices. Rows are in a random order, the same as in the released file.
        evidence: the only part that may leave the site: no count, no plain hash of data.
        released: path of the verified released file, in the work folder.
        report: the quality report: local.
    """

    X: NDArray[np.float32] = field(repr=False)
    y: NDArray[np.int64] = field(repr=False)
    evidence: dict[str, Any]
    released: Path
    report: quality.QualityReport = field(repr=False)


def ingest(source: Path, contract: DataContract, work: Path, *, secret: bytes) -> Ingested:
    """Turn ``source`` (.csv or .parquet) into features, writing the released file and local reports into ``work``.

    ``work`` is made with mode 0700, its files with 0600. A released file exists there exactly when this returns: it
    was read back and k and l were verified on its bytes.

    Args:
        secret: at least 32 random bytes that stay at the site: the key of the commitments.

    Raises:
        DataError: the table does not meet the contract; the quality report is in ``work`` nevertheless.
        AnonymityError: k or l fails; the hint names coarser levels that pass.
        ConfigError: the work folder is readable by others, or the secret is too short.
    """
    lineage.private_folder(work)
    for stale in (RELEASED, LINEAGE, QUALITY_JSON, QUALITY_HTML):
        (work / stale).unlink(missing_ok=True)
    raw = sources.read(source, contract)
    committed = lineage.commitment(secret, "source", source)
    report = quality.assess(raw, contract)
    lineage.write_private(work / QUALITY_JSON, canonical.dumps(report.to_json()))
    lineage.write_private(work / QUALITY_HTML, report.to_html().encode())
    report.require()
    recoded = fixed.recode(raw.columns, raw.rows, contract)
    table = recoded.table.take(_shuffled(recoded.table.rows))
    released = _write_verified(table, contract, work)
    X, y = encode.encode(table, contract)
    evidence = _evidence(contract, committed, lineage.commitment(secret, "released", released))
    record = {
        "v": 1,
        "fedveil": __version__,
        "at": int(time.time()),
        "contract": contract.hash,
        "source": {"path": str(source), "sha256": lineage.file_hash(source), "rows": raw.rows},
        "suppressed_rows": recoded.suppressed,
        "released": {"path": released.name, "sha256": lineage.file_hash(released), "rows": table.rows},
        "evidence": evidence,
    }
    lineage.write_private(work / LINEAGE, canonical.dumps(record))
    return Ingested(X, y, evidence, released, report)


def _shuffled(rows: int) -> NDArray[np.int64]:
    """A permutation from the operating system's randomness: released rows must not be in the source's order.

    Sorting 64-bit random keys; two equal keys among 10^6 rows have probability below 3e-8, and would then keep the
    order of that one pair.
    """
    return np.argsort(np.frombuffer(os.urandom(8 * rows), np.uint64), kind="stable")


def _write_verified(table: fixed.ReleasedTable, contract: DataContract, work: Path) -> Path:
    draft, released = work / "released.draft", work / RELEASED
    try:
        lineage.write_private(draft, _csv_bytes(table, contract))
        verify.require(draft, contract)
        os.replace(draft, released)
    finally:
        draft.unlink(missing_ok=True)
    return released


def _csv_bytes(table: fixed.ReleasedTable, contract: DataContract) -> bytes:
    columns: list[list[str]] = []
    for c in contract.loaded:
        if c.coded:
            # Code -1 ("no value") indexes the last entry, "".
            columns.append(np.array([*c.labels, ""], dtype=object)[table.coded[c.name]].tolist())
        else:
            columns.append(["" if x != x else repr(x) for x in table.numbers[c.name].tolist()])
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([c.name for c in contract.loaded])
    writer.writerows(zip(*columns, strict=True))
    return out.getvalue().encode()


def _evidence(contract: DataContract, source: str, released: str) -> dict[str, Any]:
    """Built only after the verification passed, hence ``met``; a table that fails has no evidence."""
    factor = fixed.stability_factor(contract)
    unit = contract.unit if factor == 1 else f"{contract.unit}; a group of {factor} of them" if factor else None
    return {
        "v": 1,
        "contract": contract.hash,
        "recoding": "fixed",
        "criteria": {
            "k-anonymity": {"required": contract.k, "met": True},
            "distinct l-diversity": {"required": contract.l, "met": True},
        },
        "suppression": contract.suppression_limit > 0,
        "stability_factor": factor,
        "unit": unit or "one row of the released table; not bounded for the original records",
        "commitments": {"source": source, "released": released},
    }
