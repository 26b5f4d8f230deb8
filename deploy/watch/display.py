"""What a person sees while a run is under way, and when it has ended."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from fedveil.deploy.lab.simulate import Outcome

CONSOLE = Console(soft_wrap=True)


class Display:
    """A progress bar over rounds: ε of those opened (no site is charged more), the public metric and bytes so far."""

    def __init__(self, title: str, steps: int | None = None) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            console=CONSOLE,
        )
        self._bytes = 0
        self._task = self._progress.add_task(title, total=steps, facts="waiting for the sites")

    def __enter__(self) -> Display:
        self._progress.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._progress.__exit__(*exc)

    def progress(self, kind: str, facts: dict[str, Any]) -> None:
        """Told of the run's events."""
        if kind == "plan":
            for warning in facts["warnings"]:
                self._progress.console.print("[bold yellow]warning:[/]", escape(warning), highlight=False)
        elif kind == "joined":
            self._progress.update(self._task, facts=f"{len(facts['sites'])} sites signed the plan")
        elif kind == "round":
            metrics = "  ".join(f"{k} {v:.3f}" for k, v in facts["metrics"].items())
            self._bytes += facts["bytes_sent"] + facts["bytes_received"]
            text = f"ε ≤ {facts['epsilon_opened']:.3f}  {metrics}  {self._bytes / 1e6:.1f} MB"
            self._progress.update(self._task, completed=facts["round"], facts=text)
        elif kind == "aborted":
            self._progress.console.print(
                f"round {facts['round']} aborted (charged where a site answered): {facts['reason']}", highlight=False
            )

    def count(self, done: int, facts: str) -> None:
        """Anything else that is counted."""
        self._progress.update(self._task, completed=done, facts=facts)


def standard_error(values: list[float]) -> float:
    """Of the mean of at least two values."""
    return statistics.stdev(values) / len(values) ** 0.5


def summary(outcomes: list[Outcome], folder: Path) -> None:
    """The table after ``fedveil simulate``; ``folder`` holds the run, or one run for each seed."""
    first = outcomes[0]
    plan = first.plan
    table = Table(title="SIMULATED (one process, no real institutions)", show_header=False)
    table.add_row("ending", ", ".join(sorted({o.status for o in outcomes})))
    table.add_row("steps applied", f"{', '.join(map(str, sorted({o.steps for o in outcomes})))} of {plan.steps}")
    table.add_row(
        "mode, sum", f"{plan.mode}, {plan.sum}" + ("  (no encryption)" if plan.sum in ("plain", "none") else "")
    )
    table.add_row("sites, colluders t, drop-outs d", f"{plan.sites}, {plan.colluders}, {plan.dropouts}")
    table.add_row(
        "claim", f"ε = {plan.claim:.4f} at δ = {plan.delta:g} for each {plan.unit} (fallback ε {plan.fallback:.2f})"
    )
    for name in first.metrics:
        values = [o.metrics[name] for o in outcomes]
        spread = ""
        if len(values) > 1:
            spread = f" ± {standard_error(values):.4f} (mean and standard error over {len(values)} seeds)"
        table.add_row(f"test {name}", f"{statistics.mean(values):.4f}{spread}")
    table.add_row("seconds", f"{sum(o.seconds for o in outcomes):.1f}")
    table.add_row("run folder" if len(outcomes) == 1 else "run folders in", str(folder))
    CONSOLE.print(table)
