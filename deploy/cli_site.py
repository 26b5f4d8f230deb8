"""``fedveil client``: the site's side, started by hand as an institution would."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Run a site: its own data, its own limits, outbound connections only.")


@app.callback()
def _group() -> None:
    """Run a site: its own data, its own limits, outbound connections only."""


@app.command()
def run(
    settings: Annotated[Path, typer.Argument(help="site.toml")],
    wait: Annotated[float, typer.Option(help="seconds to wait for a server before giving up")] = 60.0,
) -> None:
    """Check and recode the site's table, then take part in one run."""
    from fedveil.common import settings as files
    from fedveil.deploy import site_process

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    loaded = files.load(settings, files.SiteSettings)
    site_process.run(loaded, status=lambda text: typer.echo(f"{loaded.site.id}: {text}"), wait=wait)
