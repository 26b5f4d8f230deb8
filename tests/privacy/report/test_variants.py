"""Runs of every kind verify, and their reports say what kind they were."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from fedveil.common import canonical
from fedveil.common.errors import FedveilError, VerificationError
from fedveil.common.journal import Row
from fedveil.privacy.dp.accounting import gaussian_epsilon
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.charges import compose
from fedveil.privacy.report.render import render_html
from fedveil.privacy.report.verify import verify_report


def plan_like(base: PrivacyPlan, **changes) -> PrivacyPlan:
    values = {
        "sites": 4, "records": 800, "epsilon": 2.0, "steps": 4, "clip": 1.0, "model": base.model,
        "optimizer": Optimizer(learning_rate=0.5), "contract_hash": base.contract_hash,
    }  # fmt: skip
    return make_plan(**{**values, **changes})


def checked(w) -> dict:
    v = verify_report(w.report, consortium_key=w.public)
    v.raise_for_failure()
    document = canonical.loads(w.report.read_bytes())
    assert "<html" in render_html(document)
    assert document["payload"]["simulated"] == v.simulated
    return document["payload"]


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "local", "sum": "none"},
        {"mode": "client", "few_clients": True},
        {"sum": "sharedkey"},
        {"colluders": 0, "dropouts": 1},
        {"sample_rate": 0.2, "steps": 8},
    ],
)
def test_every_mode_and_sum(make, honest, changes) -> None:
    p = checked(make(plan_like(honest.plan, **changes)))
    assert p["claim"]["epsilon"] <= 2.0
    assert p["claim"]["fallback_epsilon"] >= p["claim"]["epsilon"] - 1e-9


def test_the_weakness_of_the_shared_key_is_said(make, honest) -> None:
    p = checked(make(plan_like(honest.plan, sum="sharedkey")))
    assert any("One curious site" in x for x in p["deviations"])
    assert "without the server" in p["claim"]["sentence"]


@pytest.mark.parametrize("plain", [True, False])
def test_a_simulated_run_is_marked_in_capitals(make, honest, plain) -> None:
    w = make(plan_like(honest.plan, sum="plain") if plain else None, simulated=not plain)
    (w.folder / "contract.json").unlink()
    build_report(w.folder, w.server)
    p = checked(w)
    assert p["notice"].startswith("SIMULATED")
    assert p["deviations"][0].startswith("SIMULATED")
    assert any("in the clear" in x for x in p["deviations"]) == plain


def test_the_precision_of_every_site_is_in_the_report(make, honest) -> None:
    """It is no deviation: the proof does not depend on it. What it assumes stands there in any case."""
    for made, precision in ((make(precision="float32"), "float32"), (honest, "float64")):
        p = checked(made)
        assert {s["precision"] for s in p["sites"].values()} == {precision}
        assert any("depends on its place" in x for x in p["deviations"])


def test_a_precision_that_does_not_exist_is_no_report(make) -> None:
    with pytest.raises(VerificationError, match="precision"):
        make(precision="float8")


def test_a_real_run_needs_its_contract(spoilt) -> None:
    (spoilt.folder / "contract.json").unlink()
    failed = verify_report(spoilt.report).failed
    assert failed is not None
    assert failed.name == "contract"


def test_a_site_that_dropped_out_for_good_is_named(make) -> None:
    w = make(absent={2: {"dorn"}, 3: {"dorn"}, 4: {"dorn"}}, lost={"dorn"})
    p = checked(w)
    assert p["ledgers_missing"] == ["dorn"]
    assert p["sites"]["dorn"] is None
    assert "dorn" in p["not_covered"][0]
    assert p["accounting"]["steps_charged"] == 4  # what its ledger may hold, not what the others' do


def test_more_missing_ledgers_than_drop_outs_fail(make) -> None:
    failed = verify_report(make(lost={"cava", "dorn"}).report).failed
    assert failed is not None
    assert failed.name == "ledgers delivered"


def test_an_exhausted_budget_is_a_normal_ending(make, honest) -> None:
    w = make(plan_like(honest.plan, steps=8), cap=2.0)
    p = checked(w)
    assert p["status"] == "BUDGET_EXHAUSTED"
    assert p["steps"]["applied"] < p["steps"]["planned"] == 8
    assert all(s["exhausted"] for s in p["sites"].values())
    assert p["accounting"]["epsilon_charged_pld"] < p["claim"]["epsilon"]
    # The round that every site refused was opened, and charged to nobody.
    charged = {s["charged"] for s in p["sites"].values()}
    assert charged == {p["accounting"]["steps_charged"]} == {p["steps"]["opened"] - 1}
    own = gaussian_epsilon(math.sqrt(p["steps"]["opened"] - 1) / w.plan.noise_multiplier, w.plan.delta)
    assert p["accounting"]["epsilon_charged_pld"] == pytest.approx(own, abs=2e-3)


def test_a_restart_in_the_middle_of_a_round(make) -> None:
    p = checked(make(restart_in=2))
    assert p["steps"]["restarts"] == 1
    assert p["steps"]["applied"] == 4


@pytest.mark.parametrize("rounds", [0, 2])
def test_an_aborted_run(make, rounds) -> None:
    p = checked(make(stop_after=rounds))
    assert p["status"] == "ABORTED"
    assert p["steps"]["opened"] == rounds
    assert p["claim"]["epsilon"] > 1.9, "the claim is for all planned steps"


def test_earlier_runs_are_shown_as_tuning(make) -> None:
    p = checked(make(earlier_steps=3))
    assert set(p["tuning"]["earlier_sessions"].values()) == {1}
    assert 0 < p["sites"]["alba"]["epsilon_before"] < p["sites"]["alba"]["epsilon_after"]


def test_a_group_is_reported_as_a_group(make) -> None:
    released = {"criteria": {"k": {"required": 3, "met": False}}, "stability_factor": 3, "unit": "three rows", "x": 1}
    a = checked(make(released=released, simulated=True))["sites"]["alba"]["anonymisation"]
    assert a["epsilon_of_original_record"] > 3 * 1.99
    assert not a["all_met"]
    assert not a["same_contract"]


def test_evidence_that_is_empty(make) -> None:
    assert checked(make(released={}, simulated=True))["sites"]["alba"]["anonymisation"] is None


@pytest.mark.parametrize(
    "released",
    [
        {"criteria": {"k": True}},
        {"criteria": {str(i): {"required": 1, "met": True} for i in range(65)}},
        {"criteria": {}, "stability_factor": 0},
        {"unit": "x" * 2000},
        {"contract": "zz"},
    ],
)
def test_malformed_evidence_stops_the_builder(make, released) -> None:
    with pytest.raises(VerificationError, match="data\\.released"):
        make(released=released)


def row(n: int, kind: str, **body) -> Row:
    return Row(n, "alba", 0, kind, body, "0" * 64, "0" * 64, "0" * 128)


OPEN = {"lineage": "l", "unit": "record", "adjacency": "a", "cap_epsilon": 5.0, "delta": 1e-5, "order": 6.0}
SPEND = {"session": "s", "round": 1, "plan_hash": "0" * 64, "event": SampledGaussian(1.0, 5.0).to_json()}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("ledger.open", {**OPEN, "order": 1e9}),
        ("ledger.open", {**OPEN, "order": "6"}),
        ("ledger.open", {**OPEN, "cap_epsilon": 1e300}),
        ("ledger.open", {**OPEN, "cap_epsilon": True}),
        ("ledger.open", {**OPEN, "delta": 0.0}),
        ("ledger.open", {**OPEN, "lineage": 5}),
        ("spend", SPEND),
    ],
)
def test_a_ledger_whose_first_row_no_honest_site_writes(kind, body) -> None:
    with pytest.raises(FedveilError):
        compose([row(0, kind, **body)], "s")


@pytest.mark.parametrize(
    "change",
    [
        {"event": {**SPEND["event"], "noise_multiplier": 1e-9}},
        {"event": {**SPEND["event"], "noise_multiplier": 10**400}},
        {"event": {**SPEND["event"], "event": "os.system"}},
        {"event": None},
        {"round": "1"},
        {"round": 0},
        {"session": ["s"]},
    ],
)
def test_a_charge_that_no_honest_site_writes(change) -> None:
    with pytest.raises((FedveilError, ArithmeticError)):
        compose([row(0, "ledger.open", **OPEN), row(1, "spend", **{**SPEND, **change})], "s")
    good = compose([row(0, "ledger.open", **OPEN), row(1, "spend", **SPEND)], "s")
    assert good.epsilon_after >= gaussian_epsilon(math.sqrt(1) / 5, 1e-5), "the filter bounds the exact value"


def test_the_auditor_loads_neither_torch_nor_flwr_nor_tenseal_nor_jinja2() -> None:
    code = (
        "import sys, fedveil.deploy.cli.audit, fedveil.deploy.cli.ledger, fedveil.deploy.cli.plan\n"
        "print([m for m in ('torch', 'flwr', 'tenseal', 'opacus', 'jinja2', 'pyarrow', 'grpc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
