"""A checked table, anonymised by any method of :mod:`fedveil.privacy.anonymization` and verified on the written bytes.

For training the pipeline uses the contract's fixed levels. This is for publishing, and for sites whose contract encodes
sets. Mondrian, optimal and local recoding look at the data. Differential privacy then speaks of released rows only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from fedveil.client.records.read.intake import RawTable
from fedveil.client.records.release import persons
from fedveil.client.records.release.closeness import require_closeness
from fedveil.client.records.release.released_cells import require_cells
from fedveil.common.contract import Column, DataContract
from fedveil.common.errors import AnonymityError, DataError, UsageError
from fedveil.privacy.anonymization import codes, recheck
from fedveil.privacy.anonymization import verify as fixed_verify
from fedveil.privacy.anonymization.anonymizer import Anonymizer, Method, Outcome, contract_models
from fedveil.privacy.anonymization.attributes import Sensitive, TableSpec
from fedveil.privacy.anonymization.criteria import Criterion, KAnonymity, TCloseness
from fedveil.privacy.anonymization.recheck import Finding, Findings
from fedveil.privacy.anonymization.rows import TableRows
from fedveil.privacy.anonymization.stability import Stability, Step, stability
from fedveil.privacy.anonymization.stream import write_release


@dataclass(frozen=True)
class Released:
    """A written and verified release. All of this stays at the site."""

    path: Path
    outcome: Outcome
    stability: Stability
    findings: Findings


@dataclass(frozen=True)
class Risk:
    """Re-identification risk of a released table under the three usual attackers (El Emam, Dankar, 2008).

    Attributes:
        rows, classes: of the released table.
        prosecutor: highest probability of naming a person who is known to be in the table: 1 / smallest class; where
            persons have up to m rows, m times that at most.
        marketer: expected share of persons named right: classes / rows, with the same factor. The journalist's risk
            needs a register of the population and is at most the prosecutor's.
        unique: share of rows that are alone in their class.
    """

    rows: int
    classes: int
    prosecutor: float
    marketer: float
    unique: float


def specification(contract: DataContract) -> tuple[TableSpec, tuple[Criterion, ...]]:
    """The engine's specification and criteria of a contract. Diversity is counted over the contract's labels.

    The engine counts rows. Where k counts persons with up to m rows each, k·m rows are asked for: whoever they are of,
    they are of k persons at least. So the released file alone shows that k holds.
    """
    spec = TableSpec.from_contract(contract)
    rows = contract.k * (contract.rows_per_person or 1)
    models = tuple(KAnonymity(rows) if isinstance(m, KAnonymity) else m for m in contract_models(contract))
    if contract.t is not None and not any(isinstance(m, TCloseness) for m in models):
        t = [TCloseness(contract.t, c.name, distance=contract.t_distance) for c in contract.sensitive]
        models = (*models, *t)
    return replace(spec, sensitive=tuple(Sensitive(c.name, c.labels) for c in contract.sensitive)), models


def as_table(raw: RawTable, contract: DataContract) -> pa.Table:
    """The loaded columns for the engine: quasi-identifiers as they are, other coded columns as their labels.

    Raises:
        DataError: a category holds values that are not among its leaves.
    """
    return pa.table({c.name: _arrow(raw.columns[c.name], c) for c in contract.loaded})


def _arrow(values: Any, c: Column) -> pa.Array:
    if c.type == "number" and (c.role == "quasi" or not c.coded):
        return pa.array(values, pa.float64(), from_pandas=True)  # NaN is "no value"
    code = codes.encode(values, c)
    if unseen := int((code == codes.UNSEEN).sum()):
        raise DataError(
            f"column {c.name!r}: {unseen} values are not in the contract", hint="correct them at the source"
        )
    if c.role == "quasi":
        known = frozenset(c.values)
        return pa.array([None if v == "" else v if v in known else "other" for v in values], pa.string())
    labels = np.array([*c.labels, ""], dtype=object)[code]
    return pa.array([v or None for v in labels], pa.string())


def anonymise(raw: RawTable, contract: DataContract, method: Method, out: Path) -> Released:
    """Recode ``raw``, write ``out`` (.csv or .parquet, mode 0600), read it back and check every criterion on it.

    Of a person's rows the first m of the source are released, where the contract has ``rows_per_person``.

    Raises:
        UsageError: ``out`` exists or has another ending; too many quasi-identifiers for the method.
        AnonymityError: the criteria cannot be met, or the written file does not meet them. Then ``out`` does not exist.
    """
    require_new(out)
    if contract.rows_per_person is not None and raw.persons is not None:
        raw = raw.take(persons.first_rows(raw.persons, contract.rows_per_person))
    spec, models = specification(contract)
    engine = Anonymizer(spec, models, method=method, suppression_limit=contract.suppression_limit)
    done = write_release(engine, TableRows(as_table(raw, contract)), out, lambda draft: require_cells(draft, contract))
    return Released(out, done.outcome, _stability(contract, engine, done.outcome), done.findings)


def require_new(out: Path, endings: Sequence[str] = (".csv", ".parquet")) -> None:
    """Refuse a path that cannot become a release.

    Raises:
        UsageError: it exists, has another ending, or its folder does not exist.
    """
    if out.suffix not in endings or out.exists():
        raise UsageError(
            f"{out} cannot be the release: it exists, or ends differently",
            hint=f"name a new {' or '.join(endings)} file",
        )
    if not out.parent.is_dir():
        raise UsageError(
            f"{out} cannot be the release: its folder does not exist", hint="make the folder, or correct the path"
        )


def _stability(contract: DataContract, engine: Anonymizer, outcome: Outcome) -> Stability:
    """Stability of the whole pipeline: the engine's method, and what the contract does to duplicates and outliers."""
    q = contract.quality
    steps: list[Step] = ["row-wise"]
    if q.duplicates == "drop":
        steps.append("exact duplicates removed")
    if q.near_duplicates == "drop":
        steps.append("near duplicates removed")
    if q.fitted_outliers == "drop":
        steps.append("data-fitted")
    method = outcome.method if engine.method == "auto" else engine.method
    return stability(method, engine.models, suppression_limit=engine.suppression_limit, steps=steps)


