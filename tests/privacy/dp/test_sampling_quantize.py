"""Sampling rates by exact binomial bounds; the grid's sensitivity as a property of neighbouring vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from fedveil.common import threads
from fedveil.common.errors import DataError, PlanError
from fedveil.privacy.dp import quantize
from fedveil.privacy.dp.quantize import to_grid
from fedveil.privacy.dp.sampling import poisson_sample

FALSE_ALARM = 1e-9


@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3, 0.5, 0.99])
def test_the_rate_is_the_plans(rate) -> None:
    n = 400_000
    taken = int(poisson_sample(n, rate).sum())
    assert stats.binomtest(taken, n, rate).pvalue > FALSE_ALARM
    # negative control: a rate 10 % off would be seen (where it can be)
    if n * rate > 10_000:
        assert stats.binomtest(taken, n, rate * 0.9).pvalue < FALSE_ALARM


def test_records_are_drawn_independently() -> None:
    """Rows of pairs and two draws in a row: all four outcomes at the product's rate; sizes vary as a binomial's."""
    first, second = poisson_sample(200_000, 0.3), poisson_sample(200_000, 0.3)
    for a, b in ((first, second), (first[:-1], first[1:]), (first[:100_000], first[100_000:])):
        table = np.histogram2d(a.astype(int), b.astype(int), bins=2)[0]
        assert stats.contingency.chi2_contingency(table)[1] > FALSE_ALARM  # type: ignore[operator]
    assert (first != second).any()
    sizes = [int(poisson_sample(1000, 0.3).sum()) for _ in range(400)]
    variance = np.var(sizes, ddof=1) * 399 / (1000 * 0.3 * 0.7)
    assert stats.chi2.ppf(FALSE_ALARM, 399) < variance < stats.chi2.isf(FALSE_ALARM, 399)


def test_rate_one_takes_all_and_nothing_is_a_batch_too() -> None:
    assert poisson_sample(1000, 1.0).all()
    assert poisson_sample(0, 0.5).shape == poisson_sample(0, 1.0).shape == (0,)
    assert not poisson_sample(1000, 1e-15).any()
    assert poisson_sample(1000, math.nextafter(1.0, 0.0)).all()


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(rate) -> None:
    with pytest.raises(PlanError):
        poisson_sample(10, rate)


VECTORS = hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(-1e6, 1e6))


@settings(max_examples=300)
@given(VECTORS, st.floats(1e-3, 10.0), st.floats(1e-6, 10.0), st.floats(0.1, 1e4), st.data())
def test_neighbours_stay_neighbours_on_the_grid(a, clip, width, clamp, data) -> None:
    """‖a - b‖ <= C before implies at most C + sqrt(D)·γ after the clamp and the grid."""
    step = data.draw(hnp.arrays(np.float64, a.shape, elements=st.floats(-1, 1)))
    b = a + step * (clip / max(1.0, float(np.linalg.norm(step))))
    moved = width * np.linalg.norm(to_grid(a, clamp, width) - to_grid(b, clamp, width))
    rounding = 1e-9 * (1 + np.linalg.norm(a))
    assert moved <= np.linalg.norm(a - b) + math.sqrt(a.size) * width + rounding


def test_the_bound_of_the_grid_is_reached() -> None:
    """Negative control: without the grid's term the bound is wrong."""
    a, b = np.full(100, 0.499), np.full(100, 0.501)
    assert np.linalg.norm(to_grid(a, 10.0, 1.0) - to_grid(b, 10.0, 1.0)) == 10.0 > np.linalg.norm(a - b) + 9.9


@given(VECTORS, st.floats(0.1, 1e5), st.floats(1e-4, 1.0))
def test_clamp_then_round_to_nearest(values, clamp, width) -> None:
    grid = to_grid(values, clamp, width)
    assert grid.dtype == np.int64
    clamped = np.clip(values, -clamp, clamp)
    # np.rint(clip(...)): were it rounded first, a value at the clamp could lie beyond it by more than half a width
    assert (np.abs(grid * width - clamped) <= width / 2 * (1 + 1e-9) + 1e-9).all()
    assert (np.abs(grid) <= round(clamp / width)).all()


def test_order_of_clamp_and_grid_known_answer() -> None:
    assert to_grid(np.array([-9.0, -2.6, 0.0, 1.49, 1.51, 9.0]), 2.6, 1.0).tolist() == [-3, -3, 0, 1, 2, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_never_reaches_the_grid(bad) -> None:
    with pytest.raises(DataError, match="NaN or an infinity"):
        to_grid(np.array([0.0, bad, 1.0]), 1.0, 0.1)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 9, 10, 11, 39, 40, 41, 123])
def test_chunks_and_threads_give_the_grid_of_the_whole(count, size, monkeypatch) -> None:
    values = np.random.default_rng(size).normal(0, 3, size)
    whole = np.rint(np.clip(values, -4, 4) / 0.1).astype(np.int64)
    monkeypatch.setattr(threads, "_count", [count])
    monkeypatch.setattr(quantize, "_CHUNK", 10)
    monkeypatch.setattr(quantize, "_PIECE", 40)
    before = values.copy()
    assert np.array_equal(to_grid(values, 4.0, 0.1), whole)
    assert np.array_equal(to_grid(values.reshape(1, -1), 4.0, 0.1), whole[None])
    assert np.array_equal(values, before)
    for at in (0, size // 2, size - 1):
        values[at] = math.nan
        with pytest.raises(DataError):
            to_grid(values, 4.0, 0.1)
        values[at] = 0.0
