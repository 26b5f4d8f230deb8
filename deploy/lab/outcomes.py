"""What simulations gave: one outcome a run, the table after them, ``summary.json``, and the exit they end with."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from fedveil.common.errors import BudgetExhausted, RunAborted
from fedveil.deploy.lab.choices import NOT_PRIVATE
from fedveil.deploy.watch.display import CONSOLE
from fedveil.privacy.plan import PrivacyPlan

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Outcome:
    """What a simulation gave: the ending, public test metrics, steps applied, seconds; whether its noise was seeded."""

    status: str
    metrics: dict[str, float]
    steps: int
    seconds: float
    plan: PrivacyPlan
    run: Path
    not_private: bool = False


def standard_error(values: list[float]) -> float:
    """The standard error of the mean of at least two values."""
    return statistics.stdev(values) / len(values) ** 0.5


def show(outcomes: list[Outcome], folder: Path) -> None:
    """The table after ``fedveil simulate``; ``folder`` holds the run, or one run for each seed."""
    first = outcomes[0]
    plan = first.plan
    title = NOT_PRIVATE if first.not_private else "SIMULATED (one process, no real institutions)"
    table = Table(title=title, show_header=False)
    table.add_row("ending", ", ".join(sorted({o.status for o in outcomes})))
    table.add_row("steps applied", f"{', '.join(map(str, sorted({o.steps for o in outcomes})))} of {plan.steps}")
    table.add_row(
        "mode, sum", f"{plan.mode}, {plan.sum}" + ("  (no encryption)" if plan.sum in ("plain", "none") else "")
    )
    table.add_row("sites, colluders t, drop-outs d", f"{plan.sites}, {plan.colluders}, {plan.dropouts}")
    table.add_row(
        "claim",
        f"none: {NOT_PRIVATE}"
        if first.not_private
        else f"ε = {plan.claim:.4f} at δ = {plan.delta:g} for each {plan.unit} (fallback ε {plan.fallback:.2f})",
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


def write_summary(folder: Path, seeds: Iterable[int], outcomes: list[Outcome]) -> None:
    """Write ``summary.json``: how each seed's run ended, in which folder; every metric's mean and standard error."""
    runs = [
        {"seed": s, "folder": o.run.name, "status": o.status, "steps": o.steps, "metrics": o.metrics,
         "seconds": o.seconds}
        for s, o in zip(seeds, outcomes, strict=True)
    ]  # fmt: skip
    values = {name: [o.metrics[name] for o in outcomes] for name in outcomes[0].metrics}
    found = {
        name: {"mean": statistics.mean(v), "standard_error": standard_error(v) if len(v) > 1 else None}
        for name, v in values.items()
    }
    said = {"not_private": True} if outcomes[0].not_private else {}
    (folder / SUMMARY).write_text(json.dumps({**said, "runs": runs, "metrics": found}, indent=1) + "\n")


def raise_for_ending(outcomes: list[Outcome], folder: Path) -> None:
    """Give a run that did not carry out its plan the exit code of ``fedveil server start``. Its report is written.

    Raises:
        RunAborted, BudgetExhausted: one of the runs ended so.
    """
    from fedveil.server.job import ABORTED, EXHAUSTED

    endings = {o.status for o in outcomes}
    if ABORTED in endings:
        raise RunAborted(f"the run in {folder} was aborted", hint="the last model and the report are in its folder")
    if EXHAUSTED in endings:
        raise BudgetExhausted(f"the budget is spent; the last model is in {folder}", hint="a normal ending")
