"""From plan and journals to a report's payload: one pure function, run by the builder and again by the verifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedveil.common.identity import Roster
from fedveil.privacy.dp.accounting import epsilon_pld, epsilon_rdp, interval
from fedveil.privacy.grid import MODULUS_BITS
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.report import ledgers, privacy_loss, witnesses, wording
from fedveil.privacy.report.catalogue import Speaker
from fedveil.privacy.report.charges import Charges
from fedveil.privacy.report.history import History, Round

VERSION = 3
MAX_METRIC_POINTS = 256
MAX_REFUSALS = MAX_RUNS = 64
MAX_SPENDING = 24
SIGNED_IN = "en"  # the language of the sentences that are signed; pages in others say the same


@dataclass(frozen=True)
class Facts:
    """What a payload is derived from.

    Attributes:
        charges: by site, for every ledger that was delivered.
        server_head: rows and last hash of the server's journal.
        metrics: rows of ``metrics.jsonl``.
        digests: SHA-256 of every file of the bundle.
        roots: Merkle root of every journal, by owner.
        audit: an empirical audit's results, repeated and not recomputed.
        joins: every site's join statement.
    """

    plan: PrivacyPlan
    roster: Roster
    history: History
    charges: Mapping[str, Charges]
    server_head: tuple[int, str]
    metrics: list[dict[str, Any]]
    digests: Mapping[str, str]
    roots: Mapping[str, str]
    audit: dict[str, Any] | None = None
    joins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def simulated(self) -> bool:
        """Whether the results protect nobody: said by the plan, or by the engine."""
        return self.plan.simulated or self.history.simulated

    @property
    def missing(self) -> list[str]:
        """Sites whose ledger was not delivered, in the roster's order."""
        return [m.site for m in self.roster.sites if m.site not in self.charges]

    @property
    def most_charged(self) -> int:
        """Steps that this run charged to the site it charged most: a site that refused a round was not charged for it.

        Where a ledger was not delivered, every round that was opened may have been charged in it.
        """
        if self.missing:
            return len(self.history.rounds)
        return max((len(c.spends) for c in self.charges.values()), default=0)


def derive(f: Facts) -> dict[str, Any]:
    """The payload without what only its builder knows (versions of its software, the time).

    Raises:
        VerificationError: the server's journal has no end.
    """
    plan, end = f.plan, f.history.ended
    earlier = {s: c.earlier_sessions for s, c in f.charges.items()}
    numbers = {
        "v": VERSION,
        "session": f.history.session,
        "consortium": f.roster.consortium,
        "status": end.status,
        "simulated": f.simulated,
        **({"not_private": True} if f.history.debug_noise else {}),
        "claim": _claim(plan),
        "trust": _trust(plan),
        "mechanism": _mechanism(plan),
        "steps": _steps(f),
        "rounds": [_round(f, r) for r in f.history.rounds],
        "accounting": _accounting(f),
        "sites": {m.site: _site(f, m.site) for m in f.roster.sites},
        "ledgers_missing": f.missing,
        "refusals": [{"round": r.round, "site": r.site, "code": r.code} for r in f.history.refusals[:MAX_REFUSALS]],
        "tuning": {"earlier_sessions": earlier},
        "audit": f.audit,
        "plan": plan.to_json(),
        "model": plan.model.model_dump(mode="json") | {"parameters": plan.model.parameters},
        "optimizer": plan.optimizer.model_dump(mode="json"),
        "metrics": _metrics(f),
        "hashes": _hashes(f),
        "witnesses": _witnesses(f),
    }
    if other := _other_ledgers(f):
        numbers["other_ledgers"] = other
    return wording.insert(numbers, Speaker(SIGNED_IN))


