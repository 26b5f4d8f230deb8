"""Two runs in a row on the same ledgers: the second ends where the filter says, and its report counts both.

How many steps that is, is computed here by dp-accounting alone, from the two plans and the cap.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from typer.testing import CliRunner

from fedveil.client.app import make_app as client_app
from fedveil.common import cli
from fedveil.common.errors import BudgetExhausted
from fedveil.common.journal import parse
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab import datasets, virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.report.build import build_report
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app
from fedveil.server.evaluate import Evaluator

CAPPED, CAP, PLENTY, DELTA = "site-0001", 1.5, 20.0, 1e-5
SPLIT = datasets.load("trivial", 3, 0)


def planned(*, epsilon: float, steps: int, rate: float) -> PrivacyPlan:
    """Three sites, none may be missing: one that stops stops the run."""
    return make_plan(
        sum="plain", sites=3, records=SPLIT.records, epsilon=epsilon, delta=DELTA, steps=steps, clip=1.0,
        sample_rate=rate, model=ModelSpec(name="logistic", inputs=SPLIT.inputs, classes=SPLIT.classes),
        optimizer=Optimizer(learning_rate=0.1), contract_hash="c" * 64,
    )  # fmt: skip


FIRST, SECOND = planned(epsilon=1.0, steps=5, rate=1.0), planned(epsilon=1.2, steps=40, rate=0.5)


@dataclass
class Consortium:
    """Three sites whose state outlives a run; one of them has a cap that counts."""

    state: Path
    world: virtual_sites.World

    def run(self, plan: PrivacyPlan, name: str) -> dict[str, object]:
        """Server and sites from the start, on the ledgers that lie there; the payload of the run's report."""
        out = self.state / name
        job = jobs.create(
            out, plan, self.world.roster, self.world.server, documents=self.world.documents(), durable=False,
            engine="inprocess", evaluate=Evaluator(plan.network, SPLIT.X_test, SPLIT.y_test),
        )  # fmt: skip
        server, _ = server_app(job)
        kept = virtual_sites.Kept(
            lambda i: virtual_sites.make_site(
                self.world.roster, i, self.world.keys[i], plan, *SPLIT.parts[i], self.state,
                cap=CAP if self.world.sites[i] == CAPPED else PLENTY, engine="closed",
            )
        )  # fmt: skip
        try:
            run_inprocess(server, client_app(kept.resolve), self.world.sites, lambda _: {})
        finally:
            kept.close()
            job.journal.close()
        build_report(out, self.world.server)
        return json.loads((out / "report.json").read_text())["payload"]


def epsilon(order: float, *composed: tuple[PrivacyPlan, int]) -> float:
    """ε of so many steps of each plan at one Rényi order, by dp-accounting alone."""
    accountant = RdpAccountant(orders=[order])
    for plan, steps in composed:
        gaussian = dp_event.GaussianDpEvent(plan.noise_multiplier)
        rate = plan.sample_rate
        if steps:
            accountant.compose(gaussian if rate == 1 else dp_event.PoissonSampledDpEvent(rate, gaussian), steps)
    aside = 1e-3 * DELTA if any(plan.sample_rate < 1 and steps for plan, steps in composed) else 0.0
    return float(accountant.get_epsilon(DELTA - aside))  # for samples that outgrow their places


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("state"), virtual_sites.World.make(3))


@pytest.fixture(scope="module")
def reports(consortium: Consortium) -> tuple[dict, dict]:
    return consortium.run(FIRST, "first"), consortium.run(SECOND, "second")


def test_the_second_run_stops_exactly_where_the_filter_says(consortium: Consortium, reports) -> None:
    first, second = reports
    rows = parse((consortium.state / "ledgers" / f"{CAPPED}.jsonl").read_bytes())
    order = rows[0].body["order"]
    allowed = max(k for k in range(SECOND.steps + 1) if epsilon(order, (FIRST, FIRST.steps), (SECOND, k)) <= CAP)
    assert 0 < allowed < SECOND.steps  # neither at once nor never
    assert epsilon(order, (FIRST, FIRST.steps), (SECOND, allowed + 1)) > CAP * 1.001  # and not by a rounding
    assert (first["status"], first["steps"]["applied"]) == ("COMPLETED", FIRST.steps)
    assert second["status"] == "BUDGET_EXHAUSTED"
    assert second["steps"]["applied"] == allowed
    charged = [r.body["plan_hash"] for r in rows if r.kind == "spend"]
    assert charged == [FIRST.hash] * FIRST.steps + [SECOND.hash] * allowed
    # a filter that had forgotten the first run would have let more through
    assert allowed < max(k for k in range(SECOND.steps + 1) if epsilon(order, (SECOND, k)) <= CAP)


def test_the_second_report_composes_both(consortium: Consortium, reports) -> None:
    first, second = reports
    order, done = second["sites"][CAPPED]["order"], second["steps"]["applied"]
    capped = second["sites"][CAPPED]
    assert capped["epsilon_before"] == pytest.approx(epsilon(order, (FIRST, FIRST.steps)), abs=1e-9)
    assert capped["epsilon_before"] == first["sites"][CAPPED]["epsilon_after"]
    assert capped["epsilon_after"] == pytest.approx(epsilon(order, (FIRST, FIRST.steps), (SECOND, done)), abs=1e-9)
    assert (capped["charged"], capped["earlier_sessions"], capped["exhausted"]) == (done, 1, True)
    assert "1 earlier sessions" in second["tuning"]["sentence"]
    for name in ("site-0002", "site-0003"):  # they had charged the step that the capped one refused, or were not asked
        other = second["sites"][name]
        assert done <= other["charged"] <= done + 1
        assert not other["exhausted"]
        assert other["epsilon_before"] > 0


@pytest.mark.parametrize("name", ["first", "second"])
def test_anybody_can_verify_it(consortium: Consortium, reports, name: str) -> None:
    key = (consortium.state / name / "consortium.pub").read_text().strip()
    result = CliRunner().invoke(
        cli.build(), ["audit", "verify", str(consortium.state / name / "report.json"), "--consortium-key", key]
    )
    assert result.exit_code == 0, result.output


def test_a_third_run_does_not_begin(consortium: Consortium, reports) -> None:
    before = (consortium.state / "ledgers" / f"{CAPPED}.jsonl").read_bytes()
    with pytest.raises(BudgetExhausted):
        consortium.run(SECOND, "third")
    after = parse((consortium.state / "ledgers" / f"{CAPPED}.jsonl").read_bytes())
    assert [r.kind for r in after[len(parse(before)) :]] == ["refused"]
