"""The privacy plan: what it derives, what it refuses, and that what it proposes instead is accepted."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.client.train import site_sum
from fedveil.common.errors import PlanError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build
from fedveil.privacy.dp.accounting import Filter, best_order, epsilon_pld, gaussian_epsilon, rdp
from fedveil.privacy.dp.clipping import Clipper
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.plan import Optimizer, PrivacyPlan, from_json, make_plan
from fedveil.privacy.plan_rules import MAX_INFLATION, default_tolerance

MODEL = ModelSpec(name="logistic", inputs=20, classes=2)
GIVEN: dict[str, Any] = {
    "sites": 5, "records": 2000, "epsilon": 2.0, "steps": 30, "clip": 1.0, "model": MODEL,
    "optimizer": Optimizer(learning_rate=0.5), "contract_hash": "c" * 64,
}  # fmt: skip


def make(*changes: dict[str, Any]) -> PrivacyPlan:
    """The ordinary plan, with changes."""
    values: dict[str, Any] = dict(GIVEN)
    for change in changes:
        values |= change
    return make_plan(**values)


PLAN = make()


def test_the_defaults_of_every_small_federation() -> None:
    """The defaults: t = d = max(1, n // 6) from four sites up; three stand no drop-out."""
    for n in range(3, 21):
        t, d = default_tolerance(n)
        assert (t, d) == ((1, 0) if n == 3 else (max(1, n // 6),) * 2)
        plan = make({"sites": n})
        assert (plan.colluders, plan.dropouts) == (t, d)
        assert plan.honest == n - t - d
        assert plan.threshold == (n + t) // 2 + 1
        assert plan.honest >= 2
        assert plan.honest > t
        assert plan.threshold <= plan.members == n - d
    known = {n: make({"sites": n}) for n in (3, 4, 20)}
    assert [(p.honest, p.threshold) for p in known.values()] == [(2, 3), (2, 3), (14, 12)]


@pytest.mark.parametrize("sites", [0, 1, 2])
@pytest.mark.parametrize("tolerance", [{}, {"colluders": 0, "dropouts": 0}])
def test_two_sites_have_no_secret_between_them(sites, tolerance) -> None:
    with pytest.raises(PlanError) as e:
        make({"sites": sites}, tolerance)
    assert e.value.nearest is None or e.value.nearest["sites"] == 3
    with pytest.raises(PlanError):
        from_json(PLAN.to_json() | {"sites": 2, "colluders": 0, "dropouts": 0, "sum": "sharedkey"})


@settings(max_examples=100, deadline=None)
@given(st.integers(3, 60), st.integers(0, 40), st.integers(0, 40))
def test_an_impossible_tolerance_is_refused_with_one_that_works(n, t, d) -> None:
    h, T = n - t - d, (n + t) // 2 + 1
    asked: dict[str, Any] = {"sites": n, "colluders": t, "dropouts": d}
    if h >= 2 and h > t and n - d >= T:
        assert make(asked).honest == h
        return
    with pytest.raises(PlanError) as e:
        make(asked)
    assert e.value.nearest
    nearest = make(asked, e.value.nearest)
    assert nearest.colluders <= t
    assert nearest.dropouts <= d
    # as many colluders as any number of drop-outs up to d allows for, then as many drop-outs
    assert (nearest.colluders, nearest.dropouts) == max(
        (a, b) for a in range(t + 1) for b in range(d + 1)
        if n - a - b >= max(2, a + 1) and n - b >= (n + a) // 2 + 1
    )  # fmt: skip


@pytest.mark.parametrize(
    ("n", "t", "d", "best"),
    [
        (4, 3, 1, (1, 1)),
        (4, 2, 0, (1, 0)),
        (20, 10, 0, (9, 0)),
        (5, 2, 7, (2, 0)),
        (3, 2, 2, (1, 0)),
    ],
)
def test_the_nearest_keeps_the_colluders(n, t, d, best) -> None:
    with pytest.raises(PlanError) as e:
        make({"sites": n, "colluders": t, "dropouts": d})
    assert e.value.nearest == {"colluders": best[0], "dropouts": best[1]}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"epsilon": 0.0}, "epsilon"), ({"epsilon": -3.0}, "epsilon"), ({"epsilon": 601.0, "steps": 1}, "epsilon"),
        ({"epsilon": 1e-4, "steps": 1 << 18}, "epsilon"), ({"delta": 1e-17}, "delta"),
        ({"epsilon": math.inf, "steps": 1}, "epsilon"),
        ({"delta": 0.02}, "delta"), ({"steps": 0}, "steps"), ({"clip": 1e300}, "clip"),
        ({"epsilon": None, "noise_multiplier": 0.3, "steps": 200}, "noise_multiplier"),
        ({"epsilon": None, "noise_multiplier": 0.01}, "noise_multiplier"),
        ({"epsilon": None, "noise_multiplier": -1.0, "steps": 1}, "noise_multiplier"),
        ({"epsilon": None, "noise_multiplier": 1e7}, "noise_multiplier"),
    ],
)  # fmt: skip
def test_what_is_out_of_bounds_is_refused_with_its_bound_and_the_nearest(change, field) -> None:
    asked: dict[str, Any] = GIVEN | change
    with pytest.raises(PlanError, match=field.replace("_", ".")) as e:
        make(asked)
    nearest = e.value.nearest
    assert nearest
    assert set(nearest) == {field}
    while nearest:
        asked |= nearest
        nearest = refusal(asked)
    assert make(asked)