def _claim(plan: PrivacyPlan) -> dict[str, Any]:
    points = privacy_loss.curve(plan.event, plan.steps, plan.delta, plan.claim)
    rates = [(fpr, privacy_loss.attack_rate(points, fpr)) for fpr in privacy_loss.FALSE_ALARMS]
    weakest, accountant = privacy_loss.fallback(plan)
    replaced, by = privacy_loss.replace_one(plan)
    return {
        "unit": plan.unit,
        "adjacency": plan.adjacency,
        "epsilon": plan.claim,
        "epsilon_planned": plan.epsilon,
        "delta": plan.delta,
        "epsilon_rdp": epsilon_rdp([(plan.event, plan.steps)], plan.delta),
        "replace_one_epsilon": replaced,
        "replace_one_accountant": by,
        "fallback_epsilon": weakest,
        "fallback_accountant": accountant,
        "filter_epsilon": plan.filter_epsilon(),
        "groups": privacy_loss.groups(plan),
        "curve": [list(p) for p in points],
        "attack": [{"false_positive_rate": a, "true_positive_rate": b} for a, b in rates],
    }


def _trust(plan: PrivacyPlan) -> dict[str, Any]:
    return {
        "mode": plan.mode,
        "sum": plan.sum,
        "task": plan.task,
        "sites": plan.sites,
        "colluders": plan.colluders,
        "dropouts": plan.dropouts,
        "honest": plan.honest,
        "members": plan.members,
        "threshold": plan.threshold,
    }


def _mechanism(plan: PrivacyPlan) -> dict[str, Any]:
    return {
        "clip": plan.clip,
        "sensitivity": plan.sensitivity,
        "inflation": plan.inflation,
        "noise_multiplier": plan.noise_multiplier,
        "fallback_noise_multiplier": plan.fallback_event.noise_multiplier,
        "grid": plan.grid,
        "clamp": plan.clamp,
        "share_std_in_grid_units": plan.share_std,
        "bound_in_grid_units": plan.bound,
        "modulus_bits": MODULUS_BITS,
        "sample_rate": plan.event.sample_rate,
        "records_declared": plan.records,
        "divisor": plan.divisor,
        "local_steps": plan.local_steps,
        "local_batch": plan.local_batch,
    }


def _steps(f: Facts) -> dict[str, Any]:
    outcomes = [r.outcome for r in f.history.rounds]
    return {
        "planned": f.plan.steps,
        "opened": len(outcomes),
        "applied": outcomes.count("applied"),
        "aborted": outcomes.count("aborted"),
        "interrupted": outcomes.count("interrupted"),
        "restarts": f.history.restarts,
        "refusals": len(f.history.refusals),
        "repairs": f.history.repairs,
    }


def _round(f: Facts, r: Round) -> dict[str, Any]:
    members = set(r.members or ())
    return {
        "round": r.number,
        "outcome": r.outcome,
        "members": len(members),
        "missing": [] if r.members is None else [m.site for m in f.roster.sites if m.site not in members],
        "noise_multiplier": f.plan.realised_noise_multiplier(len(members)) if r.outcome == "applied" else None,
        "model_hash": r.model_out,
        "reason": r.reason,
    }


def _accounting(f: Facts) -> dict[str, Any]:
    plan, steps = f.plan, f.most_charged
    charged = [(plan.event, steps)]
    return {
        "interval": interval(plan.event),
        "steps_charged": steps,
        "epsilon_charged_pld": epsilon_pld(charged, plan.delta),
        "epsilon_charged_rdp": epsilon_rdp(charged, plan.delta),
        "by_step": privacy_loss.by_step(plan.event, plan.steps, plan.delta),
    }


def _site(f: Facts, site: str) -> dict[str, Any] | None:
    c = f.charges.get(site)
    if c is None:
        return None
    return {
        "lineage": c.lineage,
        "unit": c.unit,
        "cap_epsilon": c.cap,
        "delta": c.delta,
        "order": c.order,
        "epsilon_before": c.epsilon_before,
        "epsilon_after": c.epsilon_after,
        "left": c.left,
        "runs_left": c.affords(f.plan.event) // f.plan.steps,
        "approvals": None if c.approvals is None else list(c.approvals),
        "runs": _runs(c),
        "spending": _spending(c),
        "charged": len(c.spends),
        "committed": c.committed,
        "earlier_sessions": c.earlier_sessions,
        "exhausted": c.exhausted,
        "precision": c.precision,
        "anonymisation": _anonymisation(f.plan, c),
        **({"lost_ledgers": _lost(c)} if c.lost else {}),
    }


