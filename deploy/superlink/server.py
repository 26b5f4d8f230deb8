"""The server's executor: starts a run at SuperLink, takes the run's task, runs the installed ServerApp.

A task of any run but the one that this process started is ended as failed, and its bundle is not fetched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization as ser
from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp

from fedveil.common import flwr_adapter, identity
from fedveil.common.errors import IdentityError, TransportError
from fedveil.common.files import write_durably
from fedveil.common.identity import Roster
from fedveil.common.settings import Federation
from fedveil.common.units import SiteId
from fedveil.deploy.enrol.gate import Doorkeeper
from fedveil.deploy.enrol.provision import load_roster
from fedveil.deploy.server_process import Refusals, conduct, known_job, new_job, reply_limits
from fedveil.deploy.superlink.bundle import BUNDLE, PIN
from fedveil.deploy.superlink.grid import SuperlinkGrid
from fedveil.deploy.superlink.runtime import SERVER, Link, Task
from fedveil.privacy.planning import plan_from_settings
from fedveil.server import job as jobs
from fedveil.server.job import Job
from fedveil.server.strategy import SecureSumStrategy

_POLL_S = 0.2
_PATIENCE_S = 60.0
NUMBER = "superlink.run"  # in the run's folder: the number of Flower's run
_OTHER = "this server runs no other bundle than fedveil's own, and starts its runs itself"
Say = Callable[[str], None]


def run(
    federation: Federation,
    folder: Path,
    link: Link,
    *,
    certificates: Iterable[Path],
    resume: bool = False,
    progress: jobs.Progress | None = None,
    on_status: Say = lambda text: None,
) -> Job:
    """Run one job under SuperLink, from its plan to its report.

    Args:
        folder: of the run; a new one, or with ``resume`` the one to go on with.
        link: SuperLink's interface on this machine, with the executors' secret.
        certificates: of all sites, PEM, under the keys that the roster names; SuperLink is told of them. While the run
            goes on, a site is left out as soon as its certificate has expired or is revoked.
        on_status: told, in words, of what happens.

    Raises:
        FedveilError: the plan is refused, SuperLink does not answer, or the run could not begin or was aborted.
    """
    f = federation.federation
    roster = load_roster(f.identity)
    held = _certificates(roster, certificates)
    keeper = Doorkeeper(f.identity, kept=folder.parent)
    for site, pem in held.items():
        keeper(site, pem)
        public = x509.load_pem_x509_certificate(pem).public_key()
        link.register(public.public_bytes(ser.Encoding.PEM, ser.PublicFormat.SubjectPublicKeyInfo), site)
        on_status(f"{site} may connect")
    if resume:
        job = known_job(federation, folder, progress=progress)
    else:
        job = new_job(
            federation, folder, lambda c, n: plan_from_settings(federation, c, n), progress=progress, engine="superlink"
        )

    def carry(job: Job, server: ServerApp, strategy: SecureSumStrategy, _: Refusals) -> None:
        task = _own_task(link, folder / NUMBER, on_status)
        with task.held():
            failure = "the run was not finished"
            try:
                if task.begin().bundle != PIN:
                    raise TransportError("SuperLink gives out another bundle than the one this run was started with")
                grid = SuperlinkGrid(
                    task, roster, limits=reply_limits(job.plan), gate=lambda site: keeper(site, held[site])
                )
                server(grid, Context(task.run_id, flwr_adapter.SERVER_NODE, {}, RecordDict(), {}))
                failure = "" if strategy.status == jobs.COMPLETED else strategy.status
            finally:
                task.finish(failure)

    return conduct(job, carry)


def refuse_others(link: Link, on_status: Say, *, own: int | None = None) -> Task | None:
    """End every waiting ServerApp task that is not of the run ``own``. Returns that run's task, if it is there."""
    while (task := link.acquire(SERVER)) is not None:
        if task.run_id == own:
            return task
        on_status(f"run {task.run_id}: refused, this server did not start it")
        task.finish(_OTHER)
    return None


def _own_task(link: Link, number_file: Path, on_status: Say) -> Task:
    """Start a run under the pinned bundle and take its task.

    What an earlier process started for the same job is stopped first: otherwise SuperNodes wait a minute for the rest
    of a message that was half sent when it was killed.
    """
    if number_file.exists() and (before := number_file.read_text().strip()).isdecimal():
        link.stop_run(int(before))
    number = link.start_run(BUNDLE)
    write_durably(number_file, str(number).encode())
    end = time.monotonic() + _PATIENCE_S
    while (task := refuse_others(link, on_status, own=number)) is None:
        if time.monotonic() > end:
            raise TransportError("another executor has taken this run", hint="start SuperLink with --isolation process")
        time.sleep(_POLL_S)
    return task


def _certificates(roster: Roster, paths: Iterable[Path]) -> dict[SiteId, bytes]:
    """Every site's certificate, each under the key that the roster names."""
    site_of = {m.tls_key: m.site for m in roster.sites}
    out: dict[SiteId, bytes] = {}
    for path in paths:
        pem = path.read_bytes()
        site = site_of.get(identity.spki_sha256(pem))
        if site is None:
            raise IdentityError(
                f"{path} is not the certificate of a site on the roster", hint="use the site's current one"
            )
        out[site] = pem
    if missing := [m.site for m in roster.sites if m.site not in out]:
        raise IdentityError(
            f"the certificate of {', '.join(missing)} was not given", hint="give --certificate once for every site"
        )
    return out
