"""``fedveil compare``: several finished runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of a sweep.")],
    metric: Annotated[str | None, typer.Option(help="What the picture shows. By default the first metric.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write a page with table and picture to this file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table as CSV.")] = None,
) -> None:
    """Compare finished runs: settings, ε, metrics and baselines, as a table and a page."""
    from rich.console import Console
    from rich.table import Table

    from fedveil.deploy.lab import comparison
    from fedveil.deploy.lab.api import load
    from fedveil.deploy.lab.run import Run

    found: list[Run] = []
    for folder in runs:
        one = load(folder)
        found += [one] if isinstance(one, Run) else list(one)
    together = comparison.compare(found)
    console = Console(highlight=False)
    for title, lines in (("Means over seeds", comparison.means(together)), ("Each run", comparison.rows(together))):
        names = list(dict.fromkeys(name for line in lines for name in line))
        table = Table(title=title, title_justify="left", box=None)
        for name in names:
            table.add_column(name, overflow="fold", ratio=1 if name == comparison.SETTINGS else None)
        for line in lines:
            table.add_row(*(comparison.shown(line.get(name)) for name in names))
        console.print(table)
    if csv is not None:
        together.to_csv(csv)
    if out is not None:
        out.write_text(comparison.page(together, metric or together.metrics[0]), encoding="utf-8")
        console.print(f"written: {out}")
