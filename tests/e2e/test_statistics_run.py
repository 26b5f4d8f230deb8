"""Statistics from private rows, end to end in one process: plan, consent, ledger, sum, estimates, report, audit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedveil.client import round as line
from fedveil.client.app import make_app as client_app
from fedveil.client.records.release import encode
from fedveil.client.session import Site
from fedveil.common import contract as contracts
from fedveil.common import flwr_adapter, identity
from fedveil.common.contract import DataContract
from fedveil.common.errors import BudgetExhausted, PlanError, PolicyRefusal, ProtocolError, RunAborted
from fedveil.common.journal import parse
from fedveil.common.wire import Packet, sha256
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import EVALUATED, MetricSpec, StatsSpec, request
from fedveil.deploy.lab import virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy.anonymization import fixed
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.render import render_report
from fedveil.privacy.report.verify import verify_report
from fedveil.privacy.start import start
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app

SITES = 6
RECORDS = 3000
CONTRACT = DataContract.model_validate(
    {
        "name": "t", "version": "1", "purpose": "test", "unit": "one row is one patient", "k": 2,
        "columns": [
            {"name": "age", "role": "quasi", "type": "number", "low": 18, "high": 90, "levels": [40, 60],
             "unit": "years"},
            {"name": "bmi", "role": "feature", "type": "number", "low": 10, "high": 60, "unit": "kg/m2"},
            {"name": "bp", "role": "feature", "type": "number", "low": 60, "high": 200, "missing": "indicator"},
            {"name": "sick", "role": "target", "type": "category", "values": ["no", "yes"]},
        ],
    }
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """All sites' rows, in units and encoded, and who holds which."""

    bmi: np.ndarray
    bp: np.ndarray
    sick: np.ndarray
    X: np.ndarray
    y: np.ndarray
    parts: list[np.ndarray]


@pytest.fixture(scope="module")
def rows() -> Rows:
    g = np.random.default_rng(5)  # noqa: TID251
    age = g.uniform(18, 90, RECORDS)
    bmi = np.clip(g.normal(27, 5, RECORDS), 10, 60)
    bp = np.where(g.random(RECORDS) < 0.1, np.nan, np.clip(g.normal(120, 15, RECORDS), 60, 200))
    sick = np.where(bmi + g.normal(0, 4, RECORDS) > 28, "yes", "no").astype(object)
    columns: dict[str, Any] = {"age": age, "bmi": bmi, "bp": bp, "sick": sick}
    X, y = encode.encode(fixed.recode(columns, RECORDS, CONTRACT).table, CONTRACT)
    return Rows(bmi, bp, sick, X, y, np.array_split(np.arange(RECORDS), SITES))


class Consortium:
    """Six virtual sites whose ledgers outlive a run."""

    def __init__(self, home: Path, rows: Rows) -> None:
        self.home, self.rows = home, rows
        self.world = virtual_sites.World.make(SITES)
        self.runs = 0

    def site(self, index: int, plan: PrivacyPlan, cap: float) -> Site:
        r, part = self.rows, self.rows.parts[index]
        made = virtual_sites.make_site(
            self.world.roster, index, self.world.keys[index], plan, r.X[part], r.y[part], self.home, cap=cap
        )
        made.contract = CONTRACT
        return made

    def run(self, plan: PrivacyPlan, cap: float, **options: Any) -> Path:
        """One run over all sites; its folder, with a report."""
        flwr_adapter.quiet_flower()
        self.runs += 1
        out = self.home / f"run{self.runs}"
        signed = contracts.sign_contract(CONTRACT, self.world.consortium)
        documents = {**self.world.documents(), "contract.json": signed}
        job = jobs.create(
            out, plan, self.world.roster, self.world.server, documents=documents, durable=False,
            engine="inprocess", **options,
        )  # fmt: skip
        server, _ = server_app(job)
        kept = virtual_sites.Kept(lambda i: self.site(i, plan, cap))
        try:
            run_inprocess(server, client_app(kept.resolve), self.world.sites, lambda _: {})
        finally:
            kept.close()
        build_report(out, self.world.server)
        return out

    def charges(self, index: int) -> list[dict[str, Any]]:
        path = self.home / "ledgers" / f"{self.world.sites[index]}.jsonl"
        return [r.body for r in parse(path.read_bytes()) if r.kind == "spend"]


