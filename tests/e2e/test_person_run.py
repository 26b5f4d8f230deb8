"""Runs whose unit is the person: statistics and training, in one process, up to the verified report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedveil.client.app import make_app as client_app
from fedveil.client.session import Site
from fedveil.common import contract as contracts
from fedveil.common import flwr_adapter
from fedveil.common.contract import DataContract
from fedveil.common.errors import ProtocolError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import request
from fedveil.deploy.lab import virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.verify import verify_report
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app

SITES, PERSONS, ROWS = 4, 50, 3
CONTRACT = DataContract.model_validate(
    {
        "name": "visits", "version": "1", "purpose": "test", "unit": "one patient", "k": 2, "rows_per_person": ROWS,
        "columns": [
            {"name": "patient", "role": "identifier", "pseudonym": True},
            {"name": "dose", "role": "feature", "type": "number", "low": 0, "high": 10},
            {"name": "sick", "role": "target", "type": "category", "values": ["no", "yes"]},
        ],
    }
)  # fmt: skip


def plan_for(model: Any, **more: Any) -> PrivacyPlan:
    return make_plan(
        sites=SITES, records=SITES * PERSONS, capacity=64, rows_per_person=ROWS, epsilon=30.0, model=model,
        optimizer=Optimizer(learning_rate=0.5), contract_hash=CONTRACT.hash, **more,
    )  # fmt: skip


def table(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Persons with one to three rows; nobody's rows stand together."""
    g = np.random.default_rng(index)  # noqa: TID251
    whose = g.permutation(np.repeat(np.arange(PERSONS), g.integers(1, ROWS + 1, PERSONS)))
    persons = np.full((PERSONS, ROWS), -1)
    for p in range(PERSONS):
        own = np.flatnonzero(whose == p)
        persons[p, : len(own)] = own
    X = g.uniform(-1, 1, (len(whose), 1)).astype(np.float32)
    return X, (X[:, 0] > 0).astype(np.int64), persons


def run(plan: PrivacyPlan, home: Path, **options: Any) -> Path:
    flwr_adapter.quiet_flower()
    world = virtual_sites.World.make(SITES)
    documents = {**world.documents(), "contract.json": contracts.sign_contract(CONTRACT, world.consortium)}
    job = jobs.create(
        home / "run", plan, world.roster, world.server, documents=documents, durable=False, engine="inprocess",
        **options,
    )  # fmt: skip

    def make(i: int) -> Site:
        X, y, persons = table(i)
        site = virtual_sites.make_site(world.roster, i, world.keys[i], plan, X, y, home, cap=200.0)
        site.contract, site.persons = CONTRACT, persons
        return site

    kept = virtual_sites.Kept(make)
    try:
        run_inprocess(server_app(job)[0], client_app(kept.resolve), world.sites, lambda _: {})
    finally:
        kept.close()
    build_report(home / "run", world.server)
    verify_report(home / "run" / "report.json").raise_for_failure()
    return home / "run"


def test_statistics_count_persons_and_weight_their_rows(tmp_path) -> None:
    spec = request(CONTRACT, ["count", "mean"], columns=["dose"])
    done = run(plan_for(spec, steps=1, clip=spec.norm_bound), tmp_path)
    found = json.loads((done / "statistics.json").read_text())
    assert abs(found["count"]["estimate"] - SITES * PERSONS) < 15  # there are about 400 rows
    report = json.loads((done / "report.json").read_text())
    assert '"person"' in json.dumps(report)


def test_a_training_run_of_persons_is_charged_and_reported_as_such(tmp_path) -> None:
    model = ModelSpec(name="logistic", inputs=CONTRACT.width, classes=2)
    done = run(plan_for(model, steps=3, clip=1.0), tmp_path)
    ledger = (tmp_path / "ledgers" / "site-0001.jsonl").read_text()
    assert '"unit":"person"' in ledger
    assert '"capacity":64' in ledger
    assert json.loads((done / "plan.json").read_text())["unit"] == "person"


def test_a_plan_of_records_is_refused_by_a_site_of_persons(tmp_path) -> None:
    model = ModelSpec(name="logistic", inputs=CONTRACT.width, classes=2)
    plan = plan_for(model, steps=1, clip=1.0)
    world = virtual_sites.World.make(SITES)
    X, y, persons = table(0)
    site = virtual_sites.make_site(world.roster, 0, world.keys[0], plan, X, y, tmp_path, cap=200.0)
    site.contract, site.persons = CONTRACT, persons[:, :2]
    with pytest.raises(ProtocolError, match="3 rows of each person, this site's contract 2"):
        site.accept("a" * 64, plan.to_json(), world.roster.hash, CONTRACT.hash)
    site.ledger.close()
