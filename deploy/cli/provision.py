"""``fedveil provision``: keys, certificates and rosters of a consortium."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click
import typer

from fedveil.common.cli import Group
from fedveil.common.units import MAX_DAYS


class _Provision(Group):
    """``fedveil provision OUT ...`` without a sub-command makes a whole consortium at once."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``new`` before arguments that begin with no sub-command."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["new", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Provision,
    no_args_is_help=True,
    help="Make keys, certificates and rosters of a consortium, and revoke members.",
)


@app.command("new")
def new(
    out: Annotated[Path, typer.Argument(help="An empty or new folder for all the keys.")],
    site: Annotated[list[str], typer.Option("--site", help="A site's name. Give it once for every site.")],
    consortium: Annotated[str, typer.Option(help="The consortium's name.")] = "consortium",
    host: Annotated[str, typer.Option(help="Name or address by which sites reach the server.")] = "localhost",
    days: Annotated[int, typer.Option(help="Days for which the certificates hold.")] = 30,
) -> None:
    """Make everybody's keys in one place, for a trial: certificates and the signed roster of a new consortium."""
    from fedveil.deploy.enrol.provision import make_consortium

    roster = make_consortium(out, site, consortium=consortium, host=host, days=days)
    typer.echo(f"{roster.consortium}: a server and {len(roster.sites)} sites below {out}")
    typer.echo(f"roster {roster.hash}")
    typer.echo(f"Bring each folder of {out / 'sites'} to its site, and keep {out / 'consortium'} offline.")


@app.command("found")
def found(
    folder: Annotated[Path, typer.Argument(help="A new folder. It stays with the person who enrols members.")],
    consortium: Annotated[str, typer.Option(help="The consortium's name.")],
    days: Annotated[int, typer.Option(help="Days for which the authority's own certificate is valid.")] = MAX_DAYS,
) -> None:
    """Make an authority whose members bring keys of their own ('fedveil client join')."""
    from fedveil.deploy.enrol import consortium as authority

    typer.echo(f"consortium key, to be read out to every member: {authority.found(folder, consortium, days)}")


@app.command("sign-csr")
def sign_csr(
    folder: Annotated[Path, typer.Argument(help="The consortium's folder.")],
    request: Annotated[Path, typer.Argument(help="The member's request.json.")],
    out: Annotated[Path, typer.Option(help="The new file for the answer to the member.")],
    fingerprint: Annotated[str, typer.Option(help="The fingerprint as a new member read it out.")] = "",
    days: Annotated[int, typer.Option(help="Days for which the certificate holds.")] = 30,
) -> None:
    """Admit a member, or renew its certificate. Its private keys stay with it."""
    from fedveil.deploy.enrol import consortium as authority

    typer.echo(authority.sign_request(folder, request, out, heard=fingerprint, days=days))


@app.command("roster")
def publish(folder: Annotated[Path, typer.Argument(help="The consortium's folder.")]) -> None:
    """Sign the next version of the roster: all members that were admitted and not revoked."""
    from fedveil.deploy.enrol import consortium as authority

    made = authority.publish(folder)
    typer.echo(f"roster version {made.version} with {len(made.sites)} sites: {made.hash}")
    typer.echo(f"Send {folder / 'roster.json'} to every member: 'fedveil client join FOLDER --roster roster.json'.")


@app.command("revoke")
def revoke(
    folder: Annotated[Path, typer.Argument(help="The consortium's folder.")],
    site: Annotated[str, typer.Argument(help="The member's name.")],
    key_only: Annotated[bool, typer.Option(help="Revoke its TLS key only. It may enrol again with a new one.")] = False,
) -> None:
    """Revoke a member. It takes effect, also during a run, once the list lies in the server's identity folder."""
    from fedveil.deploy.enrol import consortium as authority

    made = authority.revoke(folder, site, key_only=key_only)
    typer.echo(f"revocation list {made.number}: copy {folder / 'revoked.json'} into the server's identity folder")
