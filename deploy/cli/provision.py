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
    cls=_Provision, no_args_is_help=True, help="Keys, certificates and rosters of a consortium; and who is no member."
)


@app.command("new")
def new(
    out: Annotated[Path, typer.Argument(help="An empty or new folder for all the keys.")],
    site: Annotated[list[str], typer.Option("--site", help="A member's name; once for every site.")],
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
    folder: Annotated[Path, typer.Argument(help="A new folder; it stays with whoever enrols members.")],
    consortium: Annotated[str, typer.Option(help="The consortium's name.")],
    days: Annotated[int, typer.Option(help="Days for which the authority itself holds.")] = MAX_DAYS,
) -> None:
    """Make an authority whose members bring keys of their own ('fedveil client join')."""
    from fedveil.deploy.enrol import consortium as authority

    typer.echo(f"consortium key, to be read out to every member: {authority.found(folder, consortium, days)}")


@app.command("sign-csr")
def sign_csr(
    folder: Annotated[Path, typer.Argument(help="The consortium's folder.")],
    request: Annotated[Path, typer.Argument(help="The member's request.json.")],
    out: Annotated[Path, typer.Option(help="The answer for the member; must not exist.")],
    fingerprint: Annotated[str, typer.Option(help="As the member read it out; needed for a new member.")] = "",
    days: Annotated[int, typer.Option(help="Days for which the certificate holds.")] = 30,
) -> None:
    """Admit a member, or renew its certificate; its private keys never come here."""
    from fedveil.deploy.enrol import consortium as authority

    typer.echo(authority.sign_request(folder, request, out, heard=fingerprint, days=days))


@app.command("roster")
def publish(folder: Annotated[Path, typer.Argument(help="The consortium's folder.")]) -> None:
    """Sign the next version of the roster: everybody who was admitted and not revoked."""
    from fedveil.deploy.enrol import consortium as authority

    made = authority.publish(folder)
    typer.echo(f"roster version {made.version} with {len(made.sites)} sites: {made.hash}")
    typer.echo(f"Send {folder / 'roster.json'} to every member: 'fedveil client join FOLDER --roster roster.json'.")


@app.command("revoke")
def revoke(
    folder: Annotated[Path, typer.Argument(help="The consortium's folder.")],
    site: Annotated[str, typer.Argument(help="The member.")],
    key_only: Annotated[bool, typer.Option(help="Its TLS key only: it may enrol again under another.")] = False,
) -> None:
    """Shut a member out; takes effect in a running federation once the list lies in the server's folder."""
    from fedveil.deploy.enrol import consortium as authority

    made = authority.revoke(folder, site, key_only=key_only)
    typer.echo(f"revocation list {made.number}: copy {folder / 'revoked.json'} into the server's identity folder")
