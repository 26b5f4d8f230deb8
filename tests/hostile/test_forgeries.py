"""Every forgery of the table is found by the check that the table names, or has its reason; none makes ε smaller.

The table is docs/forgeries.md; ``make forgeries`` writes it.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from forged_run import LIAR, NAMES, SERVER, Forger, make
from forgery import ALONE, BOTH, FORGERIES, HOLDS, SITE, Forgery
from forgery_table import HEAD, OUTPUT, Judged, judge, table

from fedveil.common import canonical
from fedveil.privacy.report import ledgers, results
from fedveil.privacy.report.verify import verify_report

THREATS = Path(__file__).parents[2] / "docs" / "threat-model.md"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make(tmp_path_factory.mktemp("forged") / "base")


@pytest.fixture(scope="module")
def truth(base) -> dict[str, Any]:
    return canonical.loads((base.folder / "report.json").read_bytes())["payload"]


@pytest.fixture(scope="module")
def judged() -> dict[str, Judged]:
    """What became of those that were tried."""
    return {}


def name(f: Forgery) -> str:
    return f"{f.who}: {f.what}"


def test_the_honest_run_passes_and_every_site_signs_it(base, tmp_path) -> None:
    found = verify_report(
        base.folder / "report.json", consortium_key=base.pin, require_signatures=4, auditor=base.fingerprint
    )
    assert found.ok, found.failed
    assert found.countersigned == NAMES
    assert Forger(base, tmp_path / "copy", (SERVER,)).signed_by() == [*NAMES]


def test_there_are_enough_by_each_and_no_two_alike() -> None:
    by = Counter(f.who for f in FORGERIES)
    assert by[ALONE] >= 20
    assert by[SITE] >= 10
    assert by[BOTH] >= 10
    assert len({name(f) for f in FORGERIES}) == len(FORGERIES)
    assert all(bool(f.check) != bool(f.why) for f in FORGERIES), "found by a check, or with a reason, never both"


def test_a_forger_has_no_keys_but_its_own(base, tmp_path) -> None:
    for who, holds in HOLDS.items():
        f = Forger(base, tmp_path / who, holds)
        for owner in {SERVER, *NAMES} - {*holds}:
            with pytest.raises(PermissionError):
                f.key(owner)


@pytest.mark.parametrize("forgery", FORGERIES, ids=name)
def test_it_is_found_by_its_check_or_makes_no_epsilon_smaller(base, truth, judged, tmp_path, forgery) -> None:
    found = judged.setdefault(name(forgery), judge(base, forgery, tmp_path / "forged"))
    assert found.found == forgery.check, found.detail
    if found.found:
        assert found.verification.claim == ""
    else:
        assert forgery.why
        not_smaller(found.payload, truth, forgery)


def not_smaller(payload: dict[str, Any], truth: dict[str, Any], forgery: Forgery) -> None:
    """No ε of the claim, and none that is stated of an honest site, is below the true one."""
    claim, real = payload["claim"], truth["claim"]
    for key in ("epsilon", "delta", "epsilon_rdp", "replace_one_epsilon", "fallback_epsilon", "filter_epsilon"):
        assert claim[key] >= real[key] * (1 - 1e-9), key
    assert all(a["epsilon"] >= b["epsilon"] for a, b in zip(claim["groups"], real["groups"], strict=True))
    accounts = payload["accounting"], truth["accounting"]
    assert all(accounts[0][key] >= accounts[1][key] for key in ("steps_charged", "epsilon_charged_pld"))
    for site in {*NAMES} - ({LIAR} if forgery.who != ALONE else set()):
        stated, true = payload["sites"][site], truth["sites"][site]
        if stated is None:
            assert site in payload["ledgers_missing"]
            continue
        for key in ("epsilon_before", "epsilon_after", "charged", "earlier_sessions"):
            assert stated[key] >= true[key], (site, key)


def test_the_document_is_the_table(base, judged, tmp_path) -> None:
    for n, f in enumerate(FORGERIES):
        if name(f) not in judged:  # this test alone was asked for
            judged[name(f)] = judge(base, f, tmp_path / str(n))
    assert OUTPUT.read_text(encoding="utf-8") == table([judged[name(f)] for f in FORGERIES])


def test_what_is_out_of_reach_stands_in_the_threat_model() -> None:
    text = " ".join(THREATS.read_text(encoding="utf-8").split()).lower()
    assert "forgeries.md" in text
    assert [f.what for f in FORGERIES if f.why.lower() not in text] == []
    assert "`make forgeries`" in HEAD


def test_control_without_its_check_a_forgery_passes(base, tmp_path, monkeypatch) -> None:
    by = {f.what: f for f in FORGERIES}
    for n, (what, module, function) in enumerate((
        ("a fresh ledger, in a statement of the form before data sets were named", ledgers, "head_signed"),
        ("an audit made up and signed by the server; the auditor's key is given", results, "require_auditor"),
    )):  # fmt: skip
        with monkeypatch.context() as m:
            m.setattr(module, function, lambda *_: "")
            m.setattr(ledgers, "replaces_none", lambda *_: "")
            assert judge(base, by[what], tmp_path / str(n)).verification.ok, what


def test_control_a_smaller_epsilon_would_be_noticed(truth) -> None:
    for change in (
        lambda p: p["claim"].update(epsilon=p["claim"]["epsilon"] * 0.999),
        lambda p: p["claim"]["groups"][2].update(epsilon=1.0),
        lambda p: p["sites"][NAMES[0]].update(epsilon_after=0.0),
        lambda p: p["sites"].update({NAMES[0]: None}),
    ):
        payload = copy.deepcopy(truth)
        change(payload)
        with pytest.raises(AssertionError):
            not_smaller(payload, truth, FORGERIES[0])
