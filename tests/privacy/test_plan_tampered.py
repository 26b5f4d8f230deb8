"""Plans from elsewhere: whatever a server writes into one, a site parses what holds or refuses."""

from __future__ import annotations

from typing import Any

import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common import canonical
from fedveil.common.errors import PlanError
from fedveil.common.workload.model import ModelSpec
from fedveil.privacy import plan as plans
from fedveil.privacy.dp import accounting
from fedveil.privacy.plan import Optimizer, PrivacyPlan, from_json, make_plan

PLAN = make_plan(
    sites=5, records=2000, epsilon=2.0, steps=30, clip=1.0, model=ModelSpec(name="logistic", inputs=20, classes=2),
    optimizer=Optimizer(learning_rate=0.5), contract_hash="c" * 64,
)  # fmt: skip
JSON = PLAN.to_json()


def test_the_plan_itself_is_accepted() -> None:
    assert from_json(JSON) == PLAN
    assert from_json(canonical.loads(canonical.dumps(JSON))).hash == PLAN.hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": PLAN.noise_multiplier * 0.999}, "more than the 2"),
        ({"noise_multiplier": 0.2}, "more than the 2"),
        ({"epsilon": 1.99}, "more than the 1.99"),
        ({"steps": 31}, "more than the 2"),
        ({"delta": 9e-6}, "more than the 2"),
        ({"delta": 1e-13}, "more than the 2"),
        ({"delta": 1e-300}, "malformed in: delta"),
        ({"grid": PLAN.grid * 10}, "widen"),
        ({"grid": 1.0}, "widen"),
        ({"clip": 0.1}, "widen"),
        ({"grid": PLAN.grid / 1e12}, "do not fit"),
        ({"grid": 5e-324}, "do not fit"),
        ({"clamp": 1e12}, "do not fit"),
        ({"records": 100_000}, "not below"),
        ({"colluders": 2}, "honest shares"),
        ({"dropouts": 3}, "honest shares"),
        ({"sites": 2, "dropouts": 0}, "2 sites"),
        ({"sum": "none"}, "without a secure sum"),
        ({"mode": "client"}, "drowns"),
        ({"local_steps": 2}, "one gradient"),
        ({"model": JSON["model"] | {"hidden": [3]}}, "no hidden"),
        ({"model": JSON["model"] | {"name": "cnn"}}, "square"),
        ({"model": JSON["model"] | {"name": "mlp", "hidden": [1 << 60]}}, "hidden"),
        ({"model": JSON["model"] | {"inputs": 1 << 24, "classes": 1 << 16}}, "parameters"),
    ],
)
def test_numbers_that_do_not_hold_together(change, message) -> None:
    with pytest.raises(PlanError, match=message):
        from_json(JSON | change)


@pytest.mark.parametrize("key", ["noise_multiplier", "grid", "clamp"])
def test_the_proposal_for_a_number_is_accepted(key) -> None:
    """Where a field of a plan is refused, applying ``nearest`` to it gives a plan that holds."""
    seen = 0
    for value in (0.3, 1.0, 1e3, 1e5) if key != "clamp" else (1e9, 1e12):
        spoilt = JSON | {key: value}
        nearest = proposal(spoilt)
        assert from_json(spoilt | nearest)
        seen += bool(nearest)
    assert seen


def proposal(value: dict[str, Any]) -> dict[str, object]:
    """What is proposed instead of a plan; nothing if it is accepted."""
    try:
        from_json(value)
    except PlanError as e:
        return e.nearest or {}
    return {}


