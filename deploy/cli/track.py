"""``fedveil track``: a run in MLflow or TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedveil.common.errors import UsageError


def track(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run, of several seeds, or of a sweep; a run may be under way.")
    ],
    mlflow: Annotated[str | None, typer.Option(help="A folder for MLflow's files, or the URI of its server.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="The folder that TensorBoard reads (--logdir).")] = None,
) -> None:
    """Show a run in MLflow or TensorBoard: settings, the plan's numbers, public metrics and ε of each round."""
    from fedveil.deploy.lab.api import load
    from fedveil.deploy.lab.tracking import track as export

    asked = [("mlflow", mlflow), ("tensorboard", tensorboard)]
    if not any(where for _, where in asked):
        raise UsageError("no tracker is named", hint="--mlflow FOLDER or --tensorboard FOLDER")
    found = load(run)
    for tracker, where in asked:
        for place in export(found, tracker, where) if where else ():
            typer.echo(f"{tracker}: {place}")
