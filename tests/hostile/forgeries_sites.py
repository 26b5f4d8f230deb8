"""What one site can forge alone, and what it can forge together with the server.

Alone, a site chooses the ledger that it hands over at the run's end and what it signs. The honest server then writes
journal and report from that. Together, both sign anew whatever they want to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forged_run import CAPPED, FIRST, LIAR, NAMES, OTHER, PLAN, Forger, Items, body, plan_of
from forgery import BOTH, LEFT_OUT, SITE, forged

from fedveil.common import identity
from fedveil.common.journal import MAX_ROWS, Copy, Head
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.joining import names_of
from fedveil.privacy.report import signatures

DAY = 86_400
_LEDGER = f"ledger of {LIAR}"


def handed(f: Forger, change: Callable[[Items], Any], *, join: Any = None, at: Any = None) -> None:
    """The site signs its ledger anew (and its statement, if ``join``); the server takes what it is given."""
    f.rewrite(LIAR, change, at)
    if join is not None:
        f.join(LIAR, join, ledger=True)
    f.honest_server()


def here(items: Items, kind: str) -> list[dict[str, Any]]:
    """The bodies of a kind that belong to this run's session."""
    session = body(items, "session.end", -1)["session"]
    return [b for k, b in items if k == kind and b.get("session") == session]


def _without(items: Items, *bodies: dict[str, Any]) -> None:
    items[:] = [i for i in items if all(i[1] is not b for b in bodies)]


def _first_session(items: Items) -> list[dict[str, Any]]:
    session = body(items, "session.end")["session"]
    return [b for _, b in items if b.get("session") == session]


def keep(_: Any) -> None:
    """As it was."""


OLDER_ROWS = (
    "others hold the older ledger's head, which fixes how many rows it had and not what they cost; whoever has the "
    "folder of an earlier run has its rows. It is the forger's own spending"
)
CHEAP = SampledGaussian(0.5, 99.0, PLAN.event.overflow).to_json()

# -- one site ---------------------------------------------------------------------------------------------------------


@forged(SITE, "a cheaper price in its own charge", "charges")
def cheaper(f: Forger) -> None:
    handed(f, lambda items: here(items, "spend")[-1].update(event=CHEAP))


@forged(SITE, "one of its own charges left out", "charges")
def uncharged(f: Forger) -> None:
    handed(f, lambda items: _without(items, here(items, "spend")[-1], here(items, "commit")[-1]))


@forged(SITE, "its own earlier session left out, after it joined", _LEDGER)
def hidden_after(f: Forger) -> None:
    handed(f, lambda items: _without(items, *_first_session(items)))


@forged(SITE, "its own earlier session left out, before it joined", _LEDGER)
def hidden_before(f: Forger) -> None:
    handed(f, lambda items: _without(items, *_first_session(items)), join=keep)


@forged(SITE, "a cheaper price in an earlier session, before it joined", _LEDGER)
def cheaper_before(f: Forger) -> None:
    handed(f, lambda items: body(items, "spend").update(event=CHEAP), join=keep)


def _fresh(items: Items) -> None:
    _without(items, *_first_session(items))
    body(items, "ledger.open")["subject_salt"] = "a" * 64  # another first row: another ledger


@forged(SITE, "its ledger deleted, a fresh one begun", _LEDGER)
def fresh(f: Forger) -> None:
    handed(f, _fresh, join=keep)


def _import(f: Forger, items: Items, events: list[Any]) -> None:
    """A fresh ledger that says it counts the whole of the old one."""
    old = f.rows(LIAR)
    upto = next(r["n"] for r in old if r["kind"] == "session.end") + 1
    _fresh(items)
    items.insert(1, ("ledger.import", {
        "lineage": "simulated", "owner": LIAR, "public": identity.public_hex(f.key(LIAR)), "ledger": old[0]["hash"],
        "carries": [], "head": [upto, old[upto - 1]["hash"]], "events": events,
    }))  # fmt: skip


@forged(
    SITE,
    "an import of its older ledger that counts less than was spent there",
    why=OLDER_ROWS,
)
def smaller_import(f: Forger) -> None:
    handed(f, lambda items: _import(f, items, [[CHEAP, 1]]), join=keep)


@forged(SITE, "an import of nothing that claims its older ledger was charged at its cap", _LEDGER)
def import_at_no_cap(f: Forger) -> None:
    def change(items: Items) -> None:
        _import(f, items, [])
        old = body(items, "ledger.import")
        old |= {"ledger": "c" * 64, "carries": [old["ledger"]], "covers": [[MAX_ROWS, old["ledger"]]]}

    handed(f, change, join=keep)


@forged(SITE, "an import of a part of its older ledger, up to an earlier row", _LEDGER)
def partial_import(f: Forger) -> None:
    def change(items: Items) -> None:
        _import(f, items, [[FIRST.event.to_json(), 1]])
        body(items, "ledger.import")["head"][0] = 5

    handed(f, change, join=keep)


def _later(f: Forger, seconds: int) -> Callable[[int, float], float]:
    """Rows since the site joined, so many seconds later; those before are known to others."""
    since = f.json("joins.json")[LIAR]["payload"]["head"][0] - 1
    return lambda n, t: t + (seconds if n >= since else 0)


