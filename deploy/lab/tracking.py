"""A run shown in MLflow or TensorBoard: what is public or charged, and nothing else.

They get the simulation's config, the plan's numbers, and for each round the metrics on the public table and ε. All of
it is read from the run's folder, so a run that is still under way can be exported too; the next export adds what is
new.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedveil.common.errors import FedveilError, UsageError
from fedveil.deploy.lab.run import Run
from fedveil.deploy.lab.runs import Runs

_EXPERIMENT, _SESSION, _SUFFIX = "fedveil", "fedveil.session", ".fedveil"


def track(run: Run | Runs, tracker: str, where: str | Path) -> list[str]:
    """Export a run, or each one of several, to a tracker.

    Args:
        run: what :func:`fedveil.load` gave.
        tracker: ``"mlflow"`` or ``"tensorboard"``.
        where: a folder. For MLflow also the URI of a tracking server: then the values go there. Else nothing leaves
            this machine.

    Returns:
        For each run, where it can be found.

    Raises:
        UsageError: an unknown tracker. FedveilError: it is not installed.
    """
    if tracker not in _TRACKERS:
        raise UsageError(f"unknown tracker {tracker[:64]!r}", hint=f"one of {', '.join(_TRACKERS)}")
    library, export = _TRACKERS[tracker]
    if importlib.util.find_spec(library) is None:
        raise FedveilError(
            f"the tracker {tracker!r} needs the library {library}", hint=f"pip install 'fedveil[{tracker}]'"
        )
    return [export(one, str(where)) for one in ([run] if isinstance(run, Run) else run)]


def _said(run: Run) -> dict[str, Any]:
    """Settings by name: the plan's, and what the simulation was asked for where that was given."""
    asked = {k: v for k, v in run.config.items() if v is not None}
    plan = {"noise_multiplier": run.plan.noise_multiplier, "unit": run.unit, "parameters": run.plan.model.parameters}
    return {**run.settings, **plan, **asked}


def _marks(run: Run) -> dict[str, str]:
    """What must stand beside every number."""
    return {"status": run.status, _SESSION: run.session, "claim": run.claim}


def _mlflow(run: Run, where: str) -> str:
    # Read when mlflow is imported and when it is used: no telemetry, and plain files where a folder is given.
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"
    uri = where
    if "://" not in where:
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        uri = Path(where).resolve().as_uri()
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    held = client.get_experiment_by_name(_EXPERIMENT)
    experiment = client.create_experiment(_EXPERIMENT) if held is None else held.experiment_id
    found = client.search_runs([experiment], f"tags.`{_SESSION}` = '{run.session}'")
    if found:
        name = found[0].info.run_id
    else:
        name = client.create_run(experiment, run_name=run.folder.name, tags=_marks(run)).info.run_id
        client.log_batch(name, params=[Param(key, str(value)) for key, value in _said(run).items()])
    for key, value in _marks(run).items():
        client.set_tag(name, key, value)
    there = max((m.step for m in client.get_metric_history(name, "epsilon")), default=0)
    for row in run.history:
        if row["round"] > there:
            at = int(time.time() * 1000)
            values = [Metric(key, row[key], at, row["round"]) for key in row.keys() - {"round"}]
            client.log_batch(name, metrics=values)
    if run.status != "RUNNING":
        client.set_terminated(name, "FINISHED" if run.status == "COMPLETED" else "FAILED")
    return f"{uri}, experiment {_EXPERIMENT}, run {name}"


def _tensorboard(run: Run, where: str) -> str:
    from torch.utils.tensorboard.writer import SummaryWriter

    folder = Path(where) / run.folder.name
    for old in folder.glob(f"*{_SUFFIX}"):  # of an earlier export: TensorBoard would show both
        old.unlink()
    lines = [f"|{k}|{v}|" for k, v in {**_marks(run), **_said(run)}.items()]
    with SummaryWriter(str(folder), filename_suffix=_SUFFIX) as writer:
        writer.add_text("run", "\n".join(["|setting|value|", "|-|-|", *lines]))
        for row in run.history:
            for key in row.keys() - {"round"}:
                writer.add_scalar(key, row[key], row["round"])
    return str(folder)


_TRACKERS: dict[str, tuple[str, Callable[[Run, str], str]]] = {
    "mlflow": ("mlflow", _mlflow),
    "tensorboard": ("tensorboard", _tensorboard),
}
