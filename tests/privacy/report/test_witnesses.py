"""What members have seen and signed stands against a ledger, a date or a set that is told otherwise later.

Every forgery is signed anew by whoever it takes: the site, the server, or both. What the other members signed stays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.common import canonical, identity
from fedveil.common.journal import Copy, Head
from fedveil.common.units import Delta, Epsilon
from fedveil.privacy.joining import data_set, names_of
from fedveil.privacy.ledger import CLOCK_S, Ledger
from fedveil.privacy.report import witnesses
from fedveil.privacy.report.catalogue import Speaker
from fedveil.privacy.report.countersign import countersign
from fedveil.privacy.report.verify import Check, verify_report
from fedveil.privacy.report.wording import words

SITES = ("alba", "berg", "cava", "dorn")
Items = list[tuple[str, dict[str, Any]]]


def nothing(items: Items) -> None:
    """Sign a ledger anew as it is."""


@pytest.fixture(scope="session")
def run(tmp_path_factory, honest):
    """An honest run in the form that is written today; do not change it."""
    return type(honest)(
        tmp_path_factory.mktemp("today") / "run", honest.plan, earlier_steps=2, absent={2: {"dorn"}}, aborted={3},
        witnesses=True,
    ).write()  # fmt: skip


@pytest.fixture
def told(run, tmp_path):
    return run.copy(tmp_path / "run")


def failed(w, name: str) -> str:
    """What is wrong, in the check of that name, which is the first that fails."""
    found = verify_report(w.report, consortium_key=w.public)
    assert found.failed is not None
    assert found.failed.name == name, found.failed
    return found.failed.detail


def passed(w) -> dict[str, Check]:
    found = verify_report(w.report, consortium_key=w.public)
    assert found.ok, found.failed
    return {c.name: c for c in found.checks}


def first(w, site: str) -> dict[str, Any]:
    return w.rows(f"journals/{site}.jsonl")[0]


def head(w, site: str, rows: int, last: str, ledger: str, of: str = "") -> Copy:
    return Copy(Head(rows, last), ledger, of or w.data_set).by(site, w.sites[site])


# -- heads -------------------------------------------------------------------------------------------------------------


def test_an_honest_run_passes_and_an_older_one_too(run, honest) -> None:
    now, before = passed(run), passed(honest)
    assert now["signed sets"].detail == "16 signed sets of 4 sites"
    assert before["signed sets"].detail.startswith("no ledger says")
    for w in (run, honest):
        assert "other_ledgers" not in canonical.loads(w.report.read_bytes())["payload"]


def test_one_copy_that_the_site_has_signed_is_enough(told) -> None:
    lost = head(told, "berg", 500, "ab" * 32, first(told, "berg")["hash"])
    told.forge(peers={"cava": {"berg": [lost.to_json()]}})
    assert "cava holds a head of 500 rows that the site has signed" in failed(told, "ledger of berg")


def test_a_rewritten_ledger_is_held_against_what_was_signed(told) -> None:
    """Its owner leaves an earlier charge out; a peer has the head after it."""
    rows = told.rows("journals/berg.jsonl")
    seen = head(told, "berg", 3, rows[2]["hash"], rows[0]["hash"])
    told.forge(peers={"cava": {"berg": [seen.to_json()]}}, ledgers={"berg": lambda items: items.pop(1)})
    assert "3 rows that the site has signed" in failed(told, "ledger of berg")


@pytest.mark.parametrize("how", ["unsigned", "by the accuser", "another number"])
def test_what_a_colluder_makes_up_is_shown_and_proves_nothing(told, how) -> None:
    mine = first(told, "berg")["hash"]
    made_up = {
        "unsigned": Copy(Head(500, "ab" * 32), mine),
        "by the accuser": Copy(Head(500, "ab" * 32), mine, told.data_set).by("berg", told.sites["cava"]),
        "another number": head(told, "berg", 5, "ab" * 32, mine)._replace(head=Head(500, "ab" * 32)),
    }[how]
    told.forge(peers={"cava": {"berg": [made_up.to_json()]}})
    assert "one word against another" in passed(told)["ledger of berg"].detail


# -- other ledgers -----------------------------------------------------------------------------------------------------


def test_a_fresh_ledger_is_named(told) -> None:
    lost = head(told, "berg", 40, "ab" * 32, "cd" * 32)
    told.forge(peers={s: {"berg": [lost.to_json()]} for s in ("alba", "cava")})
    detail = failed(told, "ledger of berg")
    assert "it is a fresh ledger: 2 members have seen another one of this data set" in detail
    assert f"{'cd' * 8}... with 40 rows" in detail


def test_it_cannot_say_that_its_ledger_is_of_another_data_set(told) -> None:
    other = data_set("heart, renamed", told.plan.unit)
    told.forge(told={"berg": {"data_set": other}})
    assert "another data set" in failed(told, "ledger of berg")

    def renamed(items: Items) -> None:
        items[0][1]["data_set"] = other

    told.forge(told={"berg": {"data_set": told.data_set}}, ledgers={"berg": renamed})
    assert "another data set" in failed(told, "ledger of berg")


def test_ledgers_of_other_data_sets_are_listed_in_report_and_verifier(told) -> None:
    kept = [head(told, "berg", n, "ab" * 32, "cd" * 32, "9" * 64).to_json() for n in (7, 9)]
    hearsay = Copy(Head(7, "ab" * 32), "ef" * 32).to_json()
    told.forge(peers={"cava": {"berg": [kept[0], hearsay]}, "dorn": {"berg": [kept[1]]}})
    payload = canonical.loads(told.report.read_bytes())["payload"]
    assert payload["other_ledgers"] == {
        "berg": [
            {"ledger": "cd" * 32, "rows": 9, "members": 2, "same_data_set": False, "imported": False, "at_cap": False}
        ]
    }
    assert "other ledgers of berg" in payload["not_covered"][0]
    detail = passed(told)["ledger of berg"].detail
    assert f"other ledgers of this site: {'cd' * 8}... (9 rows, seen by 2 members, of another data set)" in detail


def older(w, tmp_path, steps: int) -> Ledger:
    ledger = Ledger.open(
        tmp_path / "older.jsonl", "berg", w.sites["berg"], lineage="older", cap=Epsilon(w.cap),
        delta=Delta(w.plan.delta), unit=w.plan.unit, durable=False, clock=lambda: 1e9, data_set=w.data_set,
    )  # fmt: skip
    for n in range(steps):
        ledger.reserve("before", n + 1, "e" * 64, w.plan.event)
    return ledger


@pytest.mark.parametrize(("imported", "ok"), [(2, True), (1, False)], ids=["up to the known row", "too early a copy"])
def test_a_ledger_that_was_imported_is_listed_as_counted(make, run, tmp_path, imported, ok) -> None:
    sites = {s: identity.new_signing_key() for s in SITES}
    made = type(run)(tmp_path / "x", run.plan, sites=sites)
    known = older(made, tmp_path, 2)
    seen = known.journal.copy(made.data_set)
    (tmp_path / "older.jsonl").unlink(missing_ok=True)
    old = older(made, tmp_path, imported)
    w = make(witnesses=True, sites=sites, before={"berg": old}, peers={"cava": {"berg": [seen.to_json()]}})
    if not ok:
        assert "it is a fresh ledger" in failed(w, "ledger of berg")
        return
    assert "(3 rows, seen by 1 members, counted in this one)" in passed(w)["ledger of berg"].detail
    [entry] = canonical.loads(w.report.read_bytes())["payload"]["other_ledgers"]["berg"]
    assert (entry["same_data_set"], entry["imported"]) == (True, True)


def test_it_cannot_claim_an_import_that_its_ledger_does_not_hold(told) -> None:
    told.forge(told={"berg": {"imports": [["cd" * 32, 40]]}})
    assert "it counts 40 rows of ledger cdcdcdcdcdcdcdcd...; it does not" in failed(told, "ledger of berg")


# -- signed sets -------------------------------------------------------------------------------------------------------


def agreed(items: Items, round_: int) -> dict[str, Any]:
    return next(b for k, b in items if k == "agreed" and b["round"] == round_)


def other_members(items: Items) -> None:
    agreed(items, 1)["members"] = names_of(SITES[:3])


def other_digest(items: Items) -> None:
    agreed(items, 1)["digest"] = "a" * 64


def a_second_set(items: Items) -> None:
    items.insert(-2, ("agreed", {**copy.deepcopy(agreed(items, 1)), "digest": "a" * 64}))


def a_hidden_round(items: Items) -> None:
    items.insert(-2, ("agreed", {**copy.deepcopy(agreed(items, 1)), "round": 9}))


def unsaid(items: Items) -> None:
    items[:] = [i for i in items if i[0] != "agreed"]


@pytest.mark.parametrize(("lie", "check", "words"), [
    (other_members, "signed sets", "berg signed another set in round 1 than the server's journal announces"),
    (other_digest, "signed sets", "signed different sums of the same sites in round 1"),
    (a_hidden_round, "signed sets", "berg signed another set in round 9"),
    (a_second_set, "ledger of berg", "signs another set for round 1"),
], ids=lambda v: getattr(v, "__name__", ""))  # fmt: skip
def test_a_site_and_the_server_cannot_tell_of_another_set(told, lie, check, words) -> None:
    told.forge(ledgers={"berg": lie})
    assert words in failed(told, check)


def test_the_server_cannot_announce_another_set_afterwards(told) -> None:
    """dorn was in round 4. The journal says it was not, and states the noise of three."""

    def without(items: Items) -> None:
        for kind, body in items:
            if kind in ("round.set", "round.applied") and body["round"] == 4:
                body["members"] = list(SITES[:3])
                if kind == "round.applied":
                    body["noise_multiplier"] = told.plan.realised_noise_multiplier(3)

    told.forge(server=without)
    assert "signed another set in round 4 than the server's journal announces" in failed(told, "signed sets")


def test_too_few_signatures_under_a_sum_that_was_opened(told) -> None:
    told.forge(ledgers=dict.fromkeys(SITES[:2], unsaid))
    assert "signed by 2 of the 3 sites that its sum needs" in failed(told, "signed sets")
    told.forge(ledgers=dict.fromkeys(SITES[:1], nothing))


def test_one_that_did_not_sign_is_no_fault(told) -> None:
    told.forge(ledgers={"berg": unsaid})
    assert passed(told)["signed sets"].detail == "12 signed sets of 3 sites"


# -- dates -------------------------------------------------------------------------------------------------------------


def shifted(seconds: float) -> Callable[[int], float]:
    return lambda _: 1e9 + seconds


@pytest.mark.parametrize("seconds", [-CLOCK_S - 1, CLOCK_S + 1, 40 * CLOCK_S])
def test_a_ledger_that_is_dated_elsewhere(told, seconds) -> None:
    told.forge(ledgers={"berg": nothing}, at={"berg": shifted(seconds)})
    assert "more than 24 hours outside of the run" in failed(told, "row times")


@pytest.mark.parametrize("seconds", [-CLOCK_S, CLOCK_S])
def test_clocks_may_be_a_day_apart(told, seconds) -> None:
    told.forge(ledgers={"berg": nothing}, at={"berg": shifted(seconds)})
    passed(told)


def test_only_rows_of_this_session_lie_in_the_run(told) -> None:
    told.forge(ledgers={"berg": nothing}, at={"berg": lambda n: 1e9 - (90 * CLOCK_S if n < 3 else 0)})
    passed(told)


@pytest.mark.parametrize(
    ("owner", "words"), [("berg", "row 5 of the ledger of berg"), ("server", "row 5 of the server")]
)
def test_times_that_fall(told, owner, words) -> None:
    back = lambda n: 1e9 - (1 if n == 5 else 0)  # noqa: E731
    told.forge(ledgers={"berg": nothing}, at={owner: back})
    assert f"{words}" in failed(told, "row times")


def test_a_run_cannot_be_dated_elsewhere_without_its_sites(told) -> None:
    told.forge(at={"server": shifted(-90 * CLOCK_S)})
    assert "outside of the run" in failed(told, "row times")


# -- a hidden charge ---------------------------------------------------------------------------------------------------


def test_a_hidden_charge_is_found_from_either_side(told) -> None:
    """A round that the server leaves out of its journal, and one that a site leaves out of its ledger."""

    def uncharged(items: Items) -> None:
        items[:] = [i for i in items if not (i[0] in ("spend", "commit") and i[1].get("round") == 4)]

    spoilt = told.copy(told.folder.parent / "other")
    told.forge(ledgers={"berg": uncharged})
    assert "berg is in the sum of round 4, but its ledger was not charged" in failed(told, "charges")

    def unopened(items: Items) -> None:
        items[:] = [i for i in items if i[1].get("round") != 4]
        model = next(b["model_hash"] for k, b in reversed(items) if k == "round.applied")
        items[-1][1].update(status="ABORTED", steps_done=2, model_hash=model)
        lines = (spoilt.folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (spoilt.folder / "metrics.jsonl").write_bytes(b"".join(lines[:-1]))

    spoilt.forge(server=unopened)
    found = verify_report(spoilt.report, consortium_key=spoilt.public)
    bad = {c.name: c.detail for c in found.checks if not c.passed}
    assert "signed another set in round 4" in bad.get("signed sets", "") or "ledger of alba" in bad


# -- by how many a head is held ----------------------------------------------------------------------------------------


def signed_head(w, site: str, rows: int) -> list[Any]:
    """What a peer holds of a site's ledger in this run, after so many rows."""
    found = w.rows(f"journals/{site}.jsonl")
    return head(w, site, rows, found[rows - 1]["hash"], found[0]["hash"]).to_json()


