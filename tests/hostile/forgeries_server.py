"""What the server can forge alone: its report, plan and contract, signatures and audits.

Each function changes a copy of an honest run's folder as the holder of the named keys could: everything that these
keys can sign is signed anew, every hash, chain, head and root that follows is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forged_run import CAPPED, CONTRACT, FIRST, OTHER, PLAN, SERVER, Forger, body, one_run, plan_of
from forgery import ALONE, FORGERIES, Forgery, forged

from fedveil.common import identity
from fedveil.common.contract import sign_contract
from fedveil.privacy.audit import attach

DAY = 86_400


def stated(what: str, check: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """The server signs a report in which one thing reads otherwise."""
    FORGERIES.append(Forgery(ALONE, what, check, lambda f: f.state(change)))


# -- the server alone: what the report says ---------------------------------------------------------------------------

stated("half of ε", "epsilon by PLD", lambda p: p["claim"].update(epsilon=p["claim"]["epsilon"] / 2))
stated("a smaller δ", "epsilon by PLD", lambda p: p["claim"].update(delta=p["claim"]["delta"] / 10))
stated("a smaller fallback ε", "fallback epsilon", lambda p: p["claim"].update(fallback_epsilon=1.0))
stated(
    "a smaller ε with one record replaced", "replace-one epsilon", lambda p: p["claim"].update(replace_one_epsilon=2.0)
)
stated("a smaller ε of a person with 3 rows", "group epsilon", lambda p: p["claim"]["groups"][1].update(epsilon=2.5))
stated(
    "a larger noise multiplier, in the report", "prices",
    lambda p: p["mechanism"].update(noise_multiplier=2 * p["mechanism"]["noise_multiplier"]),
)  # fmt: skip
stated(
    "more declared records and a smaller sample rate, in the report", "prices",
    lambda p: p["mechanism"].update(records_declared=1600, sample_rate=0.05),
)  # fmt: skip
stated("fewer steps planned, in the report", "prices", lambda p: p["steps"].update(planned=1))
stated("a larger cap of a site", "every field", lambda p: p["sites"][OTHER].update(cap_epsilon=99.0))
stated("less spent by a site", "budgets", lambda p: p["sites"][OTHER].update(epsilon_after=0.5))
stated("another unit: a person, where a record was counted", "every field", lambda p: p["claim"].update(unit="person"))
stated("another sentence under the right numbers", "every field", lambda p: p["claim"].update(sentence="ε is 0.1."))
stated("another contract's hash", "every field", lambda p: p["hashes"].update(contract="a" * 64))
stated("the list of other ledgers left out", "every field", lambda p: p.pop("other_ledgers"))
stated("better results, in the report alone", "every field", lambda p: p["metrics"]["final"].update(accuracy=0.99))
stated("the report of an older version", "report signature", lambda p: p.update(v=2))


@forged(ALONE, "an earlier session of a site left out of the report", "every field")
def hidden_session(f: Forger) -> None:
    def change(p: dict[str, Any]) -> None:
        entry = p["sites"][OTHER]
        entry.update(runs=entry["runs"][1:], epsilon_before=0.0, earlier_sessions=0)
        p["tuning"]["earlier_sessions"][OTHER] = 0

    f.state(change)


# -- the server alone: plan, contract, roster, statements -------------------------------------------------------------


def _plan(f: Forger, **changes: Any) -> None:
    plan = plan_of(**changes)
    f.put("plan.json", plan.to_json())
    f.tell(lambda items: body(items, "run.open").update(plan_hash=plan.hash))


@forged(ALONE, "a plan with more noise, so a smaller ε, everywhere it can", "join statements")
def other_plan(f: Forger) -> None:
    _plan(f, epsilon=0.5)


@forged(ALONE, "a plan for more records, so a smaller sample rate", "join statements")
def more_records(f: Forger) -> None:
    _plan(f, records=1600, sample_rate=0.05, noise_multiplier=PLAN.noise_multiplier, epsilon=None)


@forged(ALONE, "a plan for sites of another capacity", "join statements")
def other_capacity(f: Forger) -> None:
    _plan(f, capacity=80)


@forged(ALONE, "another contract (k = 20), which the consortium did not sign", "contract")
def other_contract(f: Forger) -> None:
    stricter = CONTRACT.model_copy(update={"k": 20})
    f.put("contract.json", sign_contract(stricter, f.key(SERVER)))
    f.rebuild()


def _own_consortium(f: Forger) -> None:
    """A roster under a made-up consortium's key, and the contract again."""
    key = identity.new_signing_key()
    f.put("roster.json", identity.sign_roster(f.base.world.roster, key))
    f.put("contract.json", sign_contract(CONTRACT, key))
    (f.folder / "consortium.pub").write_text(identity.public_hex(key) + "\n")
    f.rebuild()


