"""The quality report as JSON and as one self-contained page, with counts under k hidden.

How counts are hidden: :mod:`.hidden_counts` and :mod:`.figures`. The page needs no network and follows
the reader's light or dark setting.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from fedveil.client.records.judge import figures, hidden_counts
from fedveil.client.records.judge.hidden_counts import HIDDEN, bars, rate, shown
from fedveil.client.records.judge.quality_report import QualityReport

_STYLE = (
    ":root{color-scheme:light dark;--fg:#1c2430;--bg:#fff;--line:#d5dbe3;--bar:#3b6ea8;--soft:#667}"
    "@media(prefers-color-scheme:dark){:root{--fg:#e4e8ee;--bg:#15191f;--line:#39424e;--bar:#7fb0e8;--soft:#9aa4b0}}"
    "body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:var(--fg);"
    "background:var(--bg)}table{border-collapse:collapse;width:100%;margin:1rem 0}th,td{border-bottom:1px solid "
    "var(--line);padding:.3rem .6rem;text-align:left;vertical-align:top}figure{display:inline-block;margin:.5rem 1rem "
    ".5rem 0}figcaption{color:var(--soft)}svg rect{fill:var(--bar)}svg text{fill:var(--fg);font-size:11px}"
)


def to_json(report: QualityReport) -> dict[str, Any]:
    """For the site's own records; small counts hidden."""
    k = hidden_counts.least(report.k)
    columns = [figures.of_column(c, report.rows, k) for c in report.columns]
    by_name = {c.name: f for c, f in zip(report.columns, columns, strict=True)}
    return {
        "rows": shown(report.rows, k),
        "k": k,
        "stages": figures.stages(report, columns, k),
        "columns": [
            {
                "column": c.name,
                "missing": f.missing,
                "invalid": f.invalid,
                "other": f.other,
                "completeness": rate(f.missing, report.rows, k),
                "validity": rate(f.invalid, report.rows - f.missing if isinstance(f.missing, int) else HIDDEN, k),
                "consistency": figures.consistency(report, c, k),
                "constant": c.constant,
            }
            for c, f in zip(report.columns, columns, strict=True)
        ],
        "uniqueness": rate(figures.duplicates(report, k), report.rows, k),
        "bars": {c.name: bars(c.bins, (f.missing, f.invalid), k) for c, f in zip(report.columns, columns, strict=True)},
        "problems": [
            {"code": p.code, "column": p.column, "what": p.what, "cells": cells, "remedy": p.remedy}
            for p, cells in ((p, figures.of_problem(p, by_name, k)) for p in report.problems)
        ],
        "notes": list(report.notes),
        "drift": [d.to_json() for d in report.moves],
        "stability": [s.to_json() for s in report.stability],
        "checklist": [
            {"letter": e.letter, "what": e.what, "looked": e.looked, "columns": list(e.columns)}
            for e in report.checklist
        ],
        "usable": not report.problems,
    }


def to_html(quality: QualityReport) -> str:
    """One self-contained page of :func:`to_json`."""
    report = to_json(quality)
    verdict = "meets" if report["usable"] else "does not meet"
    stages = [
        (s["stage"], s.get("rows", ""), s.get("left", ""), s.get("found", s.get("cells", ""))) for s in report["stages"]
    ]
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Data quality</title><style>{_STYLE}</style>',
        f"<h1>Data quality</h1><p>The table {verdict} its contract's types, bounds and values. This report is "
        f"local. Counts under {report['k']} are hidden; a column with such a count has no bars.</p>",
    ]
    if report["problems"]:
        rows = [(p["code"], p["column"], p["what"], p["cells"], p["remedy"]) for p in report["problems"]]
        parts.append("<h2>Problems</h2>" + _table(("code", "column", "cells that", "count", "what to do"), rows))
    if report["notes"]:
        parts.append("<h2>Notes</h2><ul>" + "".join(f"<li>{html.escape(n)}</li>" for n in report["notes"]) + "</ul>")
    parts.append("<h2>Stages</h2>" + _table(("stage", "rows", "left", "found"), stages))
    columns = [tuple(c.values()) for c in report["columns"]]
    parts.append("<h2>Columns</h2>" + _table(tuple(report["columns"][0]), columns))
    parts.append(_bars("completeness", [(c["column"], _height(c["completeness"])) for c in report["columns"]], "share"))
    parts += [_bars(name, drawn, "rows") for name, drawn in report["bars"].items() if drawn]
    if report["drift"]:
        moves = [tuple("-" if v is None else v for v in d.values()) for d in report["drift"]]
        head = ("column", "distance to the earlier table", "explained by chance", "moved", "not compared")
        parts.append("<h2>Drift</h2>" + _table(head, moves))
    if report["stability"]:
        rows = [(s["stage"], s["factor"] or "not bounded", s["why"]) for s in report["stability"]]
        parts.append("<h2>Rows that one record can change</h2>" + _table(("stage", "at most", "why"), rows))
    rows = [(e["letter"], e["what"], e["looked"], ", ".join(e["columns"]) or "-") for e in report["checklist"]]
    if rows:
        head = ("", "direct identifier (HIPAA safe harbour)", "looked for in", "columns")
        parts.append("<h2>Direct identifiers</h2>" + _table(head, rows))
    return "".join(parts) + "</html>"


def _height(value: float | str) -> float:
    """A rate as the height of a bar. A bound is drawn as its number, a hidden rate as nothing."""
    if value == "hidden":
        return 0.0
    return float(value.removeprefix(">") if isinstance(value, str) else value)


def _bars(title: str, drawn: Sequence[Sequence[Any]], unit: str) -> str:
    top = max((float(n) for _, n in drawn), default=0.0) or 1.0
    height, out = 18 * len(drawn) + 4, []
    for i, (label, n) in enumerate(drawn):
        width, y = 150 * float(n) / top, 18 * i
        name = html.escape(label if len(label) <= 22 else label[:21] + "…")
        out.append(
            f'<text x="0" y="{y + 13}">{name}</text><rect x="150" y="{y + 3}" width="{width:.1f}" height="12"/>'
            f'<text x="{154 + width:.1f}" y="{y + 13}">{n:g}</text>'
        )
    caption = f"<figcaption>{html.escape(title)} ({unit})</figcaption>"
    return f'<figure>{caption}<svg width="360" height="{height}" role="img">{"".join(out)}</svg></figure>'


def _table(head: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str:
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in r) + "</tr>" for r in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"
