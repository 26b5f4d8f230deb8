"""A site's local report: what stays there because no privacy budget covers it.

Rows, quality of columns, information lost and re-identification risk, beside the site's own ledger and what the
federation's report says of it. Written with mode 0600 into a folder of the site; nothing here is sent anywhere.
"""

from __future__ import annotations

import csv
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedveil.common import canonical, fields, identity
from fedveil.common.contract import Column
from fedveil.common.errors import FedveilError, UsageError, VerificationError, WireError
from fedveil.common.files import replacing
from fedveil.common.journal import GENESIS, Row, verify_rows
from fedveil.privacy.report import signatures
from fedveil.privacy.report.bundle import CONTRACT, read_bounded
from fedveil.privacy.report.catalogue import LANGUAGES, Speaker
from fedveil.privacy.report.charges import compose

LOCAL_JSON, LOCAL_PAGE, TEMPLATE = "local-report.json", "local-report.html", "local.html.j2"
QUALITY, LINEAGE, RELEASED = "quality.json", "lineage.json", "released.csv"
_LIMIT, _REPORT_LIMIT = 1 << 24, 1 << 28
Classes = Counter[tuple[str, ...]]  # rows by the released labels of the quasi-identifiers


def collect(folder: Path, rows: list[Row], report: Path | None, quasi: Sequence[Column]) -> dict[str, Any]:
    """The local report as JSON.

    Args:
        folder: the site's private work folder of ingestion.
        rows: the site's ledger, verified or at least parsed.
        report: the federation's ``report.json``; None if there is none yet.
        quasi: the contract's quasi-identifiers, for the figures of loss and risk; empty where it is not at hand.

    Raises:
        VerificationError: a file is malformed, or the ledger breaks its own rules.
    """
    document = {} if report is None else fields.mapping(_json(report, _REPORT_LIMIT), "the report")
    payload = fields.mapping(document.get("payload", {}), "the report")
    charges = compose(rows, str(payload.get("session", "")))
    site = rows[0].owner
    classes = _classes(folder / RELEASED, [c.name for c in quasi])
    sessions: dict[str, dict[str, Any]] = {}
    for name, epsilon, _ in charges.spending:
        s = sessions.setdefault(name, {"session": name, "steps": 0})
        s["steps"], s["epsilon_after"] = s["steps"] + 1, epsilon
    lineage = _json(folder / LINEAGE)
    return {
        "v": 1,
        "site": site,
        "budget": {
            "lineage": charges.lineage, "cap": charges.cap, "delta": charges.delta, "spent": charges.epsilon_after,
            "left": charges.left, "order": charges.order,
        },
        "sessions": list(sessions.values()),
        "head": list(charges.head),
        "continues_report": _continues(payload, site, rows),
        "signed_report": None if report is None else _has_signed(report, rows[0], document),
        "quality": _json(folder / QUALITY),
        "lineage": lineage,
        "loss": _loss(lineage, classes, quasi),
        "risk": _risk(classes),
    }  # fmt: skip


def write(folder: Path, report: dict[str, Any]) -> list[Path]:
    """Write JSON and a page in every language into ``folder``, mode 0600; returns the paths.

    Raises:
        UsageError: the page's library is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined  # an auditor needs no jinja2
    except ModuleNotFoundError as e:
        raise UsageError(f"rendering needs {e.name}", hint="pip install 'fedveil[audit]'") from e
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("fedveil.privacy.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    written = [_private(folder / LOCAL_JSON, canonical.dumps(report) + b"\n")]
    for lang in LANGUAGES:
        page = environment.from_string(source).render(r=report, t=Speaker(lang), columns=_columns, origin=_origin)
        name = LOCAL_PAGE if lang == LANGUAGES[0] else LOCAL_PAGE.replace(".html", f".{lang}.html")
        written.append(_private(folder / name, page.encode()))
    return written


def _continues(payload: dict[str, Any], site: str, rows: list[Row]) -> bool | None:
    head = payload.get("hashes", {}).get("heads", {}).get(site)
    if head is None:
        return None
    count, digest = fields.head(head, "the report's head")
    return count <= len(rows) and digest == (rows[count - 1].hash if count else GENESIS)


def _has_signed(report: Path, first: Row, document: dict[str, Any]) -> bool:
    """Whether this exact report lies beside a signature under the key that signed the ledger's first row."""
    held = signatures.read(report.parent).get(first.owner)
    if not isinstance(held, dict):
        return False
    session, signer = str(document.get("payload", {}).get("session")), str(held.get("signer"))
    try:
        verify_rows([first], signer, owner=first.owner)
        signatures.require(first.owner, signer, session, canonical.digest(document), held)
    except FedveilError:
        return False
    return True


