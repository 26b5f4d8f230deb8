"""``fedveil client``: the site's side, started by hand as an institution would."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedveil.common.cli import Group

if TYPE_CHECKING:
    from fedveil.common.settings import SiteSettings

app = typer.Typer(
    cls=Group, no_args_is_help=True, help="Run a site: its own data, its own limits, outbound connections only."
)
Settings = Annotated[Path, typer.Argument(help="The site's site.toml.")]
SettingsOption = Annotated[Path, typer.Option("--settings", help="The site's site.toml.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Folder = Annotated[Path, typer.Argument(help="The member's identity folder. Its private keys never leave it.")]


@app.callback()
def _group() -> None:
    """Run a site: its own data, its own limits, outbound connections only."""


@app.command()
def run(
    settings: Settings,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the server before giving up.")] = 60.0,
) -> None:
    """Check and recode the site's table, then take part in one run."""
    from fedveil.common import log
    from fedveil.deploy import site_process

    log.to_stderr()
    loaded = _load(settings)
    site_process.run(loaded, status=lambda text: typer.echo(f"{loaded.site.id}: {text}"), wait=wait)


@app.command()
def join(
    folder: Folder,
    site: Annotated[str, typer.Option(help="Make keys and a request under this name; the server's is 'server'.")] = "",
    host: Annotated[str, typer.Option(help="With --site server: the name or address by which sites reach it.")] = "",
    reply: Annotated[Path | None, typer.Option(help="Install the consortium's answer.")] = None,
    consortium_key: Annotated[
        str, typer.Option(help="The key as the consortium read it out. Needed once, with --reply.")
    ] = "",
    roster: Annotated[Path | None, typer.Option(help="Install a roster. An older one is refused.")] = None,
    revoked: Annotated[
        Path | None, typer.Option(help="Install a list of revoked members. An older one is refused.")
    ] = None,
) -> None:
    """Enrol: make keys and a request (--site), then install the answer (--reply) and the roster (--roster)."""
    from fedveil.common.errors import UsageError
    from fedveil.deploy.enrol import join as enrol
    from fedveil.deploy.enrol import revoked as revocations

    if sum(map(bool, (site, reply, roster, revoked))) != 1:
        raise UsageError(
            "give one of --site, --reply, --roster and --revoked at a time",
            hint="first --site NAME, then --reply FILE; --roster FILE and --revoked FILE when new ones are sent",
        )
    if site:
        _asked(folder, enrol.request(folder, site, host=host))
    elif reply is not None:
        certificate = enrol.install(folder, reply, consortium_key=consortium_key)
        typer.echo(f"installed; the certificate holds to {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    elif roster is not None:
        made = enrol.take_roster(folder, roster)
        typer.echo(f"roster version {made.version} of {made.consortium}: {len(made.sites)} sites, {made.hash}")
    elif revoked is not None:
        listed = revocations.take_revoked(folder, revoked)
        typer.echo(f"revocation list {listed.number}: {len(listed.sites)} members, {len(listed.tls_keys)} keys")


@app.command()
def renew(
    folder: Folder,
    rotate: Annotated[bool, typer.Option(help="Make a new TLS key. A new roster is needed then.")] = False,
    host: Annotated[str, typer.Option(help="For the server: the name or address by which sites reach it.")] = "",
) -> None:
    """Ask for a new certificate before the old one expires. The request is signed with this member's key."""
    from fedveil.deploy.enrol import join as enrol

    _asked(folder, enrol.renew(folder, rotate=rotate, host=host))


@app.command()
def check(
    settings: Settings,
    gpu: Annotated[bool, typer.Option("--gpu", help="Check the GPU too.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Leave out the checks that need the network.")] = False,
    as_json: Json = False,
) -> None:
    """Check everything that can stop a run, and say what to do about it. Exit code 0 if all is well."""
    from rich.console import Console

    from fedveil.common import canonical
    from fedveil.deploy.preflight import Preflight

    findings = Preflight(_load(settings), gpu=gpu, offline=offline).run()
    failed = [f for f in findings if f.ok is False]
    if as_json:
        document = {"ok": not failed, "checks": [f.to_json() for f in findings]}
        sys.stdout.write(canonical.dumps(document).decode() + "\n")
    else:
        console = Console(highlight=False)
        for f in findings:
            mark = {True: "ok  ", False: "FAIL", None: "-   "}[f.ok]
            console.print(f"{mark} {f.check:<12} {f.message}", markup=False, soft_wrap=True)
            if f.remedy:
                console.print(f"     what to do: {f.remedy}", markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(failed[0].exit_code)


@app.command()
def requests(settings: Settings, as_json: Json = False) -> None:
    """List the runs that wait for a person's approval at this site."""
    from fedveil.client import approval
    from fedveil.common import canonical

    found = [w.to_json() for w in approval.waiting(_requests(_load(settings)))]
    if as_json:
        sys.stdout.write(canonical.dumps(found).decode() + "\n")
        return
    for w in found:
        typer.echo(
            f"{w['plan_hash']}\n  {w['task']} {w['model']}, epsilon {w['epsilon']:.4g} at delta {w['delta']:g}, "
            f"fallback {w['fallback_epsilon']:.4g}, {w['steps']} steps, {w['sites']} sites, mode {w['mode']}, "
            f"sum {w['sum']}; {w['approvals']} approvals so far"
        )


@app.command()
def approve(
    run: Annotated[str, typer.Argument(help="The plan's hash, or its first 8 digits or more.")],
    key: Annotated[Path, typer.Option(help="The approver's private key, made by 'fedveil client approver'.")],
    settings: SettingsOption = Path("site.toml"),
    reject: Annotated[bool, typer.Option("--reject", help="Remove the request instead.")] = False,
) -> None:
    """Approve one run at this site, as a person with a key. Valid for seven days and for one run."""
    from fedveil.client import approval
    from fedveil.common import identity
    from fedveil.common.units import site_id

    loaded = _load(settings)
    wanted = approval.find(_requests(loaded), run)
    if reject:
        approval.reject(wanted)
        typer.echo(f"removed: {wanted.plan.hash}")
        return
    approval.approve(wanted, site_id(loaded.site.id), loaded.limits, identity.load_signing_key(key))
    typer.echo(f"approved: {wanted.plan.hash}")


@app.command()
def approver(key: Annotated[Path, typer.Argument(help="The new file for the private key (mode 0600).")]) -> None:
    """Make a person's key for approvals. Put the printed public key into [limits] approvers of site.toml."""
    from fedveil.common import identity

    made = identity.new_signing_key()
    identity.save_signing_key(key, made)
    typer.echo(identity.public_hex(made))


def _load(path: Path) -> SiteSettings:
    from fedveil.common import settings as files

    return files.load(path, files.SiteSettings)


def _requests(settings: SiteSettings) -> Path:
    from fedveil.deploy.site_process import REQUESTS

    return settings.site.state / REQUESTS


def _asked(folder: Path, fingerprint: str) -> None:
    typer.echo(f"send {folder / 'request.json'} to the consortium and read this out to it:\n{fingerprint}")