forged(ALONE, "another consortium's roster; the auditor has the consortium's key", "roster")(_own_consortium)
forged(
    ALONE, "another consortium's roster; the auditor takes the key from the bundle", pinned=False,
    why="whoever makes all keys can make a consistent story; the result says NOT pinned",
)(_own_consortium)  # fmt: skip


@forged(ALONE, "the copies of a ledger's head taken out of another site's statement", "join statements")
def no_witnesses(f: Forger) -> None:
    f.edit("joins.json", lambda d: d[OTHER]["payload"].update(peers={}))
    f.tell()


# -- the server alone: signatures and audits --------------------------------------------------------------------------


@forged(ALONE, "a site's signature under its own report used again for another one", "countersignatures")
def old_signatures(f: Forger) -> None:
    held = (f.folder / "signatures.json").read_bytes()
    f.rebuild()
    f.state(lambda p: p.update(written_at=1))
    (f.folder / "signatures.json").write_bytes(held)


@forged(ALONE, "a site's signature under another site's name", "countersignatures")
def lent_signature(f: Forger) -> None:
    f.edit("signatures.json", lambda d: d.update({OTHER: d[CAPPED]}))


@forged(ALONE, "the sites' signatures taken away; 2 are asked for", "countersignatures", signatures=2)
def no_signatures(f: Forger) -> None:
    (f.folder / "signatures.json").unlink()


def _audit(f: Forger, change: Callable[[dict[str, Any]], Any] | None) -> None:
    path = f.folder / "audit.json"
    if change is None:
        path.unlink()
    else:
        f.edit("audit.json", change)
        f.state(lambda p: p.update(audit=f.json("audit.json")))
    f.rebuild()


@forged(ALONE, "an attached audit's numbers changed", "every field")
def audit_edited(f: Forger) -> None:
    _audit(f, lambda a: a["one_run"].update(one_run(PLAN, 52).to_json()))


@forged(ALONE, "an attached audit of another run's plan", "every field")
def audit_elsewhere(f: Forger) -> None:
    other = attach.evidence_of(FIRST.hash, one_run(FIRST), f.base.auditor).to_json()
    _audit(f, lambda a: (a.clear(), a.update(other)))


def _audit_by_server(f: Forger) -> None:
    other = attach.evidence_of(PLAN.hash, one_run(PLAN, 52), f.key(SERVER)).to_json()
    _audit(f, lambda a: (a.clear(), a.update(other)))


forged(ALONE, "an audit made up and signed by the server; the auditor's key is given", "attached audit", auditor=True)(
    _audit_by_server
)
forged(
    ALONE, "an audit made up and signed by the server; no auditor's key is given",
    why="no name is bound to an auditor's key; the result prints its fingerprint",
)(_audit_by_server)  # fmt: skip


def _audit_gone(f: Forger) -> None:
    _audit(f, None)


forged(ALONE, "an attached audit left out; the auditor's key is given", "attached audit", auditor=True)(_audit_gone)
forged(
    ALONE,
    "an attached audit left out; no auditor's key is given",
    why="an audit is evidence beside the claim, and need not be there",
)(_audit_gone)