def test_a_delta_below_the_rounding_of_a_composition_is_refused() -> None:
    """A Fourier transform rounds at some 3e-17 a step; one step, or every record in every step, needs none."""
    asked = GIVEN | {"sample_rate": 0.01, "steps": 1000, "delta": 1e-12}
    with pytest.raises(PlanError, match="rounding") as e:
        make(asked)
    assert e.value.nearest == {"delta": 1e-11}
    assert make(asked, e.value.nearest or {})
    assert make(asked, {"sample_rate": 1.0})
    assert make(asked, {"steps": 1})
    with pytest.raises(PlanError, match="rounding") as e:
        make(asked, {"records": 1 << 37, "steps": 5000})
    assert e.value.nearest == {"steps": 100}


def test_a_delta_that_no_accountant_tells_from_rounding_is_refused() -> None:
    """Below 1e-13 PLD gives inf, which no JSON has: the run would be charged first and then fail."""
    assert math.isfinite(make({"delta": 1e-13}).claim)
    for delta in (9e-14, 1e-17, 1e-300):
        with pytest.raises(PlanError, match="greater than or equal to"):
            make({"delta": delta})
        with pytest.raises(PlanError, match="malformed in: delta"):
            from_json(PLAN.to_json() | {"delta": delta})


def refusal(asked: dict[str, Any]) -> dict[str, object] | None:
    """What is proposed instead of a plan; None if it is accepted."""
    try:
        make(asked)
    except PlanError as e:
        return e.nearest
    return None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": 1e-3, "records": 1000}, "declared records"),
        ({"delta": 1e-3, "records": 5000}, "declared records"),
        ({"delta": 5e-4, "records": 10_000}, "declared records"),
        ({"sum": "none"}, "without a secure sum"),
        ({"local_steps": 4}, "one gradient evaluation"),
        ({"mode": "client"}, "drowns"),
        ({"mode": "client", "local_steps": 4, "sites": 150}, "drowns"),
        ({"mode": "local", "colluders": 9}, "colluders = 9"),
        ({"mode": "local", "dropouts": 5}, "dropouts = 5"),
        ({"mode": "local", "sites": 2, "dropouts": 0}, "secure sum of 2"),
        ({"mode": "local", "sites": 1}, "secure sum of 1"),
        ({"delta": 1e-3, "records": 1 << 45}, "declared records"),
    ],
)  # fmt: skip
def test_what_cannot_hold_is_refused_with_what_does(change, message) -> None:
    asked: dict[str, Any] = GIVEN | change
    with pytest.raises(PlanError, match=message) as e:
        make(asked)
    nearest = e.value.nearest
    while nearest:  # a second proposal follows where two things were wrong at once
        asked |= nearest
        nearest = refusal(asked)
    assert make(asked)


