"""A finished run as an object: its numbers, its report, its model. Everything is read from the run's folder."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common.errors import UsageError, VerificationError
from fedveil.deploy.lab.choices import NOT_PRIVATE

if TYPE_CHECKING:
    from torch import nn

    from fedveil.privacy.plan import PrivacyPlan
    from fedveil.privacy.report.verify import Verification

BASELINES = "baselines.json"
_METRICS, _CONFIG, _PLAN, _JOURNAL = "metrics.jsonl", "config.json", "plan.json", "journal.jsonl"


@dataclass(frozen=True)
class Report:
    """The privacy report of a run."""

    path: Path

    def verify(self) -> Verification:
        """Every number in it, computed again from the journals beside it.

        Raises:
            VerificationError: a check failed, or there is no report.
        """
        from fedveil.privacy.report.verify import verify_report

        if not self.path.exists():
            raise VerificationError(f"{self.path.parent} holds no report", hint="simulate(..., report=True)")
        found = verify_report(self.path)
        found.raise_for_failure()
        return found

    @property
    def page(self) -> Path:
        """The page for people."""
        return self.path.with_suffix(".html")


class Run:
    """One run. Shown in a notebook it prints its ε and its metrics beside the baselines.

    Args:
        folder: a run's folder.

    Raises:
        UsageError: no run is there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / _JOURNAL).exists():
            raise UsageError(f"{self.folder} holds no run", hint="the folder that simulate() or the server wrote")

    @cached_property
    def plan(self) -> PrivacyPlan:
        """The privacy plan that everybody signed."""
        from fedveil.privacy.plan import from_json

        return from_json(json.loads((self.folder / _PLAN).read_text()))

    @property
    def epsilon(self) -> float:
        """ε of the whole run at :attr:`delta`, for one :attr:`unit`."""
        return self.plan.claim

    @property
    def delta(self) -> float:
        """δ of the run."""
        return self.plan.delta

    @property
    def unit(self) -> str:
        """Whom ε protects: a record, a person or a client."""
        return self.plan.unit

    @property
    def claim(self) -> str:
        """ε in words; or that there is none, because the noise was seeded."""
        said = f"ε = {self.epsilon:.4g} at δ = {self.delta:g} for each {self.unit}"
        simulated = self._said.get("run.open", {}).get("simulated")
        return NOT_PRIVATE if self.not_private else f"{said} (SIMULATED)" if simulated else said

    @property
    def session(self) -> str:
        """The run's own name: 64 hexadecimal digits."""
        return str(self._said.get("run.open", {}).get("session", ""))

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the simulation was asked for; empty for a run of real sites."""
        path = self.folder / _CONFIG
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the plan, by name: for runs that were not simulated."""
        p = self.plan
        return {
            "sites": p.sites, "mode": p.mode, "sum": p.sum, "epsilon": p.claim, "delta": p.delta, "clip": p.clip,
            "sample_rate": p.sample_rate, "steps": p.steps, "network": p.model.name, "hidden": list(p.network.hidden),
            "optimizer": p.optimizer.name, "learning_rate": p.optimizer.learning_rate,
            "momentum": p.optimizer.momentum,
        }  # fmt: skip

    @cached_property
    def status(self) -> str:
        """How it ended: COMPLETED, STOPPED_EARLY, BUDGET_EXHAUSTED, ABORTED; RUNNING where it has not."""
        return str(self._said.get("run.end", {}).get("status", "RUNNING"))

    @property
    def not_private(self) -> bool:
        """Whether the noise followed from a seed (``debug_noise_seed``): then no claim of the run holds."""
        return "debug_noise_seed" in self._said.get("run.open", {})

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """One row for each round: its number, the ε spent so far, the metrics on the public table."""
        path = self.folder / _METRICS
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        return [{"round": r["round"], "epsilon": r["epsilon_opened"], **r["metrics"]} for r in rows]

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The final model's metrics on the public table."""
        found = self._said.get("run.end", {}).get("metrics") or (self.history[-1] if self.history else {})
        return {k: v for k, v in found.items() if k not in ("round", "epsilon")}

    @cached_property
    def baselines(self) -> dict[str, dict[str, float]]:
        """What the same records give otherwise; empty where nobody computed it (:func:`fedveil.baselines`)."""
        path = self.folder / BASELINES
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def report(self) -> Report:
        """The privacy report."""
        from fedveil.privacy.report.bundle import REPORT

        return Report(self.folder / REPORT)

    def model(self) -> nn.Module:
        """The final model, on the CPU.

        Raises:
            UsageError: the run kept none.
        """
        import numpy as np

        from fedveil.common.workload.torch.networks import build, unflatten
        from fedveil.privacy.report.bundle import MODEL

        path = self.folder / MODEL
        if not path.exists():
            raise UsageError(f"{self.folder} holds no model", hint="only the sites have it, or the run has not ended")
        net = build(self.plan.network)
        unflatten(net, np.fromfile(path, "<f4"))
        return net.eval()

    def table(self) -> list[dict[str, Any]]:
        """This run and its baselines, one row each."""
        own = {"": f"this run, {NOT_PRIVATE if self.not_private else f'ε = {self.epsilon:.3g}'}", **self.metrics}
        return [own, *({"": name, **found} for name, found in self.baselines.items())]

    def plot(self, metric: str | None = None, *, path: str | Path | None = None) -> Path:
        """Draw a metric and ε over the rounds; returns the picture's file.

        Args:
            metric: which; by default all of them.
            path: a .png, .svg or .pdf; by default ``curve.png`` in the run's folder.

        Raises:
            UsageError: no such metric.
        """
        from fedveil.deploy.watch.plot import write_curve

        known = sorted({k for row in self.history for k in row} - {"round", "epsilon"})
        if metric is not None and metric not in known:
            raise UsageError(f"the run has no metric {metric!r}", hint=f"one of {', '.join(known) or 'none'}")
        return write_curve(self.folder, metric=metric, path=None if path is None else Path(path))

    def __repr__(self) -> str:
        shown = ", ".join(f"{k} {v:.4f}" for k, v in self.metrics.items())
        return f"Run({str(self.folder)!r}: {self.status}, {self.claim}, {shown})"

    def _repr_html_(self) -> str:
        where = html.escape(str(self.folder))
        return (
            f"<p><b>{self.status}</b>: {html.escape(self.claim)}</p>{as_html(self.table())}<p><code>{where}</code></p>"
        )

    @cached_property
    def _said(self) -> dict[str, dict[str, Any]]:
        """The last row of each kind in the server's journal, by its kind."""
        from fedveil.common.journal import parse, without_torn_end

        data = without_torn_end((self.folder / _JOURNAL).read_bytes())
        return {row.kind: row.body for row in parse(data)}


def as_html(rows: list[dict[str, Any]]) -> str:
    """Rows as an HTML table; a column for each key, in the order of their first rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(str(n))}</th>" for n in names)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(shown(row.get(n)))}</td>' for n in names)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def shown(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return ""
    return (
        (f"{value:.4f}" if abs(value) >= 1e-3 or not value else f"{value:g}")
        if isinstance(value, float)
        else str(value)
    )
