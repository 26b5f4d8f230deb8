"""Four sites of a made-up consortium and the messages of a server that may lie."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.client import round as line
from fedveil.client.session import Site
from fedveil.common import identity
from fedveil.common.identity import SERVER, Member, Roster
from fedveil.common.settings import LimitsSection
from fedveil.common.units import Delta, Epsilon, SiteId
from fedveil.common.wire import Packet
from fedveil.common.workload.model import ModelSpec
from fedveil.privacy.joining import sum_spec
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.secagg.opened_sum import pack, with_sums
from fedveil.privacy.secagg.store import DirectoryStore
from fedveil.privacy.start import start

CONTRACT = "c" * 64
INPUTS = 3


def small_plan(**changes: Any) -> PrivacyPlan:
    """ε = 2 in four steps of a logistic model with three features, four sites, t = d = 1."""
    values: dict[str, Any] = {
        "sites": 4, "records": 40, "epsilon": 2.0, "steps": 4, "clip": 1.0, "contract_hash": CONTRACT,
        "model": ModelSpec(name="logistic", inputs=INPUTS, classes=2), "optimizer": Optimizer(learning_rate=0.5),
    }  # fmt: skip
    return make_plan(**{**values, **changes})


@dataclass
class World:
    """The consortium; ``sites`` can be closed and opened again on the same folders, as after a crash."""

    folder: Path
    plan: PrivacyPlan
    cap: float
    session: str = field(default_factory=lambda: secrets.token_hex(32))
    limits: dict[str, Any] = field(default_factory=dict)
    forge: Callable[..., Packet] | None = None

    def __post_init__(self) -> None:
        self.keys: list[Ed25519PrivateKey] = [identity.new_signing_key() for _ in range(self.plan.sites)]
        members = tuple(Member(SiteId(f"site-{i + 1}"), identity.public_hex(k)) for i, k in enumerate(self.keys))
        self.roster = Roster("small", Member(SERVER, "a" * 64), members)
        self.sites = [self.open(i) for i in range(self.plan.sites)]

    def open(self, index: int) -> Site:
        """Site ``index`` on its own folder, durable."""
        rng = np.random.default_rng(index)
        member = self.roster.sites[index]
        own = self.folder / member.site
        ledger = Ledger.open(
            own / "ledger.jsonl", member.site, self.keys[index], lineage="small", cap=Epsilon(self.cap),
            delta=Delta(self.plan.delta), unit=self.plan.unit,
        )  # fmt: skip
        limits = LimitsSection(**{"max_epsilon": self.cap, "modes": (self.plan.mode,), **self.limits})
        if "sums" not in self.limits:  # of the plan, a sum in the clear too, which no owner can allow
            limits = limits.model_copy(update={"sums": (self.plan.sum,)})
        return Site(
            id=member.site, key=self.keys[index], roster=self.roster, contract_hash=CONTRACT, width=INPUTS, classes=2,
            limits=limits, X=rng.standard_normal((10, INPUTS)).astype(np.float32),
            y=rng.integers(0, 2, 10), evidence={}, ledger=ledger, engine="closed", capacity=12,
            store_for=lambda session: DirectoryStore(own / "sessions" / session),
        )  # fmt: skip

    def reopen(self, index: int) -> Site:
        """Site ``index`` as a new process finds it."""
        self.sites[index].ledger.close()
        self.sites[index] = self.open(index)
        return self.sites[index]

    def proposal(self, **changes: Any) -> Packet:
        """The server's ``join``."""
        header = {"kind": "join", "session": self.session, "plan": self.plan.to_json(),
                  "roster_hash": self.roster.hash, "contract_hash": CONTRACT}  # fmt: skip
        return Packet({**header, **changes})

    def statements(self) -> dict[str, Any]:
        """Every site's signed statement."""
        return {s.id: line.join(s, self.proposal()).header["statement"] for s in self.sites}

    def begin(self) -> World:
        """Join and begin at all sites."""
        joins = self.statements()
        for s in self.sites:
            line.begin(s, Packet({"kind": "begin", "session": self.session, "joins": joins}))
        return self

    def request(self, round_: Any = 1, sums: Sequence[Packet] = (), **changes: Any) -> Packet:
        """The server's ``contribute``, from the start of training; with ``sums`` it also names the ``state`` after."""
        header = {"kind": "contribute", "session": self.session, "round": round_, "nonce": f"nonce-{round_}",
                  "plan_hash": self.plan.hash, "state": start(self.plan).digest}  # fmt: skip
        return with_sums({**header, **changes}, {}, sums)

    def opened(self, round_: int, values: Any) -> Packet:
        """What a round opened to, in grid units; under ``keysum`` as all members together could have it."""
        spec, members = sum_spec(self.plan, self.session, self.roster), [m.site for m in self.roster.sites]
        if self.plan.sum == "keysum" and self.forge is not None:
            return self.forge(spec, dict(zip(members, self.keys, strict=True)), round_, values)
        return pack(spec, round_, members, np.asarray(values, np.int64))

    def finish(self, **changes: Any) -> Packet:
        """The server's ``finish``."""
        header = {"kind": "finish", "session": self.session, "status": "COMPLETED", "round": 1,
                  "model_hash": start(self.plan).hash, "state": start(self.plan).digest}  # fmt: skip
        return Packet({**header, **changes})

    def spends(self, index: int = 0) -> list[int]:
        """The rounds charged to a site's ledger."""
        return [r.body["round"] for r in self.sites[index].ledger.journal.of_kind("spend")]


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest, forge_opening: Callable[..., Packet]) -> Callable[..., World]:
    """A maker of worlds whose ledgers are closed at the end."""

    def make(*, cap: float = 3.0, limits: dict[str, Any] | None = None, **plan: Any) -> World:
        made = World(tmp_path / secrets.token_hex(4), small_plan(**plan), cap, limits=limits or {}, forge=forge_opening)
        request.addfinalizer(lambda: [s.ledger.close() for s in made.sites])
        return made

    return make
