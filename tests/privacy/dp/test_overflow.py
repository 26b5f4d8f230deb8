"""Samples that outgrow their places: every accountant takes them off δ, and ledgers keep a share of it for them."""

from __future__ import annotations

import pytest

from fedveil.common import identity
from fedveil.common.errors import BudgetExhausted, VerificationError
from fedveil.common.units import Delta, Epsilon
from fedveil.privacy.dp.accounting import (
    PLANNED_OVERFLOW,
    RESERVE,
    Filter,
    best_order,
    delta_curve,
    epsilon_pld,
    epsilon_rdp,
    epsilon_replace_one,
    replace_one_rdp,
)
from fedveil.privacy.dp.events import MAX_OVERFLOW, SampledGaussian, from_json
from fedveil.privacy.ledger import Ledger

DELTA, STEPS = 1e-5, 50
PLAIN = SampledGaussian(0.1, 1.5)
LOSSY = SampledGaussian(0.1, 1.5, 0.4 * DELTA / STEPS)


@pytest.mark.parametrize("accountant", [epsilon_pld, epsilon_rdp, epsilon_replace_one, replace_one_rdp])
def test_every_accountant_takes_it_off_delta(accountant) -> None:
    found = accountant([(LOSSY, STEPS)], DELTA)
    assert found == pytest.approx(accountant([(PLAIN, STEPS)], 0.6 * DELTA), rel=1e-9)
    assert found > accountant([(PLAIN, STEPS)], DELTA)  # the control: forgotten, it would be less
    with pytest.raises(VerificationError, match="use up delta"):
        accountant([(SampledGaussian(0.1, 1.5, DELTA), STEPS)], DELTA)


def test_a_curve_of_delta_holds_it() -> None:
    (_, with_), (_, without) = delta_curve([(LOSSY, STEPS)], [1.0]) + delta_curve([(PLAIN, STEPS)], [1.0])
    assert with_ - without == pytest.approx(0.4 * DELTA, rel=1e-6)


def test_an_event_carries_it_and_an_old_one_has_none() -> None:
    assert from_json(LOSSY.to_json()) == LOSSY
    assert "overflow" not in PLAIN.to_json()
    for wrong in (-1e-9, 2 * MAX_OVERFLOW, float("nan"), True, "0", None):
        with pytest.raises(VerificationError):
            from_json({**PLAIN.to_json(), "overflow": wrong})


def test_a_filter_keeps_a_thousandth_of_delta_and_promises_what_it_admits() -> None:
    f = Filter(4.0, DELTA, best_order(4.0, DELTA))
    assert f.after(0.0) is f
    assert f.after(1e-20).delta == pytest.approx(DELTA * (1 - RESERVE))
    assert f.after(1e-20).epsilon_of(0.1) > f.epsilon_of(0.1)
    tenth = SampledGaussian(0.01, 20.0, RESERVE * DELTA / 10)
    assert f.affords(tenth) == 10
    assert f.admits(0.0, 10 * tenth.overflow)
    assert not f.admits(0.0, 11 * tenth.overflow)


def open_ledger(path, key, cap=4.0, delta=DELTA) -> Ledger:
    return Ledger.open(path, "a", key, lineage=path.stem, cap=Epsilon(cap), delta=Delta(delta), durable=False)


def test_a_ledger_stops_where_its_share_for_them_is_used_up(tmp_path) -> None:
    ledger = open_ledger(tmp_path / "l", identity.new_signing_key())
    event = SampledGaussian(0.01, 20.0, RESERVE * DELTA / 3)
    for number in range(1, 4):
        ledger.reserve("s" * 64, number, "p" * 64, event)
    with pytest.raises(BudgetExhausted):
        ledger.reserve("s" * 64, 4, "p" * 64, event)
    assert ledger.affords(event) == 0
    assert ledger.affords(SampledGaussian(0.01, 20.0)) > 0  # steps without sampling's overflow still fit
    ledger.close()


def test_an_import_that_needs_more_of_delta_is_refused_and_nothing_is_closed(tmp_path) -> None:
    key = identity.new_signing_key()
    old = open_ledger(tmp_path / "old", key, delta=1e-2)
    old.reserve("s" * 64, 1, "p" * 64, SampledGaussian(0.01, 20.0, RESERVE * 1e-2))
    old.close()
    new = open_ledger(tmp_path / "new", key)
    with pytest.raises(VerificationError, match="outgrow"):
        new.take_over(tmp_path / "old", key)
    new.close()
    again = open_ledger(tmp_path / "old", key, delta=1e-2)
    assert not again.tally.closed
    again.close()


def test_one_plan_takes_a_millionth_so_that_a_thousand_runs_fit() -> None:
    assert RESERVE / PLANNED_OVERFLOW == pytest.approx(1000)
