"""ε of lists of events: closed forms, papers' figures, two foreign accountants and high-precision arithmetic."""

from __future__ import annotations

import math
import warnings

import mpmath
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis import rdp as opacus_rdp

from fedveil.common.errors import PlanError, VerificationError
from fedveil.privacy.dp.accounting import (
    ORDERS,
    conversion,
    delta_curve,
    epsilon_pld,
    epsilon_rdp,
    gaussian_epsilon,
    rdp,
)
from fedveil.privacy.dp.events import SampledGaussian

DELTA = 1e-5
# σ, S, exact ε at δ = 1e-5 of S unsampled steps (Balle & Wang 2018, Theorem 8)
GOLDEN = [(1.0, 1, 4.37718), (5.0, 100, 9.99726), (20.0, 100, 1.99309)]
INTEGER_ORDERS = [float(a) for a in (2, 3, 5, 8, 16, 32, 64)]


def sgm(q: float, sigma: float) -> SampledGaussian:
    return SampledGaussian(q, sigma)


@pytest.mark.parametrize(("sigma", "steps", "expected"), GOLDEN)
def test_golden_values_of_the_gaussian(sigma, steps, expected) -> None:
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, DELTA)
    assert exact == pytest.approx(expected, abs=5e-6)
    pld = epsilon_pld([(sgm(1.0, sigma), steps)], DELTA)
    assert exact - 1e-9 <= pld <= exact + 1e-3


@pytest.mark.parametrize(("sigma", "steps", "expected"), GOLDEN)
def test_the_closed_form_in_high_precision(sigma, steps, expected) -> None:
    mu = mpmath.sqrt(steps) / sigma
    with mpmath.workdps(40):
        phi = lambda x: mpmath.ncdf(x)  # noqa: E731
        delta = lambda e: phi(mu / 2 - e / mu) - mpmath.exp(e) * phi(-mu / 2 - e / mu)  # noqa: E731
        root = mpmath.findroot(lambda e: delta(e) - mpmath.mpf(DELTA), expected)
    assert gaussian_epsilon(float(mu), DELTA) == pytest.approx(float(root), abs=1e-9)


def test_the_closed_form_at_its_ends() -> None:
    assert gaussian_epsilon(1e-6, DELTA) == 0.0
    with pytest.raises(PlanError, match="500"):
        gaussian_epsilon(60.0, DELTA)


def test_rounds_compose_and_are_never_forgotten() -> None:
    """σ = 1, q = 1/125, 125 steps a round: peers that reset their accountant each round claim the first figure."""
    event, seen = sgm(1 / 125, 1.0), []
    for rounds, expected in ((1, 0.62), (3, 0.94), (10, 1.61)):
        ours = epsilon_pld([(event, 125 * rounds)], DELTA)
        prv = PRVAccountant()
        prv.history = [(1.0, 1 / 125, 125 * rounds)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = prv.get_epsilon(DELTA, eps_error=0.01)
        assert theirs == pytest.approx(expected, abs=0.015)
        assert ours == pytest.approx(theirs, abs=0.011)
        seen.append(ours)
    assert seen[0] < seen[1] < seen[2]
    pieces = [(event, 125)] * 10
    assert epsilon_pld(pieces, DELTA) == seen[2]
    assert epsilon_rdp(pieces, DELTA) == pytest.approx(epsilon_rdp([(event, 1250)], DELTA), rel=1e-12)


def test_the_moments_accountant_of_abadi_2016() -> None:
    """q = .01, σ = 4, T = 10,000, δ = 1e-5: ε = 1.26 by the conversion of that time."""
    event = sgm(0.01, 4.0)
    classic = min(10_000 * rdp(event, a) + math.log(1 / DELTA) / (a - 1) for a in ORDERS)
    assert classic == pytest.approx(1.26, abs=0.005)
    assert epsilon_pld([(event, 10_000)], DELTA) < epsilon_rdp([(event, 10_000)], DELTA) < classic


@pytest.mark.parametrize(("sigma", "epochs", "printed"), [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)])
def test_the_table_of_tensorflow_privacy(sigma, epochs, printed) -> None:
    """Its MNIST tutorial: 60,000 records, batches of 256, δ = 1e-5, by the conversion of that time."""
    event, steps = sgm(256 / 60_000, sigma), epochs * 60_000 // 256
    classic = min(steps * rdp(event, a) + math.log(1 / DELTA) / (a - 1) for a in ORDERS)
    assert classic == pytest.approx(printed, abs=0.011)
    assert epsilon_pld([(event, steps)], DELTA) < epsilon_rdp([(event, steps)], DELTA) < classic