@pytest.fixture
def consortium(tmp_path: Path, rows: Rows) -> Consortium:
    return Consortium(tmp_path, rows)


def plan_for(spec: StatsSpec | ModelSpec, *, epsilon: float = 1.0, sum: Any = "keysum", **more: Any) -> PrivacyPlan:
    stats = isinstance(spec, StatsSpec)
    given: dict[str, Any] = {"steps": 1, "clip": spec.norm_bound} if stats else {"steps": 3, "clip": 1.0}
    return make_plan(
        sites=SITES, records=RECORDS, epsilon=epsilon, model=spec, optimizer=Optimizer(learning_rate=0.5),
        contract_hash=CONTRACT.hash, sum=sum, **(given | more),
    )  # fmt: skip


def everything() -> StatsSpec:
    return request(CONTRACT, ["count", "mean", "variance", "histogram", "quantiles"], columns=["bmi", "bp"])


def near(found: dict[str, Any], truth: Any) -> bool:
    return abs(found["estimate"] - truth) <= 6 * found["standard_error"]


def failed_checks(consortium: Consortium, run: Path) -> list[str]:
    """Names of the auditor's checks that fail."""
    result = verify_report(run / "report.json", consortium_key=identity.public_hex(consortium.world.consortium))
    assert len(result.checks) > 15
    return [c.name for c in result.checks if not c.passed]


@pytest.mark.parametrize("sum", ["keysum", "plain"])
def test_two_columns_end_to_end(consortium: Consortium, rows: Rows, sum: str) -> None:
    plan = plan_for(everything(), sum=sum)
    run = consortium.run(plan, cap=1.2)
    found = json.loads((run / "statistics.json").read_text())
    bmi, bp = found["columns"]["bmi"], found["columns"]["bp"]
    assert near(found["count"], RECORDS)
    assert near(bmi["mean"], rows.bmi.mean())
    assert near(bmi["variance"], rows.bmi.var())
    assert near(bp["present"], np.isfinite(rows.bp).sum())
    assert near(bp["mean"], np.nanmean(rows.bp))
    assert near(bp["variance"], np.nanvar(rows.bp))
    # the noise is really there, and the errors are small enough to be of use
    assert bmi["mean"]["estimate"] != rows.bmi.mean()
    assert bmi["mean"]["standard_error"] < 0.5
    true, _ = np.histogram(rows.bmi, bins=np.linspace(10, 60, 11))
    assert np.abs(np.array(bmi["histogram"]["noisy"]) - true).max() < 6 * bmi["histogram"]["standard_error"]
    for q in bmi["quantiles"]:
        assert abs(q["estimate"] - np.quantile(rows.bmi, q["p"])) < q["resolution"]
    # each site was charged one whole step at h shares, no more
    for i in range(SITES):
        (spend,) = consortium.charges(i)
        assert spend["event"] == plan.event.to_json()
        assert spend["round"] == 1
    # and an auditor agrees
    assert failed_checks(consortium, run) == []
    assert "statistics" in render_report(run / "report.json").read_text()


def test_an_altered_estimate_is_found(consortium: Consortium) -> None:
    run = consortium.run(plan_for(everything(), sum="plain"), cap=1.2)
    path = run / "statistics.json"
    genuine = path.read_bytes()
    altered = json.loads(genuine)
    altered["columns"]["bmi"]["mean"]["estimate"] += 0.5
    path.write_text(json.dumps(altered))
    assert failed_checks(consortium, run) == ["statistics"]
    path.unlink()
    assert failed_checks(consortium, run) == []  # like the model's file, it may be left out
    path.write_bytes(genuine)
    sums = bytearray((run / "model.f32").read_bytes())
    sums[2] ^= 1
    (run / "model.f32").write_bytes(sums)
    assert "model chain" in failed_checks(consortium, run)