def verify(path: Path, contract: DataContract) -> Findings:
    """Check every criterion of the contract on a released file, of fixed levels or of any other method.

    Raises:
        AnonymityError: a criterion fails, or the file is not a release under this contract: other columns, labels,
            values or numbers than it allows.
    """
    if path.suffix == ".csv" and (verdict := _fixed_levels(path, contract)) is not None:
        fixed_verify.require(path, contract)
        return _as_findings(verdict, contract, require_closeness(path, contract))
    spec, models = specification(contract)
    findings = recheck.require(path, spec, models)
    require_cells(path, contract)
    return findings


def _fixed_levels(path: Path, contract: DataContract) -> fixed_verify.Verdict | None:
    """What the file shows if it holds the contract's released columns and labels; None if it holds anything else."""
    try:
        return fixed_verify.verify(path, contract)
    except AnonymityError:
        return None


def _as_findings(verdict: fixed_verify.Verdict, contract: DataContract, distances: Mapping[str, float]) -> Findings:
    found = [Finding("k-anonymity", "", f"k = {contract.k}", True, 0, min(m.rows for m in verdict.classes.values()))]
    for i, c in enumerate(contract.sensitive if contract.l > 1 else ()):
        fewest = min(len(m.seen[i]) for m in verdict.classes.values())
        found.append(Finding("distinct l-diversity", c.name, f"l = {contract.l}", True, 0, fewest))
    t = f"t = {contract.t:g}, {contract.t_distance}" if contract.t is not None else ""
    found += [Finding("t-closeness", name, t, True, 0, farthest) for name, farthest in distances.items()]
    return Findings(verdict.rows, len(verdict.classes), tuple(found))


def risk(path: Path, contract: DataContract) -> Risk:
    """The risk of a released .csv or .parquet file, from the sizes of its classes.

    Raises:
        AnonymityError: the file cannot be read, lacks quasi-identifiers or has no rows.
    """
    names = [c.name for c in contract.quasi]
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path, columns=names)
        else:
            text = pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), include_columns=names)
            table = pacsv.read_csv(path, convert_options=text)
    except (OSError, KeyError, pa.ArrowException):
        table = None
    if table is None or table.num_rows == 0 or table.num_columns != len(names):
        raise AnonymityError(
            f"{path} is not a readable release with its quasi-identifiers",
            hint="give a .csv or .parquet file that 'fedveil data anonymize' wrote under this contract",
        )
    plain = [c.cast(pa.string()) for c in table.columns]
    groups = pa.table(plain, names=names).group_by(names).aggregate([([], "count_all")]) if names else None
    sizes: Sequence[int] = [table.num_rows] if groups is None else groups["count_all"].to_pylist()
    rows, most = sum(sizes), contract.rows_per_person or 1
    named = min(1.0, most / min(sizes)), min(1.0, most * len(sizes) / rows)
    return Risk(rows, len(sizes), *named, sizes.count(1) / rows)