@pytest.mark.parametrize("records", [10**3, 10**4, 10**7, 10**10, 2999, 12_345, 1437])
def test_delta_at_one_over_n_is_refused(records) -> None:
    """At δ = 1/N publishing one whole record would be allowed."""
    with pytest.raises(PlanError, match="declared records") as e:
        make({"records": records, "delta": min(0.01, 1 / records)})
    assert e.value.nearest
    proposed = e.value.nearest["delta"]
    assert isinstance(proposed, float)
    assert 0.05 / records <= proposed <= 0.1 / records
    assert len(f"{proposed:e}".rstrip("0").partition("e")[0].rstrip("0")) <= 2  # one digit
    assert make({"records": records, "delta": proposed}).claim <= 2.0
    assert make({"records": records, "delta": 0.99 / records}).delta < 1 / records


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0}, {"steps": 1 << 21}, {"steps": 2.5}, {"delta": 0.0}, {"delta": 0.5}, {"sample_rate": 2.0},
        {"sample_rate": 0.0}, {"sample_rate": math.nan}, {"epsilon": 0.0}, {"epsilon": -1.0}, {"epsilon": 2000.0},
        {"epsilon": math.nan}, {"epsilon": math.inf}, {"clip": 0.0}, {"clip": -1.0}, {"clip": math.inf},
        {"records": 0}, {"records": -5}, {"sites": 5000}, {"colluders": -1}, {"dropouts": -1}, {"mode": "central"},
        {"sum": "xor"}, {"contract_hash": "x"}, {"contract_hash": "C" * 64}, {"local_steps": 0},
        {"model": ModelSpec(name="mlp", inputs=3, classes=2)}, {"model": ModelSpec(name="cnn", inputs=10, classes=2)},
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_a_plan_error(change) -> None:
    with pytest.raises(PlanError):
        make(change)


def test_the_claim_is_the_accountants() -> None:
    assert PLAN.claim == epsilon_pld([(SampledGaussian(1.0, PLAN.noise_multiplier), 30)], 1e-5)
    assert 1.99 < PLAN.claim <= 2.0
    exact = gaussian_epsilon(math.sqrt(30) / PLAN.noise_multiplier, 1e-5)
    assert exact <= PLAN.claim <= exact + 1e-3
    fallback = gaussian_epsilon(math.sqrt(30 * PLAN.honest) / PLAN.noise_multiplier, 1e-5)
    assert PLAN.fallback == pytest.approx(fallback, abs=2e-3)
    assert PLAN.claim < PLAN.fallback < math.inf


def test_epsilon_follows_from_a_noise_multiplier_as_well() -> None:
    values: dict[str, Any] = {k: v for k, v in GIVEN.items() if k != "epsilon"}
    made = make_plan(**values, noise_multiplier=9.0)
    exact = gaussian_epsilon(math.sqrt(30) / 9.0, 1e-5)
    assert made.noise_multiplier == 9.0
    assert made.epsilon == made.claim
    assert exact <= made.epsilon <= exact + 1e-3
    assert from_json(made.to_json()) == made
    # and back: the noise that this ε asks for is the one given, to what bisection promises
    assert make({"epsilon": made.epsilon}).noise_multiplier == pytest.approx(9.0, rel=2e-4)
    neither_nor_both: list[dict[str, Any]] = [{}, {"epsilon": 2.0, "noise_multiplier": 9.0}]
    for both in neither_nor_both:
        with pytest.raises(PlanError, match="epsilon or from noise_multiplier"):
            make_plan(**values, **both)


@pytest.mark.parametrize("sigma", [0.1, 0.0, -1.0, math.nan, math.inf, 1e7, 0.2])
def test_a_noise_multiplier_without_meaning_is_refused(sigma) -> None:
    """At 0.2 two hundred steps cost more than any plan may claim."""
    values: dict[str, Any] = {k: v for k, v in GIVEN.items() if k != "epsilon"} | {"steps": 200}
    with pytest.raises(PlanError):
        make_plan(**values, noise_multiplier=sigma)


def test_one_record_replaced_costs_more_than_one_added() -> None:
    exact = gaussian_epsilon(2 * math.sqrt(30) / PLAN.noise_multiplier, 1e-5)
    assert exact <= PLAN.claim_replace_one <= exact + 1e-3
    assert PLAN.claim_replace_one > 2 * PLAN.claim


