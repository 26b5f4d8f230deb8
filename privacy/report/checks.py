"""The verifier's checks, one method each: it returns what it found, or raises what is wrong.

Order matters. First who may speak (roster, signatures), then what was said in which order (journals), then whether it
adds up (charges, ε). An accountant composes a plan only after every site's signature under its hash was verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fedveil.common import canonical, fields, identity
from fedveil.common.contract import DataContract
from fedveil.common.errors import VerificationError
from fedveil.common.identity import Roster
from fedveil.common.journal import GENESIS, Row
from fedveil.privacy import plan as plans
from fedveil.privacy.joining import JOIN, data_set
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.report import bundle as bundles
from fedveil.privacy.report import (
    claims,
    ledgers,
    prices,
    progress,
    recompute,
    results,
    rounds,
    schema,
    signatures,
    software_bill,
    states,
    tables,
    witnesses,
)
from fedveil.privacy.report.build import DOMAIN
from fedveil.privacy.report.bundle import CONTRACT, JOINS, PLAN, REPORT, Bundle, journal_name
from fedveil.privacy.report.charges import Charges, compose
from fedveil.privacy.report.derive import VERSION, Facts, derive
from fedveil.privacy.report.history import EXHAUSTED, History, replay
from fedveil.privacy.report.prices import Prices

_CONTRACT = "fedveil/contract/1"
_REPORT_LIMIT = 1 << 28
_OWN = ("software", "written_at")  # what only the builder knows

Step = tuple[str, str, Callable[[], str]]


class NotReached(VerificationError):
    """A check that needs something which an earlier check did not establish."""


class Audit:
    """One verification under way; :meth:`steps` gives the checks in order."""

    def __init__(
        self, report: Path, consortium_key: str | None, signatures_required: int = 0, auditor: str | None = None
    ) -> None:
        self._report, self._key, self.pinned = report, consortium_key, False
        self._required, self._auditor = signatures_required, auditor
        self._bundle: Bundle | None = None
        self._document: Any = None
        self.roster: Roster | None = None
        self._payload: dict[str, Any] | None = None
        self._rows: list[Row] | None = None
        self._history: History | None = None
        self._joins: dict[str, dict[str, Any]] | None = None
        self._seen: dict[str, ledgers.Seen] = {}
        self._plan: PrivacyPlan | None = None
        self._prices: Prices | None = None  # of the plan's file, by the verifier's own arithmetic
        self._agreed: DataContract | None = None  # of a real run
        self._charges: dict[str, Charges] = {}
        self.countersigned: tuple[str, ...] = ()

    @property
    def established(self) -> tuple[Any, Roster, Bundle]:
        """The report, the roster and the files as they were read for the checks."""
        return self._document, self._got("roster", self.roster), self._got("files", self._bundle)

    @property
    def claim(self) -> str:
        """The claimed sentence."""
        return str((self._payload or {}).get("claim", {}).get("sentence", ""))

    @property
    def auditors(self) -> dict[str, str]:
        """The fingerprint of the auditor's key under each result of an empirical audit, empty where nobody signed."""
        return results.auditors((self._payload or {}).get("audit"))

    @property
    def simulated(self) -> bool:
        """Whether the run protected nobody."""
        return bool((self._plan and self._plan.simulated) or (self._history and self._history.simulated))

    def steps(self) -> Iterator[Step]:
        """``(name, what is compared, the check)``; made one after the other, each once."""
        yield "files", "the report and the files beside it are there, plain and within bounds", self._files
        yield "roster", "signature of the roster by the consortium's key", self._open_roster
        yield "report signature", "signature of the report by the server's key on the roster", self._open_report
        yield "countersignatures", "signatures of this very report by sites on the roster", self._countersigned
        yield "server journal", "numbering, hash chain and signature of every row; head in the report", self._chain
        yield "order of events", "forward only: open, join, rounds, end; nothing afterwards", self._order
        yield "join statements", "every site signed this plan, roster, contract and session", self._signed_joins
        yield "plan", "hash equal to the signed one everywhere; consistent in itself", self._check_plan
        yield "contract", "signed by the consortium, hash equal to the plan's; consistent in itself", self._contract
        yield (
            "rounds",
            "every sum has at least n - d sites; realised noise; not more than the planned steps",
            self._sums,
        )
        yield (
            "model chain",
            "every round starts from the model before; the last is the report's and the file's",
            self._models,
        )
        if self._plan and self._plan.task == "stats":
            yield "statistics", "every estimate against the opened sum, by the same derivation", self._statistics
        if self.roster and self._history and self._history.end:
            for m in self.roster.sites:
                if m.site in self._history.end.heads or self._has(journal_name(m.site)):
                    what = "chain, signatures, head; its end, its table, no step charged twice or past the cap"
                    yield f"ledger of {m.site}", what, partial(self._ledger, m.site)
        yield "row times", "no time falls; rows of this session lie inside the run, give or take a day", self._times
        yield (
            "signed sets",
            "the sets that the sites signed against each other and the server's journal",
            self._agreements,
        )
        yield "ledgers delivered", "one ledger of every site, except of at most d that dropped out", self._delivered
        yield "charges", "every member of every sum had charged exactly the plan's step", self._spends
        yield "prices", "the report's trust and noise against the plan's raw numbers, by other arithmetic", self._priced
        for name, what, check in claims.CHECKS:
            yield name, what, partial(self._on, check)
        yield "group epsilon", "several units of one person, by the third accountant: none is below it", self._groups
        yield "budgets", "each site's ε over all its runs; the most that this run charged to one", self._budgets
        yield (
            "metrics file",
            "rounds in order; the epsilon of the rounds opened; its last results against the run's end",
            self._metrics,
        )
        yield "every field", "the report's fields against the same derivation from the journals", self._fields
        if self._auditor is not None:
            yield "attached audit", "every attached result is signed by the auditor's key that was given", self._audited
        yield "schema", f"the report's form against the published schema, version {VERSION}", self._schema

    # -- who may speak ------------------------------------------------------------------------------------------

    def _files(self) -> str:
        self._document = canonical.loads(bundles.read_bounded(self._report, _REPORT_LIMIT), limit=_REPORT_LIMIT)
        self._bundle = bundles.read(self._report.parent)
        return f"{len(self._bundle.files)} files"

    def _open_roster(self) -> str:
        bundle = self._got("files", self._bundle)
        given = self._key is not None
        key = fields.public_key(self._key, "the consortium's key that was given") if given else bundle.pin
        roster = bundles.open_roster(bundle, key)
        self._key, self.pinned, self.roster = key, given, roster
        how = "the key you gave" if given else f"key {key[:16]}... taken from the bundle, NOT pinned"
        return f"{roster.consortium[:64]!r}, {len(roster.sites)} sites; {how}"

    def _open_report(self) -> str:
        roster = self._got("roster", self.roster)
        payload = identity.opened(self._document, DOMAIN, roster.server.signing_key, what=REPORT)
        signatures.require_version(fields.mapping(payload, REPORT).get("v"), VERSION)
        self._payload = payload
        return f"key {roster.server.signing_key[:16]}..."

    def _countersigned(self) -> str:
        roster, payload = self._got("roster", self.roster), self._got("report signature", self._payload)
        found = signatures.check(self._report.parent, roster, str(payload.get("session")), self._document)
        self.countersigned = tuple(found)
        if len(found) < self._required:
            raise VerificationError(f"{len(found)} of {len(roster.sites)} sites signed, {self._required} are required")
        return f"{len(found)} of {len(roster.sites)} sites"

    # -- what was said, in which order --------------------------------------------------------------------------

    def _chain(self) -> str:
        rows = self._got("files", self._bundle).server_rows(self._got("roster", self.roster))
        payload = self._got("report signature", self._payload)
        claimed = fields.head(payload["hashes"]["heads"]["server"], "the report's head of the server")
        if claimed != (found := (len(rows), rows[-1].hash if rows else GENESIS)):
            raise VerificationError(
                f"the report names a head of {claimed[0]} rows, the journal has another of {found[0]}"
            )
        self._rows = rows
        return f"{len(rows)} rows"

    def _order(self) -> str:
        history = replay(self._got("server journal", self._rows))
        end = history.ended
        outcomes = [r.outcome for r in history.rounds]
        applied, finished = outcomes.count("applied"), len(outcomes) - outcomes.count("interrupted")
        if end.steps_done not in (applied, finished, len(outcomes)):
            raise VerificationError(
                f"run.end speaks of {end.steps_done} steps, the journal of {applied} applied rounds"
            )
        self._history = history
        if history.debug_noise:
            raise VerificationError("NOT PRIVATE: the noise of this run followed from a debug seed; no claim holds")
        return f"{end.status}, {len(outcomes)} rounds, {applied} applied"

    def _signed_joins(self) -> str:
        bundle, roster, h = self._got("files", self._bundle), self._got("roster", self.roster), self._ended()
        documents = fields.mapping(bundle.json(JOINS), JOINS)
        names = {m.site for m in roster.sites}
        if set(documents) != names or set(h.joined) != names:
            raise VerificationError("the join statements are not those of exactly the roster's sites")
        if canonical.digest(documents) != h.joins_digest:
            raise VerificationError(f"{JOINS} is not the one that the server's journal names")
        wanted = {"v": 1, "session": h.session, "roster_hash": roster.hash, "contract_hash": h.contract_hash}
        wanted["plan_hash"] = canonical.digest(bundle.json(PLAN))
        if (h.plan_hash, h.roster_hash) != (wanted["plan_hash"], roster.hash):
            raise VerificationError(
                "the server's journal opens the run with another plan or roster than the bundle holds"
            )
        joins = {}
        for m in roster.sites:
            statement = identity.opened(documents[m.site], JOIN, m.signing_key, what=f"the join statement of {m.site}")
            for key, value in {**wanted, "site": m.site}.items():
                if fields.mapping(statement, JOINS).get(key) != value:
                    raise VerificationError(f"{m.site} signed another {key.replace('_', ' ')}")
            ledgers.head_signed(m.site, statement, m.signing_key)
            joins[m.site] = statement
        self._joins, self._seen = joins, ledgers.seen_by_peers(joins)
        return f"{len(joins)} signatures under plan {wanted['plan_hash'][:16]}..."

    def _check_plan(self) -> str:
        self._got("join statements", self._joins)
        value = self._got("files", self._bundle).json(PLAN)
        p = plans.PrivacyPlan.model_validate_json(canonical.dumps(value))
        own = prices.read(value)
        recompute.refuse_absurd(own.rate, own.noise, own.steps)
        p = p.check()
        if p.hash != canonical.digest(value):
            raise VerificationError("the plan's file leaves out fields that its hash covers")
        if p.sites != len(self._got("roster", self.roster).sites):
            raise VerificationError(f"the plan speaks of {p.sites} sites, the roster of {len(self._joins or {})}")
        if p.contract_hash != self._ended().contract_hash:
            raise VerificationError("the plan was made for another contract than the one the sites signed")
        self._plan, self._prices = p, own
        return f"mode {p.mode}, sum {p.sum}, n = {p.sites}, t = {p.colluders}, d = {p.dropouts}, h = {p.honest}"

    def _contract(self) -> str:
        plan, bundle = self._got("plan", self._plan), self._got("files", self._bundle)
        if CONTRACT not in bundle.files:
            if not self.simulated:
                raise VerificationError(f"{CONTRACT} is missing")
            return "no contract in this simulated run"
        p = identity.opened(bundle.json(CONTRACT), _CONTRACT, self._key or "", what="the data contract")
        inner = p.get("contract") if isinstance(p, dict) and p.get("hash") == plan.contract_hash else None
        if plan.contract_hash not in (canonical.digest(p), canonical.digest(inner)):
            raise VerificationError("the contract is not the one that the plan names")
        if not self.simulated:
            self._agreed = DataContract.model_validate(p if inner is None else inner)
        return f"hash {plan.contract_hash[:16]}..."

    def _sums(self) -> str:
        return rounds.sums(self._got("plan", self._prices), self._got("roster", self.roster), self._ended())

    def _models(self) -> str:
        payload, plan = self._got("report signature", self._payload), self._got("plan", self._plan)
        h = self._ended()
        said = rounds.models(h, payload, self._report.parent)
        states.chain(h)
        return f"{said}; {states.steps(self._report.parent, plan, h, self._got('roster', self.roster))}"

    def _statistics(self) -> str:
        return claims.statistics(self._got("plan", self._plan), self._ended(), self._report.parent)

    # -- whether it adds up -------------------------------------------------------------------------------------

    def _ledger(self, site: str) -> str:
        bundle, plan, h = self._got("files", self._bundle), self._got("plan", self._plan), self._ended()
        rows = bundle.site_rows(self._got("roster", self.roster), site)
        head = (len(rows), rows[-1].hash if rows else GENESIS)
        if head != h.ended.heads.get(site):
            raise VerificationError("its head is not the one that the server's journal names at the end of the run")
        named = self._got("report signature", self._payload)["hashes"]["heads"].get(site)
        if head != fields.head(named, "the report's head"):
            raise VerificationError("its head is not the one that the report names")
        joined = self._got("join statements", self._joins)[site]
        seen, public = self._seen.get(site, []), self._got("roster", self.roster).member(site).signing_key
        remark = ledgers.continues(rows, joined, seen, plan.colluders, public)
        c = compose(rows, h.session)
        named = data_set(self._agreed.name, c.unit) if self._agreed else ""
        remark += ledgers.replaces_none(c, joined, ledgers.others(site, public, joined, seen, c.covers, c.lost), named)
        remark += ledgers.at_caps(rows, c) + witnesses.said(site, public, joined, seen, rows, plan, self.countersigned)
        ledgers.charged(c, plan, h, joined["head"][0])
        ledgers.ends(c, h, site)
        if not self.simulated:
            tables.held(c.released, self._got("contract", self._agreed))
        self._charges[site] = c
        spent = f"filter epsilon {c.epsilon_after:.4f} of {c.cap:g}"
        return f"{len(rows)} rows, {len(c.spends)} steps charged, {spent}{remark}"

    def _times(self) -> str:
        return ledgers.dated(self._charges, self._ended())

    def _agreements(self) -> str:
        return ledgers.agreed(self._charges, self._got("plan", self._plan), self._ended())

    def _delivered(self) -> str:
        h, roster, plan = self._ended(), self._got("roster", self.roster), self._got("plan", self._plan)
        names = {m.site for m in roster.sites}
        if not names.issuperset(h.ended.heads):
            raise VerificationError("the run's end names the ledger of a stranger")
        missing = sorted(names - set(h.ended.heads))
        if len(missing) > plan.dropouts:
            named = ", ".join(missing[:8]) + ", ..." * (len(missing) > 8)
            raise VerificationError(f"{len(missing)} ledgers are missing ({named}); at most {plan.dropouts} may be")
        if h.ended.status == EXHAUSTED and not missing and not any(c.exhausted for c in self._charges.values()):
            raise VerificationError("the run is said to have ended for lack of budget, but no ledger refused a step")
        return f"not delivered: {', '.join(missing)}" if missing else f"all {len(names)}"

    def _spends(self) -> str:
        own, h = self._got("plan", self._prices), self._ended()
        count = sum(ledgers.counts(self._charged(site), own, h, site) for site in h.ended.heads)
        return f"{count} charges of SGM(q = {own.rate:g}, sigma = {own.noise:.6g})"

    def _priced(self) -> str:
        return prices.stated(self._got("report signature", self._payload), self._got("plan", self._prices))

    def _budgets(self) -> str:
        payload, h, plan = self._got("report signature", self._payload), self._ended(), self._got("plan", self._prices)
        for site in h.ended.heads:
            stated = fields.mapping(payload["sites"][site], f"the report's entry of {site}")
            ledgers.budget(site, self._charged(site), stated)
        # In a ledger that was not delivered, every round that was opened may be charged.
        most = max([len(c.spends) for c in self._charges.values()], default=0)
        steps = most if len(h.ended.heads) == plan.sites else len(h.rounds)
        said = claims.charged(fields.mapping(payload.get("accounting"), "accounting"), plan, steps)
        each = "; ".join(
            f"{s} {c.epsilon_before:.3f} to {c.epsilon_after:.3f}" for s, c in [*self._charges.items()][:8]
        )
        return f"{each}; {said}"

    def _metrics(self) -> str:
        rows = self._got("files", self._bundle).metrics()
        return progress.metrics(rows, self._got("plan", self._prices), self._ended())

    def _fields(self) -> str:
        payload = dict(self._got("report signature", self._payload))
        software = software_bill.checked(payload.get("software"))
        fields.integer(payload, "written_at", REPORT)
        for key in _OWN:
            payload.pop(key)
        rows, bundle = self._got("server journal", self._rows), self._got("files", self._bundle)
        plan = self._got("plan", self._plan)
        facts = Facts(
            plan, self._got("roster", self.roster), self._ended(), self._in_order(),
            (len(rows), rows[-1].hash), bundle.metrics(), bundle.digests, bundle.roots, bundle.audit(plan),
            self._got("join statements", self._joins),
        )  # fmt: skip
        claims.same(payload, canonical.loads(canonical.dumps(derive(facts))), REPORT)
        by = {name: software[name]["version"] for name in ("dp-accounting", "fedveil") if name in software}
        return "written with " + ", ".join(f"{name} {version}" for name, version in by.items())

    def _audited(self) -> str:
        payload = self._got("report signature", self._payload)
        return results.require_auditor(payload.get("audit"), self._auditor or "")

    def _schema(self) -> str:
        if errors := schema.errors(self._got("report signature", self._document)):
            raise VerificationError("; ".join(errors[:8]))
        return schema.NAME

    def _on(self, check: Callable[[dict[str, Any], Prices], str]) -> str:
        payload = self._got("report signature", self._payload)
        return check(fields.mapping(payload.get("claim"), "claim"), self._got("plan", self._prices))

    def _groups(self) -> str:
        return claims.groups(self._got("report signature", self._payload), self._got("plan", self._prices))

    # -- helpers ------------------------------------------------------------------------------------------------

    def _got(self, name: str, value: Any) -> Any:
        if value is None:
            raise NotReached(name)
        return value

    def _ended(self) -> History:
        return self._got("order of events", self._history)

    def _charged(self, site: str) -> Charges:
        return self._got(f"ledger of {site}", self._charges.get(site))

    def _in_order(self) -> dict[str, Charges]:
        return {
            s: self._charged(s)
            for s in (m.site for m in self._got("roster", self.roster).sites)
            if s in self._ended().ended.heads
        }

    def _has(self, name: str) -> bool:
        return self._bundle is not None and name in self._bundle.files
