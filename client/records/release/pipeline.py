"""From a site's table to features, in one fixed order: read, assess, reduce, recode, shuffle, write, verify, encode.

Something is fitted to the data only if the contract says so. The evidence then says that differential privacy is about
the released rows. If a stage fails, the rest does not run, and no released file exists.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedveil import __version__
from fedveil.client.records import lineage
from fedveil.client.records.judge import drift, page, quality, stages
from fedveil.client.records.judge.quality_report import QualityReport
from fedveil.client.records.read import intake, sources
from fedveil.client.records.read.sources import Dialect, RawTable, Rules, Source
from fedveil.client.records.release import encode, persons
from fedveil.client.records.release.closeness import require_closeness
from fedveil.common import canonical, identity
from fedveil.common.contract import DataContract
from fedveil.common.errors import AnonymityError, UsageError, WireError
from fedveil.common.files import replacing
from fedveil.privacy.anonymization import fixed, verify
from fedveil.privacy.anonymization.buckets import random_order

RELEASED, LINEAGE, SIGNATURE = "released.csv", drift.LINEAGE, drift.SIGNATURE
QUALITY_JSON, QUALITY_HTML = drift.QUALITY, "quality.html"


@dataclass(frozen=True)
class Ingested:
    """A site's training data and what may be said about it.

    Attributes:
        X: (n, contract.width) float32 in [-1, 1].
        y: (n,) int64 class indices. Rows are in a random order, the same as in the released file.
        evidence: the only part that may leave the site: no count, no plain hash of data.
        released: path of the verified released file, in the work folder.
        report: the quality report: local.
        left_out: how many rows are beyond the site's capacity, or a person's: not trained on. Local.
        persons: (n', m) the rows of X that belong to each person, -1 for none; None where a record is the unit.
    """

    X: NDArray[np.float32] = field(repr=False)
    y: NDArray[np.int64] = field(repr=False)
    evidence: dict[str, Any]
    released: Path
    report: QualityReport = field(repr=False)
    left_out: int = 0
    persons: NDArray[np.int64] | None = field(default=None, repr=False)


def ingest(
    source: Source,
    contract: DataContract,
    work: Path,
    *,
    secret: bytes,
    dialect: Dialect | None = None,
    rules: Rules | None = None,
    key: Ed25519PrivateKey | None = None,
    before: Mapping[str, Any] | None = None,
    capacity: int | None = None,
) -> Ingested:
    """Turn ``source`` into features, writing the released file and local reports into ``work``.

    ``work`` is made with mode 0700, its files with 0600. A released file exists there exactly when this returns. Then
    it was read back, and k, l and t were verified on its bytes.

    Args:
        secret: at least 32 random bytes that stay at the site: the key of the commitments and pseudonyms.
        dialect: how a CSV file is written.
        rules: the site's declared corrections, and whom to tell about progress.
        key: signs the lineage record; by default a key derived from ``secret``.
        before: an earlier table's report (:func:`.drift.earlier`), for the report to say what has moved.
        capacity: the most records (or persons) to train on: the first ones of the source, in its order. None: all.

    Raises:
        DataError: the table does not meet the contract; the quality report is in ``work`` nevertheless.
        AnonymityError: k, l or t fails; the hint names coarser levels that pass.
        ConfigError: the work folder is readable by others, or the secret is too short.
    """
    cleared(work, source)
    rules = rules or Rules(secret=lineage.checked_secret(secret))
    raw, report = assessed(source, contract, work, dialect=dialect, rules=rules, before=before)
    committed = sources.commitment(secret, source, contract)
    recoded = fixed.recode(raw.columns, raw.rows, contract)
    order = random_order(recoded.table.rows)
    table = recoded.table.take(order)
    if contract.rows_per_person is not None and raw.persons is not None:
        persons.require_k(recoded.table, raw.persons, contract)
    released = _write_verified(table, contract, work)
    with unless_signed(released):
        X, y = encode.encode(table, contract)
        evidence = evidence_of(contract, committed, lineage.commitment(secret, "released", released))
        limit = {"limit": contract.suppression_limit}
        record = record_of(
            source, contract, work, raw.tally.read, evidence=evidence, suppressed=recoded.suppressed,
            stages=[*report.stages, stages.Stage("suppression", raw.rows, table.rows, 0, limit)],
            released={"path": released.name, "sha256": lineage.file_hash(released), "rows": table.rows},
        )  # fmt: skip
        lineage.write_signed(work / LINEAGE, work / SIGNATURE, record, key or lineage.derived_key(secret))
    if contract.rows_per_person is not None and raw.persons is not None:
        grouped = persons.rows_of(raw.persons, order, contract.rows_per_person, capacity)
        return Ingested(X, y, evidence, released, report, len(y) - int((grouped >= 0).sum()), grouped)
    within = order < (table.rows if capacity is None else capacity)
    return Ingested(X[within], y[within], evidence, released, report, int((~within).sum()))


@contextmanager
def unless_signed(released: Path) -> Iterator[None]:
    """Remove a release if its lineage record cannot be written and signed: nobody would know where it is from."""
    try:
        yield
    except BaseException:
        released.unlink(missing_ok=True)
        raise


def cleared(work: Path, source: Source) -> None:
    """Make ``work`` private and remove what an earlier table left in it: files of two tables do not belong together.

    The release that its lineage record names is removed too, if it lies in the folder and is unchanged.

    Raises:
        ConfigError: others can read it.
        UsageError: ``source`` is one of the files that would go.
    """
    lineage.private_folder(work)
    earlier = earlier_release(work)
    if isinstance(source, Path) and source.resolve() in (earlier, (work / RELEASED).resolve()):
        raise UsageError(
            f"{source} is a release in the work folder, which is cleared before the next one",
            hint="copy it elsewhere, or name another folder: --work, or [site] state of site.toml",
        )
    if earlier is not None:
        earlier.unlink(missing_ok=True)
    for stale in (RELEASED, LINEAGE, SIGNATURE, QUALITY_JSON, QUALITY_HTML):
        (work / stale).unlink(missing_ok=True)


def earlier_release(work: Path) -> Path | None:
    """The file inside ``work`` that its lineage record names as the release; None if it is not there, or another."""
    try:
        with (work / LINEAGE).open("rb") as f:
            record = canonical.loads(f.read(drift.MAX_BYTES + 1), limit=drift.MAX_BYTES)
    except (OSError, WireError):
        return None
    named = record.get("released") if isinstance(record, dict) else None
    if not isinstance(named, Mapping) or not isinstance(named.get("path"), str) or "\0" in named["path"]:
        return None
    path = (work / named["path"]).resolve()
    if not path.is_relative_to(work.resolve()) or not path.is_file():
        return None
    return path if lineage.file_hash(path) == named.get("sha256") else None


def record_of(
    source: Source,
    contract: DataContract,
    work: Path,
    read: int,
    *,
    stages: Sequence[stages.Stage],
    suppressed: int,
    released: dict[str, Any],
    evidence: dict[str, Any],
) -> dict[str, Any]:
    """The lineage record: hashes of the input and the output, and every stage between them. It stays at the site."""
    return {
        "v": 2,
        "fedveil": __version__,
        "at": int(time.time()),
        "contract": contract.hash,
        "source": {"path": sources.described(source), "sha256": _source_hash(source), "rows": read},
        "quality": lineage.file_hash(work / QUALITY_JSON),
        "stages": [s.__dict__ for s in stages],
        "suppressed_rows": suppressed,
        "released": released,
        "evidence": evidence,
    }


def assessed(
    source: Source,
    contract: DataContract,
    work: Path,
    *,
    dialect: Dialect | None,
    rules: Rules,
    before: Mapping[str, Any] | None = None,
) -> tuple[RawTable, QualityReport]:
    """The table after all stages before recoding, and its quality report, which is written into ``work`` first.

    Raises:
        DataError: the problems that the report names, or a source that cannot be read at all.
        AnonymityError: the table has fewer than k rows.
    """
    opened = sources.open_source(source, contract, dialect)
    taken = intake.take_in(opened, contract, rules, sources.described(source))
    raw, done = stages.reduce(taken, contract, rules.corrections)
    report = quality.assess(taken, contract, done, stages.stability(contract))
    if before is not None:
        report = quality.against(report, before)
    lineage.write_private(work / QUALITY_JSON, canonical.dumps(page.to_json(report)))
    lineage.write_private(work / QUALITY_HTML, page.to_html(report).encode())
    report.require()
    if raw.rows < contract.k:
        raise AnonymityError(
            f"k = {contract.k} is more than the {raw.rows} rows of the table",
            hint="no combination of levels passes: a table of at least k rows is needed",
        )
    return raw, report


def _source_hash(source: Source) -> str | None:
    """Plain hash of a file, for the local record. A query has none."""
    path = source if isinstance(source, Path) else getattr(source, "path", None)
    return lineage.file_hash(path) if isinstance(path, Path) else None


def _write_verified(table: fixed.ReleasedTable, contract: DataContract, work: Path) -> Path:
    with replacing(work / RELEASED) as draft:
        identity.write_secret(draft, _csv_bytes(table, contract))
        verify.require(draft, contract)
        require_closeness(draft, contract)
    return work / RELEASED


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


def evidence_of(contract: DataContract, source: str, released: str) -> dict[str, Any]:
    """What may leave about a release. It depends on the contract and two commitments, on nothing else of the data.

    It is built only after the verification has passed, hence ``met``. A table that fails has no evidence.
    """
    steps = stages.stability(contract)
    factor = stages.total(steps)
    unit = contract.unit if factor == 1 else f"{contract.unit}; a group of {factor} of them" if factor else None
    return {
        "v": 1,
        "contract": contract.hash,
        "recoding": "fixed",
        "criteria": met_criteria(contract),
        "suppression": contract.suppression_limit > 0,
        "stability_factor": factor,
        "stability": [s.to_json() for s in steps],
        "unit": unit or "one row of the released table; not bounded for the original records",
        "commitments": {"source": source, "released": released},
    }


def met_criteria(contract: DataContract) -> dict[str, Any]:
    """What a contract requires, by criterion. For a release that was verified to meet all of it."""
    criteria: dict[str, Any] = {"k-anonymity": {"required": contract.k, "met": True}}
    if contract.l > 1:  # l = 1 requires nothing, so nothing is said about it
        criteria["distinct l-diversity"] = {"required": contract.l, "met": True}
    if contract.t is not None:
        criteria["t-closeness"] = {"required": contract.t, "met": True}
    return criteria