@settings(max_examples=5, deadline=None)
@given(
    st.integers(3, 60), st.floats(0.3, 4), st.integers(1, 40), st.sampled_from([1.0, 0.1]), st.floats(1e-3, 1e3),
    st.sampled_from([(20, ()), (784, ()), (30, (64, 32)), (1, ()), (100_000, ())]),
)  # fmt: skip
def test_every_plan_keeps_its_promises(sites, epsilon, steps, q, clip, shape) -> None:
    model = ModelSpec(name="mlp" if shape[1] else "logistic", inputs=shape[0], classes=2, hidden=shape[1])
    change = {"sites": sites, "epsilon": epsilon, "steps": steps, "sample_rate": q, "clip": clip, "model": model}
    plan = make(change)
    assert plan.claim <= epsilon
    assert 0 < plan.inflation <= MAX_INFLATION
    assert math.isfinite(plan.fallback)
    assert plan.fallback >= plan.claim
    assert 2 * plan.bound + 1 <= 1 << 46
    assert plan.share_std >= 64
    # what the h honest shares add up to, in units of the sensitivity on the grid, is σ
    total = plan.share_std * math.sqrt(plan.honest) * plan.grid
    wide = clip + math.sqrt(model.parameters) * plan.grid * (1 + 2.0**-6)
    assert total / wide == pytest.approx(plan.noise_multiplier)
    assert plan.divisor == q * 2000
    assert from_json(plan.to_json()) == plan


def test_a_thousand_clients_and_one_alone() -> None:
    clients = make({"mode": "client", "sites": 1200, "records": 1200, "local_steps": 5, "epsilon": 8.0, "sum": "plain"})
    assert (clients.unit, clients.divisor, clients.event.sample_rate) == ("client", 1200.0, 1.0)
    few = make({"mode": "client", "few_clients": True, "records": 5, "local_steps": 5})
    assert few.unit == "client"
    local = make({"mode": "local", "sum": "none"})
    assert (local.unit, local.honest, local.fallback) == ("record", 1, local.claim)
    assert local.realised_noise_multiplier(3) == pytest.approx(local.noise_multiplier * math.sqrt(3))


def test_more_survivors_mean_more_noise_never_less_than_claimed() -> None:
    for members in range(PLAN.members, PLAN.sites + 1):
        assert PLAN.realised_noise_multiplier(members) >= PLAN.noise_multiplier
    assert PLAN.realised_noise_multiplier(PLAN.members) == pytest.approx(PLAN.noise_multiplier)
    assert PLAN.realised_noise_multiplier(0) == 0


@pytest.mark.parametrize(
    "change",
    [
        {}, {"epsilon": 0.2, "steps": 7}, {"epsilon": 6.0, "steps": 400}, {"epsilon": 3.0, "steps": 1},
        {"epsilon": 1.0, "steps": 500, "sample_rate": 0.02}, {"epsilon": 4.0, "steps": 100, "sample_rate": 0.3},
    ],
)  # fmt: skip
def test_filter_epsilon_carries_exactly_the_planned_steps(change) -> None:
    plan = make(change)
    cap = plan.filter_epsilon()
    assert plan.claim <= cap
    f, spent, steps = Filter(cap, plan.delta, best_order(cap, plan.delta)), 0.0, 0
    while f.admits(spent + rdp(plan.event, f.order)):
        spent += rdp(plan.event, f.order)
        steps += 1
    assert steps == plan.steps
    lower = 0.99 * cap
    assert Filter(lower, plan.delta, best_order(lower, plan.delta)).affords(plan.event) < plan.steps
    # a σ larger than needed makes a smaller cap sufficient, below the ε that the plan claims
    generous = plan.model_copy(update={"noise_multiplier": 10 * plan.noise_multiplier})
    assert generous.filter_epsilon() < plan.epsilon