def _lost(c: Charges) -> list[dict[str, Any]]:
    """The lost ledgers that this one was charged for at their caps."""
    return [{"ledger": name, "cap_epsilon": cap, "delta": delta} for name, (cap, delta) in sorted(c.lost.items())]


def _other_ledgers(f: Facts) -> dict[str, list[dict[str, Any]]]:
    """By site, its other ledgers of which members of the run hold a signed head; sites without any are left out."""
    seen, out = ledgers.seen_by_peers(f.joins), dict[str, list[dict[str, Any]]]()
    for m in f.roster.sites:
        c = f.charges.get(m.site)
        counted = (c.covers, c.lost) if c else ({}, {})
        if found := ledgers.others(m.site, m.signing_key, f.joins.get(m.site, {}), seen.get(m.site, []), *counted):
            out[m.site] = [o._asdict() for o in found]
    return out


def _witnesses(f: Facts) -> dict[str, Any]:
    """Of every ledger that was delivered: its rows, how many are witnessed, and how many peers hold how many rows."""
    seen, needed, out = ledgers.seen_by_peers(f.joins), f.plan.quorum, dict[str, Any]()
    for m in f.roster.sites:
        if m.site in f.charges:
            rows = f.charges[m.site].head[0]
            found = witnesses.held(m.site, m.signing_key, f.joins.get(m.site, {}), seen.get(m.site, []), rows)
            out[m.site] = {"rows": rows, "witnessed": witnesses.witnessed(found, needed), "held": found}
    return {"needed": needed, "ledgers": out}


def _runs(c: Charges) -> list[dict[str, Any]]:
    """What each session (empty name: an imported ledger) was charged and when, in the order of its first charge."""
    found: dict[str, dict[str, Any]] = {}
    for session, epsilon, at in c.spending:
        run = found.setdefault(session, {"session": session[:64], "steps": 0, "first_at": at})
        run["steps"] += 1
        run |= {"epsilon_after": epsilon, "last_at": at}
    return list(found.values())[-MAX_RUNS:]


def _spending(c: Charges) -> list[list[float]]:
    """``[rows that spent, ε of the filter after them]``, thinned evenly; the first and the last are kept."""
    points = [[i + 1, epsilon] for i, (_, epsilon, _) in enumerate(c.spending)]
    every = max(1, -(-len(points) // MAX_SPENDING))
    return [p for i, p in enumerate(points) if i == 0 or (len(points) - 1 - i) % every == 0]


def _anonymisation(plan: PrivacyPlan, c: Charges) -> dict[str, Any] | None:
    r = c.released
    if r is None or not (r.criteria or r.unit):
        return None
    factor = r.stability_factor
    return {
        "same_contract": r.contract_hash == plan.contract_hash,
        "criteria": r.criteria,
        "all_met": all(x["met"] for x in r.criteria.values()),
        "stability_factor": factor,
        "unit": r.unit,
        "epsilon_of_original_record": None if factor is None else privacy_loss.group_epsilon(plan, factor),
    }


def _metrics(f: Facts) -> dict[str, Any]:
    rows = f.metrics
    every = max(1, -(-len(rows) // MAX_METRIC_POINTS))
    shown = [r for i, r in enumerate(rows) if (len(rows) - 1 - i) % every == 0]

    def total(key: str) -> float:
        return sum(r[key] for r in rows if r[key] is not None)

    return {
        "final": f.history.ended.metrics,
        "by_round": [[r["round"], r["metrics"]] for r in shown],
        "bytes_sent": total("bytes_sent"),
        "bytes_received": total("bytes_received"),
        "seconds": total("seconds"),
    }


def _hashes(f: Facts) -> dict[str, Any]:
    heads = {site: list(c.head) for site, c in f.charges.items()}
    return {
        "plan": f.plan.hash,
        "roster": f.roster.hash,
        "contract": f.plan.contract_hash,
        "model": f.history.ended.model_hash,
        "joins": f.history.joins_digest,
        "heads": {"server": list(f.server_head), **heads},
        "roots": dict(f.roots),
        "files": dict(f.digests),
    }
