"""Our own accountant against the library's two bounds, against the closed form, and with its safeguards taken out."""

from __future__ import annotations

import ast
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fedveil.common.errors import VerificationError
from fedveil.privacy.dp import fourier_pld
from fedveil.privacy.dp.accounting import epsilon_pld, gaussian_epsilon, interval
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.dp.fourier_pld import epsilon

SAME = 1e-6  # on one grid, ours and the library's are one number to this, relative
FINER = 2.5e-3  # what the library's coarser grid adds at most: so far may ours lie below

# q, σ, steps, δ: ordinary runs, few large steps, many small ones, rates near 0 and near 1, small and large δ.
TABLE = [
    (0.01, 1.0, 1000, 1e-5), (0.01, 0.6, 1000, 1e-5), (0.1, 2.0, 200, 1e-6), (0.5, 5.0, 60, 1e-5),
    (0.001, 0.5, 5000, 1e-5), (0.02, 3.0, 10_000, 1e-8), (1e-4, 0.4, 20, 1e-5), (0.3, 1.0, 1, 1e-4),
    (0.999, 4.0, 30, 1e-6), (1 - 1e-9, 10.0, 100, 1e-5), (1.0, 4.0, 60, 1e-5), (1.0, 0.5, 1, 1e-10),
    (0.05, 0.7, 20, 1e-9), (0.2, 30.0, 500, 1e-3), (0.9, 0.7, 10, 1e-5), (2**-20, 0.3, 100, 1e-7),
]  # fmt: skip


def upper(*events: tuple[float, float, int], delta: float) -> float:
    """The library's upper bound."""
    return epsilon_pld([(SampledGaussian(q, sigma), n) for q, sigma, n in events], delta)


def least(q: float, sigma: float, steps: int, delta: float) -> float:
    """The library's lower bound: every loss rounded down, on a grid eight times finer than ours."""
    one = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=q, pessimistic_estimate=False, use_connect_dots=False,
        value_discretization_interval=fourier_pld._interval(fourier_pld._weights(q, 1), sigma) / 8,
    )  # fmt: skip
    return float(one.self_compose(steps).get_epsilon_for_delta(delta))


def plausible(own: float, *events: tuple[float, float, int], delta: float) -> bool:
    """What every comparison here asks of ε: not above the library's bound, and below it by no more than its grid."""
    bound = upper(*events, delta=delta)
    return bound * (1 - FINER) - 5e-4 <= own <= bound * (1 + SAME) + 1e-6


@pytest.mark.parametrize(("q", "sigma", "steps", "delta"), TABLE)
def test_on_one_grid_it_is_the_librarys_number_and_on_a_finer_one_a_little_less(q, sigma, steps, delta) -> None:
    event, bound = (q, sigma, steps), upper((q, sigma, steps), delta=delta)
    assert epsilon([event], delta, interval(SampledGaussian(q, sigma))) == pytest.approx(bound, rel=SAME)
    assert plausible(epsilon([event], delta), event, delta=delta)


@pytest.mark.parametrize(("q", "sigma", "steps", "delta"), TABLE[2:4])
def test_it_is_never_below_losses_that_are_rounded_down(q, sigma, steps, delta) -> None:
    assert (
        0.9 * epsilon([(q, sigma, steps)], delta) < least(q, sigma, steps, delta) <= epsilon([(q, sigma, steps)], delta)
    )


@pytest.mark.parametrize(("sigma", "steps"), [(0.3, 1), (1.0, 1), (5.0, 100), (20.0, 100), (400.0, 10)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9, 1e-13])
def test_every_record_in_every_step_is_the_closed_form(sigma, steps, delta) -> None:
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    own = epsilon([(1.0, sigma, steps)], delta)
    assert exact * (1 - 1e-9) <= own <= exact * 1.0003 + 1e-9


@pytest.mark.parametrize(("sigma", "steps"), [(3.0, 7), (10.0, 100), (60.0, 5000)])
def test_so_is_a_rate_of_nearly_one_which_is_composed_by_transforms(sigma, steps) -> None:
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, 1e-6)
    assert exact * (1 - 1e-9) <= epsilon([(1 - 1e-12, sigma, steps)], 1e-6) <= exact * 1.0003


def test_different_steps_compose_on_one_grid() -> None:
    events = [(0.01, 1.0, 300), (0.1, 3.0, 50), (1.0, 20.0, 10), (1.0, 8.0, 3), (0.02, 0.8, 40)]
    assert plausible(epsilon(events, 1e-5), *events, delta=1e-5)
    assert epsilon(list(reversed(events)), 1e-5) == pytest.approx(epsilon(events, 1e-5), rel=1e-9)
    split = [(0.01, 1.0, 100), (0.01, 1.0, 200), *events[1:], (0.5, 9.0, 0)]
    assert epsilon(split, 1e-5) == pytest.approx(epsilon(events, 1e-5), rel=1e-9)


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.floats(-4, -0.05), st.floats(-0.3, 1.5), st.integers(1, 2000), st.floats(-9, -3))
def test_random_steps_cost_what_the_library_says(lg_q, lg_sigma, steps, lg_delta) -> None:
    q, sigma, delta = 10**lg_q, 10**lg_sigma, 10**lg_delta
    event, one = (q, sigma, steps), SampledGaussian(q, sigma)
    if steps * one.loss > 100:
        return
    bound = upper(event, delta=delta)
    assert epsilon([event], delta, interval(one)) == pytest.approx(bound, rel=SAME, abs=1e-6)
    assert plausible(epsilon([event], delta), event, delta=delta)
    more = [event, (1.0, 10 * sigma, 2), (q / 2, 2 * sigma, 3)]
    assert epsilon([event], delta) - 1e-9 <= epsilon(more, delta) <= upper(*more, delta=delta) * (1 + SAME) + 1e-6


