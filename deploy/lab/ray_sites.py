"""Virtual sites over Ray: any process may answer for any site, so a site's state lives in its folder.

Every message opens the site (its key, data, ledger, session store) and closes it again; the ledger's lock makes
sure that no two processes speak for one site at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.serverapp import ServerApp

from fedveil.client.app import make_app
from fedveil.client.session import Site
from fedveil.common import canonical, identity
from fedveil.deploy.lab.seeded_noise import SEED, Seeded
from fedveil.deploy.lab.sites import Sites
from fedveil.deploy.lab.virtual_sites import World, make_site
from fedveil.deploy.transport.ray import run_ray
from fedveil.privacy import plan as plans
from fedveil.privacy.plan import PrivacyPlan


@contextmanager
def _resolve(context: Context) -> Iterator[Site]:
    """The site behind a message, from its folder."""
    folder, index = Path(str(context.node_config["folder"])), int(context.node_config["partition-id"])
    own = folder / "sites" / str(index)
    roster = identity.roster_from_payload(canonical.loads((folder / "roster-payload.json").read_bytes()))
    plan = plans.from_json(canonical.loads((folder / "plan.json").read_bytes()))
    with np.load(own / "data.npz", allow_pickle=False) as data:
        X, y = data["X"], data["y"]
    key = identity.load_signing_key(own / "signing.key")
    site = make_site(
        roster, index, key, plan, X, y, folder, cap=float(context.node_config["cap"]),
        engine=str(context.node_config["engine"]), durable=True,
    )  # fmt: skip
    try:
        yield site
    finally:
        site.ledger.close()


app = Seeded(make_app(_resolve))


def run_over_ray(
    server: ServerApp,
    world: World,
    plan: PrivacyPlan,
    split: Sites,
    folder: Path,
    *,
    cap: float,
    engine: str,
    noise_seed: int | None,
) -> None:
    """Lay every site's key and data into ``folder`` (simulated keys and public data) and run on Flower's Ray engine."""
    (folder / "roster-payload.json").write_bytes(canonical.dumps(world.roster.payload))
    for index, (key, (X, y)) in enumerate(zip(world.keys, split.parts, strict=True)):
        own = folder / "sites" / str(index)
        identity.save_signing_key(own / "signing.key", key)
        np.savez(own / "data.npz", X=X, y=y)
    said = {"folder": str(folder.resolve()), "cap": cap, "engine": engine}
    if noise_seed is not None:
        said[SEED] = noise_seed
    run_ray(server, app, sites=world.sites, node_config=lambda _: said)