@pytest.mark.parametrize(
    "change",
    [
        {"foo": 1}, {"__class__": "x"}, {"v": 3}, {"v": "1"}, {"mode": "central"}, {"mode": None}, {"sum": []},
        {"adjacency": "replace-one"}, {"sites": "5"}, {"sites": 5.5}, {"sites": True}, {"sites": -5},
        {"sites": 10**400}, {"records": 10**5000}, {"records": 1 << 60}, {"steps": 0}, {"steps": 1 << 30},
        {"sample_rate": 0}, {"sample_rate": 1.5}, {"epsilon": -1}, {"epsilon": 1e308}, {"epsilon": float("inf")},
        {"epsilon": float("nan")}, {"delta": 0}, {"delta": 0.5}, {"clip": "1"}, {"clip": 0}, {"noise_multiplier": 0},
        {"noise_multiplier": 1e7}, {"noise_multiplier": None}, {"model": None}, {"model": {}},
        {"model": JSON["model"] | {"code": "import os"}},
        {"model": JSON["model"] | {"hidden": [1] * 17}}, {"model": JSON["model"] | {"hidden": ["1"]}},
        {"optimizer": JSON["optimizer"] | {"momentum": 1}}, {"optimizer": {"learning_rate": -1}},
        {"contract_hash": "c" * 63}, {"contract_hash": "C" * 64}, {"contract_hash": "c" * 64 + "\n"},
        {"contract_hash": "c" * (1 << 20)}, {"few_clients": 1}, {"few_clients": "yes"}, {"foo": {1, 2}}, {"foo": b"x"},
    ],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_malformed_plans(change) -> None:
    with pytest.raises(PlanError, match="malformed"):
        from_json(JSON | change)


@pytest.mark.parametrize("value", [None, [], "", 1, {}, [JSON], {"v": 2}, "x" * 1_000_000])
def test_what_is_no_plan(value) -> None:
    with pytest.raises(PlanError, match="malformed"):
        from_json(value)


@pytest.mark.parametrize("key", [k for k, info in PrivacyPlan.model_fields.items() if info.is_required()])
def test_a_missing_field_is_named(key) -> None:
    with pytest.raises(PlanError, match=f"malformed in: {key}"):
        from_json({k: v for k, v in JSON.items() if k != key})


def test_a_strangers_words_are_not_repeated_at_length() -> None:
    with pytest.raises(PlanError) as e:
        from_json(JSON | {f"x{i}" * 1000: 0 for i in range(1000)})
    assert len(e.value.message) < 600


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 1e-300}, {"noise_multiplier": 1e-6, "epsilon": 600},
        {"noise_multiplier": 0.05, "steps": 1 << 20},
        {"noise_multiplier": 0.2, "steps": 1 << 20, "sample_rate": 0.9, "epsilon": 600},
        {"noise_multiplier": 1.0, "steps": 1 << 20, "epsilon": 600, "sites": 4096, "colluders": 1, "dropouts": 1},
        {"noise_multiplier": 1e6, "steps": 1 << 20, "epsilon": 1e-300},
    ],
    ids=str,
)  # fmt: skip
def test_a_hostile_plan_is_refused_before_it_costs_anything(change, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these once asked an accountant for gigabytes or minutes: for a loss distribution that is wide."""
    widths, compose = list[float](), PLDAccountant.compose

    def watched(self: Any, event: Any, count: int = 1) -> Any:
        noise = event.noise_multiplier if hasattr(event, "noise_multiplier") else event.event.noise_multiplier
        widths.append(count / noise**2)
        return compose(self, event, count)

    monkeypatch.setattr(PLDAccountant, "compose", watched)
    with pytest.raises(PlanError):
        from_json(JSON | change)
    assert max(widths, default=0) < 1
    accounting._pld.cache_clear()
    plans._parsed.cache_clear()
    from_json(JSON)  # a control: an ordinary plan does ask for one
    assert widths


SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3), max_leaves=5
)
NEAR = st.floats(0.5, 2).map(lambda f: ("scale", f))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(JSON)), VALUES | NEAR, min_size=1, max_size=3))
def test_whatever_is_accepted_holds(changes: dict[str, Any]) -> None:
    spoilt = dict(JSON)
    for key, value in changes.items():
        if isinstance(value, tuple):
            spoilt[key] = JSON[key] * value[1] if type(JSON[key]) is float else JSON[key]
        else:
            spoilt[key] = value
    if type(spoilt["steps"]) is int and spoilt["steps"] > 1000:
        spoilt["steps"] = 1000
    try:
        plan = from_json(spoilt)
    except PlanError:
        return
    assert isinstance(plan, PrivacyPlan)
    assert plan.claim <= plan.epsilon * (1 + 1e-9)
    assert plan.inflation <= 0.02
    assert plan.delta < 1 / plan.records
    assert plan.mode == "local" or (plan.honest > plan.colluders and plan.honest >= 2)
