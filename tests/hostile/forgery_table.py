"""`make forgeries`: who can forge what of a report, and which check finds it; writes docs/forgeries.md.

`python tests/hostile/forgery_table.py [output file]`, half a minute. The suite makes every forgery too
(`tests/hostile/test_forgeries.py`) and compares the file.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one, however it was started

import forgeries_server  # isort: skip
import forgeries_journal  # isort: skip
import forgeries_sites  # isort: skip
from forged_run import LIAR, NAMES, Base, Forger, make
from forgery import ALONE, BOTH, FORGERIES, HOLDS, SITE, Forgery

from fedveil.privacy.report.verify import Verification, verify_report

OUTPUT = Path(__file__).parents[2] / "docs" / "forgeries.md"
MADE_BY = (forgeries_server, forgeries_journal, forgeries_sites)  # importing them fills the list
HEAD = """# Forgeries of a report

Who can forge what, and which check of `fedveil audit verify` finds it. `make forgeries` prints this table: it makes a
small run of four sites (t = d = 1, `keysum`), carries every forgery out on a copy of its folder with no keys but those
of the forger, and verifies. Everything that these keys can sign is signed anew; hashes, chains and roots are computed
anew. The auditor has the consortium's key from elsewhere, unless a row says otherwise. The checks are described in
[privacy-report.md](privacy-report.md#what-is-checked).

**No forged report that passes states a smaller ε than the true one for an honest site.** The test of this table checks
that for every row (`tests/hostile/test_forgeries.py`). What stays out of reach has its reason beside it, and
the number of honest sites that sign such a report once they have verified it and compared it with their own ledgers.
"""


@dataclass(frozen=True)
class Judged:
    """What became of a forgery.

    Attributes:
        found: the first check that failed, by name; empty where none did.
        payload: the forged report's text.
        signed: how many of the honest sites sign it, once they have verified it and compared their own ledgers.
    """

    forgery: Forgery
    found: str
    detail: str
    payload: dict[str, Any]
    verification: Verification
    signed: str


def judge(base: Base, forgery: Forgery, folder: Path) -> Judged:
    """Carry a forgery out in the new ``folder`` and verify what lies there then."""
    forger = Forger(base, folder, HOLDS[forgery.who])
    forgery.change(forger)
    options: dict[str, Any] = {"auditor": base.fingerprint} if forgery.auditor else {}
    result = verify_report(
        forger.report, consortium_key=base.pin if forgery.pinned else None, require_signatures=forgery.signatures,
        **options,
    )  # fmt: skip
    bad = result.failed
    payload = forger.json("report.json")["payload"]
    honest = len(NAMES) - (LIAR in forger.holds)
    signed = f"{0 if bad else len(forger.signed_by())} of {honest}"
    return Judged(forgery, bad.name if bad else "", bad.detail if bad else "", payload, result, signed)


def table(judged: list[Judged]) -> str:
    """The document."""
    lines = [HEAD]
    for who, title in ((ALONE, "The server alone"), (SITE, "One site alone"), (BOTH, "The server and one site")):
        rows = [j for j in judged if j.forgery.who == who]
        caught = sum(bool(j.found) for j in rows)
        lines += [f"## {title}", "", f"{len(rows)} forgeries: {caught} found, {len(rows) - caught} out of reach.", ""]
        lines += ["| what | found by |", "|---|---|"]
        lines += [f"| {j.forgery.what} | {j.found} |" for j in rows if j.found]
        lines += ["", "| what is not found | because | honest sites that sign it |", "|---|---|---|"]
        lines += [f"| {j.forgery.what} | {j.forgery.why} | {j.signed} |" for j in rows if not j.found]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Write and print the table."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    with tempfile.TemporaryDirectory() as home:
        base = make(Path(home) / "base")
        judged = [judge(base, forgery, Path(home) / f"forged-{n}") for n, forgery in enumerate(FORGERIES)]
    text = table(judged)
    out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    if wrong := [j.forgery.what for j in judged if j.found != j.forgery.check]:
        raise SystemExit("found by another check than is expected: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
