"""Prices are not taken from the code that charged: its faults, which ledger and report share, are found by name."""

from __future__ import annotations

from typing import Any

import pytest

from fedveil.common.contract import DataContract
from fedveil.common.errors import VerificationError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import MetricSpec, request
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.plan_figures import PlanFigures
from fedveil.privacy.report import prices
from fedveil.privacy.report.verify import verify_report


def wrong(name: str, by: Any) -> tuple[str, Any]:
    """A property of a plan that gives ``by`` of what it should."""
    right = getattr(PlanFigures, name).fget
    return name, property(lambda plan: by(right(plan)))


FAULTS = {
    "a charge at q·0.8": (wrong("event", lambda e: SampledGaussian(0.8 * e.sample_rate, e.noise_multiplier)),
                          "charges", "sample_rate"),
    "a charge at σ·1.1": (wrong("event", lambda e: SampledGaussian(e.sample_rate, 1.1 * e.noise_multiplier)),
                          "charges", "noise_multiplier"),
    "noise x0.95": (wrong("share_std", lambda x: 0.95 * x), "prices", "share_std_in_grid_units"),
    "the grid left out of the sensitivity": (wrong("sensitivity", lambda x: x / 1.001), "prices", "sensitivity"),
    "a share more": (wrong("honest", lambda h: h + 1), "rounds", "realised noise"),
    "a larger share alone": (wrong("fallback_event", lambda e: SampledGaussian(e.sample_rate, 2 * e.noise_multiplier)),
                             "prices", "fallback_noise_multiplier"),
    "another divisor": (wrong("divisor", lambda x: 2 * x), "prices", "divisor"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_code_that_prices_is_found(make, planned, monkeypatch, fault) -> None:
    """It is there when the run is charged, when the report is written and when it is verified."""
    (name, planted), check, word = FAULTS[fault]
    plan = planned(sample_rate=0.25, records=4000)
    monkeypatch.setattr(PlanFigures, name, planted)
    found = verify_report(make(plan).report)
    assert found.failed is not None
    assert found.failed.name == check, found.failed
    assert word in found.failed.detail


def test_a_wrong_count_of_parameters_is_found(make, planned, monkeypatch) -> None:
    plan = planned()
    monkeypatch.setattr(ModelSpec, "parameters", property(lambda _: 25))
    found = verify_report(make(plan).report)
    assert found.failed is not None
    assert found.failed.name == "prices"
    assert "model: parameters" in found.failed.detail


@pytest.mark.parametrize("changes", [{}, {"sample_rate": 0.1, "records": 5000}, {"mode": "local"}])
def test_the_honest_run_passes(make, planned, changes) -> None:
    found = verify_report(make(planned(**changes)).report)
    assert found.ok, found.failures
    detail = next(c.detail for c in found.checks if c.name == "prices")
    assert "D = 26" in detail


NETWORKS = [
    ModelSpec(name="logistic", inputs=12, classes=2),
    ModelSpec(name="mlp", inputs=30, classes=3, hidden=(64, 7)),
    ModelSpec(name="cnn", inputs=28 * 28, classes=10, hidden=(16, 32)),
    ModelSpec(name="resnet", inputs=3 * 32 * 32, classes=10, hidden=(3, 16, 32, 64)),
    ModelSpec(name="resnet", inputs=16 * 16, classes=4, hidden=(1, 8, 8)),
    ModelSpec(name="transformer", inputs=20, classes=5, hidden=(100, 32, 4, 2)),
    ModelSpec(name="lstm", inputs=20, classes=5, hidden=(100, 16, 24)),
    ModelSpec(name="lora-mlp", inputs=30, classes=3, hidden=(4, 64, 7)),
    ModelSpec(name="lora-transformer", inputs=20, classes=5, hidden=(2, 100, 32, 4, 2)),
]


@pytest.mark.parametrize("spec", NETWORKS, ids=lambda s: s.name)
def test_layers_are_added_up_to_what_a_network_says(spec: ModelSpec) -> None:
    assert not spec.problem()
    assert prices._parameters(spec.model_dump(mode="json")) == spec.parameters


@pytest.mark.parametrize("missing", [{}, {"missing": "indicator"}])
@pytest.mark.parametrize("wanted", [["count"], ["mean"], ["variance", "histogram"], ["histogram", "quantiles"]])
@pytest.mark.parametrize("confusion", [None, False, True])
def test_answers_are_added_up_to_what_a_request_says(honest, missing, wanted, confusion) -> None:
    agreed = honest.contract.model_dump(mode="json", exclude_unset=True)
    agreed["columns"][1] |= missing
    contract = DataContract.model_validate(agreed)
    metric = None
    if confusion is not None:
        network = ModelSpec(name="logistic", inputs=contract.width, classes=2)
        metric = MetricSpec(network=network, model_hash="a" * 64, confusion=confusion)
    spec = request(contract, wanted, metric=metric)
    assert not spec.problem()
    assert prices._parameters(spec.model_dump(mode="json")) == spec.parameters


def test_a_workload_that_is_not_known_here_is_not_counted() -> None:
    assert prices._parameters({"name": "graph", "inputs": 3, "classes": 2}) is None


BAD: list[Any] = [
    None, [], {}, {"sites": True}, {"sites": 1.5}, {"colluders": 3}, {"dropouts": 9},
    {"noise_multiplier": 0}, {"noise_multiplier": "7"}, {"delta": 2}, {"steps": 0},
    {"grid": -1}, {"clip": float("inf")}, {"mode": 3}, {"model": []},
    {"model": {"name": "cnn", "inputs": 4, "classes": 2, "hidden": [1]}},
    {"model": {"name": "lora-transformer", "inputs": 4, "classes": 2, "hidden": []}},
    {"model": {"name": "mlp", "inputs": 4, "classes": 2, "hidden": [1] * 17}},
    {"model": {"name": "mlp", "inputs": 4, "classes": 2, "hidden": ["9"]}},
    {"model": {"name": "resnet", "inputs": 4, "classes": 2, "hidden": [3]}},
    {"model": {"name": "stats", "columns": 4}}, {"model": {"name": "stats", "columns": [4]}},
    {"model": {"name": "stats", "columns": [{"moments": 9}]}},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD)
def test_a_malformed_plan_is_a_named_error(honest, change) -> None:
    prices.read(honest.plan.to_json())
    with pytest.raises(VerificationError, match=r"plan\.json"):
        prices.read({**honest.plan.to_json(), **change} if change else change)


def test_the_most_blocks_that_a_plan_may_name_take_no_memory() -> None:
    huge = {"name": "transformer", "inputs": 1, "classes": 2, "hidden": [1 << 24] * 4}
    assert (prices._parameters(huge) or 0) > 1 << 70


@pytest.mark.parametrize("event", [None, [], {}, {"event": "other"}, {"event": "sampled-gaussian", "sample_rate": "1"}])
def test_an_event_that_is_none_is_no_price(honest, event) -> None:
    assert prices.charge(prices.read(honest.plan.to_json()), event)


def test_the_plans_own_event_is_the_price(planned) -> None:
    for changes in (
        {},
        {"sample_rate": 0.1, "records": 5000},
        {"mode": "local"},
        {"mode": "client", "few_clients": True},
    ):
        plan: PrivacyPlan = planned(**changes)
        own = prices.read(plan.to_json())
        assert not prices.charge(own, plan.event.to_json())
        assert own.share == pytest.approx(plan.share_std, rel=1e-12)
        assert own.realised(3) == pytest.approx(plan.realised_noise_multiplier(3), rel=1e-12)