def _loss(lineage: dict[str, Any] | None, classes: Classes, quasi: Sequence[Column]) -> dict[str, Any]:
    """Rows in and out; the part of them that suppression took; what the recoding took of those that stayed."""
    if lineage is None:
        return {}
    rows = {k: lineage[k].get("rows") for k in ("source", "released") if isinstance(lineage.get(k), dict)}
    suppressed = lineage.get("suppressed_rows")
    before = suppressed + rows["released"] if _count(suppressed) and _count(rows.get("released")) else 0
    share = suppressed / before if before else None
    return {**rows, "suppressed": suppressed, "suppressed_share": share} | _penalty(classes, quasi, share or 0.0)


def _penalty(classes: Classes, quasi: Sequence[Column], suppressed: float) -> dict[str, Any]:
    """Normalised certainty penalty (Xu et al., KDD 2006), in the contract's domains: 0 for exact values, 1 for "any".

    A number's label counts the part of the public bounds that it spans. A category's label counts the part of the other
    leaves that it holds. "No value" counts 0, a suppressed row 1. The table's figure is the mean over all cells.

    Args:
        suppressed: the part of all rows that was suppressed.
    """
    rows = sum(classes.values())
    if not rows:
        return {}
    spans = [_spans(c) for c in quasi]
    columns = [sum(n * spans[i].get(labels[i], 0.0) for labels, n in classes.items()) / rows for i in range(len(quasi))]
    kept = sum(columns) / len(columns)
    by_column = {c.name: loss for c, loss in zip(quasi, columns, strict=True)}
    return {"ncp": (1 - suppressed) * kept + suppressed, "ncp_of_released_by_column": by_column}


def _spans(c: Column) -> dict[str, float]:
    """The penalty of every label of a quasi-identifier."""
    if c.type == "category":
        others = max(sum(map(len, c.groups)) - 1, 1)
        return {label: (len(group) - 1) / others for label, group in zip(c.labels, c.groups, strict=True)}
    if c.low is None or c.high is None:
        raise VerificationError(f"the quasi-identifier {c.name!r} has no public bounds")
    edges = itertools.pairwise((c.low, *c.cuts, c.high))
    return {label: (b - a) / (c.high - c.low) for label, (a, b) in zip(c.labels, edges, strict=True)}


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def quasi_identifiers(run: Path) -> list[Column]:
    """The quasi-identifiers of the contract in a run's folder; none where it has no contract.

    Raises:
        VerificationError, ContractError: it is malformed.
    """
    document = _json(run / CONTRACT)
    payload = fields.mapping((document or {}).get("payload", {}), CONTRACT)
    columns = fields.mapping(payload.get("contract", {}), CONTRACT).get("columns", [])
    if not isinstance(columns, list):
        raise VerificationError(f"{CONTRACT}: the columns are no list")
    return [Column.model_validate(c) for c in columns if isinstance(c, dict) and c.get("role") == "quasi"]


def _classes(released: Path, quasi: list[str]) -> Classes:
    """Rows of the released table by their quasi-identifiers' labels; empty without a table or quasi-identifiers."""
    if not quasi or not released.is_file():
        return Counter()
    with released.open(encoding="utf-8", newline="") as f:
        table = csv.DictReader(f)
        if not set(quasi) <= set(table.fieldnames or ()):
            return Counter()
        return Counter(tuple(row[c] for c in quasi) for row in table)


def _risk(classes: Classes) -> dict[str, Any]:
    """From the sizes of the classes of equal quasi-identifiers: El Emam's prosecutor and marketer risk."""
    rows = sum(classes.values())
    if not rows:
        return {}
    alone = sum(n == 1 for n in classes.values())
    return {
        "rows": rows, "classes": len(classes), "smallest_class": min(classes.values()),
        "prosecutor": 1 / min(classes.values()), "marketer": len(classes) / rows, "alone": alone / rows,
    }  # fmt: skip


def _json(path: Path, limit: int = _LIMIT) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return fields.mapping(canonical.loads(read_bounded(path, limit), limit=limit), path.name)
    except WireError as e:
        raise VerificationError(f"{path.name}: {e.message}") from e


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """Every key of the rows, what they are about first."""
    names = sorted({name for row in rows for name in row})
    return sorted(names, key=lambda n: (n not in ("stage", "column"), n))


def _origin(lineage: dict[str, Any]) -> dict[str, Any]:
    """What a page shows of the lineage record: when, by what, from which file to which."""
    at = lineage.get("at")
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at)) if type(at) is int and 0 <= at < 1 << 40 else None
    return {"at": when, **{k: lineage.get(k) for k in ("fedveil", "contract", "source", "released")}}


def _private(path: Path, data: bytes) -> Path:
    with replacing(path) as part:
        identity.write_secret(part, data)
    return path
