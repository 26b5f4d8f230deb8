"""``fedveil server``: the coordinator's side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fedveil.common.cli import Group

app = typer.Typer(
    cls=Group, no_args_is_help=True, help="Coordinate a run: admit sites, add ciphertexts, open only sums."
)

Settings = Annotated[Path, typer.Argument(help="The server's federation.toml.")]


@app.command()
def start(
    settings: Settings,
    run: Annotated[Path | None, typer.Option(help="The new folder of the run. By default <runs>/<time>.")] = None,
) -> None:
    """Start a run and serve until it has ended. The run's folder then holds a report."""
    from fedveil.common import log
    from fedveil.common import settings as files
    from fedveil.deploy import server_process
    from fedveil.deploy.watch.display import Display

    log.to_stderr()
    federation = files.load(settings, files.Federation)
    folder = run or federation.federation.runs / time.strftime("%Y%m%d-%H%M%S")
    with Display(federation.federation.name, federation.privacy.steps) as display:
        server_process.start(federation, folder, progress=display.progress)
    typer.echo(f"report: {folder / 'report.html'}")


@app.command()
def resume(settings: Settings, run: Annotated[Path, typer.Argument(help="The folder of the run.")]) -> None:
    """Go on with a run whose server was stopped. No finished round is charged again."""
    from fedveil.common import log
    from fedveil.common import settings as files
    from fedveil.deploy import server_process
    from fedveil.deploy.watch.display import Display

    log.to_stderr()
    federation = files.load(settings, files.Federation)
    with Display(federation.federation.name, federation.privacy.steps) as display:
        server_process.resume(federation, run, progress=display.progress)
    typer.echo(f"report: {run / 'report.html'}")


@app.command()
def status(run: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Show how far a run is."""
    from fedveil.deploy import server_process

    for name, value in server_process.status(run).items():
        typer.echo(f"{name}: {value}")


@app.command()
def monitor(
    run: Annotated[Path, typer.Argument(help="The folder of a run. It need not exist yet.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: any free one.")] = 9464,
) -> None:
    """Show a run on this machine: a status page, /metrics for Prometheus, /healthz. Stop it with Ctrl-C."""
    from fedveil.common import log
    from fedveil.deploy.watch.monitor_web import Monitor

    log.to_stderr()
    shown = Monitor(run, port)
    typer.echo(f"http://127.0.0.1:{shown.port}/ shows {run}")
    try:
        shown.serve()
    except KeyboardInterrupt:
        typer.echo("stopped")
