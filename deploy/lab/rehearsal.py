"""``fedveil simulate --federation``: a real ``federation.toml`` tried out over virtual sites, before it is sent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedveil.common.errors import UsageError
from fedveil.deploy.lab.partition import parse
from fedveil.deploy.lab.sites import Sites
from fedveil.deploy.lab.split import held_out

if TYPE_CHECKING:
    from fedveil.common.contract import DataContract
    from fedveil.common.settings import Federation
    from fedveil.deploy.lab.simulate import Config


def sites_for(
    settings: Federation, contract: DataContract, table: Path | None, *, clients: int, by: str, seed: int, test: float
) -> Sites:
    """A public or made-up table, encoded by the contract as real sites encode theirs, dealt out to virtual sites.

    Args:
        table: by default the federation's own public table.

    Raises:
        UsageError: there is no table, or it cannot be dealt out so. DataError: it does not meet the contract.
    """
    from fedveil.deploy.server_process import public_table

    path = table or settings.federation.public_test
    if path is None:
        raise UsageError(
            "a rehearsal needs records", hint="--dataset TABLE.csv, which may be made up, or [federation] public_test"
        )
    rule = parse(by)
    if isinstance(rule, str):
        raise UsageError("a rehearsal does not deal out by a column", hint="iid, dirichlet, shards or quantity")
    X, y = public_table(path, contract)
    rng = np.random.default_rng(seed)  # noqa: TID251 - public data
    held, kept = held_out(y, contract.classes, test, rng)
    parts = [(X[kept[i]], y[kept[i]]) for i in rule(y[kept], clients, rng)]
    return Sites(parts, X[held], y[held], contract.classes, contract.feature_names, source=path.name)


def config_for(settings: Federation, config: Config, sites: Sites) -> Config:
    """``config`` with what the settings decide: the run's folder says what was simulated."""
    from dataclasses import replace

    p, o = settings.privacy, settings.optimizer
    return replace(
        config, clients=len(sites), dataset=sites.source, epsilon=p.epsilon or 0.0, noise_multiplier=p.noise_multiplier,
        delta=p.delta, mode=p.mode, sum=p.sum, steps=p.steps, clip=p.clip, sample_rate=p.sample_rate,
        network=settings.model.name, hidden=settings.model.hidden, learning_rate=o.learning_rate, momentum=o.momentum,
        local_steps=p.local_steps, colluders=p.colluders, dropouts=p.dropouts,
        reveal_to=p.reveal_to, committee=p.committee, force=p.few_clients, local_batch=p.local_batch,
        optimizer=o.name, second_moment=o.second_moment, stabiliser=o.stabiliser, server_rate=o.server_rate,
        schedule=o.schedule, averaging=o.averaging, proximal=o.proximal, patience=settings.run.patience,
        stop_metric=settings.run.stop_metric,
    )  # fmt: skip
