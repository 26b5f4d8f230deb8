"""What the planner accepts, the secure sum can begin with: the grid's room is the sum's own."""

from __future__ import annotations

import itertools

import pytest

from fedveil.common.errors import PlanError
from fedveil.common.workload.model import ModelSpec
from fedveil.privacy import grid
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.secagg import params


def plan(sites: int, hidden: int, steps: int, epsilon: float) -> PrivacyPlan:
    committee = {"committee": 120, "committee_seed": "5e" * 32} if sites > params.MAX_HELPERS else {}
    return make_plan(
        sites=sites, records=100 * sites, epsilon=epsilon, steps=steps, clip=1.0, sample_rate=0.1, delta=1e-6,
        model=ModelSpec(name="mlp", inputs=64, classes=10, hidden=(hidden,)), contract_hash="c" * 64,
        optimizer=Optimizer(learning_rate=0.1), **committee,
    )  # fmt: skip


@pytest.mark.parametrize("sites", [10, 150, 200, 400, 700, 1000])
def test_an_accepted_plan_fits_the_secure_sum(sites) -> None:
    for hidden, steps, epsilon in itertools.product((8, 4000), (10, 1000), (0.5, 8.0)):
        p = plan(sites, hidden, steps, epsilon)
        found = params.plaintext(sites, p.committee or sites, p.bound, p.model.parameters, steps)
        assert found.failure_log2 <= params.MAX_FAILURE_LOG2


def test_with_the_room_of_few_sites_many_do_not_fit(monkeypatch) -> None:
    """Negative control: the grid as it was chosen without asking the sum."""
    p = plan(700, 8, 10, 0.5)
    share = p.noise_multiplier / p.honest**0.5
    width, clamp = grid.choose(700, 1.0, share, p.model.parameters, 10, 20.0)
    wide = grid.largest_sum(700, 700, clamp, width, p.share_std * p.grid / width, p.model.parameters * 10)
    bits = [params.modulus_bits(700, p.model.parameters, 10, k) for k in (1, 2, 3, 4)]
    assert max(bits) < grid.MODULUS_BITS, "so many errors need room of their own"
    with pytest.raises(Exception, match="does not fit any plaintext modulus"):
        params.plaintext(700, 120, max(wide, 1 << 45), p.model.parameters, 10)


@pytest.mark.parametrize(("sites", "said"), [(1200, "1200 sites"), (300, "300 helpers")])
def test_too_many_sites_or_helpers_are_refused_by_the_planner(sites, said) -> None:
    with pytest.raises(PlanError, match=said):
        make_plan(
            sites=sites, records=100 * sites, epsilon=2.0, steps=10, clip=1.0, sample_rate=0.1, delta=1e-6,
            model=ModelSpec(name="logistic", inputs=64, classes=10), contract_hash="c" * 64,
            optimizer=Optimizer(learning_rate=0.1),
        )  # fmt: skip
