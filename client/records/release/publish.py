"""A release by any method, with its signed lineage record. Also: what vouches for a work folder's reports.

:func:`~.pipeline.ingest` makes the features on which a federation trains. This makes a table to be published. After
both, all files in the work folder are about the same table: what an earlier table left is removed first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.client.records import lineage
from fedveil.client.records.judge import drift, stages
from fedveil.client.records.judge.quality_report import QualityReport
from fedveil.client.records.read import sources
from fedveil.client.records.read.sources import Dialect, Rules, Source
from fedveil.client.records.release import anonymize as release
from fedveil.client.records.release import pipeline
from fedveil.client.records.release.anonymize import Released
from fedveil.common import canonical, identity
from fedveil.common.contract import DataContract
from fedveil.common.errors import DataError, VerificationError, WireError
from fedveil.privacy.anonymization.anonymizer import Method


@dataclass(frozen=True)
class Published:
    """A written and verified release, and the quality report of the table behind it. All of this stays at the site."""

    release: Released
    report: QualityReport


def publish(
    source: Source,
    contract: DataContract,
    work: Path,
    method: Method,
    out: Path,
    *,
    secret: bytes,
    dialect: Dialect | None = None,
    rules: Rules | None = None,
    key: Ed25519PrivateKey | None = None,
) -> Published:
    """Assess ``source``, recode it by ``method``, write and verify ``out``, and sign the lineage record in ``work``.

    Args:
        out: a new .csv or .parquet file (mode 0600), or the release that the folder's lineage record names, which is
            then replaced. Afterwards it exists exactly when this returns.
        secret: as for :func:`~fedveil.client.records.release.pipeline.ingest`, and so are the other arguments.

    Raises:
        UsageError: ``out`` exists, has another ending or no folder to lie in, or ``source`` is a file that would be
            removed from ``work``: then nothing in the folder is touched. Too many quasi-identifiers for the method.
        DataError: the table does not meet the contract; the quality report is in ``work`` nevertheless.
        AnonymityError: the criteria cannot be met.
        ConfigError: the work folder is readable by others, or the secret is too short.
    """
    lineage.private_folder(work)
    if out.resolve() != pipeline.earlier_release(work):
        release.require_new(out)
    pipeline.cleared(work, source)
    rules = rules or Rules(secret=lineage.checked_secret(secret))
    raw, report = pipeline.assessed(source, contract, work, dialect=dialect, rules=rules)
    committed = sources.commitment(secret, source, contract)
    done = release.anonymise(raw, contract, method, out)
    rows = done.findings.rows
    own = out.resolve().parent == work.resolve()
    limit = {"limit": contract.suppression_limit}
    with pipeline.unless_signed(out):
        record = pipeline.record_of(
            source, contract, work, raw.tally.read, suppressed=raw.rows - rows,
            stages=[*report.stages, stages.Stage("suppression", raw.rows, rows, 0, limit)],
            released={"path": out.name if own else str(out.resolve()), "sha256": lineage.file_hash(out), "rows": rows},
            evidence=_evidence(contract, done, committed, lineage.commitment(secret, "released", out)),
        )  # fmt: skip
        signer = key or lineage.derived_key(secret)
        lineage.write_signed(work / pipeline.LINEAGE, work / pipeline.SIGNATURE, record, signer)
    return Published(done, report)


def _evidence(contract: DataContract, done: Released, source: str, released: str) -> dict[str, Any]:
    """As :func:`.pipeline.evidence_of`, for the local record. The egress gate passes only evidence of fixed levels."""
    return {
        "v": 1,
        "contract": contract.hash,
        "recoding": done.outcome.method,
        "criteria": pipeline.met_criteria(contract),
        "suppression": contract.suppression_limit > 0,
        "stability_factor": done.stability.factor,
        "unit": done.stability.unit,
        "commitments": {"source": source, "released": released},
    }


def reports(work: Path, public: str = "") -> tuple[dict[str, Any], str]:
    """The quality report in a work folder, and in one sentence what vouches for it.

    Args:
        public: the key that signed the lineage record, 64 hexadecimal digits; by default the folder's own.

    Raises:
        DataError: there is no report, or not one that this version writes.
        VerificationError: the lineage record is not signed by that key, or the report or the released file is
            not the one that it names.
    """
    path, record = work / pipeline.QUALITY_JSON, work / pipeline.LINEAGE
    try:
        with path.open("rb") as f:
            data = f.read(drift.MAX_BYTES + 1)
    except OSError as e:
        raise DataError(f"{work} holds no quality report", hint="run 'fedveil data check' first") from e
    if not record.exists():
        return _read(path, data), "no lineage record: the table of this report was not accepted"
    if not public and not (work / lineage.KEY_FILE).is_file():
        return _read(path, data), "the lineage record cannot be checked: this folder has no key of its own"
    whose = "the given" if public else "this folder's"
    public = public or identity.public_hex(lineage.derived_key(lineage.site_secret(work)))
    signed = lineage.read_signed(record, work / pipeline.SIGNATURE, public)
    drift.require_named(path, data, signed)
    missing = _missing_release(work, signed.get("released"))
    state = f"the report is unchanged; {missing}" if missing else "report and release are unchanged"
    return _read(path, data), f"the lineage record is signed by {whose} key; {state}"


def _missing_release(work: Path, named: Any) -> str:
    """What to say if the release is not where the record says; "" if it is there and unchanged."""
    if not isinstance(named, Mapping) or not isinstance(named.get("path"), str):
        raise VerificationError(f"the lineage record in {work} names no release", hint="check the table again")
    path = work / named["path"]
    if not path.is_file():
        return f"the release {path} is not there and was not compared"
    if lineage.file_hash(path) != named.get("sha256"):
        raise VerificationError(
            f"{path} is not the release that the signed lineage record names",
            hint="it was changed since: anonymise the table again",
        )
    return ""


def _read(path: Path, data: bytes) -> dict[str, Any]:
    """The report, after a check that it has every part that is shown."""
    try:
        report = canonical.loads(data, limit=drift.MAX_BYTES)
    except WireError:
        report = None
    tables = {"stages": ("stage",), "columns": ("column",), "problems": ("code", "column", "cells", "what", "remedy"),
              "drift": ("column",)}  # fmt: skip
    if not isinstance(report, dict) or not all(_is_table(report.get(n), keys) for n, keys in tables.items()):
        report = None
    elif not report["columns"] or not all(isinstance(n, str) for n in report.get("notes", [None])):
        report = None
    if report is None:
        raise DataError(f"{path} is not a quality report of this version", hint="run 'fedveil data check' again")
    return report


def _is_table(lines: Any, keys: tuple[str, ...]) -> bool:
    return isinstance(lines, list) and all(isinstance(line, dict) and set(keys) <= set(line) for line in lines)
