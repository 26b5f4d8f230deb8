"""A site as a process of its own: from ``site.toml`` to answering a server, on the site's own terms."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context

from fedveil.client.app import make_app
from fedveil.client.ingest import lineage
from fedveil.client.ingest.pipeline import Ingested, ingest
from fedveil.client.peers import PeerHeads
from fedveil.client.session import Site
from fedveil.client.train import pick_device
from fedveil.common import contract as contracts
from fedveil.common import identity
from fedveil.common.errors import ConfigError, IdentityError
from fedveil.common.settings import SiteSettings
from fedveil.common.units import Delta, Epsilon, site_id
from fedveil.deploy.provision import load_roster, load_tls
from fedveil.deploy.transport.grpc_site import run_site
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.secagg.store import DirectoryStore

_LOG = logging.getLogger("fedveil.site")


def prepare(settings: SiteSettings, *, unit: str = "record") -> tuple[Site, Ingested]:
    """Check the identity, open (and lock) the ledger, ingest the table; nothing has touched the network yet.

    Raises:
        ConfigError, IdentityError, ContractError, DataError, AnonymityError, JournalError: what stops the site.
    """
    s = settings.site
    if "plain" in settings.limits.sums:
        raise ConfigError("the sum 'plain' exists in the simulator only", hint="take it out of [limits] sums")
    site = site_id(s.id)
    key = identity.load_signing_key(s.identity / "signing.key")
    roster = load_roster(s.identity)
    if roster.member(site).signing_key != identity.public_hex(key):
        raise IdentityError(
            f"{s.identity / 'signing.key'} is not the key of {site!r} on the roster", hint="check site.toml's id"
        )
    contract = contracts.load_signed(s.contract, (s.identity / "consortium.pub").read_text().strip())
    s.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    ledger = Ledger.open(
        s.state / "ledger.jsonl", site, key, lineage=s.lineage, unit=unit,
        cap=Epsilon(settings.limits.max_epsilon), delta=Delta(settings.limits.delta),
    )  # fmt: skip
    try:
        data = ingest(s.data, contract, s.state / "data", secret=lineage.site_secret(s.state / "data"))
    except BaseException:
        ledger.close()
        raise
    out = Site(
        id=site, key=key, roster=roster, contract_hash=contract.hash, width=contract.width,
        classes=contract.classes, limits=settings.limits, X=data.X, y=data.y, evidence=data.evidence, ledger=ledger,
        store_for=lambda session: DirectoryStore(s.state / "sessions" / session),
        engine=settings.training.engine, device=pick_device(settings.training.device), models=s.state / "models",
        peers=PeerHeads(s.state / "peers.json"),
        contract=contract,
    )  # fmt: skip
    out.tidy()
    return out, data


def run(settings: SiteSettings, *, status: Callable[[str], None], wait: float = 60.0) -> None:
    """Ingest, dial out, take part in one run, end.

    Raises:
        FedveilError: whatever stopped the site; its class has a documented exit code.
    """
    if ":" not in settings.site.server:
        raise ConfigError(f"server = {settings.site.server!r} is not host:port")
    tls = load_tls(settings.site.identity)
    site, data = prepare(settings)
    status(f"ingested: {Path(settings.site.data).name} meets the contract; reports in {data.released.parent}")

    @contextmanager
    def resolve(context: Context) -> Iterator[Site]:
        yield site

    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        run_site(
            make_app(resolve), address=settings.site.server, tls=tls, site=site.id, node_config={}, stop=stop,
            on_status=status, wait=wait,
        )  # fmt: skip
    finally:
        site.ledger.close()
