"""The site's own limits: hours, lists, floors; a server that asks again and again fills nothing."""

from __future__ import annotations

import datetime
import secrets
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedveil.client import policy
from fedveil.client import round as line
from fedveil.common.errors import AnonymityError, BudgetExhausted, FedveilError, PolicyRefusal
from fedveil.common.settings import WEEK, LimitsSection
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import ColumnStats, MetricSpec, StatsSpec
from fedveil.deploy.lab import demo_hospitals


def limits(**more) -> LimitsSection:
    values: dict[str, Any] = {"max_epsilon": 3.0, **more}
    return LimitsSection(**values)


def at(day: int, hour: int, minute: int = 0) -> datetime.datetime:
    """2026-06-01 is a Monday."""
    return datetime.datetime(2026, 6, day, hour, minute, tzinfo=datetime.UTC)


def works(own: LimitsSection, now: datetime.datetime) -> bool:
    try:
        policy.check_hours(own, now)
    except PolicyRefusal as e:
        return own.timezone not in e.message  # the words name the zone, or the test fails
    return True


class TestHours:
    @pytest.mark.parametrize(
        ("now", "open_"),
        [(at(1, 8), True), (at(1, 7, 59), False), (at(1, 17, 59), True), (at(1, 18), False), (at(6, 12), False)],
    )
    def test_a_window_on_working_days(self, now, open_):
        own = limits(hours="08:00-18:00", days=("mon", "tue", "wed", "thu", "fri"))
        assert works(own, now) is open_

    @pytest.mark.parametrize(
        ("now", "open_"),
        [(at(5, 23), True), (at(6, 5, 59), True), (at(6, 6), False), (at(6, 23), False), (at(5, 3), False)],
    )
    def test_a_window_over_midnight_belongs_to_the_day_it_begins_on(self, now, open_):
        assert works(limits(hours="22:00-06:00", days=("fri",)), now) is open_

    def test_hours_are_those_of_the_sites_zone(self):
        own = limits(hours="08:00-18:00", timezone="Europe/Berlin")
        assert works(own, at(1, 6, 30))  # 08:30 in summer
        assert not works(own, at(1, 17))

    @given(st.integers(0, 10 * 366 * 86400))
    def test_two_windows_that_fill_the_day_leave_no_gap(self, seconds):
        a, b = limits(hours="08:00-20:30"), limits(hours="20:30-08:00")
        moment = at(1, 0) + datetime.timedelta(seconds=seconds)
        assert works(a, moment) is not works(b, moment)
        assert works(limits(), moment)

    @pytest.mark.parametrize("bad", ["8", "08:00", "08:00-08:00", "25:00-26:00", "08:00-18:00-20:00", "x-y", "-"])
    def test_other_spellings_are_refused(self, bad):
        with pytest.raises(ValidationError, match="hours"):
            limits(hours=bad)

    def test_an_unknown_zone_is_refused(self):
        with pytest.raises(ValidationError, match="zone"):
            limits(timezone="Europe/Nowhere")

    def test_a_run_that_goes_on_into_the_night_is_not_charged_any_more(self, world, monkeypatch):
        w = world().begin()
        line.contribute(w.sites[0], w.request(1))
        monkeypatch.setattr(policy, "check_hours", lambda _: (_ for _ in ()).throw(PolicyRefusal("closed")))
        again = line.contribute(w.sites[0], w.request(1))  # what was charged is answered with the bytes it had
        assert again.header["round"] == 1
        for _ in range(3):
            with pytest.raises(PolicyRefusal, match="closed"):
                line.contribute(w.sites[0], w.request(2))
        assert w.spends() == [1]
        assert len(list(w.sites[0].ledger.journal.of_kind("refused"))) == 1


class TestLists:
    def test_models_and_plans_by_hash(self, world):
        w = world()
        own, plan = w.limits, w.plan
        assert own == {}
        policy.check(plan, limits(plans=(plan.hash,), models=(plan.workload_hash,)))
        with pytest.raises(PolicyRefusal, match="plans this site allows"):
            policy.check(plan, limits(plans=("0" * 64,)))
        with pytest.raises(PolicyRefusal, match="models this site allows"):
            policy.check(plan, limits(models=("0" * 64,)))
        other = world(steps=3).plan
        assert other.workload_hash == plan.workload_hash
        with pytest.raises(PolicyRefusal):
            policy.check(other, limits(plans=(plan.hash,)))

    def test_epsilon_of_one_run_is_below_the_cap(self, world):
        plan = world().plan
        policy.check(plan, limits(max_epsilon_per_run=2.0))
        with pytest.raises(PolicyRefusal, match="for one run"):
            policy.check(plan, limits(max_epsilon_per_run=1.9))

    def test_which_statistics_a_spec_opens(self):
        number = {"column": "x", "source": "number", "at": 0, "low": 0.0, "high": 1.0}
        spec = StatsSpec(inputs=2, classes=2, columns=(ColumnStats(**number, moments=1),))
        assert policy.metrics_of(spec) == ("count", "mean")
        both = StatsSpec(inputs=2, classes=2, columns=(ColumnStats(**number, moments=2, histogram=True),))
        assert policy.metrics_of(both) == ("count", "mean", "variance", "histogram")
        network = ModelSpec(name="logistic", inputs=2, classes=2)
        metric = MetricSpec(network=network, model_hash="0" * 64, confusion=True)
        assert policy.metrics_of(StatsSpec(inputs=2, classes=2, metric=metric)) == ("count", "accuracy", "confusion")

    def test_a_statistic_that_is_not_allowed(self, world):
        number = ColumnStats(column="x", source="number", at=0, low=0.0, high=1.0, moments=2)
        spec = StatsSpec(inputs=3, classes=2, columns=(number,))
        plan = world(model=spec, steps=1, clip=spec.norm_bound).plan
        policy.check(plan, limits(tasks=("stats",)))
        with pytest.raises(PolicyRefusal, match="'variance' is not among the metrics"):
            policy.check(plan, limits(tasks=("stats",), metrics=("count", "mean")))

    @pytest.mark.parametrize("bad", ["", "A" * 64, "0" * 63, "../" * 21])
    def test_lists_hold_hashes_only(self, bad):
        for name in ("models", "plans", "approvers"):
            with pytest.raises(ValidationError, match=name):
                limits(**{name: (bad,)})