def told_of(w) -> dict[str, Any]:
    return canonical.loads(w.report.read_bytes())["payload"]["witnesses"]


def open_points(w, lang: str) -> str:
    payload = canonical.loads(w.report.read_bytes())["payload"]
    return "\n".join(words(payload, Speaker(lang))["not_covered"])


def test_rows_are_witnessed_when_more_than_t_and_d_peers_hold_them(told) -> None:
    """n = 4, t = d = 1: three of the three others are needed."""
    total = len(told.rows("journals/berg.jsonl"))
    seen = {"alba": 5, "cava": 3, "dorn": 7}
    told.forge(peers={peer: {"berg": [signed_head(told, "berg", rows)]} for peer, rows in seen.items()})
    found = told_of(told)
    assert found["needed"] == 3
    assert found["ledgers"]["berg"] == {"rows": total, "witnessed": 3, "held": [[3, 3], [5, 2], [7, 1]]}
    assert found["ledgers"]["alba"]["held"] == []
    detail = passed(told)["ledger of berg"].detail
    assert f"rows are held: 1 to 3 by 3, 4 to 5 by 2, 6 to 7 by 1, 8 to {total} by 0" in detail
    assert "its head is seen by 0 of the needed 3 peers" in detail
    assert f"berg: 3 of {total} rows witnessed, the last one seen by 0 of the needed 3" in open_points(told, "en")
    assert f"berg：{total} 行中有 3 行有见证，最后一行有 0 个成员见过，需要 3 个" in open_points(told, "zh")


