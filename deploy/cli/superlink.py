"""``fedveil superlink``: SuperLink, SuperNode and the two executors."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from fedveil.common.cli import Group

# Every fedveil command reads this file: what it needs of torch and flwr comes with the command.
app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="Run server and sites under Flower's SuperLink. App bundles from the network are never run.",
)
FederationFile = Annotated[Path, typer.Argument(help="The server's federation.toml.")]
SiteFile = Annotated[Path, typer.Argument(help="The site's site.toml.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")]


@app.command()
def link(settings: FederationFile, port: Port = 9092) -> None:
    """Run Flower's SuperLink on this machine, with TLS. It takes SuperNodes of the roster only."""
    from fedveil.common import settings as files
    from fedveil.deploy.superlink import commands

    home = files.load(settings, files.Federation).federation.identity
    _become(commands.superlink(home, port), home / "flwr")


@app.command("server")
def serve(
    settings: FederationFile,
    run: Annotated[Path, typer.Option(help="The folder of the run.")],
    certificate: Annotated[
        list[Path], typer.Option(help="A site's certificate (tls.pem). Give it once for every site.")
    ],
    port: Port = 9092,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")] = False,
) -> None:
    """Start a run at SuperLink and carry it out. The run's folder then holds a report."""
    from fedveil.common import log
    from fedveil.common import settings as files
    from fedveil.deploy.superlink import commands, server
    from fedveil.deploy.superlink.runtime import Link

    log.to_stderr()
    federation = files.load(settings, files.Federation)
    home = federation.federation.identity
    secret = commands.secret(home).read_bytes()
    at = Link(f"{commands.HOST}:{port}", ca=home / "ca.pem", secret=secret)
    server.run(federation, run, at, certificates=certificate, resume=resume, on_status=_say)
    typer.echo(f"report: {run / 'report.html'}")


@app.command()
def node(settings: SiteFile, port: Port = 9094) -> None:
    """Run the site's SuperNode. It dials the server of site.toml and runs no app itself."""
    from fedveil.common import settings as files
    from fedveil.deploy.superlink import commands

    s = files.load(settings, files.SiteSettings).site
    s.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    _become(commands.supernode(s.identity, s.state, s.server, port), s.state / "flwr")


@app.command("site")
def execute(settings: SiteFile, port: Port = 9094) -> None:
    """Check and recode the site's table, then take part in the runs that SuperNode brings, until SIGTERM."""
    from fedveil.client.app import make_app
    from fedveil.client.egress.gate import Gate
    from fedveil.common import log
    from fedveil.common import settings as files
    from fedveil.deploy import site_process
    from fedveil.deploy.enrol.join import due
    from fedveil.deploy.superlink import commands
    from fedveil.deploy.superlink.runtime import Link
    from fedveil.deploy.superlink.site import SiteExecutor

    log.to_stderr()
    loaded = files.load(settings, files.SiteSettings)
    days, soon = due(loaded.site.identity)
    if soon:
        _say(f"the certificate holds for {days:.1f} more days: fedveil client renew {loaded.site.identity}")
    site, _ = site_process.prepare(loaded)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    secret = commands.secret(loaded.site.state).read_bytes()
    at = Link(f"{commands.HOST}:{port}", ca=None, secret=secret)
    executor = SiteExecutor(at, make_app(site_process.found_as(site, stop), Gate(loaded.egress.slot)), on_status=_say)
    _say(f"{site.id}: takes tasks from SuperNode on port {port}")
    try:
        executor.serve(stop)
        site_process.require_ledger(site)
    finally:
        try:
            site_process.write_local_report(loaded, site, _say)
        finally:
            site.ledger.close()


def _become(command: list[str], home: Path) -> None:
    from fedveil.deploy.superlink import commands

    os.execve(command[0], command, commands.environment(home))  # noqa: S606 (our own command, fixed arguments)


def _say(text: str) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')} {text}")
