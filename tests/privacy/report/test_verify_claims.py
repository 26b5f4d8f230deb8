"""The numbers of a report: lowered, embellished or signed by somebody else, each is caught by name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from fedveil.common import canonical, identity
from fedveil.common.errors import VerificationError
from fedveil.common.workload.model import ModelSpec
from fedveil.privacy import tally
from fedveil.privacy.dp.accounting import epsilon_pld, gaussian_epsilon
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.plan import Optimizer, make_plan
from fedveil.privacy.report import claims, prices, privacy_loss, recompute
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.verify import verify_report

DOMAIN = "fedveil/report/1"


def edit(w, change, key=None) -> str:
    """Change the payload, sign it (by default with the server's own key), name the first failed check."""
    payload = canonical.loads(w.report.read_bytes())["payload"]
    change(payload)
    w.report.write_bytes(canonical.dumps(identity.signed(key or w.server, DOMAIN, payload)))
    v = verify_report(w.report, consortium_key=w.public)
    assert v.failed is not None
    return v.failed.name


def lower(payload: dict[str, Any]) -> None:
    payload["claim"]["epsilon"] *= 0.9


def test_a_lower_epsilon_without_a_new_signature(spoilt) -> None:
    document = canonical.loads(spoilt.report.read_bytes())
    lower(document["payload"])
    spoilt.report.write_bytes(canonical.dumps(document))
    failed = verify_report(spoilt.report).failed
    assert failed is not None
    assert failed.name == "report signature"


def test_a_lower_epsilon_signed_by_a_stranger(spoilt) -> None:
    assert edit(spoilt, lower, identity.new_signing_key()) == "report signature"


def test_a_lower_epsilon_signed_by_a_site(spoilt) -> None:
    assert edit(spoilt, lower, spoilt.sites["alba"]) == "report signature"


def test_a_lower_epsilon_signed_by_the_server(spoilt) -> None:
    assert edit(spoilt, lower) == "epsilon by PLD"


def test_a_bundle_of_strangers_passes_only_without_a_pinned_key(make, honest) -> None:
    """Whoever makes all the keys can make a consistent story; the pinned key is what ties it to a consortium."""
    forged = make()
    assert verify_report(forged.report).ok
    v = verify_report(forged.report, consortium_key=honest.public)
    assert v.failed is not None
    assert v.failed.name == "roster"
    assert not verify_report(forged.report, consortium_key="not a key").ok


EDITS = {
    "delta": ("epsilon by PLD", lambda p: p["claim"].update(delta=1e-6)),
    "a little lower": ("epsilon by PLD", lambda p: p["claim"].update(epsilon=p["claim"]["epsilon"] - 1e-5)),
    "higher": ("epsilon by PLD", lambda p: p["claim"].update(epsilon=p["claim"]["epsilon"] + 0.1)),
    "no number": ("epsilon by PLD", lambda p: p["claim"].update(epsilon="2")),
    "true": ("epsilon by PLD", lambda p: p["claim"].update(epsilon=True)),
    "no claim": ("epsilon by PLD", lambda p: p.update(claim=None)),
    "second accountant": ("epsilon by RDP", lambda p: p["claim"].update(epsilon_rdp=1.0)),
    "replace one": ("replace-one epsilon", lambda p: p["claim"].update(replace_one_epsilon=p["claim"]["epsilon"])),
    "replace one by RDP": ("replace-one epsilon", lambda p: p["claim"].update(replace_one_accountant="RDP")),
    "fallback": ("fallback epsilon", lambda p: p["claim"].update(fallback_epsilon=2.0)),
    "fallback by another name": ("every field", lambda p: p["claim"].update(fallback_accountant="RDP")),
    "a person with 5 rows": ("group epsilon", lambda p: p["claim"]["groups"][2].update(epsilon=5.0)),
    "a person's rows by RDP": (
        "group epsilon", lambda p: p["claim"]["groups"][2].update(epsilon=5.0, accountant="RDP")
    ),
    "a person of one row": ("group epsilon", lambda p: p["claim"]["groups"][2].update(size=1)),
    "no groups": ("group epsilon", lambda p: p["claim"].pop("groups")),
    "curve": ("privacy curve", lambda p: p["claim"]["curve"][3].__setitem__(1, 1e-9)),
    "curve of one point": ("privacy curve", lambda p: p["claim"].update(curve=[[1, 1]])),
    "attack": ("privacy curve", lambda p: p["claim"]["attack"][1].update(true_positive_rate=0.011)),
    "budget": ("budgets", lambda p: p["sites"]["cava"].update(epsilon_after=1.0)),
    "budget before": ("every field", lambda p: p["sites"]["cava"].update(epsilon_before=0.0)),
    "sensitivity": ("prices", lambda p: p["mechanism"].update(sensitivity=1.0)),
    "steps": ("prices", lambda p: p["steps"].update(planned=3)),
    "sentence": ("every field", lambda p: p["claim"].update(sentence="Nobody learns anything.")),
    "rounds": ("every field", lambda p: p["rounds"][1].update(missing=[])),
    "realised noise": ("every field", lambda p: p["rounds"][0].update(noise_multiplier=9.0)),
    "colluders": ("prices", lambda p: p["trust"].update(colluders=3)),
    "a criterion": ("every field", lambda p: p["sites"]["alba"]["anonymisation"]["criteria"].clear()),
    "a deviation left out": ("every field", lambda p: p["deviations"].pop()),
    "not covered": ("every field", lambda p: p["not_covered"].clear()),
    "metrics": ("every field", lambda p: p["metrics"]["final"].update(accuracy=0.99)),
    "a metric on the way": ("every field", lambda p: p["metrics"]["by_round"][0][1].update(accuracy=0.99)),
    "a field more": ("every field", lambda p: p.update(certified=True)),
    "a field less": ("every field", lambda p: p.pop("tuning")),
    "a hash": ("every field", lambda p: p["hashes"]["files"].update({"plan.json": "0" * 64})),
    "software": ("every field", lambda p: p.update(software={"fedveil": 1})),
    "version": ("report signature", lambda p: p.update(v=4)),
    "an older version": ("report signature", lambda p: p.update(v=1)),
    "no heads": ("server journal", lambda p: p["hashes"].pop("heads")),
    "a site's head": ("ledger of alba", lambda p: p["hashes"]["heads"]["alba"].__setitem__(0, 3)),
}  # fmt: skip


@pytest.mark.parametrize(("v", "words"), [
    (2, "a report of version 2; fedveil 0.1 verifies it, this fedveil reads version 3"),
    (1, "a report of version 1; fedveil 0.1 verifies it"),
    (4, "a version that this fedveil does not know; it reads version 3"),
    ("3", "a version that this fedveil does not know"),
])  # fmt: skip
def test_a_report_of_another_version_is_refused_with_the_one_that_verifies_it(spoilt, v, words) -> None:
    assert edit(spoilt, lambda p: p.update(v=v)) == "report signature"
    failed = verify_report(spoilt.report, consortium_key=spoilt.public).failed
    assert failed is not None
    assert words in failed.detail


@pytest.mark.parametrize("what", EDITS)
def test_no_field_can_be_embellished_even_by_the_server(spoilt, what) -> None:
    check, change = EDITS[what]
    assert edit(spoilt, change) == check


def _leaves(value: Any, path: tuple = ()):
    # Of a long list three entries stand for all.
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else None
    if items is None:
        yield path
        return
    for key, x in items:
        yield from _leaves(x, (*path, key))


def test_every_leaf_of_the_payload_is_checked(spoilt) -> None:
    """Whichever leaf is replaced, the server's signature does not help. The builder's own are named."""
    payload = canonical.loads(spoilt.report.read_bytes())["payload"]
    free = []
    for path in _leaves(payload):
        if {"berg", "cava"} & set(path):
            continue  # alba and dorn stand for the sites
        changed = canonical.loads(canonical.dumps(payload))
        *way, last = path
        inner = changed
        for key in way:
            inner = inner[key]
        old = inner[last]
        inner[last] = (not old) if isinstance(old, bool) else old + 1 if isinstance(old, (int, float)) else f"{old}x"
        spoilt.report.write_bytes(canonical.dumps(identity.signed(spoilt.server, DOMAIN, changed)))
        if verify_report(spoilt.report).ok:
            free.append(path[0])
    assert set(free) == {"software", "written_at"}


def test_the_metrics_file_cannot_understate_what_was_spent(spoilt) -> None:
    path = spoilt.folder / "metrics.jsonl"
    rows = [canonical.loads(x) for x in path.read_bytes().splitlines()]
    rows[-1]["epsilon_opened"] = 0.5
    path.write_bytes(b"".join(canonical.dumps(r) + b"\n" for r in rows))
    build_report(spoilt.folder, spoilt.server)
    failed = verify_report(spoilt.report).failed
    assert failed is not None
    assert failed.name == "metrics file"


def test_the_builder_wants_the_servers_key(spoilt) -> None:
    with pytest.raises(VerificationError, match="roster names"):
        build_report(spoilt.folder, spoilt.sites["alba"])


def test_the_verifiers_own_accountants_agree_with_the_closed_form() -> None:
    for sigma, steps in ((1.0, 1), (5.0, 100), (20.0, 100)):
        exact = gaussian_epsilon(math.sqrt(steps) / sigma, 1e-5)
        assert recompute.gaussian_delta(sigma, steps, exact) == pytest.approx(1e-5, rel=1e-6)
        assert exact - 1e-4 <= recompute.by_pld(1.0, sigma, steps, 1e-5) <= exact + 2e-3
        assert exact <= recompute.by_rdp(1.0, sigma, steps, 1e-5) <= 1.25 * exact
    assert recompute.by_pld(0.5, 1.0, 0, 1e-5) == recompute.by_rdp(0.5, 1.0, 0, 1e-5) == 0.0


def test_the_third_accountant_refuses_what_is_below_it_or_far_above(planned) -> None:
    for changes in ({}, {"sample_rate": 0.01, "records": 10_000, "steps": 1000}):
        plan = planned(**changes)
        own, claim = prices.read(plan.to_json()), {"epsilon": plan.claim}
        assert "third accountant" in claims.fourier(claim, own)
        for part, word in ((0.995, "gives"), (1.05, "far above")):
            with pytest.raises(VerificationError, match=word):
                claims.fourier({"epsilon": part * plan.claim}, own)
        for fault in ({"noise": 0.98 * own.noise}, {"steps": own.steps + own.steps // 20 + 1}):
            with pytest.raises(VerificationError, match="third accountant"):
                claims.fourier(claim, replace(own, **fault))


def test_a_filter_never_reads_less_than_its_charges_cost() -> None:
    once, often = SampledGaussian(1.0, 8.0), SampledGaussian(0.02, 1.0)
    for events in ([once] * 3, [often] * 400, [once, often] * 20, [once, *[often] * 50, SampledGaussian(0.5, 30.0)]):
        least = recompute.least(events, 1e-5)
        assert 0 < least < min(recompute.by_filter(events, order, 1e-5) for order in (4.0, 8.0, 16.0, 32.0))
        assert least > 0.5 * min(recompute.by_filter(events, order, 1e-5) for order in (4.0, 8.0, 16.0, 32.0))


def test_a_ledger_too_wide_or_too_mixed_for_a_distribution_is_left_to_its_filter() -> None:
    assert recompute.least([SampledGaussian(1.0, 0.2)] * 1000, 1e-5) == 0
    assert recompute.least([SampledGaussian(0.5, 5.0 + i) for i in range(65)], 1e-5) == 0
    assert recompute.least([SampledGaussian(0.1, 5.0)] * 10, 1e-300) == 0
    assert recompute.least([], 1e-5) == 0


def test_a_filter_that_counts_too_little_is_found(make, monkeypatch) -> None:
    """One fault in the ledger's arithmetic and in its check: the third accountant composes without a Rényi order."""
    w = make(earlier_steps=16, cap=8.0)
    right, by_filter = tally.rdp, recompute.by_filter

    def less(events, order: float, delta: float) -> float:
        found, offset = by_filter(list(events), order, delta), recompute._offset(order, delta)
        return found and 0.3 * (found - offset) + offset

    monkeypatch.setattr(tally, "rdp", lambda event, order: 0.3 * right(event, order))
    monkeypatch.setattr(recompute, "by_filter", less)
    build_report(w.folder, w.server)
    failed = verify_report(w.report).failed
    assert failed is not None
    assert failed.name == "budgets"
    assert "its charges cost" in failed.detail


def test_an_absurd_plan_is_refused_before_an_accountant_sees_it() -> None:
    with pytest.raises(VerificationError, match="below any"):
        recompute.refuse_absurd(0.5, 1e-6, 1 << 20)
    with pytest.raises(VerificationError, match="more than 3000"):
        recompute.refuse_absurd(1.0, 0.2, 1 << 20)


@pytest.mark.parametrize("mu", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("false_alarms", [0.01, 0.1, 0.4])
def test_the_attack_rate_bounds_the_best_test_and_is_not_far_from_it(mu: float, false_alarms: float) -> None:
    """Against the exact trade-off function of the Gaussian mechanism (Dong, Roth & Su 2022): Φ(Φ^-1(fpr) + mu)."""
    from statistics import NormalDist

    n, claim = NormalDist(), epsilon_pld([(SampledGaussian(1.0, 1 / mu), 1)], 1e-5)
    best = n.cdf(n.inv_cdf(false_alarms) + mu)
    points = privacy_loss.curve(SampledGaussian(1.0, 1 / mu), 1, 1e-5, claim)
    got = privacy_loss.attack_rate(points, false_alarms)
    assert best - 1e-9 <= got <= best + 0.03
    assert recompute.detection(points, false_alarms) == pytest.approx(got, abs=1e-12)


def test_a_group_of_records_is_accounted_as_a_group(honest) -> None:
    plan = honest.plan
    exact = gaussian_epsilon(5 * math.sqrt(plan.steps) / plan.noise_multiplier, plan.delta)
    assert privacy_loss.group_epsilon(plan, 1) == plan.claim
    assert privacy_loss.group_epsilon(plan, 5) == pytest.approx(exact, rel=2e-3)
    assert exact > 5 * plan.claim


@pytest.mark.parametrize(
    ("sites", "rate", "epsilon", "steps"),
    [(1000, 0.01, 2.0, 100), (60, 1.0, 2.0, 60), (300, 0.01, 5.0, 1000), (2000, 1.0, 8.0, 60)],
)
def test_the_fallback_of_many_sites_is_named_by_an_accountant_that_can_compute_it(
    honest, sites: int, rate: float, epsilon: float, steps: int
) -> None:
    plan = make_plan(
        sites=sites, records=100_000, epsilon=epsilon, delta=1e-6, steps=steps, clip=1.0, sample_rate=rate, sum="plain",
        model=ModelSpec(name="logistic", inputs=1000, classes=2), optimizer=Optimizer(learning_rate=0.1),
        contract_hash=honest.plan.contract_hash,
    )  # fmt: skip
    value, accountant = privacy_loss.fallback(plan)
    assert value >= plan.claim
    stated = {"fallback_epsilon": value, "fallback_accountant": accountant}
    own = prices.read(plan.to_json())
    assert "recomputed" in claims.fallback(stated, own)
    with pytest.raises(VerificationError, match="fallback"):
        claims.fallback({**stated, "fallback_epsilon": 0.8 * value}, own)
    if rate == 1 and accountant == "PLD":
        mu = math.sqrt(steps * plan.honest) / plan.noise_multiplier
        assert value == pytest.approx(gaussian_epsilon(mu, 1e-6), rel=1e-2)