@pytest.mark.parametrize("how", ["unsigned", "by the accuser", "its own word", "another ledger"])
def test_what_its_owner_has_not_signed_counts_nothing(told, how) -> None:
    rows = told.rows("journals/berg.jsonl")
    true = head(told, "berg", 3, rows[2]["hash"], rows[0]["hash"])
    copy_, peer = {
        "unsigned": (Copy(true.head, true.ledger), "cava"),
        "by the accuser": (Copy(true.head, true.ledger, told.data_set).by("berg", told.sites["cava"]), "cava"),
        "its own word": (true, "berg"),
        "another ledger": (head(told, "berg", 3, rows[2]["hash"], "cd" * 32, "9" * 64), "cava"),
    }[how]
    told.forge(peers={peer: {"berg": [copy_.to_json()]}})
    passed(told)
    assert told_of(told)["ledgers"]["berg"]["held"] == []
    told.forge(peers={"cava": {"berg": [true.to_json()]}})  # negative control
    assert told_of(told)["ledgers"]["berg"]["held"] == [[3, 1]]


def test_a_report_cannot_state_more_witnesses_than_signed(told) -> None:
    document = canonical.loads(told.report.read_bytes())
    document["payload"]["witnesses"]["ledgers"]["berg"] |= {"witnessed": 5, "held": [[5, 3]]}
    forged = identity.signed(told.server, "fedveil/report/1", document["payload"])
    told.report.write_bytes(canonical.dumps(forged))
    assert "witnesses" in failed(told, "every field")


