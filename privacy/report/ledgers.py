"""Checks one site's ledger against what is said elsewhere: the plan, the server's journal, the other sites.

Every function raises :class:`VerificationError` and names what does not hold.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

from fedveil.common import fields
from fedveil.common.errors import FedveilError, VerificationError
from fedveil.common.journal import GENESIS, Copy, Row
from fedveil.privacy.joining import heads_of, names_of
from fedveil.privacy.ledger import CLOCK_S
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.report import prices, recompute
from fedveil.privacy.report.charges import Charges
from fedveil.privacy.report.history import COMPLETED, STOPPED, History
from fedveil.privacy.report.prices import Prices

_UNEVEN = 1e-2  # what the third accountant's grid may add
Seen = list[tuple[str, Copy]]  # who has seen it, and what


class Other(NamedTuple):
    """Another ledger of a site: its first row's hash, the most rows and how many members saw, and what counts it.

    ``same_data_set``: it counted the data set of this run. ``imported``: this run's ledger counts all of these rows.
    ``at_cap``: it was lost, and is counted as having spent its whole cap.
    """

    ledger: str
    rows: int
    members: int
    same_data_set: bool
    imported: bool
    at_cap: bool


def head_signed(site: str, joined: Mapping[str, Any], public: str) -> None:
    """A join statement names its site's ledger, head and data set under the site's own word.

    A statement of an older form, which names no data set, would let a fresh ledger pass: what others have seen of the
    old one would be of "another" data set.
    """
    count, digest = fields.head(joined.get("head"), f"the join statement of {site}")
    said = [count, digest, joined.get("ledger"), joined.get("data_set"), joined.get("head_signature")]
    try:
        own = Copy.from_json(said)
    except FedveilError as e:
        raise VerificationError(f"the join statement of {site} is of a form that this version does not read") from e
    if not own.signed_by(site, public):
        raise VerificationError(f"the join statement of {site}: the head of its own ledger is not signed")


def seen_by_peers(joins: Mapping[str, Mapping[str, Any]]) -> dict[str, Seen]:
    """By site, every head of its ledgers that a signed join statement names; whether its owner signed it or not."""
    out: dict[str, Seen] = {}
    for witness, statement in joins.items():
        try:
            held = heads_of(statement.get("peers", {}))
        except FedveilError as e:
            raise VerificationError(f"the join statement of {witness}: {e.message}") from e
        for site, copies in held.items():
            out.setdefault(site, []).extend((witness, copy) for copy in copies.values())
    return out


def continues(
    rows: list[Row], joined: Mapping[str, Any], seen: Iterable[tuple[str, Copy]], colluders: int, public: str = ""
) -> str:
    """It is the ledger that the site joined with, and holds every row that other sites had seen of it.

    One copy that the owner has signed is enough. In older versions a copy is the word of its witness. Up to
    ``colluders`` sites may invent one together, and must not be able to accuse another site with it. Of more witnesses
    than that, at least one is honest.

    Args:
        joined: the site's own join statement.
        seen: see :func:`seen_by_peers`; of the site's other ledgers it says nothing here.
        colluders: t of the plan.
        public: the site's key (hex).

    Returns:
        A remark on witnesses who say otherwise and are too few to be believed; empty if there are none.
    """
    if not rows:
        raise VerificationError("it has no rows")
    count, digest = fields.head(joined.get("head"), "the join statement")
    if not _holds(rows, count, digest) or joined.get("ledger") != rows[0].hash:
        raise VerificationError("it does not continue the ledger that the site had when it joined")
    lost = [(w, c) for w, c in seen if c.ledger == rows[0].hash and not _holds(rows, *c.head)]
    if signed := [(w, c) for w, c in lost if c.signed_by(rows[0].owner, public)]:
        witness, copy = signed[0]
        raise VerificationError(
            f"before this run it had other rows, or more: {witness} holds a head of {copy.head.rows} rows that the "
            "site has signed"
        )
    against = {w: c.head.rows for w, c in lost}
    if not against:
        return ""
    said = ", ".join(f"{w} ({n} rows)" for w, n in sorted(against.items())[:8])
    if len(against) > colluders:
        raise VerificationError(f"these sites signed that it had other rows, or more, before this run: {said}")
    return f"; {said} signed that it had other rows, or more: one word against another, up to {colluders} may collude"


def others(
    site: str,
    public: str,
    joined: Mapping[str, Any],
    seen: Seen,
    covers: Mapping[str, int],
    lost: Container[str] = (),
) -> list[Other]:
    """The other ledgers of a site that members of this run have seen, by heads that the site has signed.

    Args:
        public: the site's key (hex).
        joined: its own join statement.
        seen: see :func:`seen_by_peers`.
        covers: by imported ledger, up to how many of its rows.
        lost: the ledgers whose whole caps are charged.
    """
    by: dict[str, list[tuple[str, Copy]]] = {}
    for witness, copy in seen:
        if witness != site and copy.ledger != joined.get("ledger") and copy.signed_by(site, public):
            by.setdefault(copy.ledger, []).append((witness, copy))
    return [
        Other(
            name, max(c.head.rows for _, c in copies), len({w for w, _ in copies}),
            any(c.data_set == joined.get("data_set") for _, c in copies),
            covers.get(name, -1) >= max(c.head.rows for _, c in copies), name in lost,
        )
        for name, copies in sorted(by.items())
    ]  # fmt: skip


def replaces_none(c: Charges, joined: Mapping[str, Any], others: Iterable[Other], data_set: str) -> str:
    """It counts what other ledgers of the data set have spent, as far as members saw them; and is of this data set.

    Args:
        joined: the site's own join statement.
        others: see :func:`others`.
        data_set: the contract's, by hash; empty where no contract is at hand.

    Returns:
        A remark that lists the other ledgers; empty if there are none.
    """
    said = joined.get("data_set")
    if said != (data_set or said) or c.data_set not in ("", said):
        raise VerificationError("the site joined with the ledger of another data set than the contract's")
    for entry in joined.get("imports", []):
        name, rows = entry
        if c.covers.get(name, -1) < rows:
            raise VerificationError(f"the site said that it counts {rows} rows of ledger {name[:16]}...; it does not")
    listed = []
    for o in others:
        if o.same_data_set and not o.imported:
            raise VerificationError(
                f"it is a fresh ledger: {o.members} members have seen another one of this data set, "
                f"{o.ledger[:16]}... with {o.rows} rows, which it does not count"
            )
        how = "charged at its cap" if o.at_cap else "counted in this one" if o.imported else "of another data set"
        listed.append(f"{o.ledger[:16]}... ({o.rows} rows, seen by {o.members} members, {how})")
    return f"; other ledgers of this site: {', '.join(listed)}" if listed else ""


def agreed(charges: Mapping[str, Charges], plan: PrivacyPlan, h: History) -> str:
    """Every set that a site signed is one that the journal announces, the same for all, and signed by enough.

    Ledgers of older versions do not say what their site signed. So this begins with the first one that does.
    """
    found = {s: c.agreed for s, c in charges.items() if c.agreed}
    if not found:
        return "no ledger says which sets its site signed (a sum without agreement, or an older version)"
    rounds = {r.number: r for r in h.rounds}
    for site, sets in found.items():
        for n, (names, digest) in sets.items():
            r = rounds.get(n)
            if r is None or names not in map(names_of, r.announced):
                raise VerificationError(f"{site} signed another set in round {n} than the server's journal announces")
            other = next((s for s, o in found.items() if n in o and o[n][0] == names and o[n][1] != digest), None)
            if other is not None:
                raise VerificationError(f"{site} and {other} signed different sums of the same sites in round {n}")
    unknown = plan.sites - len(charges)
    for r in h.applied:
        last = names_of(r.members or ())
        signed = sum(sets.get(r.number, ("", ""))[0] == last for sets in found.values())
        if signed + unknown < plan.threshold:
            raise VerificationError(
                f"the set of round {r.number} was signed by {signed} of the {plan.threshold} sites that its sum needs"
            )
    return f"{sum(map(len, found.values()))} signed sets of {len(found)} sites"


def dated(charges: Mapping[str, Charges], h: History) -> str:
    """No row is dated before the one before it, and this session's rows lie inside the run, give or take a day.

    A journal's writer never lets times fall. Clocks of different machines may be apart, by :data:`CLOCK_S` at most.
    """
    if h.fall is not None:
        raise VerificationError(f"row {h.fall} of the server's journal is dated before the row before it")
    first, last = h.times
    for site, c in charges.items():
        if c.fall is not None:
            raise VerificationError(f"row {c.fall} of the ledger of {site} is dated before the row before it")
        if c.times and not (first - CLOCK_S <= c.times[0] and c.times[1] <= last + CLOCK_S):
            raise VerificationError(
                f"the ledger of {site} dates rows of this session more than {CLOCK_S // 3600} hours outside of the run"
            )
    return f"{len(charges) + 1} journals; the run took {last - first} seconds"


def counts(c: Charges, plan: Prices, h: History, site: str) -> int:
    """It was charged the plan's step, only for opened rounds, for the states that the server's journal names, and for
    every sum the site is in. Returns how often.

    The price of a step is the verifier's own, out of the plan's numbers.
    """
    opened = {r.number: r.state_in for r in h.rounds}
    for n, row in c.spends.items():
        if n not in opened:
            raise VerificationError(f"{site} charged round {n}, which the server never opened")
        wrong = prices.charge(plan, row.body["event"])
        if wrong or row.body.get("plan_hash") != h.plan_hash:
            raise VerificationError(
                f"{site} charged round {n} with another event or plan than the signed one" + (wrong and f": {wrong}")
            )
        if row.body.get("state", "") != opened[n]:
            raise VerificationError(f"{site} charged round {n} for another model state than the server's journal names")
    for r in h.applied:
        if site in (r.members or ()) and r.number not in c.spends:
            raise VerificationError(f"{site} is in the sum of round {r.number}, but its ledger was not charged")
    return len(c.spends)


def _holds(rows: list[Row], count: int, digest: str) -> bool:
    return count <= len(rows) and digest == (rows[count - 1].hash if count else GENESIS)


def charged(c: Charges, plan: PrivacyPlan, h: History, joined: int) -> None:
    """It counts what the plan counts, and the plan was accepted before the first charge.

    Args:
        joined: how many rows the ledger had when the site joined.
    """
    if c.unit != plan.unit:
        raise VerificationError(f"the ledger counts each {c.unit!r}, the plan each {plan.unit!r}")
    if plan.unit != "client" and c.capacity > plan.capacity:
        raise VerificationError(
            f"the ledger declares a capacity of {c.capacity} {plan.unit}s, the plan is for at most {plan.capacity}"
        )
    if not c.spends:
        return
    row = c.accepted
    if row is None or row.n > min(r.n for r in c.spends.values()):
        raise VerificationError("it was charged for a session that the site had not accepted")
    for key in ("plan_hash", "roster_hash", "contract_hash"):
        if row.body.get(key) != getattr(h, key):
            raise VerificationError(f"row {row.n} accepts another {key.replace('_', ' ')}")
    for n, spend in c.spends.items():
        if spend.n < joined:
            raise VerificationError(f"row {spend.n} charges round {n} before the site joined")


def ends(c: Charges, h: History, site: str) -> None:
    """It has the session's end, and the same one as the server's journal.

    A ledger is handed over only after both rows of the end were written: one that lacks them was cut. Another end is
    accepted where the run was restarted after the site had been told that it was over. Then the site is in no later
    sum.
    """
    known = {r.model_in for r in h.rounds} | {r.model_out for r in h.applied} | {h.ended.model_hash}
    for row in c.models:
        if row.body.get("model_hash") not in known:
            raise VerificationError(f"row {row.n} names a model that the server's journal does not have")
    if c.end is None or not c.models:
        raise VerificationError("it has no end of this session: its tail was cut")
    status, last = c.end.body.get("status"), c.models[-1]
    told = (status, last.body.get("model_hash"), last.body.get("round"))
    if told == (h.ended.status, h.ended.model_hash, len(h.applied)):
        return
    if status in (COMPLETED, STOPPED) or not _before_a_restart(c, h, site, last):
        raise VerificationError(
            f"rows {last.n} and {c.end.n} tell another end of this run than the server's journal: "
            f"{str(status)[:32]} after {str(last.body.get('round'))[:16]} applied rounds"
        )


def _before_a_restart(c: Charges, h: History, site: str, last: Row) -> bool:
    done = last.body.get("round")
    if not h.restarts or type(done) is not int or not 0 <= done <= len(h.applied):
        return False
    model = h.applied[done - 1].model_out if done else h.model_hash
    later = any(site in (r.members or ()) for r in h.applied[done:])
    return last.body.get("model_hash") == model and not later and max(c.spends, default=0) <= len(h.rounds)


def budget(site: str, c: Charges, stated: Mapping[str, Any]) -> None:
    """The filter's ε once more, by the verifier's own accountant: in the ledger, in the report, and under the cap.

    A filter's ε holds for charges that were chosen on the way. So it is never below what the third accountant makes of
    the same charges, had all been fixed before. The cap that counts is the one in force at each spend: an owner may
    lower it afterwards.
    """
    lost = sum(epsilon for epsilon, _ in c.lost.values())
    own = recompute.by_filter(c.events, c.order, c.delta) + lost
    # The ledger adds 1e-12 to each step against rounding.
    if abs(own - c.epsilon_after) > 1e-6 * max(1.0, own) + 2e-12 * len(c.events):
        raise VerificationError(
            f"{site}: the filter's epsilon is {own:.6f}, its ledger composes to {c.epsilon_after:.6f}"
        )
    if fields.number(stated, "epsilon_after", site) < own - 1e-6:
        raise VerificationError(f"{site}: the report states {stated['epsilon_after']:.6f} spent, it is {own:.6f}")
    least = recompute.least(c.events, c.delta)
    if own - lost < least * (1 - _UNEVEN) - 1e-6:
        raise VerificationError(f"{site}: its filter reads {own:.6f}, but its charges cost {least:.6f} when composed")
    events, cap = c.tightest
    if (then := recompute.by_filter(events, c.order, c.delta)) > cap * (1 + 1e-6):
        raise VerificationError(f"{site}: {then:.6f} was spent under a cap of {cap:g}")


def at_caps(rows: Iterable[Row], c: Charges) -> str:
    """Every lost ledger is charged a whole cap: not below the highest that this ledger had until then.

    What an import carries along was charged by the ledger that it counts; here it is that import's word. Prices are
    read out of the rows again, beside the tally that composed them.

    Returns:
        A remark that lists the lost ledgers; empty if there are none.
    """
    highest, found, carried = 0.0, dict[str, float](), set[str]()
    for row in rows:
        if row.kind in ("ledger.open", "ledger.cap"):
            highest = max(highest, fields.number(row.body, "cap_epsilon", row.kind))
        elif row.kind == "ledger.lost":
            name = fields.hexadecimal(row.body, "ledger", row.kind)
            found[name] = fields.number(row.body, "cap_epsilon", row.kind)
            if found[name] < highest:
                raise VerificationError(f"row {row.n} charges a lost ledger {found[name]:g}, less than {highest:g}")
        elif row.kind == "ledger.import":
            found |= (along := {str(name): float(cap) for name, cap, _ in row.body.get("lost", [])})
            carried |= along.keys()
    if {name: cap for name, (cap, _) in c.lost.items()} != found:
        raise VerificationError("the lost ledgers that it was charged for do not add up")
    if not found:
        return ""
    said = {name: " by an import's word" if name in carried else "" for name in found}
    listed = ", ".join(f"{name[:16]}... at {cap:g}{said[name]}" for name, cap in sorted(found.items()))
    return f"; lost ledgers, charged at their caps: {listed}"
