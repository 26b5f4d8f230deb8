"""A ledger is whole, tells the same end as the server, and holds what the other sites had seen of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from fedveil.common import canonical
from fedveil.common.errors import VerificationError
from fedveil.privacy.plan import make_plan
from fedveil.privacy.report.countersign import countersign
from fedveil.privacy.report.verify import Check, verify_report

SITES = ("alba", "berg", "cava", "dorn")
Items = list[tuple[str, dict[str, Any]]]


def failed(w) -> Check:
    found = verify_report(w.report, consortium_key=w.public)
    assert found.failed is not None
    with pytest.raises(VerificationError):  # nor does a site sign it that has not its ledger at hand
        countersign(w.report, w.sites["alba"], w.public)
    return found.failed


def of(items: Items, kind: str, nth: int = -1) -> dict[str, Any]:
    return [b for k, b in items if k == kind][nth]


def index(items: Items, kind: str, nth: int = -1) -> int:
    return [i for i, (k, _) in enumerate(items) if k == kind][nth]


def cut(rows: int) -> Callable[[Items], None]:
    return lambda items: items.__delitem__(slice(-rows, None))


def test_the_forger_changes_nothing_by_itself(spoilt) -> None:
    spoilt.forge(ledgers=dict.fromkeys(SITES, lambda items: None))
    assert verify_report(spoilt.report, consortium_key=spoilt.public).ok


def shorter(w, rounds: int) -> Callable[[Items], None]:
    """The server's journal with its last rounds left out, ABORTED."""

    def change(items: Items) -> None:
        end = items.pop()
        del items[index(items, "round.open", -rounds) :]
        model = of(items, "round.applied")["model_hash"]
        applied = sum(k == "round.applied" for k, _ in items)
        items.append((end[0], {**end[1], "status": "ABORTED", "steps_done": applied, "model_hash": model}))
        lines = (w.folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (w.folder / "metrics.jsonl").write_bytes(b"".join(lines[:-rounds]))

    return change


def another_model(items: Items) -> None:
    for body in (of(items, "round.applied"), items[-1][1]):
        body["model_hash"] = "a" * 64


def status(value: str) -> Callable[[Items], None]:
    return lambda items: items[-1][1].update(status=value)


def test_with_all_tails_cut_no_other_final_model_can_stand(spoilt) -> None:
    spoilt.forge(ledgers=dict.fromkeys(SITES, cut(2)), server=another_model)
    assert (failed(spoilt).name, "tail was cut" in failed(spoilt).detail) == ("ledger of alba", True)


def test_no_ledger_can_be_cut_to_a_shorter_run(spoilt) -> None:
    spoilt.forge(ledgers={s: cut(2 if s == "dorn" else 4) for s in SITES}, server=shorter(spoilt, 1))
    assert (failed(spoilt).name, "tail was cut" in failed(spoilt).detail) == ("ledger of alba", True)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_one_tail_cut_is_one_too_many(spoilt, rows) -> None:
    spoilt.forge(ledgers={"berg": cut(rows)})
    assert (failed(spoilt).name, "tail was cut" in failed(spoilt).detail) == ("ledger of berg", True)


@pytest.mark.parametrize("said", ["ABORTED", "BUDGET_EXHAUSTED"])
def test_the_server_tells_the_end_that_the_sites_were_told(spoilt, said) -> None:
    spoilt.forge(server=status(said))
    assert (failed(spoilt).name, "another end" in failed(spoilt).detail) == ("ledger of alba", True)


ENDS: dict[str, tuple[str, Callable[[Items], Any]]] = {
    "it says ABORTED": ("another end", lambda x: of(x, "session.end").update(status="ABORTED")),
    "it says nothing": ("another end", lambda x: of(x, "session.end").pop("status")),
    "the model of an earlier round": ("another end", lambda x: of(x, "model").update(model_hash=None)),
    "another count of rounds": ("another end", lambda x: of(x, "model").update(round=2)),
    "no model": ("tail was cut", lambda x: x.pop(index(x, "model"))),
    "a second end": ("had ended", lambda x: x.append(copy.deepcopy(x[-1]))),
    "a model after the end": ("had ended", lambda x: x.append(copy.deepcopy(x[-2]))),
    "a charge after the model": ("was noted", lambda x: charges_last(x, 1)),
    "all charges after the model": ("was noted", lambda x: charges_last(x, 4)),
    "a second acceptance": (
        "accepted before",
        lambda x: x.insert(-2, ("plan.accepted", {**of(x, "plan.accepted"), "precision": "float32"})),
    ),
    "a kind that no ledger has": ("of a kind", lambda x: x.append(("refund", {"epsilon": 1}))),
}  # fmt: skip


def charges_last(items: Items, rounds: int) -> None:
    own = [x for x in items if x[0] in ("spend", "commit") and x[1]["session"] == of(items, "model")["session"]]
    own = own[-2 * rounds :]
    rest = [x for x in items if x not in own]
    items[:] = [*rest[:-1], *own, rest[-1]]


@pytest.mark.parametrize("lie", ENDS)
def test_a_site_and_the_server_cannot_tell_another_end(spoilt, lie) -> None:
    word, change = ENDS[lie]
    model = canonical.loads((spoilt.folder / "journal.jsonl").read_bytes().splitlines()[-1])["body"]["model_hash"]

    def apply(items: Items) -> None:
        change(items)
        if kinds := [b for k, b in items if k == "model"]:
            kinds[-1]["model_hash"] = kinds[-1]["model_hash"] or earlier

    earlier = next(r["body"]["model_hash"] for r in spoilt.rows("journal.jsonl") if r["kind"] == "round.applied")
    assert earlier != model
    spoilt.forge(ledgers={"berg": apply})
    assert (failed(spoilt).name, word in failed(spoilt).detail) == ("ledger of berg", True), failed(spoilt)


# -- a site that was told that the run is over, and a server that was restarted and went on --------------------------


def ended_early(spoilt, *, restarted: bool = True, said: str = "ABORTED", rounds: int = 2) -> None:
    """dorn is in no sum after the second round, where it was told the end."""
    model = spoilt.rows("journal.jsonl")
    applied = [r["body"] for r in model if r["kind"] == "round.applied"]

    def site(items: Items) -> None:
        own = [i for i, (k, b) in enumerate(items) if k == "spend" and b["session"] == spoilt.session]
        del items[own[rounds] : -2]
        of(items, "model").update(model_hash=applied[0]["model_hash"], round=1)
        of(items, "session.end").update(status=said)

    def server(items: Items) -> None:
        for kind in ("round.set", "round.applied"):
            body = of(items, kind)
            body["members"] = [s for s in body["members"] if s != "dorn"]
        three = spoilt.plan.realised_noise_multiplier(3)
        of(items, "round.applied")["noise_multiplier"] = three
        of(items, "round.set", 2)["members"] = ["alba", "berg", "cava"]
        if restarted:
            session = items[0][1]["session"]
            items.insert(index(items, "round.open", 2), ("run.resumed", {"session": session, "round": 3}))

    spoilt.forge(ledgers={"dorn": site}, server=server)


def test_a_site_that_was_told_the_end_before_a_restart_keeps_its_report(spoilt) -> None:
    ended_early(spoilt)
    found = verify_report(spoilt.report, consortium_key=spoilt.public)
    assert found.ok, found.failed


@pytest.mark.parametrize("change", [{"restarted": False}, {"said": "COMPLETED"}])
def test_without_a_restart_that_is_another_end(spoilt, change) -> None:
    ended_early(spoilt, **change)
    assert (failed(spoilt).name, "another end" in failed(spoilt).detail) == ("ledger of dorn", True)


# -- what the other sites had seen -----------------------------------------------------------------------------------


def seen(w, rows: int, digest: str = "", ledger: str = "") -> dict[str, Any]:
    own = w.rows("journals/berg.jsonl")
    return {"berg": [[rows, digest or own[rows - 1]["hash"], ledger or own[0]["hash"]]]}


def test_what_a_peer_had_seen_must_be_there(spoilt) -> None:
    for held in (seen(spoilt, 3), seen(spoilt, 3000, "f" * 64, "e" * 64), {}):
        spoilt.forge(peers={"alba": held})
        assert verify_report(spoilt.report, consortium_key=spoilt.public).ok, held
    for held, how in ((seen(spoilt, 3000, "f" * 64), "3000 rows"), (seen(spoilt, 2, "f" * 64), "2 rows")):
        spoilt.forge(peers={"alba": held, "cava": held})
        assert failed(spoilt).name == "ledger of berg"
        assert f"alba ({how}), cava ({how})" in failed(spoilt).detail
    spoilt.forge(peers={"alba": {"berg": [[1]]}})
    assert (failed(spoilt).name, "alba" in failed(spoilt).detail) == ("join statements", True)


def test_as_many_as_may_collude_cannot_accuse_another(spoilt) -> None:
    """What a site says of a peer's ledger is not signed by that peer. It is shown, and costs nobody the report."""
    spoilt.forge(peers={"alba": seen(spoilt, 3000, "f" * 64)})
    found = verify_report(spoilt.report, consortium_key=spoilt.public)
    assert found.ok
    detail = next(c.detail for c in found.checks if c.name == "ledger of berg")
    assert "alba (3000 rows) signed that it had other rows" in detail


def test_the_ledger_that_a_site_joined_with_is_the_one_it_hands_over(spoilt) -> None:
    joins = canonical.loads((spoilt.folder / "joins.json").read_bytes())
    assert joins["berg"]["payload"]["ledger"] == spoilt.rows("journals/berg.jsonl")[0]["hash"]


# -- rounds ----------------------------------------------------------------------------------------------------------


def test_no_round_takes_the_nonce_of_another(spoilt) -> None:
    spoilt.forge(server=lambda items: of(items, "round.open").update(nonce=of(items, "round.open", 0)["nonce"]))
    assert (failed(spoilt).name, "nonce" in failed(spoilt).detail) == ("order of events", True)


def test_the_first_model_is_named_when_the_run_is_opened(spoilt) -> None:
    spoilt.forge(server=lambda items: items[0][1].pop("model_hash"))
    assert (failed(spoilt).name, "model_hash" in failed(spoilt).detail) == ("order of events", True)


def test_only_a_site_on_the_roster_refuses(spoilt) -> None:
    for site, passes in ((None, True), ("alba", True), ("evil", False)):
        body = {"session": spoilt.session, "round": 1, "site": site, "code": "BudgetExhausted"}
        spoilt.forge(server=lambda items, b=body: items.insert(3, ("site.refused", b)))
        found = verify_report(spoilt.report, consortium_key=spoilt.public)
        assert found.ok == passes
    assert found.failed is not None
    assert (found.failed.name, "'evil'" in found.failed.detail) == ("rounds", True)


def metrics(w, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    path = w.folder / "metrics.jsonl"
    rows = [canonical.loads(line) for line in path.read_bytes().splitlines()]
    change(rows)
    path.write_bytes(b"".join(canonical.dumps(row) + b"\n" for row in rows))
    w.forge()


def test_the_results_at_the_end_are_those_of_the_last_round(spoilt) -> None:
    spoilt.forge(server=lambda items: items[-1][1].update(metrics={"accuracy": 0.99}))
    assert (failed(spoilt).name, "accuracy = 0.99" in failed(spoilt).detail) == ("metrics file", True)
    spoilt.forge(server=lambda items: items[-1][1].update(metrics={"auc": 0.99}))
    assert failed(spoilt).name == "metrics file"


@pytest.mark.parametrize("steps", [4, 40])
def test_no_round_can_state_less_than_was_spent(make, honest, steps) -> None:
    """Of many rounds not all are computed again: what lies between does not fall."""
    keep = ("sites", "records", "clip", "model", "optimizer", "contract_hash")
    plan = make_plan(**{k: getattr(honest.plan, k) for k in keep}, epsilon=2.0, steps=steps)
    w = make(plan)
    assert verify_report(w.report).ok
    for row in (1, 2, steps - 2):
        kept = (w.folder / "metrics.jsonl").read_bytes()
        metrics(w, lambda rows, i=row: rows[i].update(epsilon_opened=0.0))
        assert failed(w).name == "metrics file"
        (w.folder / "metrics.jsonl").write_bytes(kept)


def test_a_ledger_at_another_delta_is_named(make) -> None:
    w = make(delta=0.01)
    assert verify_report(w.report).ok
    said = canonical.loads(w.report.read_bytes())["payload"]["deviations"]
    assert any("alba, berg, cava, dorn count at another δ than the claim's" in x for x in said)


def test_the_cap_that_counts_is_the_one_in_force_at_the_charge(spoilt) -> None:
    """An owner who lowers it afterwards has done nothing wrong; the report shows the new one."""
    spoilt.forge(ledgers={"berg": lambda items: items.insert(-2, ("ledger.cap", {"cap_epsilon": 0.5}))})
    assert verify_report(spoilt.report, consortium_key=spoilt.public).ok
    entry = canonical.loads(spoilt.report.read_bytes())["payload"]["sites"]["berg"]
    assert entry["cap_epsilon"] == 0.5 < entry["epsilon_after"]
    assert entry["left"] == 0