def test_runs_compose_and_the_cap_stops_the_next(consortium: Consortium) -> None:
    plan = plan_for(request(CONTRACT, ["mean"], columns=["bmi"]), sum="plain")
    cap = plan_for(plan.model, sum="plain", epsilon=1.5).filter_epsilon()  # two such runs, not three
    consortium.run(plan, cap=cap)
    second = consortium.run(plan, cap=cap)
    report = json.loads((second / "report.json").read_text())["payload"]
    for i, site in enumerate(consortium.world.sites):
        assert len(consortium.charges(i)) == 2
        entry = report["sites"][site]
        assert entry["earlier_sessions"] == 1
        assert 0 < entry["epsilon_before"] < entry["epsilon_after"] <= cap
    with pytest.raises(BudgetExhausted):
        consortium.run(plan, cap=cap)
    assert all(len(consortium.charges(i)) == 2 for i in range(SITES))


def test_training_and_evaluation_on_the_same_rows_share_one_ledger(consortium: Consortium, rows: Rows) -> None:
    """Rows held back for testing are rows of the same people: their accuracy is charged where training was."""
    network = ModelSpec(name="logistic", inputs=CONTRACT.width, classes=2)
    train = plan_for(network, sum="plain", epsilon=2.0)
    trained = consortium.run(train, cap=4.0)
    weights = (trained / "model.f32").read_bytes()
    metric = MetricSpec(network=network, model_hash=sha256(weights), confusion=True)
    plan = plan_for(request(CONTRACT, ["confusion"], metric=metric), sum="plain")
    run = consortium.run(plan, cap=4.0, attached={EVALUATED: weights})
    found = json.loads((run / "statistics.json").read_text())["metrics"]

    W = np.frombuffer(weights, "<f4").astype(np.float64)
    scores = rows.X @ W[: 2 * CONTRACT.width].reshape(2, -1).T + W[2 * CONTRACT.width :]
    guess = scores.argmax(1)
    assert near(found["accuracy"], float((guess == rows.y).mean()))
    true = np.zeros((2, 2))
    np.add.at(true, (rows.y, guess), 1)
    assert np.abs(np.array(found["confusion"]["noisy"]) - true).max() < 6 * found["confusion"]["standard_error"]

    events = [c["event"]["sigma"] if "sigma" in c["event"] else c["event"] for c in consortium.charges(0)]
    assert len(events) == train.steps + 1
    assert events[-1] != events[0]
    assert failed_checks(consortium, run) == []
    entry = json.loads((run / "report.json").read_text())["payload"]["sites"][consortium.world.sites[0]]
    assert entry["epsilon_before"] > 0


def test_a_restarted_server_still_has_the_model_to_evaluate(consortium: Consortium, tmp_path: Path) -> None:
    network = ModelSpec(name="logistic", inputs=CONTRACT.width, classes=2)
    weights = np.arange(network.parameters, dtype="<f4").tobytes()
    metric = MetricSpec(network=network, model_hash=sha256(weights))
    plan, world = plan_for(request(CONTRACT, ["accuracy"], metric=metric), sum="plain"), consortium.world
    job = jobs.create(
        tmp_path / "r", plan, world.roster, world.server, documents=world.documents(), attached={EVALUATED: weights}
    )
    job.journal.close()
    again = jobs.resume(tmp_path / "r", world.roster, world.server)
    again.journal.close()
    assert again.attached == {EVALUATED: weights}
    assert not again.state.weights.any()


