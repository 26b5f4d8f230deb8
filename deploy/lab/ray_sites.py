"""Virtual sites over Ray: each worker speaks for a part of them, from files in the run's folder.

A worker keeps its sites' ledger rows and stores as a simulation in one process does, in files of its own. Started again
on another machine, it reads them and goes on: a site that had kept its answer repeats it; one that was charged and had
not refuses, and misses the round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedveil.client import together as passes
from fedveil.client.app import make_app
from fedveil.common.wire import Packet
from fedveil.deploy.lab import together, virtual_sites
from fedveil.deploy.lab.resuming import Part, part_of
from fedveil.deploy.lab.seeded_noise import SEED, Seeded
from fedveil.deploy.lab.virtual_sites import World
from fedveil.deploy.transport.inprocess import run_on
from fedveil.deploy.transport.ray import Cluster, RayGrid
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.secagg.plain import Together


@dataclass(frozen=True)
class Asked:
    """How a simulation over Ray is carried out.

    Attributes:
        run: the run's folder, which every machine sees at this place.
        cap: of each ledger.
        engine: that computes clipped sums.
        noise_seed: for debugging; NOT PRIVATE.
        workers: so many share the sites.
    """

    run: Path
    cap: float
    engine: str
    noise_seed: int | None
    workers: int


class Host:
    """What lives in one worker: see :class:`fedveil.deploy.transport.ray.Host`."""

    def __init__(self, asked: Asked, position: int) -> None:
        self._part: Part = part_of(asked.run, f"-{position}")
        p = self._part
        virtual_sites.fit_threads(p.kept.plan.model.parameters)
        self._sites = virtual_sites.Kept(
            lambda i: virtual_sites.make_site(
                p.world.roster, i, p.world.keys[i], p.kept.plan, *p.records.parts[i], asked.run, cap=asked.cap,
                engine=asked.engine, log=p.kept.rows, stored=p.kept.stored,
            )
        )  # fmt: skip
        self._own = range(position, len(p.world.sites), asked.workers)
        self.app = Seeded(make_app(self._sites.resolve))
        self.node_config: dict[str, Any] = {} if asked.noise_seed is None else {SEED: asked.noise_seed}

    def together(self, sites: Sequence[int], request: Packet) -> Together:
        """What these sites contribute in one pass."""
        with self._part.kept.rows.together():
            return passes.contribute(map(self._sites.find, sites), request)

    def close(self) -> None:
        """Write the ledgers of the worker's sites."""
        for index in self._own:
            self._sites.find(index)
        self._sites.close()
        self._part.kept.close()


def workers_for(world: World) -> int:
    """How many workers share the sites of a run: one for each processor of the cluster."""
    cluster = Cluster()
    try:
        return min(len(world.sites), cluster.processors)
    finally:
        cluster.close()


def run_over_ray(server: Any, asked: Asked, world: World, plan: PrivacyPlan) -> None:
    """Run the server app to its end over the workers of a cluster; then have them write their ledgers.

    Args:
        server: a ServerApp; None: only the ledgers are missing.
    """
    cluster = Cluster()
    try:
        one_pass = together.fits(plan) and asked.noise_seed is None
        kind = together.RayTogetherGrid if one_pass else RayGrid
        grid = kind(cluster, partial(Host, asked), world.sites, asked.workers)
        if server is not None:
            run_on(server, grid)
        grid.close()
    finally:
        cluster.close()