def test_more_of_anything_costs_more() -> None:
    base = epsilon([(0.05, 1.0, 100)], 1e-5)
    assert epsilon([(0.05, 1.0, 101)], 1e-5) > base
    assert epsilon([(0.051, 1.0, 100)], 1e-5) > base
    assert epsilon([(0.05, 0.99, 100)], 1e-5) > base
    assert epsilon([(0.05, 1.0, 100)], 1e-6) > base
    assert epsilon([], 1e-5) == epsilon([(0.5, 1.0, 0)], 1e-5) == 0.0


def test_a_coarser_grid_only_adds() -> None:
    found = [epsilon([(0.02, 0.8, 300)], 1e-6, h) for h in (1e-4, 1e-3, 1e-2, 0.1)]
    assert found == sorted(found)
    assert found[1] < found[0] * 1.001


@pytest.mark.parametrize("event", [(0.01, 0.7, 100), (0.5, 1.0, 10)])
def test_the_larger_direction_counts(event) -> None:
    """To have taken a record out tells more, where samples are drawn, than to have put one in."""
    weights = fourier_pld._weights(event[0], 1)
    out, in_ = (fourier_pld._epsilon([(weights, *event[1:])], 1e-5, 1e-4, removing) for removing in (True, False))
    assert out > 1.5 * in_ > 0
    assert epsilon([event], 1e-5, 1e-4) == pytest.approx(out, rel=1e-6)


# -- negative controls: each safeguard left out is found by the comparisons above -------------------------------------

HARD, DELTA = (0.01, 0.6, 1000), 1e-5


def test_control_losses_rounded_down_are_found(monkeypatch) -> None:
    step = fourier_pld._step

    def down(*given):
        first, masses, infinite = step(*given)
        return first - 1, masses, infinite

    assert plausible(epsilon([HARD], DELTA), HARD, delta=DELTA)
    monkeypatch.setattr(fourier_pld, "_step", down)
    assert not plausible(epsilon([HARD], DELTA), HARD, delta=DELTA)


def test_control_a_tail_that_is_dropped_is_found(monkeypatch) -> None:
    """Cut where it matters, at 1e-6 of a step: its mass thrown away is too little, counted as infinite too much."""
    step, event = fourier_pld._step, (1e-4, 0.4, 20)
    safe = epsilon([event], DELTA)
    monkeypatch.setattr(fourier_pld, "_step", lambda q, s, h, cut, removing: step(q, s, h, 1e-2, removing))
    counted = _or_nothing(event)
    monkeypatch.setattr(fourier_pld, "_step", lambda q, s, h, cut, removing: (*step(q, s, h, 1e-2, removing)[:2], 0.0))
    dropped = _or_nothing(event)
    assert dropped < safe * (1 - FINER)
    assert not plausible(dropped, event, delta=DELTA)
    assert counted == 0 or counted > safe, "more than δ is cut off and refused, or the rest costs more"


def test_control_a_window_that_is_too_short_is_found(monkeypatch) -> None:
    """What leaves a window at its upper end comes back as a gain: without the bound on it, ε is too small."""
    reach = fourier_pld._reach
    monkeypatch.setattr(fourier_pld, "_reach", lambda *given: 0.4 * reach(*given))
    assert not plausible(_or_nothing(HARD), HARD, delta=DELTA)


def test_control_the_cheaper_direction_alone_is_found(monkeypatch) -> None:
    one = fourier_pld._epsilon
    monkeypatch.setattr(fourier_pld, "_epsilon", lambda events, delta, h, _: one(events, delta, h, False))
    assert not plausible(epsilon([HARD], DELTA), HARD, delta=DELTA)


def test_control_a_wrong_rate_and_a_wrong_noise_are_found() -> None:
    q, sigma, steps = HARD
    for wrong in ((0.99 * q, sigma, steps), (q, 1.01 * sigma, steps), (q, sigma, steps - 10)):
        assert not plausible(epsilon([wrong], DELTA), HARD, delta=DELTA)


def _or_nothing(event: tuple[float, float, int]) -> float:
    try:
        return epsilon([event], DELTA)
    except VerificationError:
        return 0.0


# -- shape ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_composed_is_refused_by_name() -> None:
    with pytest.raises(VerificationError, match="drowns"):
        epsilon([(0.1, 1.0, 1 << 20)], 1e-12)
    with pytest.raises(VerificationError, match="beyond"):
        epsilon([(1.0, 0.02, 1)], 1e-9)


def test_a_step_keeps_its_probability_under_both_neighbours() -> None:
    for size, removing in itertools.product((1, 2, 5), (True, False)):
        weights = fourier_pld._weights(0.03, size)
        first, masses, infinite = fourier_pld._step(weights, 0.8, 1e-3, 1e-14, removing)
        losses = 1e-3 * (first + np.arange(len(masses)))
        assert masses.min() >= 0
        assert masses.sum() + infinite == pytest.approx(1, abs=1e-12)
        assert masses @ np.exp(-losses) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 7, 97, 1000, 12_289, 1_048_577])
def test_windows_have_lengths_that_transforms_are_fast_for(n: int) -> None:
    found = fourier_pld._smooth(n)
    assert n <= found <= 1.2 * n + 4
    assert found % 2 == 0
    for p in (2, 3, 5):
        while found % p == 0:
            found //= p
    assert found == 1


def test_it_shares_nothing_with_the_other_accountants() -> None:
    """NumPy, the standard library and the project's errors: no library of accountants, no SciPy, no line of ours."""
    tree = ast.parse(Path(fourier_pld.__file__ or "").read_text(encoding="utf-8"))
    named = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    named |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert named == {"__future__", "math", "collections.abc", "numpy", "numpy.typing", "fedveil.common.errors"}
