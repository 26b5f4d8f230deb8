"""Places: enough of them by an independent oracle, a uniform injection, and nothing that a record decides."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedveil.common.errors import PlanError
from fedveil.privacy.dp.places import EMPTY, places_needed, seat, seat_each


@settings(max_examples=200, deadline=None)
@given(
    capacity=st.integers(1, 1 << 20),
    rate=st.floats(1e-6, 1.0, exclude_max=True),
    overflow=st.floats(1e-25, 1e-3),
)
def test_the_others_outgrow_the_places_as_rarely_as_promised(capacity, rate, overflow) -> None:
    """scipy's exact binomial tail; never more places than the capacity, and not absurdly many."""
    places = places_needed(capacity, rate, overflow)
    assert 1 <= places <= capacity
    if places < capacity:
        assert stats.binom.sf(places - 1, capacity - 1, rate) <= overflow
    fewest = int(stats.binom.isf(overflow, capacity - 1, rate)) + 1
    spread = (capacity * rate * (1 - rate)) ** 0.5
    assert places <= max(fewest + 4, fewest + 2 * spread) + 12


def test_fewer_places_would_break_the_promise() -> None:
    """Negative control: the mean and three standard deviations are not enough."""
    assert stats.binom.sf(130 - 1, 999, 0.1) > 1e-9 >= stats.binom.sf(places_needed(1000, 0.1, 1e-9) - 1, 999, 0.1)


def test_without_sampling_every_record_has_its_place() -> None:
    assert places_needed(1234, 1.0, 0.0) == 1234
    assert seat(1234, 1.0, 1234).tolist() != list(range(1234))
    assert sorted(seat(1000, 1.0, 1234)) == [EMPTY] * 234 + list(range(1000))


@pytest.mark.parametrize(("capacity", "rate", "overflow"), [(0, 1.0, 0.0), (10, 0.0, 1e-9), (10, 1.5, 0), (10, 0.5, 0)])
def test_what_makes_no_step_is_refused(capacity, rate, overflow) -> None:
    with pytest.raises(PlanError):
        places_needed(capacity, rate, overflow)


def _seat_of_the_second(records: int, rate: float, places: int) -> np.ndarray:
    return seat_each(np.array([2, records]), rate, places)[1]


@pytest.mark.parametrize("drawn", [seat, _seat_of_the_second])
def test_the_injection_is_uniform(drawn) -> None:
    """Three records in five places: all 60 injections, each equally often (chi-squared at 1e-6)."""
    seen = Counter(tuple(drawn(3, 1.0, 5).tolist()) for _ in range(12_000))
    assert len(seen) == 60
    assert stats.chisquare(list(seen.values())).pvalue > 1e-6


@pytest.mark.parametrize("drawn", [seat, _seat_of_the_second])
def test_each_record_is_sampled_at_the_rate_by_itself(drawn) -> None:
    sampled = np.array([[r in s for r in range(4)] for s in (set(drawn(4, 0.3, 4).tolist()) for _ in range(8_000))])
    assert abs(sampled.mean() - 0.3) < 5 * (0.21 / sampled.size) ** 0.5
    assert np.abs(np.corrcoef(sampled.T) - np.eye(4)).max() < 5 / 8_000**0.5


@pytest.mark.parametrize("drawn", [seat, _seat_of_the_second])
def test_a_sample_that_outgrows_its_places_seats_nobody(drawn) -> None:
    assert drawn(10, 1.0, 9).tolist() == [EMPTY] * 9
    assert drawn(0, 0.5, 3).tolist() == [EMPTY] * 3


@settings(max_examples=100, deadline=None)
@given(
    capacity=st.integers(6, 5000), rate=st.floats(0.001, 0.9), overflow=st.floats(1e-18, 1e-6), group=st.integers(1, 5)
)
def test_a_groups_chance_of_too_few_places_is_bounded(capacity, rate, overflow, group) -> None:
    places = places_needed(capacity, rate, overflow)
    if capacity > places:  # others, not of the group, that leave it fewer places than it needs
        assert stats.binom.sf(places - group, capacity - group, rate) <= overflow
