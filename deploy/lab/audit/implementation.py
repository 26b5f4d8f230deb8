"""This program as an :class:`~fedveil.privacy.audit.evidence.Implementation`: its own apps, in one process."""

from __future__ import annotations

import logging
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from fedveil.client import train
from fedveil.client.app import make_app as client_app
from fedveil.client.session import Session, Site
from fedveil.common import flwr_adapter
from fedveil.common.errors import SumTooLong
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.common.workload.statistics import EVALUATED, StatsSpec
from fedveil.common.workload.torch.networks import build, flatten
from fedveil.deploy.lab import virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy import norm_cap
from fedveil.privacy.audit.evidence import Charge, Part, Release, Run
from fedveil.privacy.dp.clipping import Precision
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.secagg.interface import Integers, ServerSum, SiteSum
from fedveil.privacy.start import start
from fedveil.server import job as jobs
from fedveil.server.strategy import SecureSumStrategy

Opened = tuple[NDArray[np.int64], tuple[SiteId, ...]]


class _Seen:
    """A server's half of the secure sum that keeps what it opens. In all else it is the real one.

    What was opened was released, however long it is. Nobody steps on a sum over the norm's cap. In its place the server
    and the sites (:class:`_Handed`) go on with zeros, so that an examination of a program that does not clip comes to
    its end.

    Attributes:
        sums: what was opened, with its members.
        read: what a member reads in a blinded sum, where only the sites learn the sums.
    """

    def __init__(self, inner: ServerSum, plan: PrivacyPlan) -> None:
        self.inner, self._plan = inner, plan
        self.sums: list[Opened] = []
        self.read: Callable[[Packet], Opened] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def result(self) -> Opened:
        """The opened sum, kept."""
        values, members = self.inner.result()
        self.sums.append((values, members))
        return _stepped_on(self._plan, values, members)

    def opened(self) -> Packet:
        """The opened sum for the sites; what they read in a blinded one is kept."""
        packet = self.inner.opened()
        if self._plan.reveal_to == "sites" and self.read is not None:
            self.sums.append(self.read(packet))
        return packet


class _Handed:
    """A site's half of the secure sum that keeps what it is handed. In all else it is the real one."""

    def __init__(self, inner: SiteSum, plan: PrivacyPlan, keep: Callable[[int, Integers], None]) -> None:
        self.inner, self._plan, self._keep = inner, plan, keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def contribute(self, round: int, nonce: str, values: Integers, *more: Any) -> Packet:
        """The contribution; its values are kept as they were before any encryption."""
        self._keep(round, values)
        return self.inner.contribute(round, nonce, values, *more)

    def opened(self, packet: Packet) -> Opened:
        """The sum that the site steps on."""
        values, members = self.inner.opened(packet)
        return (values, members) if self._plan.reveal_to == "sites" else _stepped_on(self._plan, values, members)


class _Watched(SecureSumStrategy):
    """The real strategy; what it opens and where the model goes can be read afterwards."""

    def __init__(self, job: jobs.Job) -> None:
        super().__init__(job)
        self.seen = _Seen(self._sum, job.plan)
        self._sum = cast(ServerSum, self.seen)

    def bring_up_to_date(self) -> None:
        """Let every site apply the last sum now, where only the sites can."""
        if self.plan.reveal_to == "sites":
            link, header = self._exchange, {"kind": "apply", "session": self.job.session}
            link.packets(link.ask(self._opened.packets(link.nodes, header), "query.apply"))

    def _record(self, number: int, metrics: MetricRecord | None, seconds: float) -> None:
        """Write no line of metrics: to compute its ε would take longer than the round."""
        self.job.progress("round", {"round": number, "members": dict(metrics or {}).get("members", 0)})