class TestRefusals:
    """What a site does not do, whatever it is asked."""

    def test_without_the_owners_consent(self, consortium: Consortium) -> None:
        plan = plan_for(everything(), sum="plain")
        site = consortium.site(0, plan, 2.0)
        site.limits = site.limits.model_copy(update={"tasks": type(site.limits)(max_epsilon=1).tasks})
        with pytest.raises(PolicyRefusal, match="'stats'"):
            line.join(site, self.proposal(consortium, plan))
        assert not list(site.ledger.journal.of_kind("spend"))
        site.ledger.close()

    def test_a_run_ends_before_it_begins(self, consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
        make = virtual_sites.make_site

        def unwilling(*a: Any, **k: Any) -> Site:
            site = make(*a, **k)
            site.limits = site.limits.model_copy(update={"tasks": ("train",)})
            return site

        monkeypatch.setattr(virtual_sites, "make_site", unwilling)
        with pytest.raises(RunAborted, match="'stats'"):
            consortium.run(plan_for(everything(), sum="plain"), cap=2.0)
        assert consortium.charges(0) == []

    @pytest.mark.parametrize(
        "change",
        [{"clip": 1.0}, {"steps": 2}, {"sample_rate": 0.5}, {"clamp": 10.0}, {"mode": "client"}, {"records": 10**12}],
        ids=lambda c: next(iter(c)),
    )
    def test_plans_that_cut_or_sample(self, consortium: Consortium, change: dict[str, Any]) -> None:
        plan = plan_for(everything(), sum="plain")
        site = consortium.site(0, plan, 2.0)
        with pytest.raises(PlanError):
            line.join(site, self.proposal(consortium, plan, **change))
        site.ledger.close()

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("columns", 0, "at"), 0), (("columns", 0, "high"), 50.0), (("columns", 0, "column"), "age"),
            (("columns", 1, "missing"), False), (("inputs",), 7),
        ],
    )  # fmt: skip
    def test_specs_that_read_the_records_otherwise(self, consortium: Consortium, path: tuple, value: Any) -> None:
        plan = plan_for(everything(), sum="plain")
        site = consortium.site(0, plan, 2.0)
        asked = self.proposal(consortium, plan)
        line.join(site, asked)  # negative control: unchanged it is accepted
        tampered = plan.to_json()
        inner = tampered["model"]
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        with pytest.raises((ProtocolError, PlanError)):
            line.join(site, Packet({**asked.header, "plan": tampered, "session": "b" * 64}))
        site.ledger.close()

    def test_another_plan_after_the_signature(self, consortium: Consortium) -> None:
        plan = plan_for(everything(), sum="plain")
        site = consortium.site(0, plan, 2.0)
        line.join(site, self.proposal(consortium, plan))
        other = plan_for(request(CONTRACT, ["count"]), sum="plain")
        ask = {"kind": "contribute", "session": "a" * 64, "round": 1, "nonce": "n", "plan_hash": other.hash}
        with pytest.raises(ProtocolError, match="another plan"):
            line.contribute(site, Packet(ask))
        assert not list(site.ledger.journal.of_kind("spend"))
        site.ledger.close()

    def test_other_weights_than_the_plan_names(self, consortium: Consortium) -> None:
        network = ModelSpec(name="logistic", inputs=CONTRACT.width, classes=2)
        weights = bytes(4 * network.parameters)
        metric = MetricSpec(network=network, model_hash=sha256(weights))
        plan = plan_for(request(CONTRACT, ["accuracy"], metric=metric), sum="plain")
        site = consortium.site(0, plan, 2.0)
        line.join(site, self.proposal(consortium, plan))
        ask = {"kind": "contribute", "session": "a" * 64, "round": 1, "nonce": "n", "plan_hash": plan.hash}
        ask["state"] = start(plan).digest
        other = b"\x00\x00\x80\x3f" + weights[4:]
        for buffers in ({}, {EVALUATED: other}, {EVALUATED: weights[4:]}):
            with pytest.raises(ProtocolError):
                line.contribute(site, Packet(ask, buffers))
        assert not list(site.ledger.journal.of_kind("spend"))
        line.contribute(site, Packet(ask, {EVALUATED: weights}))  # negative control
        assert len(list(site.ledger.journal.of_kind("spend"))) == 1
        site.ledger.close()

    @staticmethod
    def proposal(consortium: Consortium, plan: PrivacyPlan, **change: Any) -> Packet:
        header = {
            "kind": "join", "session": "a" * 64, "plan": plan.to_json() | change,
            "roster_hash": consortium.world.roster.hash, "contract_hash": CONTRACT.hash,
        }  # fmt: skip
        return Packet(header)
