"""A site as a process of its own: from ``site.toml`` to answering a server, on the site's own terms."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context
from threadpoolctl import threadpool_limits

from fedveil.client import policy
from fedveil.client.app import Resolve, make_app
from fedveil.client.approval import Approvals
from fedveil.client.egress.gate import Gate
from fedveil.client.peers import PeerHeads
from fedveil.client.records import lineage
from fedveil.client.records.read import corrections
from fedveil.client.records.read.source_options import dialect_of, source_of
from fedveil.client.records.read.sources import Rules, Source
from fedveil.client.records.release.pipeline import Ingested, ingest
from fedveil.client.session import Site
from fedveil.client.train import pick_device
from fedveil.common import contract as contracts
from fedveil.common import identity, threads
from fedveil.common.contract import DataContract
from fedveil.common.errors import ConfigError, FedveilError, IdentityError
from fedveil.common.settings import LimitsSection, SiteSettings, TrainingSection
from fedveil.common.units import Delta, Epsilon, site_id
from fedveil.deploy.enrol.join import due
from fedveil.deploy.enrol.provision import load_roster, load_tls
from fedveil.deploy.enrol.revoked import Revoked
from fedveil.deploy.transport.grpc_site import run_site
from fedveil.privacy.joining import data_set
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.report import local as locals_
from fedveil.privacy.report.bundle import REPORT
from fedveil.privacy.secagg.store import DirectoryStore

LEDGER, REQUESTS, SALT, REPORTS = "ledger.jsonl", "requests", "subject.salt", "reports"
_SALT_BYTES = 32


def prepare(settings: SiteSettings) -> tuple[Site, Ingested]:
    """Check the identity, open (and lock) the ledger, ingest the table; nothing has touched the network yet.

    Raises:
        ConfigError, IdentityError, ContractError, DataError, AnonymityError, JournalError: what stops the site.
    """
    s = settings.site
    site = site_id(s.id)
    key = identity.load_signing_key(s.identity / "signing.key")
    roster = load_roster(s.identity)
    if roster.member(site).signing_key != identity.public_hex(key):
        raise IdentityError(
            f"{s.identity / 'signing.key'} is not the key of {site!r} on the roster",
            hint="correct [site] id",
        )
    consortium = (s.identity / "consortium.pub").read_text().strip()
    contract = contracts.load_signed(s.contract, consortium)
    policy.check_contract(contract, settings.limits)
    unit = unit_of(settings.limits, contract)
    s.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    salt = subject_salt(s.state)
    ledger = Ledger.open(
        s.state / LEDGER, site, key, lineage=s.lineage, unit=unit,
        cap=Epsilon(settings.limits.max_epsilon), delta=Delta(settings.limits.delta),
        capacity=s.capacity, version=settings.data.version, data_set=data_set(contract.name, unit),
        subject_salt=hashlib.sha256(salt).hexdigest() if salt else "",
    )  # fmt: skip
    try:
        device = pick_device(settings.training.device)
        cap_resources(settings.training, device)
        data = ingested(settings, contract, key, salt, s.state / "data")
    except BaseException:
        ledger.close()
        raise
    out = Site(
        id=site, key=key, roster=roster, contract_hash=contract.hash, width=contract.width,
        classes=contract.classes, limits=settings.limits, X=data.X, y=data.y, evidence=data.evidence, ledger=ledger,
        store_for=lambda session: DirectoryStore(s.state / "sessions" / session), capacity=s.capacity,
        engine=settings.training.engine, precision=settings.training.precision,
        microbatch=settings.training.microbatch, device=device, persons=data.persons,
        models=s.state / "models",
        peers=PeerHeads(s.state / "peers.json", roster),
        revoked=Revoked(s.identity, s.state),
        contract=contract,
        approvals=Approvals(s.state / REQUESTS, site, settings.limits),
        reports=s.state / REPORTS,
        consortium=consortium,
    )  # fmt: skip
    out.tidy()
    return out, data


def unit_of(limits: LimitsSection, contract: DataContract) -> str:
    """What the ledger counts: clients where the owner allows mode "client", else the contract's persons or records.

    Raises:
        ConfigError: the modes count different units; one ledger counts only one.
    """
    if "client" not in limits.modes:
        return "record" if contract.rows_per_person is None else "person"
    if set(limits.modes) != {"client"}:
        raise ConfigError(
            "mode 'client' stands beside others in [limits] modes: it counts clients, they count records",
            hint="set modes = ['client'] in [limits] of site.toml, with a lineage and state for it alone",
        )
    return "client"


def source_from(settings: SiteSettings) -> Source:
    """The site's table, as ``[site] data`` and ``[data]`` say.

    Raises:
        ConfigError, UsageError: settings that do not go together, or a file that others can read.
    """
    d = settings.data
    return source_of(settings.site.data, d.query, d.url_file, d.fhir)


def subject_salt(state: Path, *, make: bool = True) -> bytes:
    """The secret under which this site tells subjects apart: 32 random bytes, made once with the ledger, mode 0600.

    It is empty if the ledger was opened without one, or if there is none yet and ``make`` is False.

    Raises:
        ConfigError: the file does not hold it.
    """
    path = state / SALT
    if not path.exists():
        if not make or (state / LEDGER).exists():
            return b""
        identity.write_secret(path, secrets.token_bytes(_SALT_BYTES))
    salt = path.read_bytes()
    if len(salt) != _SALT_BYTES or path.stat().st_mode & 0o077:
        raise ConfigError(
            f"{path} is not a private file of {_SALT_BYTES} bytes",
            hint=f"restore it from a backup, with chmod 600 {path}",
        )
    return salt


def cap_resources(training: TrainingSection, device: str) -> None:
    """Keep this process within the owner's share of the machine: CPU threads, and a fraction of the GPU's memory.

    Raises:
        ConfigError: more threads than the process may use processors.
    """
    if training.threads > (most := len(os.sched_getaffinity(0))):
        raise ConfigError(
            f"[training] threads = {training.threads}, and this process may use {most} processors",
            hint=f"a number up to {most}, or 0 for all",
        )
    if training.threads:
        torch.set_num_threads(training.threads)
        threadpool_limits(training.threads)  # NumPy's own library, which the engine 'numpy' computes with
        threads.use(training.threads)  # noise, encryption, sums
    if device.startswith("cuda") and training.gpu_memory < 1:
        torch.cuda.set_per_process_memory_fraction(training.gpu_memory)


def ingested(
    settings: SiteSettings, contract: DataContract, key: Ed25519PrivateKey, salt: bytes, work: Path
) -> Ingested:
    """The site's table through the whole ingestion, as ``[data]`` says, with its reports in ``work``.

    Raises:
        ConfigError, DataError, AnonymityError: see :func:`fedveil.client.records.release.pipeline.ingest`.
    """
    d = settings.data
    secret = lineage.site_secret(work)
    own = corrections.load(d.corrections) if d.corrections else ()
    dialect = dialect_of(d.encoding, d.delimiter, d.decimal, d.thousands)
    rules = Rules(own, salt or secret)
    return ingest(
        source_from(settings), contract, work, secret=secret, dialect=dialect, rules=rules, key=key,
        capacity=settings.site.capacity,
    )  # fmt: skip


def run(settings: SiteSettings, *, status: Callable[[str], None], wait: float = 60.0) -> None:
    """Ingest, dial out, take part in one run, end.

    Raises:
        FedveilError: whatever stopped the site; its class has a documented exit code.
    """
    tls = load_tls(settings.site.identity)
    days, soon = due(settings.site.identity)
    if soon:
        status(f"the certificate holds for {days:.1f} more days: fedveil client renew {settings.site.identity}")
    site, data = prepare(settings)
    status(f"ingested: {Path(settings.site.data).name} meets the contract; reports in {data.released.parent}")

    if data.left_out:
        status(f"the table holds more rows than [site] capacity = {settings.site.capacity}: the last ones are left out")

    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        run_site(
            make_app(found_as(site, stop), Gate(settings.egress.slot)), address=settings.site.server, tls=tls,
            site=site.id, stop=stop, on_status=status, wait=wait, server_key=site.roster.server.tls_key,
        )  # fmt: skip
        require_ledger(site)
    finally:
        try:
            write_local_report(settings, site, status)
        finally:
            site.ledger.close()


def found_as(site: Site, stop: threading.Event) -> Resolve:
    """How the apps of this process find ``site``. If its ledger could not be written, the process ends (``stop``)."""

    @contextmanager
    def resolve(context: Context) -> Iterator[Site]:
        try:
            yield site
        finally:
            if site.ledger.journal.failed is not None:
                stop.set()

    return resolve


def require_ledger(site: Site) -> None:
    """Raise the :class:`JournalError` that ended this process, if one did: the next start repairs the ledger's end."""
    if site.ledger.journal.failed is not None:
        raise site.ledger.journal.failed


def write_local_report(settings: SiteSettings, site: Site, status: Callable[[str], None]) -> None:
    """The site's own page about its table, its ledger and the newest report it has, beside the reports of ingestion.

    It must not hide how the run ended. So if it cannot be made, the reason is said, and nothing is raised.
    """
    work, rows = settings.site.state / "data", site.ledger.journal.rows
    ended = [str(r.body["session"]) for r in rows if r.kind == "session.end"]
    newest = settings.site.state / REPORTS / ended[-1] / REPORT if ended else None
    quasi = () if site.contract is None else site.contract.quasi
    try:
        held = newest if newest is not None and newest.is_file() else None
        page = locals_.write(work, locals_.collect(work, rows, held, quasi))[1]
    except (FedveilError, OSError) as e:
        status(f"the local report could not be written: {e}")
        return
    status(f"local report: {page}; it stays here" + ("" if held is None else f"; the federation's: {held.parent}"))
