"""This program as an :class:`~fedveil.privacy.audit.evidence.Implementation`: its own apps, in one process."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from fedveil.client.app import make_app as client_app
from fedveil.client.session import Site
from fedveil.common import flwr_adapter
from fedveil.common.units import SiteId
from fedveil.deploy.lab import virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy.audit.evidence import Charge, Part, Release, Run
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.secagg.interface import ServerSum
from fedveil.privacy.start import start
from fedveil.server import job as jobs
from fedveil.server.strategy import SecureSumStrategy


class _Seen:
    """A server's half of the secure sum that keeps what it opens. In all else it is the real one."""

    def __init__(self, inner: ServerSum) -> None:
        self.inner = inner
        self.opened: list[tuple[NDArray[np.int64], tuple[SiteId, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def result(self) -> tuple[NDArray[np.int64], tuple[SiteId, ...]]:
        """The opened sum, kept."""
        values, members = self.inner.result()
        self.opened.append((values, members))
        return values, members


class _Watched(SecureSumStrategy):
    """The real strategy; what it opens and where the model goes can be read afterwards."""

    def __init__(self, job: jobs.Job) -> None:
        super().__init__(job)
        self.seen = _Seen(self._sum)
        self._sum = cast(ServerSum, self.seen)

    def _record(self, number: int, metrics: MetricRecord | None, seconds: float) -> None:
        """Write no line of metrics: to compute its ε would take longer than the round."""
        self.job.progress("round", {"round": number, "members": dict(metrics or {}).get("members", 0)})


@dataclass(frozen=True)
class InProcess:
    """Runs plans with the programs of this package: clip, sample, share, encrypt, sum, open.

    Attributes:
        engine: of per-record clipping.
    """

    engine: str = "closed"

    def run(
        self,
        plan: PrivacyPlan,
        parts: Sequence[Part],
        *,
        absent: Sequence[frozenset[int]] = (),
        cap: float | None = None,
        weights: NDArray[np.float32] | None = None,
    ) -> Run:
        """See :class:`~fedveil.privacy.audit.evidence.Implementation`.

        Args:
            weights: where training starts, for an attack by a server; None: the plan's public start. A real server
                has no such choice: it can only move the model, by a sum that nobody verified, within the norm's cap.
        """
        flwr_adapter.quiet_flower()
        virtual_sites.fit_threads(plan.model.parameters)
        with _errors_only(), tempfile.TemporaryDirectory(prefix="fedveil-audit-") as folder:
            return self._run(plan, parts, absent, cap, weights, Path(folder))

    def _run(
        self,
        plan: PrivacyPlan,
        parts: Sequence[Part],
        absent: Sequence[frozenset[int]],
        cap: float | None,
        weights: NDArray[np.float32] | None,
        folder: Path,
    ) -> Run:
        world = virtual_sites.World.make(plan.sites)
        begun = start(plan) if weights is None else ModelState.start(weights)
        job = jobs.create(
            folder / "run", plan, world.roster, world.server, documents={}, durable=False, engine="inprocess",
            begun=begun,
        )  # fmt: skip
        states = [job.state.weights]

        def progress(kind: str, facts: dict[str, Any]) -> None:
            if kind == "round" and facts["members"]:
                states.append(job.state.weights)

        job.progress = progress
        strategy = _Watched(job)

        def make(i: int) -> Site:
            carried = cap or plan.filter_epsilon()
            site = virtual_sites.make_site(
                world.roster, i, world.keys[i], plan, *parts[i], folder, cap=carried, engine=self.engine
            )
            site.start = lambda _: begun
            return site

        resolve, sites = virtual_sites.keep(make)

        def drop(site: SiteId, message: Any) -> bool:
            m = message.metadata
            number = int(m.group_id) if m.message_type == "train.contribute" else 0
            return 0 < number <= len(absent) and world.sites.index(site) in absent[number - 1]

        try:
            run_inprocess(_server(strategy), client_app(resolve), world.sites, lambda _: {}, drop=drop)
            position = {s: i for i, s in enumerate(world.sites)}
            return Run(
                _releases(plan, strategy.seen.opened, states, position), strategy.status,
                {position[s.id]: Charge(len(s.ledger.tally.by_round), s.ledger.tally.epsilon) for s in sites},
            )  # fmt: skip
        finally:
            job.journal.close()
            for site in sites:
                site.ledger.close()


@contextmanager
def _errors_only() -> Iterator[None]:
    """Do not log drop-outs and a spent budget: an examination has them. What fails on a site's data is still logged."""
    log = logging.getLogger("fedveil")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _server(strategy: SecureSumStrategy) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy.start(grid)

    return app


def _releases(
    plan: PrivacyPlan,
    opened: list[tuple[NDArray[np.int64], tuple[SiteId, ...]]],
    states: list[NDArray[np.float64]],
    position: dict[SiteId, int],
) -> tuple[Release, ...]:
    rate = plan.optimizer.learning_rate
    return tuple(
        Release(
            tuple(position[m] for m in members), values.astype(np.float64) * plan.grid, (before - after) / rate
        )
        for (values, members), before, after in zip(opened, states[:-1], states[1:], strict=True)
    )  # fmt: skip