def test_the_number_of_records_a_site_holds_enters_nowhere() -> None:
    """Neighbouring data sets have the same plan, noise and divisor (only declared constants enter)."""
    names = set(inspect.signature(make_plan).parameters)
    assert not names & {"data", "X", "y", "dataset", "loader", "table"}
    model = ModelSpec(name="logistic", inputs=4, classes=2)
    small = make({"model": model})
    before = (small.hash, small.share_std, small.divisor, small.event)
    X = np.random.default_rng(0).normal(0, 3, (101, 4)).astype(np.float32)
    y = np.arange(101) % 2
    engine, weights = Clipper(build(model), "closed"), np.zeros(model.parameters, np.float32)
    a, b = (site_sum(engine, small, weights, X[:n], y[:n], 128) for n in (100, 101))
    assert 0 < np.linalg.norm(a - b) <= small.clip * (1 + 1e-4)  # other places: float32 rounds otherwise
    assert before == (small.hash, small.share_std, small.divisor, small.event)


def test_equal_plans_have_one_hash_in_every_process() -> None:
    again = make(dict(reversed(GIVEN.items())))
    assert (again, again.hash) == (PLAN, PLAN.hash)
    parsed = from_json(dict(reversed(PLAN.to_json().items())))
    assert (parsed, parsed.hash) == (PLAN, PLAN.hash)
    code = (
        "import sys, json; from fedveil.privacy.plan import PrivacyPlan;"
        "print(PrivacyPlan.model_validate_json(sys.stdin.read()).hash)"
    )
    seed = "0" if os.environ.get("PYTHONHASHSEED") == "42" else "42"
    out = subprocess.run(
        [sys.executable, "-c", code], input=PLAN.model_dump_json(), env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert out.stdout.strip() == PLAN.hash


def test_every_field_is_under_the_hash() -> None:
    changed = {
        "mode": "local", "sum": "plain", "sites": 6, "colluders": 0, "dropouts": 0, "records": 2001,
        "sample_rate": 0.5, "steps": 31, "local_steps": 2, "local_batch": 8, "clip": 1.1, "noise_multiplier": 99.0,
        "epsilon": 2.1, "delta": 2e-5, "grid": 1e-4, "clamp": 1.0,
        "model": ModelSpec(name="logistic", inputs=21, classes=2),
        "optimizer": Optimizer(learning_rate=0.6), "contract_hash": "d" * 64, "few_clients": True,
        "reveal_to": "sites", "committee": 3, "committee_seed": "e" * 64, "unit": "person", "rows_per_person": 2,
        "capacity": 50, "workload_hash": "f" * 64,
    }  # fmt: skip
    assert set(changed) == set(PrivacyPlan.model_fields) - {"v", "adjacency"}  # a new field has to be added here
    hashes = {PLAN.model_copy(update={k: v}).hash for k, v in changed.items()}
    assert len(hashes | {PLAN.hash}) == len(changed) + 1


def test_a_copy_keeps_nothing_that_was_computed_before() -> None:
    """A lowered σ must show in the claim and the hash, however often the original was asked for them."""
    before = (PLAN.claim, PLAN.fallback, PLAN.hash)
    copy = PLAN.model_copy(update={"noise_multiplier": PLAN.noise_multiplier / 2})
    assert copy.claim > before[0]
    assert copy.fallback > before[1]
    assert copy.hash != before[2]
    with pytest.raises(PlanError, match="more than the 2"):
        copy.check()


class TestCommittee:
    """Helpers of a large consortium: the plan's threshold is the committee's, under its own bound."""

    GIVEN: ClassVar[dict[str, Any]] = {
        "sites": 200, "colluders": 33, "dropouts": 20, "records": 20000, "epsilon": 2.0, "steps": 5, "clip": 1.0,
        "model": ModelSpec(name="logistic", inputs=4, classes=2), "optimizer": Optimizer(learning_rate=0.5),
        "contract_hash": "0" * 64, "committee_seed": "e" * 64,
    }  # fmt: skip

    def test_the_published_figures(self) -> None:
        plan = make_plan(committee=32, **self.GIVEN)
        assert plan.threshold == 27

    @pytest.mark.parametrize(
        "change", [{"committee": 20}, {"committee": 32, "committee_seed": ""}, {"committee": 32, "sum": "plain"}]
    )
    def test_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(PlanError):
            make_plan(**{**self.GIVEN, **change})