@dataclass(frozen=True)
class InProcess:
    """Runs plans with the programs of this package: clip, sample, share, encrypt, sum, open.

    Attributes:
        engine, precision: of per-record clipping, as in ``site.toml``.
        kept: how many numbers of single sites' contributions are kept of a run; beyond that, of a few sites a round,
            drawn at random.
    """

    engine: str = "closed"
    precision: Precision = "float32"
    kept: int = 1 << 23

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
                has no such choice: it can only move the model within the norm's cap, and under ``keysum`` only together
            with a member.
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
        begun = start(plan) if weights is None else ModelState.start(weights, plan.optimizer)
        job = jobs.create(
            folder / "run", plan, world.roster, world.server, documents={}, durable=False, engine="inprocess",
            attached=_attached(plan), begun=begun,
        )  # fmt: skip
        strategy = _Watched(job)
        handed: dict[int, dict[int, NDArray[np.float64]]] = {}
        chosen, carried = self._chosen(plan), cap or plan.filter_epsilon()

        def make(i: int) -> Site:
            site = virtual_sites.make_site(
                world.roster, i, world.keys[i], plan, *parts[i], folder, cap=carried, engine=self.engine
            )
            site.start = lambda _: begun
            site.precision = self.precision

            def keep(number: int, values: Integers) -> None:
                if i in chosen[number - 1]:
                    handed.setdefault(number, {})[i] = values.astype(np.float64) * plan.grid

            _listen(site, keep)
            return site

        kept = virtual_sites.Kept(make)
        sites = kept.sites

        def read(packet: Packet) -> Opened:
            return _member(job, sites).sum.opened(packet)

        strategy.seen.read = read
        moves = _moves(strategy, sites)

        def drop(site: SiteId, message: Any) -> bool:
            m = message.metadata
            number = int(m.group_id) if m.message_type == "train.contribute" else 0
            return 0 < number <= len(absent) and world.sites.index(site) in absent[number - 1]

        try:
            run_inprocess(_server(strategy), client_app(kept.resolve), world.sites, lambda _: {}, drop=drop)
            position = {s: i for i, s in enumerate(world.sites)}
            return Run(
                _releases(plan, strategy.seen.sums, moves, position, handed), strategy.status,
                {position[s.id]: _charge(s) for s in sites},
            )  # fmt: skip
        finally:
            job.journal.close()
            kept.close()

    def seats(self, records: int, rate: float, places: int) -> NDArray[np.int64]:
        """See :class:`~fedveil.privacy.audit.evidence.Implementation`."""
        return train.seat(records, rate, places)

    def _chosen(self, plan: PrivacyPlan) -> list[frozenset[int]]:
        """For every round, the sites whose contributions are kept: all, or a few that are drawn anew."""
        room = max(1, self.kept // (plan.model.parameters * plan.steps))
        if room >= plan.sites:
            return [frozenset(range(plan.sites))] * plan.steps
        draw = secrets.SystemRandom()
        return [frozenset(draw.sample(range(plan.sites), room)) for _ in range(plan.steps)]


def _attached(plan: PrivacyPlan) -> dict[str, bytes]:
    """The model that a plan of statistics evaluates: its public initialisation."""
    metric = plan.model.metric if isinstance(plan.model, StatsSpec) else None
    return {} if metric is None else {EVALUATED: flatten(build(metric.network)).astype("<f4").tobytes()}


def _listen(site: Site, keep: Callable[[int, Integers], None]) -> None:
    """Have ``keep`` told what ``site`` hands to the sum of every session that it accepts."""
    accept = site.accept

    def accepted(*given: Any, **named: Any) -> Session:
        session = accept(*given, **named)
        if not isinstance(session.sum, _Handed):
            session.sum = cast(SiteSum, _Handed(session.sum, session.plan, keep))
        return session

    site.accept = accepted


def _stepped_on(plan: PrivacyPlan, values: NDArray[np.int64], members: tuple[SiteId, ...]) -> Opened:
    """What server and sites step on: zeros in place of a sum over the norm's cap."""
    try:
        norm_cap.check(plan, values, len(members))
    except SumTooLong:
        return np.zeros_like(values), members
    return values, members


def _member(job: jobs.Job, sites: list[Site]) -> Session:
    """The session as the first site has it."""
    return sites[0].session(job.session)


def _moves(strategy: _Watched, sites: list[Site]) -> list[NDArray[np.float64]]:
    """The model at the start and after every round; the first site's where the server has none. It fills in the run."""
    job = strategy.job
    states = [job.state.weights]

    def progress(kind: str, facts: dict[str, Any]) -> None:
        if kind != "round" or not facts["members"]:
            return
        strategy.bring_up_to_date()
        blinded = job.plan.reveal_to == "sites"
        states.append((sites[0].model(_member(job, sites)).held if blinded else job).state.weights)

    job.progress = progress
    return states


def _charge(site: Site) -> Charge:
    rows = [r.body["event"] for r in site.ledger.journal.of_kind("spend")]
    prices = sorted({(float(e["sample_rate"]), float(e["noise_multiplier"])) for e in rows})
    return Charge(len(site.ledger.tally.by_round), site.ledger.tally.epsilon, tuple(prices))


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
    opened: list[Opened],
    states: list[NDArray[np.float64]],
    position: dict[SiteId, int],
    handed: Mapping[int, Mapping[int, NDArray[np.float64]]],
) -> tuple[Release, ...]:
    out: list[Release] = []
    for number, ((values, names), before, after) in enumerate(zip(opened, states[:-1], states[1:], strict=True), 1):
        members = tuple(position[m] for m in names)
        kept = {i: v for i, v in handed.get(number, {}).items() if i in members}
        out.append(Release(members, values.astype(np.float64) * plan.grid, _applied(plan, before, after), kept))
    return tuple(out)


def _applied(plan: PrivacyPlan, before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the model was moved by, in the unit of the averaged sum."""
    if plan.task == "stats":  # the sum itself is added
        return (after - before) / plan.divisor
    o = plan.optimizer
    return (before - after) / (o.server_rate if plan.mode == "client" else o.learning_rate)
