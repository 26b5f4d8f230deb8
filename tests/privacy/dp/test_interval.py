"""The grid on which losses are rounded: one rule in builder and verifier, always an upper bound, and never far off."""

from __future__ import annotations

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given
from hypothesis import strategies as st

from fedveil.common.errors import VerificationError
from fedveil.privacy.dp.accounting import epsilon_pld, epsilon_rdp, gaussian_epsilon, interval
from fedveil.privacy.dp.calibrate import noise_multiplier
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.report import recompute

DELTA = 1e-5


def on_a_grid(q: float, sigma: float, steps: int, width: float, delta: float = DELTA) -> float:
    accountant = PLDAccountant(value_discretization_interval=width)
    accountant.compose(dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(sigma)), steps)
    return float(accountant.get_epsilon(delta))


@given(st.floats(-12, 0), st.floats(-1.5, 6))
def test_builder_and_verifier_have_one_rule(q, sigma) -> None:
    q, sigma = 10**q, 10**sigma
    width = interval(SampledGaussian(q, sigma))
    assert width == recompute._grid(q, sigma)  # to the last bit: at a small δ another grid rounds otherwise
    assert 1e-6 <= width <= 1e-3


@given(st.floats(-9, 0), st.floats(-0.7, 5), st.floats(1, 100))
def test_less_loss_never_has_a_wider_grid(q, sigma, factor) -> None:
    """So ε does not rise where noise is added, however coarse a grid is."""
    q, sigma = 10**q, 10**sigma
    width = interval(SampledGaussian(q, sigma))
    assert interval(SampledGaussian(q, sigma * factor)) <= width
    assert interval(SampledGaussian(q / factor, sigma)) <= width


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [
        (0.1, 4.0, 60, 1e-5),
        (0.01, 1.0, 1000, 1e-5),
        (0.008, 1.0, 1250, 1e-5),
        (0.3, 7.0, 500, 1e-7),
        (1.0, 30.0, 60, 1e-5),
    ],
)
def test_ordinary_plans_keep_the_grid_they_had(q, sigma, steps, delta) -> None:
    assert interval(SampledGaussian(q, sigma)) == 1e-3


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "fine", "most"),
    [(0.01, 151.0, 20_000, 0.0254, 0.0307), (0.02, 20.0, 50_000, 0.8208, 0.95), (1e-4, 1.0, 100_000, 0.1319, 0.5)],
)
def test_many_cheap_steps_are_not_counted_for_several_times_their_price(q, sigma, steps, fine, most) -> None:
    """``fine`` on a grid of 1e-5 and less; on one of 1e-3 the first reads 0.1, above the bound by RDP (``most``)."""
    found = epsilon_pld([(SampledGaussian(q, sigma), steps)], DELTA)
    assert fine - 1e-3 < found < fine * 1.2
    assert found < epsilon_rdp([(SampledGaussian(q, sigma), steps)], DELTA) < most
    assert recompute.by_pld(q, sigma, steps, DELTA) == pytest.approx(found, rel=1e-9)
    assert on_a_grid(q, sigma, steps, 1e-3) > 1.05 * found


@pytest.mark.slow
def test_a_million_steps() -> None:
    found = epsilon_pld([(SampledGaussian(1e-3, 20.0), 10**6)], DELTA)
    assert 0.160 < found < 0.165 < epsilon_rdp([(SampledGaussian(1e-3, 20.0), 10**6)], DELTA)


@pytest.mark.parametrize(("sigma", "steps"), [(30.0, 60), (300.0, 10_000), (1000.0, 100_000)])
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_it_stays_an_upper_bound(sigma, steps, delta) -> None:
    """With q a hair below 1 losses go over the grid, and the truth is the closed form."""
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    found = epsilon_pld([(SampledGaussian(1 - 1e-9, sigma), steps)], delta)
    assert exact <= found <= exact * 1.005
    assert exact - 1e-9 <= epsilon_pld([(SampledGaussian(1.0, sigma), steps)], delta) <= exact + 1e-3


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.01, 20.0, 1000), (1e-3, 0.7, 200), (0.05, 60.0, 3000)])
def test_a_finer_grid_is_lower_and_not_by_much(q, sigma, steps) -> None:
    found, width = epsilon_pld([(SampledGaussian(q, sigma), steps)], DELTA), interval(SampledGaussian(q, sigma))
    finer = on_a_grid(q, sigma, steps, width / 4)
    assert finer <= found <= finer * 1.01 + 1e-4


def test_no_noise_is_added_for_the_grids_sake() -> None:
    """ε = 0.1 over 20,000 steps of one percent: on a grid of 1e-3 this took σ = 151."""
    sigma = noise_multiplier(0.1, DELTA, 0.01, 20_000)
    assert 35 < sigma < 50
    assert epsilon_rdp([(SampledGaussian(0.01, sigma), 20_000)], DELTA) > 0.1


@pytest.mark.parametrize("steps", [1000, pytest.param(500_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mu", [1.0, 4.0])
def test_what_arithmetic_loses_is_taken_off_delta(steps, mu) -> None:
    """Nearly every record in every step: the library convolves, and the closed form is the truth.

    As it comes from the library, ε may be too small at a tiny δ: there the rounding of the transforms is what it reads.
    """
    event = SampledGaussian(1 - 1e-9, math.sqrt(steps) / mu)
    for delta in (1e-5, 1e-9, 1e-11, 1e-12, 1e-13):
        exact = gaussian_epsilon(mu, delta)
        own = epsilon_pld([(event, steps)], delta)
        assert own >= exact * (1 - 1e-7)
        assert own <= exact * 1.1 + 0.01
        if delta > 2e-16 * steps:
            assert recompute.by_pld(event.sample_rate, event.noise_multiplier, steps, delta) == own
    # A control. How much is lost is the machine's business; half of what is taken off would make the bound none.
    lossy = on_a_grid(event.sample_rate, event.noise_multiplier, steps, interval(event), 1e-12 + 1e-16 * steps)
    assert lossy < gaussian_epsilon(mu, 1e-12) * (1 - 5e-4)


def test_nothing_is_left_of_a_delta_that_drowns() -> None:
    with pytest.raises(VerificationError, match="drowns"):
        recompute.by_pld(0.1, 5.0, 1000, 1e-13)