def test_signatures_under_the_report_witness_the_last_rows(told) -> None:
    for n, peer in enumerate(("alba", "cava", "dorn", "berg")):
        countersign(told.report, told.sites[peer], told.public)
        detail = passed(told)["ledger of berg"].detail
        if n < 2:
            assert f"its head is seen by {n + 1} of the needed 3 peers" in detail
        else:  # its own signature adds nothing to its own ledger
            assert "its head is witnessed" in detail
    assert "its head is witnessed" in passed(told)["ledger of alba"].detail


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 9)), st.sets(st.sampled_from("abcdefghs")))
def test_peers_fall_as_rows_rise(seen, signers) -> None:
    key = identity.new_signing_key()
    copies = [(w, Copy(Head(n, f"{n:064d}"), "cd" * 32, "9" * 64).by("s", key)) for w, n in seen.items()]
    found = witnesses.held("s", identity.public_hex(key), {"ledger": "cd" * 32}, copies, 9, signers)
    most = seen | dict.fromkeys(signers - {"s"}, 9)
    for row in range(1, 10):
        assert witnesses.peers_at(found, row) == sum(m >= row for m in most.values())
    for needed in range(1, 9):
        rows = witnesses.witnessed(found, needed)
        assert (rows == 0) or witnesses.peers_at(found, rows) >= needed
        assert witnesses.peers_at(found, rows + 1) < needed
