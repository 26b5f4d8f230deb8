"""``fedveil compare``: several finished runs side by side, as a table and as one page without outside resources."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedveil.common.errors import UsageError
from fedveil.deploy.lab.run import Run, as_html, shown
from fedveil.deploy.lab.runs import Runs

SETTINGS = "settings"
_LINES = 12  # that a legend can tell apart

__all__ = ["SETTINGS", "compare", "curves", "means", "page", "rows", "shown"]


def compare(runs: Sequence[Run | str | Path] | Run | str | Path) -> Runs:
    """Runs that belong together: what differs in their settings becomes the columns of their table.

    Raises:
        UsageError: no run, or a folder without one.
    """
    runs = [runs] if isinstance(runs, str | Path | Run) else runs
    found = [run if isinstance(run, Run) else Run(run) for run in runs]
    if not found:
        raise UsageError("no runs to compare", hint="name the folders of finished runs")
    settings = [run.config or run.settings for run in found]
    names = [n for n in dict.fromkeys(k for s in settings for k in s) if len({str(s.get(n)) for s in settings}) > 1]
    return Runs(found, names)


def means(runs: Runs) -> list[dict[str, Any]]:
    """The runs' table with everything in which they differ in one column: there may be twenty settings."""
    out: list[dict[str, Any]] = []
    for row in runs.table():
        told = ", ".join(f"{n} {shown(row[n])}" for n in runs.varied if row[n] is not None)
        out.append({SETTINGS: told} | {name: value for name, value in row.items() if name not in runs.varied})
    return out


def rows(runs: Runs) -> list[dict[str, Any]]:
    """One row for each run, and one for each of its baselines."""
    out: list[dict[str, Any]] = []
    for run in runs:
        said = {"run": run.folder.name, "ended": run.status, "unit": run.unit, "ε": run.epsilon, "δ": run.delta}
        out.append({**said, "rounds": len(run.history), **run.metrics})
        out += [{"run": f"  {name}", **found} for name, found in run.baselines.items()]
    return out


def curves(runs: Runs, metric: str, target: Path | io.BytesIO) -> None:
    """Draw ``metric`` over the rounds, a line for each run.

    Raises:
        UsageError: not every run has the metric.
    """
    import matplotlib

    if metric not in runs.metrics:
        raise UsageError(f"not every run has the metric {metric!r}", hint=f"one of {', '.join(runs.metrics) or 'none'}")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    colours = plt.get_cmap("viridis")([i / max(1, len(runs) - 1) for i in range(len(runs))])
    for run, colour in zip(runs, colours, strict=True):
        held = run.config or run.settings
        told = ", ".join(f"{n} {shown(held[n])}" for n in (*runs.varied, "seed") if held.get(n) is not None)
        label = told if run.folder.name.startswith(tuple("0123456789abcdef")) and len(told) < 60 else run.folder.name
        axis.plot([r["round"] for r in run.history], [r.get(metric) for r in run.history], label=label, color=colour)
    axis.set_xlabel("round")
    axis.set_ylabel(f"{metric} on the public table")
    axis.set_title(f"{metric} of {len(runs)} runs")
    if len(runs) <= _LINES:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(target, dpi=110, format="png")
    plt.close(figure)


def page(runs: Runs, metric: str) -> str:
    """The whole comparison as HTML."""
    picture = io.BytesIO()
    curves(runs, metric, picture)
    image = base64.b64encode(picture.getvalue()).decode()
    varied = ", ".join(runs.varied) or "nothing but the seed"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fedveil compare</title><style>'
        "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#17202b}"
        "table{border-collapse:collapse;margin:1rem 0}th,td{padding:.3rem .8rem;border-bottom:1px solid #dde3ea;"
        "text-align:right;white-space:pre-wrap}th:first-child,td:first-child{text-align:left}img{max-width:100%}"
        f"</style></head><body><h1>{len(runs)} runs compared</h1><p>They differ in: {html.escape(varied)}. "
        "Metrics are of the public test table. Each ε is of one run: whoever sees several runs over the same records "
        f'has to add them up.</p>{as_html(means(runs))}<img alt="{html.escape(metric)} over the rounds" '
        f'src="data:image/png;base64,{image}"><h2>Each run, and its baselines</h2>{as_html(rows(runs))}</body></html>\n'
    )
