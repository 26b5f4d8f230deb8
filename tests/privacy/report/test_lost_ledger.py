"""A run in which one site's older ledger was lost and is charged at its cap: report, pages and verifier say so."""

from __future__ import annotations

from typing import Any

import pytest

from fedveil.common import canonical, identity
from fedveil.common.journal import Copy, Head
from fedveil.privacy.joining import data_set
from fedveil.privacy.report.catalogue import Speaker
from fedveil.privacy.report.verify import verify_report
from fedveil.privacy.report.wording import words

NAME = "cd" * 32
Items = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def lost(make, planned):
    """berg's ledger is lost; cava holds a head of it that berg has signed."""
    sites = {s: identity.new_signing_key() for s in ("alba", "berg", "cava", "dorn")}
    plan = planned()
    known = Copy(Head(40, "ab" * 32), NAME, data_set("heart", plan.unit)).by("berg", sites["berg"])
    return make(plan, witnesses=True, sites=sites, gone={"berg": known}, peers={"cava": {"berg": [known.to_json()]}})


def failed(w) -> dict[str, str]:
    found = verify_report(w.report, consortium_key=w.public)
    assert not found.ok
    return {c.name: c.detail for c in found.failures}


def test_report_and_verifier_show_the_charge(lost) -> None:
    found = verify_report(lost.report, consortium_key=lost.public)
    assert found.ok, found.failed
    payload = canonical.loads(lost.report.read_bytes())["payload"]
    berg = payload["sites"]["berg"]
    assert berg["lost_ledgers"] == [{"ledger": NAME, "cap_epsilon": 8.0, "delta": lost.plan.delta}]
    assert berg["epsilon_before"] == 8.0 < berg["epsilon_after"] < berg["cap_epsilon"] == 16.0
    assert berg["epsilon_after"] == pytest.approx(8.0 + payload["sites"]["alba"]["epsilon_after"], rel=0.2)
    assert "lost_ledgers" not in payload["sites"]["alba"]
    [other] = payload["other_ledgers"]["berg"]
    assert (other["imported"], other["at_cap"]) == (True, True)
    detail = next(c.detail for c in found.checks if c.name == "ledger of berg")
    assert f"{NAME[:16]}... (40 rows, seen by 1 members, charged at its cap)" in detail
    assert f"lost ledgers, charged at their caps: {NAME[:16]}... at 8" in detail
    for lang, said in (
        ("en", "what was really spent from ledgers of berg that were lost"),
        ("zh", "berg 已丢失的账本"),
    ):
        assert said in "\n".join(words(payload, Speaker(lang))["not_covered"])


def row(items: Items) -> dict[str, Any]:
    return next(b for k, b in items if k == "ledger.lost")


def cheaper(items: Items) -> None:
    row(items)["cap_epsilon"] = 1.0


def another(items: Items) -> None:
    row(items)["ledger"] = "ef" * 32


def unsigned(items: Items) -> None:
    row(items)["signature"] = "0" * 128


def twice(items: Items) -> None:
    items.insert(2, ("ledger.lost", dict(row(items))))


def absent(items: Items) -> None:
    items[:] = [i for i in items if i[0] != "ledger.lost"]


def raised_before(items: Items) -> None:
    """The cap is raised first, so that the lost ledger's would look like a part of it."""
    at = next(i for i, (k, _) in enumerate(items) if k == "ledger.cap")
    items.insert(1, items.pop(at))


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (cheaper, "charges a lost ledger less than a whole cap"), (another, "its owner has not signed"),
        (unsigned, "its owner has not signed"), (twice, "counted here already"), (absent, "fresh ledger"),
        (raised_before, "less than a whole cap"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)  # fmt: skip
def test_a_row_that_charges_less_is_a_fault(lost, lie, words) -> None:
    lost.forge(ledgers={"berg": lie}, told={"berg": {"imports": []}} if lie is absent else None)
    assert words in failed(lost)["ledger of berg"]


def test_a_report_that_leaves_the_charge_out(lost) -> None:
    document = canonical.loads(lost.report.read_bytes())
    del document["payload"]["sites"]["berg"]["lost_ledgers"]
    document["payload"]["sites"]["berg"]["epsilon_after"] -= 8.0
    forged = identity.signed(lost.server, "fedveil/report/1", document["payload"])
    lost.report.write_bytes(canonical.dumps(forged))
    wrong = failed(lost)
    assert "the report states" in wrong["budgets"]
    assert "every field" in wrong