@forged(SITE, "its ledger dated two days after the run", "row times")
def dated(f: Forger) -> None:
    handed(f, keep, join=keep, at=_later(f, 2 * DAY))


@forged(
    SITE, "its ledger dated 20 hours after the run",
    why="clocks of a run's machines may be a day apart; no figure but the dates depends on it",
)  # fmt: skip
def dated_a_little(f: Forger) -> None:
    handed(f, keep, join=keep, at=_later(f, 72_000))


@forged(SITE, "a row of its ledger dated before the row before it", "row times")
def falling(f: Forger) -> None:
    handed(f, keep, at=lambda n, t: t - 3600 * (n == 20))


@forged(SITE, "another digest in a set that it signed", "signed sets")
def other_digest(f: Forger) -> None:
    handed(f, lambda items: here(items, "agreed")[0].update(digest="a" * 64))


@forged(SITE, "another set than it signed", "signed sets")
def other_set(f: Forger) -> None:
    handed(f, lambda items: here(items, "agreed")[0].update(members=names_of(NAMES[:3])))


@forged(
    SITE, "a set that it signed left out",
    why="a site may be too late to sign; a sum needs T signatures, and the others' are there",
)  # fmt: skip
def unsaid_set(f: Forger) -> None:
    handed(f, lambda items: _without(items, here(items, "agreed")[0]))


@forged(SITE, "a stricter table than the contract gives (k = 20)", _LEDGER)
def stricter_table(f: Forger) -> None:
    def change(items: Items) -> None:
        body(items, "data.released", -1)["criteria"]["k-anonymity"]["required"] = 20

    handed(f, change, join=keep)


@forged(SITE, "a capacity beyond the plan's", _LEDGER)
def larger_capacity(f: Forger) -> None:
    def change(items: Items) -> None:
        at = max(n for n, (kind, _) in enumerate(items) if kind == "data.released")
        items.insert(at, ("ledger.capacity", {"capacity": 10**6}))

    handed(f, change, join=keep)


@forged(SITE, "another end of the run in its ledger", _LEDGER)
def other_end(f: Forger) -> None:
    handed(f, lambda items: here(items, "model")[0].update(round=1))


@forged(SITE, "a signature in another site's name", "countersignatures")
def lent_signature(f: Forger) -> None:
    digest = f.json("signatures.json")[LIAR]["payload"]["report"]
    said = signatures.statement(OTHER, f.json("report.json")["payload"]["session"], digest)
    f.edit("signatures.json", lambda d: d.update({OTHER: identity.signed(f.key(LIAR), signatures.DOMAIN, said)}))


@forged(SITE, "a report of its own making, signed by itself", "report signature")
def own_report(f: Forger) -> None:
    payload = f.json("report.json")["payload"]
    payload["claim"]["epsilon"] /= 2
    f.put("report.json", identity.signed(f.key(LIAR), "fedveil/report/1", payload))


@forged(SITE, "its countersignature replaced by one under another report", "countersignatures")
def other_signature(f: Forger) -> None:
    said = signatures.statement(LIAR, f.json("report.json")["payload"]["session"], "0" * 64)
    f.edit("signatures.json", lambda d: d.update({LIAR: identity.signed(f.key(LIAR), signatures.DOMAIN, said)}))


# -- the server and one site ------------------------------------------------------------------------------------------


def together(f: Forger, change: Callable[[Items], Any], *, join: Any = keep, server: Any = keep) -> None:
    """Both sign anew: the site's ledger and statement, the server's journal and report."""
    f.rewrite(LIAR, change)
    if join is not None:
        f.join(LIAR, join, ledger=True)
    f.tell(server)


@forged(BOTH, "a plan with more noise and a smaller ε, accepted by that site", "join statements")
def other_plan(f: Forger) -> None:
    plan = plan_of(epsilon=0.5)
    f.put("plan.json", plan.to_json())
    together(
        f, lambda items: here(items, "plan.accepted")[0].update(plan_hash=plan.hash),
        join=lambda p: p.update(plan_hash=plan.hash), server=lambda items: items[0][1].update(plan_hash=plan.hash),
    )  # fmt: skip


