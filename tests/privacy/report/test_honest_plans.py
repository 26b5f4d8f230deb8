"""Whatever plan is accepted, the verifier accepts the claims that follow from it: the budget is spent by then."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant

from fedveil.common.errors import PlanError, VerificationError
from fedveil.common.workload.model import ModelSpec
from fedveil.privacy.dp.accounting import epsilon_pld, epsilon_rdp
from fedveil.privacy.dp.events import MAX_LOSS, MIN_NOISE_MULTIPLIER, SampledGaussian
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.report import claims, derive, prices, privacy_loss, progress, recompute

GIVEN: dict[str, Any] = {
    "sum": "plain", "records": 50, "clip": 1.0, "model": ModelSpec(name="logistic", inputs=3, classes=2),
    "optimizer": Optimizer(learning_rate=0.1), "contract_hash": "c" * 64,
}  # fmt: skip


def plan_of(q: float, steps: int, *, sites: int = 5, delta: float = 1e-5, **target: Any) -> PrivacyPlan:
    return make_plan(**GIVEN, sites=sites, sample_rate=q, steps=steps, delta=delta, **target)


def verified(plan: PrivacyPlan) -> dict[str, Any]:
    """The claim, after everything that a verifier does with it."""
    event = plan.event
    recompute.refuse_absurd(event.sample_rate, plan.noise_multiplier, plan.steps)
    claim = derive._claim(plan)
    own = prices.read(plan.to_json())
    for check in (claims.pld, claims.rdp, claims.fourier, claims.replace_one, claims.fallback, claims.curve):
        check(claim, own)
    claims.groups({"claim": claim, "sites": {}}, own)
    return claim


# Many cheap steps: PLD on a coarse grid was above RDP. Few rare ones: RDP is far above PLD. And the ordinary.
PLANS = [(0.035, 0.01, 1000), (0.1, 0.01, 3000), (0.5, 1e-4, 20), (0.1, 0.1, 60), (1.0, 1.0, 60), (8.0, 0.3, 200)]
SLOW = [
    (0.3, 0.01, 20_000), (0.1, 1e-3, 100), (0.3, 1e-3, 20), (1.0, 1e-3, 20), (3.0, 1e-5, 100), (0.3, 1e-5, 1),
    (3.0, 0.02, 300), (30.0, 0.5, 60), (0.01, 1.0, 1), (400.0, 0.1, 30), (600.0, 0.01, 1000), (400.0, 0.1, 30_000),
    (400.0, 0.5, 1000), (500.0, 1.0, 100),
]  # fmt: skip


@pytest.mark.parametrize(
    ("epsilon", "q", "steps"), [*PLANS, *(pytest.param(*plan, marks=pytest.mark.slow) for plan in SLOW)]
)
def test_an_accepted_plan_verifies(epsilon, q, steps) -> None:
    assert verified(plan_of(q, steps, epsilon=epsilon))["epsilon"] <= epsilon


@pytest.mark.slow
@pytest.mark.parametrize(
    ("q", "steps", "sigma", "delta", "sites"),
    [(0.05, 200, 0.3, 0.009, 5), (1e-3, 5000, 0.21, 1e-9, 5), (1.0, 20, 0.3, 1e-13, 5), (0.02, 300, 2.0, 1e-11, 900)],
)
def test_also_with_little_noise_with_a_small_delta_and_with_many_shares(q, steps, sigma, delta, sites) -> None:
    verified(plan_of(q, steps, delta=delta, sites=sites, noise_multiplier=sigma))


# So little lost that the library knows a bound beside all orders, and so much noise that hardly anything is lost.
LITTLE = [
    (1e-3, 3, 0.5, 1e-3), (1e-3, 30, 2.0, 1e-3), (5.2e-4, 3, 0.5, 1e-4), (1.0, 1, 300.0, 1e-3), (1.0, 1, 398.9, 1e-3),
]  # fmt: skip


@pytest.mark.parametrize(("q", "steps", "sigma", "delta"), LITTLE)
def test_a_plan_that_costs_next_to_nothing_verifies(q, steps, sigma, delta) -> None:
    plan = plan_of(q, steps, delta=delta, noise_multiplier=sigma)
    assert plan.filter_epsilon() > 0
    verified(plan)


def test_a_plan_that_delta_alone_covers_is_none() -> None:
    for q, sigma in ((1.0, 1000.0), (0.01, 20.0)):
        with pytest.raises(PlanError, match="alone covers") as e:
            plan_of(q, 1, delta=1e-3, noise_multiplier=sigma)
        found: dict[str, Any] = e.value.nearest or {}
        nearest = plan_of(q, 1, delta=1e-3, **found)
        assert 0 < nearest.epsilon < 0.01


def test_either_accountant_can_be_the_smaller_one() -> None:
    """Both are upper bounds: no order between them may be asked for."""
    coarse = PLDAccountant(value_discretization_interval=1e-3)
    coarse.compose(dp_event.PoissonSampledDpEvent(0.01, dp_event.GaussianDpEvent(151.0)), 20_000)
    assert coarse.get_epsilon(1e-5) > 3 * epsilon_rdp([(SampledGaussian(0.01, 151.0), 20_000)], 1e-5)
    few = [(SampledGaussian(1e-4, 0.4), 20)]
    assert epsilon_rdp(few, 1e-5) > 2 * epsilon_pld(few, 1e-5) + 1


def test_what_a_verifier_refuses_is_no_plan() -> None:
    """The two bounds that keep hostile work from an accountant are asked of a plan before anything is charged."""
    made = plan_of(1e-3, 20, epsilon=3.0)
    for change in ({"noise_multiplier": 0.19}, {"noise_multiplier": 0.3, "steps": 1 << 20}):
        spoilt = made.model_copy(update={"epsilon": 600.0, **change})
        with pytest.raises(VerificationError):
            recompute.refuse_absurd(spoilt.sample_rate, spoilt.noise_multiplier, spoilt.steps)
        with pytest.raises(PlanError) as e:
            spoilt.check()
        assert e.value.nearest
    steps = int(e.value.nearest["steps"])  # type: ignore[index, call-overload]
    recompute.refuse_absurd(spoilt.sample_rate, spoilt.noise_multiplier, steps)
    with pytest.raises(VerificationError):
        recompute.refuse_absurd(spoilt.sample_rate, spoilt.noise_multiplier, steps + 1)


def test_the_bound_of_the_loss_is_one() -> None:
    """The mean loss of a step is the Kullback-Leibler divergence: for q = 1 that is 1 / (2 σ²)."""
    for sigma in (0.2, 1.0, 30.0):
        assert SampledGaussian(1.0, sigma).loss == pytest.approx(1 / 2 / sigma**2)
    for q, sigma in ((0.01, 0.3), (0.3, 1.0), (1e-4, 0.2), (0.5, 40.0)):
        xs = [sigma * (i / 500 - 12) + (1 / 500) for i in range(13_000)]
        density = lambda x, m: math.exp(-((x - m) ** 2) / 2 / sigma**2) / sigma / math.sqrt(2 * math.pi)  # noqa: B023, E731
        mean = 0.0
        for x in xs:
            p0 = density(x, 0.0)
            p = (1 - q) * p0 + q * density(x, 1.0)
            mean += p * math.log(p / p0) * sigma / 500 if p0 > 0 and p > 0 else 0.0
        assert 0 < mean <= SampledGaussian(q, sigma).loss
    assert SampledGaussian(0.5, 1e-200).loss == math.inf
    assert MIN_NOISE_MULTIPLIER * MAX_LOSS > 0


def test_the_rounding_of_a_composition_is_no_lie() -> None:
    """Near the smallest δ that so many sampled steps may have, the spent ε is not quite even."""
    plan = plan_of(1e-3, 1000, delta=1e-11, noise_multiplier=1.0)
    exact = [epsilon_pld([(plan.event, k)], plan.delta) for k in range(900, 1001, 4)]
    assert any(b < a - 1e-6 for a, b in itertools.pairwise(exact))
    rounds = range(520, 1001, 20)
    spent = [epsilon_pld([(plan.event, progress.priced(k, plan.steps))], plan.delta) for k in rounds]
    rows = [{"round": k, "epsilon_opened": e, "metrics": {}} for k, e in zip(rounds, spent, strict=True)]
    history = SimpleNamespace(rounds=range(1000), applied=[])
    rows[7]["epsilon_opened"] *= 1 - 5e-3  # not computed again
    assert "recomputed" in progress.metrics(rows, prices.read(plan.to_json()), history)  # type: ignore[arg-type]
    rows[5]["epsilon_opened"] *= 0.9
    with pytest.raises(VerificationError):
        progress.metrics(rows, prices.read(plan.to_json()), history)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 16, 17, 60, 1000, 1 << 20])
def test_the_epsilon_of_a_round_is_stated_for_as_many_rounds_or_a_few_more(steps) -> None:
    numbers = {*range(1, min(steps, 2000) + 1), steps, max(1, steps - 1)}
    stated = {n: progress.priced(n, steps) for n in numbers}
    assert all(n <= k <= min(steps, max(n, n * 9 / 8)) for n, k in stated.items())
    assert all(n == k for n, k in stated.items() if n <= 16 or n == steps)
    assert [stated[n] for n in sorted(stated)] == sorted(stated.values())
    assert len(set(stated.values())) <= 16 + 8 * max(0, steps.bit_length() - 4)


@pytest.mark.parametrize("epsilon", [300.0, 400.0, 900.0])
def test_an_attack_on_a_claim_that_protects_nothing_is_no_crash(epsilon) -> None:
    points = [(0.0, 0.9999), (epsilon, 1e-5), (2 * epsilon, 0.0)]
    assert privacy_loss.attack_rate(points, 0.01) == pytest.approx(1.0, abs=1e-4)
    assert recompute.detection(points, 0.01) == pytest.approx(1.0, abs=1e-4)


def test_a_stated_bound_too_low_or_too_high_is_refused() -> None:
    plan = plan_of(0.1, 60, epsilon=1.0)
    claim = verified(plan)
    for wrong in (0.8 * claim["epsilon_rdp"], 1.2 * claim["epsilon_rdp"] + 0.1):
        with pytest.raises(VerificationError, match="between"):
            claims.rdp({**claim, "epsilon_rdp": wrong}, prices.read(plan.to_json()))
