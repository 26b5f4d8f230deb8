"""The verifier's table of Rényi orders against the ledger's: a bound may be worse than the one stated, never better."""

from __future__ import annotations

import pytest

from fedveil.privacy.dp.accounting import ORDERS, epsilon_rdp
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.report import recompute


def test_no_order_that_the_ledger_lacks() -> None:
    assert set(recompute._ORDERS) < set(ORDERS)


@pytest.mark.parametrize("delta", [1e-5, 1e-6, 1e-8])
@pytest.mark.parametrize("q", [1.0, 0.1])
def test_the_verifiers_bound_is_never_below_what_is_stated(q: float, delta: float) -> None:
    """Noise so fine-grained that every order is the best one somewhere: 0.2, 23, 48 and 280 once were refused."""
    for i in range(120):
        sigma = 0.35 * 1.06**i
        stated = epsilon_rdp([(SampledGaussian(q, sigma), 20)], delta)
        assert stated <= recompute.by_rdp(q, sigma, 20, delta) + 1e-9