@pytest.mark.parametrize(
    ("q", "sigma", "steps"), [(0.01, 4.0, 10_000), (0.008, 1.0, 1250), (0.1, 2.0, 200), (1, 9, 60)]
)
def test_rdp_agrees_with_opacus(q, sigma, steps) -> None:
    orders = [a for a in ORDERS if a.is_integer() and a <= 64]
    theirs = opacus_rdp.compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=orders)
    for a, value in zip(orders, np.atleast_1d(theirs), strict=True):
        assert rdp(sgm(q, sigma), a) == pytest.approx(value, rel=1e-7, abs=2e-12)
    whole = opacus_rdp.compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=list(ORDERS))
    epsilon, _ = opacus_rdp.get_privacy_spent(orders=list(ORDERS), rdp=whole, delta=DELTA)
    assert epsilon_rdp([(sgm(q, sigma), steps)], DELTA) == pytest.approx(epsilon, rel=1e-3)


@given(st.sampled_from(ORDERS), st.floats(1e-3, 1e9))
def test_rdp_of_the_gaussian_is_its_closed_form(order, sigma) -> None:
    assert rdp(sgm(1.0, sigma), order) == pytest.approx(order / (2 * sigma**2), rel=1e-14)


@pytest.mark.parametrize("order", [1.5, 4.0, 24.0])
@pytest.mark.parametrize(("q", "sigma"), [(0.01, 1.0), (0.1, 2.0), (0.3, 0.7), (0.9, 5.0)])
def test_rdp_is_dp_accountings_own_value(q, sigma, order) -> None:
    accountant = RdpAccountant(orders=[order])
    accountant.compose(dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(sigma)), 1)
    own = float(accountant._rdp[0])
    if own == math.inf:  # its series for a fractional order did not converge: the next whole order bounds it
        own = rdp(sgm(q, sigma), float(math.ceil(order)))
    assert rdp(sgm(q, sigma), order) == pytest.approx(own, rel=1e-12, abs=1.1e-12)


def exact_rdp(q: float, sigma: float, order: int) -> float:
    """Mironov, Talwar & Zhang 2019, section 3.3 (integer order), with 60 digits."""
    with mpmath.workdps(60):
        Q, s = mpmath.mpf(q), mpmath.mpf(sigma)
        terms = (
            mpmath.binomial(order, k) * (1 - Q) ** (order - k) * Q**k * mpmath.exp((k * k - k) / (2 * s * s))
            for k in range(order + 1)
        )
        return float(mpmath.log(mpmath.fsum(terms)) / (order - 1))


@pytest.mark.parametrize("order", [2, 8, 12, 64, 256])
@pytest.mark.parametrize(
    ("q", "sigma"),
    [(1e-8, 100.0), (1e-6, 100.0), (1e-5, 5.0), (1e-3, 1.0), (0.01, 1e6), (0.01, 1e3), (0.008, 1.0), (0.5, 1e5)],
)
def test_no_step_is_charged_less_than_it_costs(q, sigma, order) -> None:
    """The cheapest steps drown in the rounding of a sum near 1: they must not become free."""
    exact, charged = exact_rdp(q, sigma, order), rdp(sgm(q, sigma), float(order))
    assert exact <= charged
    assert charged <= exact * (1 + 1e-9) + 1.1e-12


def test_the_subtraction_alone_would_have_made_steps_free() -> None:
    """Negative control: ε at a tiny δ less the conversion, of one step, is 0 for the cheapest steps."""
    accountant = RdpAccountant(orders=[16.0])
    accountant.compose(dp_event.PoissonSampledDpEvent(1e-6, dp_event.GaussianDpEvent(100.0)), 1)
    naive = float(accountant.get_epsilon(1e-300)) - conversion(16.0, 1e-300)
    assert naive <= 0 < exact_rdp(1e-6, 100.0, 16) < rdp(sgm(1e-6, 100.0), 16.0)