class TestFloors:
    @pytest.mark.parametrize(
        ("own", "said"), [({"min_k": 6}, "k = 5"), ({"min_l": 3}, "l = 2"), ({"max_t": 0.5}, "t = None")]
    )
    def test_a_contract_that_asks_for_less(self, own, said):
        contract = demo_hospitals.contract()
        policy.check_contract(contract, limits())
        with pytest.raises(AnonymityError, match=said):
            policy.check_contract(contract, limits(**own))

    def test_the_days_of_the_week(self):
        assert limits().days == WEEK


class TestAskingAgain:
    def join(self, w, **changes):
        return line.join(w.sites[0], w.proposal(session=secrets.token_hex(32), **changes))

    def test_sessions_in_which_nothing_is_charged_are_counted(self, world):
        w = world(limits={"max_unused_sessions": 3})
        for _ in range(3):
            self.join(w)
        head = w.sites[0].ledger.head
        for site in (w.sites[0], w.reopen(0)):
            for _ in range(5):
                with pytest.raises(PolicyRefusal, match="nothing was charged"):
                    line.join(site, w.proposal(session=secrets.token_hex(32)))
        assert w.sites[0].ledger.head == head  # not one row, and no folder either
        assert len(list((w.folder / "site-1" / "sessions").iterdir())) == 3

    def test_a_known_session_and_one_that_was_used_are_not(self, world):
        w = world(limits={"max_unused_sessions": 1}).begin()
        line.join(w.sites[0], w.proposal())  # the same name again
        line.contribute(w.sites[0], w.request())
        self.join(w)
        with pytest.raises(PolicyRefusal):
            self.join(w)

    def test_after_a_day_they_are_forgotten(self, world, monkeypatch):
        w = world(limits={"max_unused_sessions": 1})
        self.join(w)
        with pytest.raises(PolicyRefusal):
            self.join(w)
        now = time.time
        monkeypatch.setattr("fedveil.client.session.time.time", lambda: now() + 86_500)
        self.join(w)

    def test_an_exhausted_ledger_gets_one_row_however_many_names_ask(self, world):
        w = world()
        site = w.sites[0]
        for n in range(1, site.ledger.affords(w.plan.event) + 1):
            site.ledger.reserve("e" * 64, n, w.plan.hash, w.plan.event)
        for _ in range(4):
            with pytest.raises(BudgetExhausted):
                self.join(w)
        assert len(list(site.ledger.journal.of_kind("refused"))) == 1
        assert not (w.folder / "site-1" / "sessions").exists()

    def test_refusals_for_two_reasons_in_turn_are_two_rows(self, world):
        w = world()
        site = w.sites[0]
        for n in range(1, site.ledger.affords(w.plan.event) + 1):
            site.ledger.reserve("e" * 64, n, w.plan.hash, w.plan.event)
        loud = world(epsilon=4.0).plan.to_json()
        for plan in (w.plan.to_json(), loud) * 3:
            with pytest.raises(FedveilError):
                self.join(w, plan=plan)
        assert [r.body["reason"] for r in site.ledger.journal.of_kind("refused")] == [
            "BudgetExhausted",
            "PolicyRefusal",
        ]

    def test_a_policy_refusal_is_a_row_and_says_why(self, world):
        w = world(limits={"min_sites": 5})
        with pytest.raises(PolicyRefusal, match="4 sites are fewer than this site's minimum, 5") as e:
            line.join(w.sites[0], w.proposal())
        assert "site's owner" in e.value.hint
        assert [r.body for r in w.sites[0].ledger.journal.of_kind("refused")] == [
            {"session": w.session, "reason": "PolicyRefusal"}
        ]


def test_a_ledger_that_stops_the_run_early_is_told_of_at_the_site_alone(world, caplog):
    """A cap equal to the plan's ε: the plan is accepted, and the site's own log says how far the budget goes."""
    for cap, told in ((2.0, True), (3.0, False)):
        w = world(cap=cap, epsilon=2.0)
        with caplog.at_level("INFO", logger="fedveil.client"):
            caplog.clear()
            reply = line.join(w.sites[0], w.proposal())
        left = w.sites[0].ledger.affords(w.plan.event)
        assert (left < w.plan.steps) is told
        assert (f"the budget pays for {left} of the plan's 4 steps" in caplog.text) is told
        assert (f"{w.plan.filter_epsilon():.4g} left" in caplog.text) is told
        assert "budget" not in str(reply.header)
