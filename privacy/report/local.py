"""A site's local report: what stays there because no privacy budget covers it.

Rows, quality of columns, information lost and re-identification risk, beside the site's own ledger and what the
federation's report says of it. Written with mode 0600 into a folder of the site; nothing here is sent anywhere.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedveil.common import canonical
from fedveil.common.errors import UsageError, VerificationError, WireError
from fedveil.common.journal import GENESIS, Row
from fedveil.privacy.report import fields
from fedveil.privacy.report.bundle import read_bounded
from fedveil.privacy.report.catalogue import LANGUAGES, Speaker
from fedveil.privacy.report.charges import compose

LOCAL_JSON, LOCAL_PAGE, TEMPLATE = "local-report.json", "local-report.html", "local.html.j2"
QUALITY, LINEAGE, RELEASED = "quality.json", "lineage.json", "released.csv"
_LIMIT = 1 << 24


def collect(folder: Path, rows: list[Row], document: Any, contract: Any) -> dict[str, Any]:
    """The local report as JSON.

    Args:
        folder: the site's private work folder of ingestion.
        rows: the site's ledger, verified or at least parsed.
        document: the federation's signed report; None if there is none yet.
        contract: the signed data contract (for the quasi-identifiers of the risk figures); None if not at hand.

    Raises:
        VerificationError: a file is malformed, or the ledger breaks its own rules.
    """
    payload = {} if document is None else fields.mapping(document.get("payload"), "the report")
    charges = compose(rows, str(payload.get("session", "")))
    site = rows[0].owner
    sessions: dict[str, dict[str, Any]] = {}
    for name, epsilon in charges.spending:
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
        "quality": _json(folder / QUALITY),
        "lineage": lineage,
        "loss": _loss(lineage),
        "risk": _risk(folder / RELEASED, _quasi(contract)),
    }  # fmt: skip


def write(folder: Path, report: dict[str, Any]) -> list[Path]:
    """Write JSON and a page in every language into ``folder``, mode 0600; returns the paths.

    Raises:
        UsageError: the page's library is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined  # an auditor needs no jinja2
    except ModuleNotFoundError as e:
        raise UsageError(f"rendering needs {e.name}", hint="pip install 'fedveil[server]'") from e
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("fedveil.privacy.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    written = [_private(folder / LOCAL_JSON, canonical.dumps(report) + b"\n")]
    for lang in LANGUAGES:
        page = environment.from_string(source).render(r=report, t=Speaker(lang), columns=_columns)
        name = LOCAL_PAGE if lang == LANGUAGES[0] else LOCAL_PAGE.replace(".html", f".{lang}.html")
        written.append(_private(folder / name, page.encode()))
    return written


def _continues(payload: dict[str, Any], site: str, rows: list[Row]) -> bool | None:
    head = payload.get("hashes", {}).get("heads", {}).get(site)
    if head is None:
        return None
    count, digest = fields.head(head, "the report's head")
    return count <= len(rows) and digest == (rows[count - 1].hash if count else GENESIS)


def _loss(lineage: dict[str, Any] | None) -> dict[str, Any]:
    """Rows in and out; the part of them that suppression took."""
    if lineage is None:
        return {}
    rows = {k: lineage[k].get("rows") for k in ("source", "released") if isinstance(lineage.get(k), dict)}
    suppressed = lineage.get("suppressed_rows")
    before = suppressed + rows["released"] if _count(suppressed) and _count(rows.get("released")) else 0
    return {**rows, "suppressed": suppressed, "suppressed_share": suppressed / before if before else None}


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _quasi(contract: Any) -> list[str]:
    columns = ((contract or {}).get("payload") or {}).get("contract", {}).get("columns", [])
    return [str(c["name"]) for c in columns if isinstance(c, dict) and c.get("role") == "quasi" and "name" in c]


def _risk(released: Path, quasi: list[str]) -> dict[str, Any]:
    """From the sizes of the classes of equal quasi-identifiers: El Emam's prosecutor and marketer risk."""
    if not quasi or not released.is_file():
        return {}
    with released.open(encoding="utf-8", newline="") as f:
        table = csv.DictReader(f)
        if not set(quasi) <= set(table.fieldnames or ()):
            return {}
        classes = Counter(tuple(row[c] for c in quasi) for row in table)
    rows = sum(classes.values())
    if not rows:
        return {}
    alone = sum(n == 1 for n in classes.values())
    return {
        "rows": rows, "classes": len(classes), "smallest_class": min(classes.values()),
        "prosecutor": 1 / min(classes.values()), "marketer": len(classes) / rows, "alone": alone / rows,
    }  # fmt: skip


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return fields.mapping(canonical.loads(read_bounded(path, _LIMIT)), path.name)
    except WireError as e:
        raise VerificationError(f"{path.name}: {e.message}") from e


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """Every key of the rows, what they are about first."""
    names = sorted({name for row in rows for name in row})
    return sorted(names, key=lambda n: (n not in ("stage", "column"), n))


def _private(path: Path, data: bytes) -> Path:
    partial = path.with_name(f".{path.name}.part")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
        f.write(data)
    os.replace(partial, path)
    return path
