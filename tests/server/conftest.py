"""The server's app over real client apps in one process, any of which may be made to lie."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedveil.client.app import make_app as client_app
from fedveil.client.session import Site
from fedveil.common import flwr_adapter as flower
from fedveil.common.wire import Limits, Packet
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab import virtual_sites
from fedveil.deploy.transport.inprocess import Drop, InprocessGrid
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app
from fedveil.server.strategy import SecureSumStrategy

Lie = Callable[[int, str, Packet], Packet | RecordDict]


def small_plan(**changes: Any) -> PrivacyPlan:
    """ε = 2 in four steps of a logistic model with three features, four sites, t = d = 1, the sum in the clear."""
    values: dict[str, Any] = {
        "sum": "plain", "sites": 4, "records": 40, "epsilon": 2.0, "steps": 4, "clip": 1.0,
        "contract_hash": "c" * 64, "model": ModelSpec(name="logistic", inputs=3, classes=2),
        "optimizer": Optimizer(learning_rate=0.5),
    }  # fmt: skip
    return make_plan(**{**values, **changes})


@dataclass
class Run:
    """One job in its folder, the virtual sites, and what may go wrong between them."""

    folder: Path
    plan: PrivacyPlan
    lie: Lie | None = None
    drop: Drop | None = None
    speaks_as: Callable[[int], int] = lambda i: i
    cap: float = 10.0
    options: dict[str, Any] = field(default_factory=dict)
    durable: bool = False
    grid: Callable[[InprocessGrid], Any] = lambda g: g
    sites: dict[int, Site] = field(default_factory=dict)

    strategy: SecureSumStrategy = field(init=False)

    def __post_init__(self) -> None:
        self.world = virtual_sites.World.make(self.plan.sites)
        self.job = jobs.create(
            self.folder, self.plan, self.world.roster, self.world.server, documents=self.world.documents(),
            durable=self.durable, engine="inprocess", **self.options,
        )  # fmt: skip

    def site(self, index: int) -> Site:
        """Virtual site ``index``, made when first asked for."""
        if index not in self.sites:
            rng = np.random.default_rng(index)
            X, y = rng.standard_normal((10, 3)).astype(np.float32), rng.integers(0, 2, 10)
            self.sites[index] = virtual_sites.make_site(
                self.world.roster, index, self.world.keys[index], self.plan, X, y, self.folder, cap=self.cap,
                engine="closed",
            )  # fmt: skip
        return self.sites[index]

    def go(self) -> str:
        """Run to the end; the status."""

        @contextmanager
        def resolve(context: Context):
            yield self.site(self.speaks_as(int(context.node_config["partition-id"])))

        server, self.strategy = server_app(self.job)
        client = _lying(client_app(resolve), self.lie)
        grid = InprocessGrid(client, self.world.sites, lambda _: {}, drop=self.drop)
        server(self.grid(grid), Context(grid.run.run_id, flower.SERVER_NODE, {}, RecordDict(), {}))
        return self.strategy.status

    def resume(self) -> str:
        """Go on with a run whose server stopped; the status."""
        self.job = jobs.resume(self.folder, self.world.roster, self.world.server, **self.options)
        return self.go()

    def bodies(self, kind: str) -> list[dict[str, Any]]:
        """The server's journal rows of one kind."""
        return [r.body for r in self.job.journal.of_kind(kind)]

    def spends(self, index: int) -> list[int]:
        """The rounds charged to a site."""
        return [r.body["round"] for r in self.site(index).ledger.journal.of_kind("spend")]


def _lying(app: ClientApp, lie: Lie | None) -> ClientApp:
    if lie is None:
        return app

    class Lying(ClientApp):
        """Lets ``lie`` rewrite every answer that is no error."""

        def __call__(self, message: Message, context: Context) -> Message:
            out = app(message, context)
            if out.has_error():
                return out
            packet = flower.from_record(out.content, Limits())
            index = int(context.node_config["partition-id"])
            said = lie(index, message.metadata.message_type, packet)
            return Message(said, reply_to=message) if isinstance(said, RecordDict) else flower.reply(said, message)

    return Lying()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    """A maker of runs."""
    count = iter(range(100))

    def make(
        *, lie: Lie | None = None, drop: Drop | None = None, cap: float = 10.0, options: dict[str, Any] | None = None,
        speaks_as: Callable[[int], int] = lambda i: i, durable: bool = False,
        grid: Callable[[InprocessGrid], Any] = lambda g: g, **plan: Any,
    ) -> Run:  # fmt: skip
        folder = tmp_path / f"run-{next(count)}"
        return Run(folder, small_plan(**plan), lie, drop, speaks_as, cap, options or {}, durable, grid)

    return make


@pytest.fixture
def plans() -> Callable[..., PrivacyPlan]:
    """A maker of small plans; ``momentum`` and what ``optimizer`` holds are the optimiser's."""

    def make(momentum: float = 0.9, optimizer: dict[str, Any] | None = None, **changes: Any) -> PrivacyPlan:
        return small_plan(optimizer=Optimizer(learning_rate=0.5, momentum=momentum, **(optimizer or {})), **changes)

    return make