@pytest.mark.parametrize("order", [1.5, 2.7, 5.3, 9.9])
@pytest.mark.parametrize(("q", "sigma"), [(0.01, 1.0), (0.1, 2.0), (0.9, 5.0)])
def test_fractional_orders_are_never_below_the_integral(q, sigma, order) -> None:
    def moment(x):
        ratio = (1 - q) + q * mpmath.exp((2 * x - 1) / (2 * mpmath.mpf(sigma) ** 2))
        return mpmath.npdf(x, 0, sigma) * ratio**order

    points = [-12 * sigma, -4 * sigma, 0, sigma, 4 * sigma, 8 * sigma, order + 12 * sigma]
    with mpmath.workdps(25):
        exact = float(mpmath.log(mpmath.quad(moment, points)) / (order - 1))
    assert exact <= rdp(sgm(q, sigma), order) <= 2 * exact + 1e-3


def test_noise_too_small_to_compute_with_costs_everything() -> None:
    for q in (1.0, 0.3, 1e-3):
        for sigma in (1e-300, 1e-160, 1e-20):
            assert rdp(sgm(q, sigma), 2.0) > 1e30
            assert epsilon_pld([(sgm(q, sigma), 1)], DELTA) > 1e30


@pytest.mark.parametrize(("sigma", "steps"), [(0.049, 1), (0.2, 1 << 20), (1.0, 1 << 20), (0.01, 1 << 20)])
def test_a_hostile_plan_costs_neither_memory_nor_time(sigma, steps) -> None:
    """The loss distribution of such a plan would have 10^8 points and more."""
    bound = epsilon_pld([(sgm(1.0, sigma), steps)], DELTA)
    mu = math.sqrt(steps) / sigma
    assert bound == epsilon_rdp([(sgm(1.0, sigma), steps)], DELTA)
    assert bound >= mu * mu / 2 > 100


def test_many_cheap_steps_still_go_by_pld() -> None:
    event = sgm(1e-4, 1.0)
    pld, bound = epsilon_pld([(event, 100_000)], DELTA), epsilon_rdp([(event, 100_000)], DELTA)
    assert 0.1 < pld < bound < 1


@settings(max_examples=10, deadline=None)
@given(st.floats(0.02, 1.0), st.floats(0.8, 20.0), st.integers(1, 30), st.floats(1.05, 2.0))
def test_pld_is_monotone(q, sigma, steps, factor) -> None:
    here = epsilon_pld([(sgm(q, sigma), steps)], DELTA)
    slack = 2e-3
    assert epsilon_pld([(sgm(q, sigma * factor), steps)], DELTA) <= here + slack
    assert epsilon_pld([(sgm(q, sigma), steps + 1)], DELTA) >= here - slack
    assert epsilon_pld([(sgm(q / factor, sigma), steps)], DELTA) <= here + slack
    assert epsilon_pld([(sgm(q, sigma), steps)], DELTA / 2) >= here
    assert here <= epsilon_rdp([(sgm(q, sigma), steps)], DELTA) + slack


def test_the_curve_passes_through_epsilon() -> None:
    events = [(sgm(0.1, 2.0), 100), (sgm(1.0, 30.0), 10)]
    epsilon = epsilon_pld(events, DELTA)
    points = delta_curve(events, [0.0, epsilon / 2, epsilon, 2 * epsilon])
    assert points[2][1] == pytest.approx(DELTA, rel=1e-3)
    deltas = [d for _, d in points]
    assert deltas == sorted(deltas, reverse=True)
    assert 0 < deltas[0] < 1


def test_nothing_costs_nothing_and_time_runs_forward() -> None:
    event = sgm(0.5, 1.0)
    assert epsilon_pld([], DELTA) == epsilon_rdp([], DELTA) == epsilon_pld([(event, 0)], DELTA) == 0.0
    for accountant in (epsilon_pld, epsilon_rdp):
        with pytest.raises(VerificationError, match="negative"):
            accountant([(event, 5), (event, -3)], DELTA)


def test_the_conversion_is_the_one_of_canonne_kamath_steinke() -> None:
    """Proposition 12 against the delta it promises: Gaussian, exact δ at the converted ε is below δ."""
    for order in (2.0, 8.0, 32.0):
        for mu in (0.3, 1.0, 2.0):
            epsilon = order * mu * mu / 2 + conversion(order, DELTA)
            assert gaussian_epsilon(mu, DELTA) <= epsilon
