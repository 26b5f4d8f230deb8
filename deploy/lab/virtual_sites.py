"""Virtual sites: the same client app over many sites in one process, or over Ray.

What a simulation leaves out is to wait for the disk (what is written survives the process, not a power cut) and
identity checks by TLS. Plans, charges, noise, clipping and the secure sum are the real ones; with ``plain`` the sum
itself is the only stand-in.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from fedveil.client.session import Site
from fedveil.common import identity, threads
from fedveil.common.errors import VerificationError
from fedveil.common.identity import SERVER, Member, Roster
from fedveil.common.journal import RowLog
from fedveil.common.settings import LimitsSection
from fedveil.common.units import Delta, Epsilon, SiteId
from fedveil.privacy.dp.places import EMPTY
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.plan import MOST_BY_DEFAULT, PrivacyPlan
from fedveil.privacy.report import countersign, signatures
from fedveil.privacy.report.bundle import REPORT
from fedveil.privacy.secagg.store import DirectoryStore, MemoryStore, Store

LINEAGE, LEDGERS = "simulated", "ledgers"
_LOG = logging.getLogger("fedveil.simulation")
_SMALL = 200_000


def fit_threads(parameters: int) -> None:
    """Use one thread for networks whose steps take less time than waking a second one: torch, NumPy and our own.

    NumPy's second thread waits in a loop: a processor's whole time, for nothing.
    """
    if parameters < _SMALL:
        torch.set_num_threads(1)
        threadpool_limits(1)
        threads.use(1)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Collect garbage less often: a thousand ledgers are all alive, and looking at each costs a tenth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@dataclass(frozen=True)
class World:
    """A simulated consortium: fresh keys for its members."""

    consortium: Ed25519PrivateKey
    server: Ed25519PrivateKey
    keys: tuple[Ed25519PrivateKey, ...]
    roster: Roster

    @classmethod
    def make(cls, clients: int) -> World:
        """Keys and a roster for ``clients`` sites named site-0001, site-0002, ..."""
        keys = tuple(identity.new_signing_key() for _ in range(clients))
        server = identity.new_signing_key()
        members = tuple(Member(SiteId(f"site-{i + 1:04d}"), identity.public_hex(k)) for i, k in enumerate(keys))
        roster = Roster("simulated", Member(SERVER, identity.public_hex(server)), members)
        return cls(identity.new_signing_key(), server, keys, roster)

    @property
    def sites(self) -> list[SiteId]:
        """The sites' names in roster order."""
        return [m.site for m in self.roster.sites]

    def documents(self) -> dict[str, Any]:
        """What a run folder keeps of the consortium."""
        return {
            "roster.json": identity.sign_roster(self.roster, self.consortium),
            "consortium.pub": identity.public_hex(self.consortium) + "\n",
        }

    def countersign(self, run: Path) -> None:
        """Verify the report in ``run`` a single time, and sign it for every site whose own ledger it was made from.

        Raises:
            VerificationError: a check failed; nobody signs.
        """
        seen = countersign.see(run / REPORT, identity.public_hex(self.consortium))
        held: dict[str, Any] = {}
        for site, key in zip(self.sites, self.keys, strict=True):
            try:
                ledger = (run / LEDGERS / f"{site}.jsonl").read_bytes()
                held[site] = countersign.sign(seen, key, ledger)[1]
            except (VerificationError, OSError) as e:
                _LOG.warning("%s does not sign the report: %s", site, e)
        signatures.keep(run, held)


def make_site(
    roster: Roster,
    index: int,
    key: Ed25519PrivateKey,
    plan: PrivacyPlan,
    X: NDArray[np.float32],
    y: NDArray[np.int64],
    state: Path,
    *,
    cap: float,
    engine: str = "auto",
    durable: bool = False,
    log: RowLog | None = None,
    stored: Callable[[SiteId], Store] = lambda _: MemoryStore(),
) -> Site:
    """One virtual site; its limits allow what the simulation asks for, its cap is enforced like any other.

    Args:
        log: where the rows of its ledger are kept until the run has ended (:class:`~fedveil.common.journal.RowLog`).
        stored: makes the store of the one session of a site that is not durable.
    """
    member = roster.sites[index]
    # Nothing real is here: where the plan states no capacity, the size of the part will do.
    stated = plan.capacity < min(plan.records, MOST_BY_DEFAULT)
    capacity = plan.capacity if stated else max(1, len(X))
    ledger = Ledger.open(
        state / LEDGERS / f"{member.site}.jsonl", member.site, key, lineage=LINEAGE,
        cap=Epsilon(cap), delta=Delta(plan.delta), unit=plan.unit, capacity=capacity, durable=durable, log=log,
    )  # fmt: skip
    limits = LimitsSection(
        max_epsilon=max(cap, plan.epsilon), delta=plan.delta, min_noise_multiplier=0.0, tasks=(plan.task,),
        modes=(plan.mode,), min_sites=1, min_honest=1, min_colluders=0, committee=True,
    )  # fmt: skip
    # Nobody's records are here: a fallback may be of any size. And "plain" is no sum that a site.toml can allow.
    limits = limits.model_copy(update={"sums": (plan.sum,), "max_fallback_epsilon": math.inf})
    stores: dict[str, Store] = {}
    persons = None
    if plan.unit == "person":  # nobody said whose the rows are: each is a person's only one
        persons = np.full((len(X), plan.rows_per_person), EMPTY, np.int64)
        persons[:, 0] = np.arange(len(X))

    def store_for(session: str) -> Store:
        if durable:
            return DirectoryStore(state / "stores" / member.site / session)
        if session not in stores:
            stores[session] = stored(member.site)
        return stores[session]

    return Site(
        id=member.site, key=key, roster=roster, contract_hash=plan.contract_hash,
        width=X.shape[1], classes=plan.model.classes, limits=limits, X=X, y=y,
        evidence={"contract_hash": plan.contract_hash, "criteria": {}, "stability_factor": 1,
                  "unit": f"one {plan.unit} of the simulated data", "commitments": {}},
        ledger=ledger, store_for=store_for, capacity=capacity, engine=engine, persons=persons,
    )  # fmt: skip


class Kept:
    """For the in-process engine: a site is made when it is first asked, and kept.

    Args:
        make: makes the site at a position.

    Attributes:
        sites: those that were made, in the order in which they were.
    """

    def __init__(self, make: Callable[[int], Site]) -> None:
        self._make, self._made = make, dict[int, Site]()
        self.sites: list[Site] = []

    def find(self, index: int) -> Site:
        """The site at a position."""
        if index not in self._made:
            self._made[index] = self._make(index)
            self.sites.append(self._made[index])
        return self._made[index]

    @contextmanager
    def resolve(self, context: Context) -> Iterator[Site]:
        """The site that a message is for."""
        yield self.find(int(context.node_config["partition-id"]))

    def close(self) -> None:
        """Write every ledger."""
        for site in self.sites:
            site.ledger.close()