@forged(BOTH, "the last round left out of both journals", f"ledger of {NAMES[0]}")
def round_fewer(f: Forger) -> None:
    states = f.steps({})

    def ledger(items: Items) -> None:
        _without(items, *(b for b in here(items, "spend") + here(items, "commit") if b["round"] == PLAN.steps))
        _without(items, here(items, "agreed")[-1])
        here(items, "model")[0].update(round=PLAN.steps - 1, model_hash=states[2].hash)
        here(items, "session.end")[0]["status"] = "ABORTED"

    def journal(items: Items) -> None:
        items[:] = [i for i in items if i[1].get("round") != PLAN.steps]
        body(items, "run.end").update(status="ABORTED", steps_done=PLAN.steps - 1, model_hash=states[2].hash)

    lines = (f.folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (f.folder / "metrics.jsonl").write_bytes(b"".join(lines[:-1]))
    (f.folder / "model.f32").write_bytes(states[2].sent())
    together(f, ledger, server=journal)


@forged(BOTH, "the site taken out of a sum's set, and uncharged", "signed sets")
def member_out(f: Forger) -> None:
    left = [n for n in NAMES if n != LIAR]

    def ledger(items: Items) -> None:
        _without(items, here(items, "spend")[0], here(items, "commit")[0])
        here(items, "agreed")[0].update(members=names_of(left))

    def change(items: Items) -> None:
        for kind, b in items:
            if kind in ("round.set", "round.applied") and b["round"] == 1:
                b["members"] = left
        body(items, "round.applied")["noise_multiplier"] = PLAN.realised_noise_multiplier(len(left))

    (f.folder / "sums").rename(f.folder / "elsewhere")  # they need not be handed on
    together(f, ledger, server=change)


@forged(BOTH, "the site's earlier session left out", _LEDGER)
def hidden(f: Forger) -> None:
    together(f, lambda items: _without(items, *_first_session(items)))


@forged(BOTH, "a fresh ledger, in a statement of the form before data sets were named", "join statements")
def older_form(f: Forger) -> None:
    def older(p: dict[str, Any]) -> None:
        for name in ("data_set", "head_signature", "imports"):
            p.pop(name)

    together(f, _fresh, join=older)


@forged(BOTH, "a fresh ledger, said to be of another data set", _LEDGER)
def other_data_set(f: Forger) -> None:
    def renamed(items: Items) -> None:
        _fresh(items)
        items[0][1]["data_set"] = "9" * 64

    together(f, renamed, join=lambda p: f.own_head(p, "9" * 64))


@forged(
    BOTH, "a ledger that no other site ever met, without its earlier session",
    why="nobody else knows that it was there; it is the forger's own spending",
)  # fmt: skip
def never_met(f: Forger) -> None:
    """The others' statements never held a copy of this site's ledger: they are signed anew for this row alone."""
    f.never_met(LIAR)
    together(f, lambda items: _without(items, *_first_session(items)))


@forged(
    BOTH,
    "an import of the older ledger that counts less than was spent there",
    why=OLDER_ROWS,
)
def smaller_import_together(f: Forger) -> None:
    together(f, lambda items: _import(f, items, [[CHEAP, 1]]))


@forged(
    BOTH,
    "the site's ledger left out",
    why=LEFT_OUT,
)
def ledger_out(f: Forger) -> None:
    (f.folder / f.file(LIAR)).unlink()
    f.tell()


@forged(BOTH, "another final model, in the site's ledger too", f"ledger of {NAMES[0]}")
def other_model(f: Forger) -> None:
    (f.folder / "model.f32").unlink()
    (f.folder / "sums").rename(f.folder / "elsewhere")

    def change(items: Items) -> None:
        body(items, "round.applied", -1).update(model_hash="a" * 64)
        body(items, "run.end")["model_hash"] = "a" * 64

    together(f, lambda items: here(items, "model")[0].update(model_hash="a" * 64), server=change)


@forged(
    BOTH, "a copy made up to accuse an honest site of a longer ledger",
    why="a copy without the accused site's own signature proves nothing; it is shown, and no figure changes",
)  # fmt: skip
def made_up(f: Forger) -> None:
    first = f.rows(OTHER)[0]["hash"]
    lie = Copy(Head(500, "ab" * 32), first, f.json("joins.json")[OTHER]["payload"]["data_set"])
    together(f, keep, join=lambda p: p["peers"].update({OTHER: [lie.by(OTHER, f.key(LIAR)).to_json()]}))


@forged(
    BOTH, "the copies of the others' ledgers left out of the site's statement",
    why="one copy in any other member's statement is enough, and the honest sites' ledgers are whole",
)  # fmt: skip
def no_copies(f: Forger) -> None:
    together(f, keep, join=lambda p: p.update(peers={}))


@forged(BOTH, "a smaller ε, countersigned by that site; 2 signatures are asked for", "countersignatures", signatures=2)
def signed_alone(f: Forger) -> None:
    f.state(lambda p: p["claim"].update(epsilon=0.5))
    f.sign(LIAR)


@forged(BOTH, "a run dated 90 days later, by both", "row times")
def dated_together(f: Forger) -> None:
    f.rewrite(LIAR, keep, _later(f, 90 * DAY))
    f.join(LIAR, keep, ledger=True)
    f.tell(at=lambda _, t: t + 90 * DAY)


@forged(BOTH, "the capped site's refusal turned into a charge-free membership", "signed sets")
def refused_member(f: Forger) -> None:
    def change(items: Items) -> None:
        for kind, b in items:
            if kind in ("round.set", "round.applied") and b["round"] == PLAN.steps:
                b["members"] = [*NAMES]
        body(items, "round.applied", -1)["noise_multiplier"] = PLAN.realised_noise_multiplier(len(NAMES))
        items.remove(next(i for i in items if i[0] == "site.refused" and i[1]["site"] == CAPPED))

    (f.folder / "sums").rename(f.folder / "elsewhere")
    together(f, lambda items: here(items, "agreed")[-1].update(members=names_of(NAMES)), server=change)
