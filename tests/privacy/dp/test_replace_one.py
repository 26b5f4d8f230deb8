"""ε when one record is replaced: what dp-accounting means by it, closed forms, and an independent integral."""

from __future__ import annotations

import math

import mpmath
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation, UnsupportedEventError
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.dp.accounting import epsilon_pld, epsilon_replace_one, gaussian_epsilon, replace_one_rdp
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.report import recompute

DELTA = 1e-5
REPLACE, ADD = NeighboringRelation.REPLACE_ONE, NeighboringRelation.ADD_OR_REMOVE_ONE


def library(accountant: type, relation: NeighboringRelation, sigma: float, steps: int) -> float:
    a = accountant(neighboring_relation=relation)
    a.compose(dp_event.GaussianDpEvent(sigma), steps)
    return float(a.get_epsilon(DELTA))


def test_the_two_accountants_of_the_library_mean_different_things() -> None:
    """RDP: σ is relative to the relation's own sensitivity, so nothing changes. PLD: to what one record adds."""
    assert library(RdpAccountant, REPLACE, 10.0, 30) == library(RdpAccountant, ADD, 10.0, 30)
    assert library(PLDAccountant, REPLACE, 10.0, 30) == pytest.approx(library(PLDAccountant, ADD, 5.0, 30), abs=2e-3)
    assert library(PLDAccountant, REPLACE, 10.0, 30) > 2 * library(PLDAccountant, ADD, 10.0, 30)
    # taken at its word, the RDP figure would be far below what is true of the same noise
    assert library(RdpAccountant, REPLACE, 10.0, 30) < 0.6 * library(PLDAccountant, REPLACE, 10.0, 30)


def test_the_library_composes_no_poisson_sampling_under_it_by_rdp() -> None:
    event = dp_event.PoissonSampledDpEvent(0.1, dp_event.GaussianDpEvent(2.0))
    with pytest.raises(UnsupportedEventError, match="REPLACE_SPECIAL"):
        RdpAccountant(neighboring_relation=REPLACE).compose(event, 1)
    PLDAccountant(REPLACE).compose(event, 1)


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (5.0, 100), (20.0, 100), (10.0, 30)])
def test_without_sampling_it_is_twice_the_distance(sigma, steps) -> None:
    exact = gaussian_epsilon(2 * math.sqrt(steps) / sigma, DELTA)
    found = epsilon_replace_one([(SampledGaussian(1.0, sigma), steps)], DELTA)
    assert exact - 1e-9 <= found <= exact + 1e-3
    assert found <= replace_one_rdp([(SampledGaussian(1.0, sigma), steps)], DELTA)


@pytest.mark.parametrize(("q", "sigma"), [(0.1, 1.0), (0.5, 2.0), (0.9, 3.0)])
def test_one_sampled_step_is_the_integral(q, sigma) -> None:
    """Hockey stick between q N(1, σ²) + (1-q) N(0, σ²) and its mirror image, integrated."""
    found = epsilon_replace_one([(SampledGaussian(q, sigma), 1)], DELTA)

    def excess(epsilon):
        def density(x, side):
            return q * mpmath.npdf(x, side, sigma) + (1 - q) * mpmath.npdf(x, 0, sigma)

        def positive(x):
            return max(mpmath.mpf(0), density(x, 1) - mpmath.exp(epsilon) * density(x, -1))

        return float(str(mpmath.quad(positive, mpmath.linspace(-1, 1 + 12 * sigma, 60))))

    assert excess(found) <= DELTA
    assert excess(found - 3e-3) > DELTA


@settings(max_examples=8, deadline=None)
@given(st.floats(0.02, 1.0), st.floats(1.0, 20.0), st.integers(1, 30))
def test_it_lies_between_its_bounds(q, sigma, steps) -> None:
    events = [(SampledGaussian(q, sigma), steps)]
    found = epsilon_replace_one(events, DELTA)
    assert epsilon_pld(events, DELTA) - 2e-3 <= found <= replace_one_rdp(events, DELTA) + 2e-3
    assert found <= recompute.replacing_bound(q, sigma, steps, DELTA) + 2e-3
    assert recompute.by_pld_replacing(q, sigma, steps, DELTA) == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize(("q", "sigma", "steps"), [(1.0, 0.01, 5), (0.001, 0.04, 5), (0.5, 0.2, 1 << 20)])
def test_a_hostile_plan_costs_neither_memory_nor_time(q, sigma, steps) -> None:
    events = [(SampledGaussian(q, sigma), steps)]
    assert epsilon_replace_one(events, DELTA) == replace_one_rdp(events, DELTA)
    assert 1000 < epsilon_replace_one(events, DELTA) < math.inf


def test_nothing_costs_nothing() -> None:
    assert epsilon_replace_one([], DELTA) == replace_one_rdp([], DELTA) == 0.0
    assert recompute.by_pld_replacing(0.5, 1.0, 0, DELTA) == recompute.replacing_bound(0.5, 1.0, 0, DELTA) == 0.0
