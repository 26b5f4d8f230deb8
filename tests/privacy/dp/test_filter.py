"""The RDP filter: it never lets more than its cap through, whatever is asked of it and in which order."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common.errors import VerificationError
from fedveil.privacy.dp.accounting import ORDERS, Filter, best_order, conversion, epsilon_rdp, gaussian_epsilon, rdp
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.report import recompute

DELTA = 1e-5
EVENTS = st.builds(
    SampledGaussian, st.sampled_from([1.0, 0.5, 0.1, 0.01, 1e-6]), st.sampled_from([0.6, 1.0, 5.0, 80.0])
)


def filter_of(cap: float, delta: float = DELTA) -> Filter:
    return Filter(cap, delta, best_order(cap, delta))


@settings(max_examples=150, deadline=None)
@given(st.floats(0.05, 20), st.lists(EVENTS, max_size=60))
def test_adaptive_spending_never_exceeds_the_cap(cap, wishes) -> None:
    f, spent, taken = filter_of(cap), 0.0, []
    for event in wishes:
        after = spent + rdp(event, f.order)
        if f.admits(after):
            spent = after
            taken.append((event, 1))
        assert f.epsilon_of(spent) <= cap * (1 + 1e-8)
    # what was let through really is (cap, δ)-DP: at the filter's order, converted by hand
    if taken:
        total = math.fsum(rdp(e, f.order) for e, _ in taken)
        assert total + conversion(f.order, DELTA) <= cap * (1 + 1e-8)
        assert epsilon_rdp(taken, DELTA) <= cap * (1 + 1e-8)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.3, 10), EVENTS, st.floats(0, 1))
def test_affords_is_what_admission_step_by_step_gives(cap, event, used) -> None:
    f = filter_of(cap)
    spent = used * f.budget
    cost, promised = rdp(event, f.order), f.affords(event, spent)
    # exactly: the next step after the promised ones is beyond the cap, and they are within what rounding is allowed
    budget, promises = Fraction(f.budget), Fraction(spent) + promised * Fraction(cost)
    assert promises + Fraction(cost) > budget
    assert promised == 0 or promises <= budget * (1 + Fraction(1, 10**9))
    # step by step, with the rounding of every sum (the first steps of a long run are taken at once)
    at_once = max(0, promised - 3000)
    total, steps = spent + at_once * cost, at_once
    while f.admits(total + cost) and steps < promised + 1000:
        total += cost
        steps += 1
    # A further step than promised is let through only where the tolerance is what it lacked.
    assert steps >= promised
    assert steps == promised or Fraction(spent) + steps * Fraction(cost) <= budget * (1 + Fraction(2, 10**9))


@settings(max_examples=60, deadline=None)
@given(st.floats(0.3, 10), EVENTS, st.floats(1.01, 3))
def test_more_noise_and_fewer_records_go_further(cap, event, factor) -> None:
    f = filter_of(cap)
    here = f.affords(event)
    q, sigma = event.sample_rate, event.noise_multiplier
    assert f.affords(SampledGaussian(q, sigma * factor)) >= here
    assert f.affords(SampledGaussian(q / factor, sigma)) >= here or q == 1  # fractional orders round up for q < 1
    assert f.affords(event, 0.3 * f.budget) <= here
    g = filter_of(cap * factor)
    assert g.budget / g.order >= f.budget / f.order


def test_one_gaussian_run_just_fits() -> None:
    """σ = 20, 100 steps: exactly 1.99309. The filter reads about 9 % above."""
    event, exact = SampledGaussian(1.0, 20.0), gaussian_epsilon(0.5, DELTA)
    assert filter_of(exact).affords(event) < 100
    assert filter_of(1.15 * exact).affords(event) >= 100
    assert filter_of(1.05 * exact).affords(event) < 100


@given(st.floats(0.01, 100), st.floats(1e-9, 0.01))
def test_the_best_order_is_the_best(cap, delta) -> None:
    order = best_order(cap, delta)
    assert order in ORDERS
    best = Filter(cap, delta, order).budget / order
    assert all(Filter(cap, delta, a).budget / a <= best for a in ORDERS)


def test_a_cap_that_its_order_cannot_express_affords_nothing() -> None:
    f = Filter(0.1, DELTA, 2.0)
    assert f.budget == 0.0
    assert f.affords(SampledGaussian(1.0, 1e6)) == 0
    assert not f.admits(1e-18)
    assert f.epsilon_of(0.0) == 0.0


def test_nothing_is_free_and_infinite_costs_are_refused() -> None:
    f = filter_of(1.0)
    assert 0 < f.affords(SampledGaussian(1e-9, 1e9)) < 1e15
    assert f.affords(SampledGaussian(1.0, 1e-300)) == 0
    assert f.affords(SampledGaussian(0.5, 1e-300)) == 0
    assert not f.admits(math.inf)
    assert not f.admits(math.nan)


@pytest.mark.parametrize(
    ("epsilon", "delta", "order"),
    [(1, 1e-5, 1), (1, 1e-5, math.nan), (1, 1e-5, math.inf), (math.inf, 1e-5, 2), (math.nan, 1e-5, 2), (0, 1e-5, 2),
     (-1, 1e-5, 2), (1, 0, 2), (1, 1, 2), (1, math.nan, 2)],
)  # fmt: skip
def test_no_filter_without_a_meaning(epsilon, delta, order) -> None:
    with pytest.raises(VerificationError):
        Filter(epsilon, delta, order)


def test_a_large_cap_affords_large_samples_too() -> None:
    """Its order is below 2, where the library finds no value for them: the next whole order's is charged."""
    event, cheaper = SampledGaussian(0.5, 5.0), SampledGaussian(1.0, 5.0)
    f = filter_of(50.0)
    assert f.order < 2
    accountant = RdpAccountant(orders=[f.order])
    accountant.compose(dp_event.PoissonSampledDpEvent(0.5, dp_event.GaussianDpEvent(5.0)), 1)
    assert accountant.get_epsilon(DELTA) == math.inf
    assert rdp(event, f.order) == rdp(event, 2.0) > 0
    assert f.affords(event) > 100
    mixed = [event] * 7 + [cheaper] * 3
    spent = sum(rdp(e, f.order) for e in mixed)
    assert recompute.by_filter(mixed, f.order, DELTA) == pytest.approx(f.epsilon_of(spent), abs=1e-9)


@pytest.mark.parametrize("order", [2.0, 8.0, 24.0])
def test_what_is_cached_is_what_is_computed(order) -> None:
    """A ledger evaluates each distinct event once; ten rows of it cost what ten evaluations would."""
    events = [SampledGaussian(q, s) for q in (0.01, 0.3, 1.0) for s in (1.0, 5.0)]
    rdp.cache_clear()
    plain = [rdp.__wrapped__(e, order) for e in events]
    assert rdp.cache_info().currsize == 0
    assert [rdp(e, order) for e in events * 10] == plain * 10
    assert rdp.cache_info().misses == len(events)
