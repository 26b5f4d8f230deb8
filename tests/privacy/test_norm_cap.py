"""The longest sum that nobody refuses: above what honest sites can reach, exact, and from the plan alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedveil.common.errors import SumTooLong
from fedveil.common.workload.model import ModelSpec
from fedveil.privacy import norm_cap
from fedveil.privacy.dp.noise import discrete_gaussian
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan


def plan(**changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "sites": 5, "records": 500, "epsilon": 2.0, "steps": 10, "clip": 1.0, "contract_hash": "c" * 64,
        "model": ModelSpec(name="logistic", inputs=99, classes=2), "optimizer": Optimizer(learning_rate=0.5),
    }  # fmt: skip
    return make_plan(**{**values, **changes})


@given(
    arrays.arrays(np.int64, st.integers(0, 50), elements=st.integers(-(1 << 46) + 1, (1 << 46) - 1)),
    st.integers(1, 3),
)
def test_the_length_is_exact(values, times):
    many = np.tile(values, times * (4000 if values.size else 1))  # over several chunks
    assert norm_cap.squared(many) == times * (4000 if values.size else 1) * sum(int(v) ** 2 for v in values.tolist())


@pytest.mark.parametrize("rate", [1.0, 0.2, 0.01])
@pytest.mark.parametrize("extra", [{}, {"clip": 0.01}, {"mode": "client", "few_clients": True}], ids=str)
def test_no_sum_of_honest_sites_is_refused(rate, extra):
    """Every sampled record pulls the same way as far as its clip allows, and the noise is the plan's."""
    p = plan(sample_rate=1.0 if extra.get("mode") else rate, **extra)
    D, rng = p.model.parameters, np.random.default_rng(1)
    for _ in range(30):
        many = p.sites if p.mode == "client" else int(rng.binomial(p.records, p.sample_rate))
        total = np.zeros(D, np.int64)
        for _ in range(p.sites):
            share = np.full(D, many / p.sites * p.clip / np.sqrt(D))
            total += np.rint(share / p.grid).astype(np.int64) + discrete_gaussian(p.share_std, D)
        norm_cap.check(p, total, p.sites)


def test_it_is_no_more_than_a_few_times_what_can_be_reached():
    for p in (
        plan(),
        plan(sample_rate=0.05),
        plan(epsilon=0.5),
        plan(model=ModelSpec(name="logistic", inputs=4000, classes=2)),
    ):
        noise = p.share_std * np.sqrt(p.sites * p.model.parameters)
        reached = p.sample_rate * p.records * p.clip / p.grid + noise
        assert reached < norm_cap.cap(p, p.sites) < 4 * reached


def test_it_grows_with_records_clip_noise_and_members():
    base = norm_cap.cap(plan(), 5) * plan().grid
    for more in (plan(records=5000), plan(clip=2.0), plan(epsilon=0.5)):
        assert norm_cap.cap(more, 5) * more.grid > base
    assert norm_cap.cap(plan(), 3) < norm_cap.cap(plan(), 5)


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_capacities_that_are_stated_make_it_tighter(rate):
    """Every member is full: no honest sum is refused; and one more record than they can hold would be too long."""
    p = plan(sample_rate=rate, capacity=110)
    assert norm_cap.cap(p, 5) * p.grid < norm_cap.cap(plan(sample_rate=rate), 5) * plan(sample_rate=rate).grid
    assert norm_cap._in_sample(plan(capacity=110), 4) == 440
    assert norm_cap._in_sample(plan(), 4) == 1000, "twice the declared records, if no capacity is stated"
    rng = np.random.default_rng(2)
    most = max(int(n) for n in rng.binomial(5 * 110, rate, 2000))
    assert most <= norm_cap._in_sample(p, 5) <= 5 * 110


def test_one_unit_over_it_is_refused():
    p = plan()
    D, most = p.model.parameters, norm_cap.cap(p, 5)
    on_it = np.zeros(D, np.int64)
    on_it[7] = -most
    norm_cap.check(p, on_it, 5)
    on_it[8] = 1
    with pytest.raises(SumTooLong, match="longer than"):
        norm_cap.check(p, on_it, 5)
