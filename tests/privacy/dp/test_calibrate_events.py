"""Calibration stays just below its target, and nothing outside the table of events becomes an event."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.common.errors import PlanError, VerificationError
from fedveil.privacy.dp.accounting import epsilon_pld, gaussian_epsilon
from fedveil.privacy.dp.calibrate import noise_multiplier
from fedveil.privacy.dp.events import SGM, SampledGaussian, from_json

DELTA = 1e-5


@pytest.mark.parametrize(
    ("epsilon", "q", "steps"), [(1.0, 1.0, 60), (4.0, 1.0, 1), (2.0, 0.1, 200), (0.2, 0.02, 500), (10.0, 0.5, 20)]
)
def test_the_smallest_noise_that_keeps_the_promise(epsilon, q, steps) -> None:
    sigma = noise_multiplier(epsilon, DELTA, q, steps)
    assert epsilon_pld([(SampledGaussian(q, sigma), steps)], DELTA) <= epsilon
    assert epsilon_pld([(SampledGaussian(q, sigma * 0.998), steps)], DELTA) > epsilon
    if q == 1:
        assert epsilon - 5e-3 <= gaussian_epsilon(math.sqrt(steps) / sigma, DELTA) <= epsilon


def test_an_impossible_target_is_refused() -> None:
    with pytest.raises(PlanError, match="no noise multiplier") as e:
        noise_multiplier(1e-9, 1e-9, 1.0, 60)
    assert e.value.hint


@given(st.floats(1e-12, 1.0), st.floats(1e-12, 1e9))
def test_events_round_trip(q, sigma) -> None:
    event = SampledGaussian(q, sigma)
    assert from_json(event.to_json()) == event


GOOD = {"event": SGM, "sample_rate": 0.5, "noise_multiplier": 2.0}


@pytest.mark.parametrize(
    "value",
    [
        None, [], "sampled-gaussian", {}, GOOD | {"event": "dp_accounting.NoOpDpEvent"}, GOOD | {"extra": 1},
        {k: v for k, v in GOOD.items() if k != "sample_rate"}, GOOD | {"sample_rate": "0.5"},
        GOOD | {"sample_rate": True}, GOOD | {"sample_rate": 0}, GOOD | {"sample_rate": -0.1},
        GOOD | {"sample_rate": 1.0000001}, GOOD | {"sample_rate": math.nan}, GOOD | {"noise_multiplier": None},
        GOOD | {"noise_multiplier": 0.0}, GOOD | {"noise_multiplier": -1}, GOOD | {"noise_multiplier": math.inf},
        GOOD | {"noise_multiplier": math.nan}, GOOD | {"noise_multiplier": 2e9},
        GOOD | {"noise_multiplier": 10**400}, GOOD | {"sample_rate": 10**400},
    ],
)  # fmt: skip
def test_nothing_but_the_table_becomes_an_event(value) -> None:
    with pytest.raises(VerificationError):
        from_json(value)


@pytest.mark.parametrize(
    ("q", "sigma"), [(0, 1), (-1, 1), (1.1, 1), (math.nan, 1), (1, 0), (1, math.inf), (1, math.nan)]
)
def test_an_event_out_of_bounds_is_refused(q, sigma) -> None:
    with pytest.raises(VerificationError):
        SampledGaussian(q, sigma)
