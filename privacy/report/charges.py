"""What one site's ledger says about one session, and about everything before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from fedveil.common import fields
from fedveil.common.errors import BudgetExhausted, VerificationError
from fedveil.common.journal import Row
from fedveil.privacy.dp.accounting import ORDERS, Filter
from fedveil.privacy.dp.events import SampledGaussian, from_json
from fedveil.privacy.report.history import falling
from fedveil.privacy.tally import Tally

MIN_NOISE = 0.1  # calibration never gives less than 0.2; far below, the accountants run for hours
Precision = Literal["float64", "float32"]
_MAX_CRITERIA, _MAX_EVENTS, _MAX_APPROVALS = 64, 4096, 256
KINDS = frozenset(
    {
        "ledger.open", "ledger.import", "ledger.lost", "ledger.cap", "ledger.capacity", "ledger.closed",
        "journal.repaired", "data.released", "plan.approved", "plan.accepted", "spend", "commit", "agreed", "refused",
        "model", "session.end",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Released:
    """What ``data.released`` says of the table: pass or fail, never a count.

    Attributes:
        contract_hash: of the contract the table was checked against; empty if it is not stated.
        criteria: by name, what was required and whether it was met.
        stability_factor: how many released records one original record can change; None if that is not bounded.
    """

    contract_hash: str
    criteria: dict[str, dict[str, Any]]
    stability_factor: int | None
    unit: str


class Spent(NamedTuple):
    """A row that spent: its session (empty for an import), the filter's ε after it, its time by the site's clock."""

    session: str
    epsilon: float
    at: int


@dataclass(frozen=True)
class Charges:
    """One ledger, composed again from its rows.

    Attributes:
        order: Rényi order of the filter, fixed when the ledger was opened.
        epsilon_before, epsilon_after: ε spent by the filter before this session's first charge, and at the end.
        spends: by round of this session, the row that charged it.
        accepted: the session's ``plan.accepted`` row, if there is one.
        precision: in which the site's owner let gradients of single records be computed in this session.
        earlier_sessions: how many other sessions were charged before this one.
        exhausted: the budget refused a step of this session.
        models, end: this session's ``model`` rows, and its ``session.end`` row if there is one.
        events: every charge of all sessions, what was imported from older ledgers first.
        left: the part of the filter's Rényi budget that is not spent, in [0, 1].
        affordable: see :meth:`affords`; None once the ledger was closed, or lost ledgers took the whole cap.
        spending: every row that spent, in order.
        approvals: keys of the persons who approved this session, as the ledger names them; None if nobody was asked.
        tightest: at the spend that came closest to the cap then in force, all events up to it, and the part of that
            cap that was left beside lost ledgers.
        capacity: the most units that the site may hold, as it declared last; 0 in ledgers of older versions.
        lost: by ledger that is lost and charged at its cap: that cap's ε and δ.
        data_set: the data set that it counts, by hash; empty in ledgers of older versions.
        covers: by imported ledger, up to how many of its rows.
        agreed: by round of this session, the set that the site signed: its names and the whole, by hash.
        times: of the first and the last row of this session; empty if there is none.
        fall: the first row of all that is dated before the one before it; None if none is.
    """

    lineage: str
    unit: str
    cap: float
    delta: float
    order: float
    epsilon_before: float
    epsilon_after: float
    spends: dict[int, Row]
    committed: int
    accepted: Row | None
    precision: Precision
    earlier_sessions: int
    exhausted: bool
    models: tuple[Row, ...]
    end: Row | None
    released: Released | None
    events: tuple[SampledGaussian, ...]
    head: tuple[int, str]
    left: float
    affordable: tuple[Filter, float, float] | None
    spending: tuple[Spent, ...]
    approvals: tuple[str, ...] | None
    tightest: tuple[tuple[SampledGaussian, ...], float]
    capacity: int
    data_set: str
    covers: dict[str, int]
    lost: dict[str, tuple[float, float]]
    agreed: dict[int, tuple[str, str]]
    times: tuple[int, ...]
    fall: int | None

    def affords(self, event: SampledGaussian) -> int:
        """How many more steps of ``event`` the cap in force carries; 0 once the ledger was closed."""
        return 0 if self.affordable is None else self.affordable[0].affords(event, *self.affordable[1:])


def compose(rows: list[Row], session: str) -> Charges:
    """Replay a verified ledger under the rules that bound its owner.

    Raises:
        VerificationError: naming the first row that breaks a rule: of an unknown kind; spending before opening, twice
            for one round, past the cap in force, after the budget refused, after the model that the session ended with
            or after its end; a second end; numbers outside the closed table.
    """
    tally, state = Tally(), _State(session)
    for row in rows:
        bounded(row)
        before = tally.epsilon
        try:
            tally.feed(row)
        except ArithmeticError as e:
            raise VerificationError(f"row {row.n} ({row.kind[:32]}) has numbers that cannot be composed") from e
        state.feed(row, before)
        if row.kind in ("spend", "ledger.import", "ledger.lost"):
            state.book(row, tally)
    f = tally.filter
    if f is None:
        raise VerificationError("the ledger was never opened")
    mine, room = state.before is not None, tally.room
    return Charges(
        lineage=tally.lineage[:128], unit=tally.unit[:128], cap=f.epsilon, delta=f.delta, order=f.order,
        epsilon_before=state.before if state.before is not None else tally.epsilon, epsilon_after=tally.epsilon,
        spends=state.spends, committed=sum(1 for s, _ in tally.committed if s == session),
        accepted=state.accepted, precision=_precision(state.accepted),
        earlier_sessions=len(state.earlier if mine else state.others),
        exhausted=state.exhausted, models=tuple(state.models), end=state.end, released=state.released,
        events=tuple(tally.events), head=(len(rows), rows[-1].hash),
        left=_left(tally), affordable=None if tally.closed or room is None else (room, tally.spent, tally.overflow),
        spending=tuple(state.spending), approvals=state.approvals,
        tightest=state.tightest, capacity=tally.capacity, data_set=tally.data_set, covers=tally.covers,
        lost=tally.lost,
        agreed={n: said for (s, n), said in tally.agreed.items() if s == session},
        times=(min(at), max(at)) if (at := [r.at for r in rows if r.body.get("session") == session]) else (),
        fall=falling(rows),
    )  # fmt: skip


def _left(tally: Tally) -> float:
    """The part that is not spent of the RDP under the cap, or under what lost ledgers leave of it."""
    budget = tally.room.after(tally.overflow).budget if tally.room else 0.0
    return max(0.0, 1 - tally.spent / budget) if budget > 0 else 0.0


def _precision(accepted: Row | None) -> Precision:
    said = accepted.body.get("precision", "float64") if accepted else "float64"
    if said not in get_args(Precision):
        raise VerificationError(f"row {accepted.n if accepted else 0} allows a precision that does not exist")
    return said


class _State:
    """What :func:`compose` collects beside the tally."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.before: float | None = None
        self.others: set[str] = set()
        self.earlier: set[str] = set()
        self.spends: dict[int, Row] = {}
        self.accepted: Row | None = None
        self.exhausted = False
        self.end: Row | None = None
        self.models: list[Row] = []
        self.released: Released | None = None
        self._table: dict[str, Any] | None = None
        self.spending: list[Spent] = []
        self.approvals: tuple[str, ...] | None = None
        self._booked: list[list[tuple[SampledGaussian, int]]] = []
        self._strain: tuple[float, int, float] = (0.0, 0, 0.0)  # part of the cap spent, rows booked, the cap's rest

    def book(self, row: Row, tally: Tally) -> None:
        """Remember a row that spent, once the tally let it pass."""
        own = row.kind == "spend"
        self.spending.append(Spent(str(row.body.get("session", "")), tally.epsilon, row.at))
        key = (row.body.get("session", ""), row.body.get("round", 0))
        self._booked.append([(tally.by_round[key], 1)] if own else tally.imported.get(row.body["ledger"], []))
        cap = tally.filter.epsilon if tally.filter else 0.0
        if own and tally.epsilon >= self._strain[0] * cap:
            self._strain = tally.epsilon / cap, len(self._booked), cap - tally.at_caps

    @property
    def tightest(self) -> tuple[tuple[SampledGaussian, ...], float]:
        """See :class:`Charges`."""
        _, rows, cap = self._strain
        return tuple(e for events in self._booked[:rows] for e, n in events for _ in range(n)), cap

    def feed(self, row: Row, before: float) -> None:
        if row.kind == "data.released":
            self._release(row)
        if row.kind == "spend" and row.body["session"] != self.session:
            self.others.add(str(row.body["session"]))
        if row.body.get("session") != self.session:
            return
        if row.kind == "plan.accepted":
            if self.accepted is not None:
                raise VerificationError(f"row {row.n} accepts a session that was accepted before")
            self.accepted = row
        elif row.kind == "plan.approved":
            self.approvals = _approvals(row)
        elif row.kind == "refused":
            self.exhausted |= row.body.get("reason") == BudgetExhausted.__name__
        elif row.kind in ("model", "session.end") and self.end is not None:
            raise VerificationError(f"row {row.n} ({row.kind}) comes after the session had ended")
        elif row.kind == "session.end":
            self.end = row
        elif row.kind == "model":
            self.models.append(row)
        elif row.kind == "spend":
            self._spend(row, before)

    def _release(self, row: Row) -> None:
        """Until the session's first charge the newest table counts. From then to the end it must stay the same.

        A site that restarts releases its table in a new order. So the commitment to the released file may change, but
        nothing else in the row.
        """
        if not self.spends:
            self.released, self._table = _released(row), _table(row)
        elif self.end is None and _table(row) != self._table:
            raise VerificationError(
                f"row {row.n} (data.released) is about another table than the one that was charged for in this session"
            )

    def _spend(self, row: Row, before: float) -> None:
        if self.exhausted:
            raise VerificationError(f"row {row.n} spends after the budget had refused a step of the same session")
        if self.end is not None:
            raise VerificationError(f"row {row.n} spends after the session had ended")
        if self.models:
            raise VerificationError(f"row {row.n} spends after the model that the session ended with was noted")
        if self.before is None:
            self.before, self.earlier = before, set(self.others)
        self.spends[fields.integer(row.body, "round", f"row {row.n}", low=1, high=1 << 20)] = row


def bounded(row: Row) -> None:
    """Refuse numbers that no honest ledger has and that would keep an accountant busy for hours."""
    where = f"row {row.n} ({row.kind[:32]})"
    if row.kind not in KINDS:
        raise VerificationError(f"{where} is of a kind that a ledger does not have")
    if row.kind == "ledger.open":
        if row.body.get("order") not in ORDERS:
            raise VerificationError(f"{where}: the Rényi order is not in the table")
        fields.text(row.body, "lineage", where)
        fields.text(row.body, "unit", where)
        for name in {"version", "subject_salt", "data_set"} & set(row.body):
            fields.text(row.body, name, where)
    if row.kind == "ledger.import":
        _bounded_import(row, where)
    if row.kind == "ledger.capacity":
        fields.integer(row.body, "capacity", where, low=1, high=1 << 48)
    if row.kind in ("ledger.open", "ledger.lost", "ledger.cap"):
        _bounded_cap(row, where)
    if row.kind in ("spend", "commit", "agreed"):
        fields.text(row.body, "session", where)
        fields.integer(row.body, "round", where, high=1 << 20)
    if row.kind == "agreed":
        for name in ("members", "digest"):
            fields.hexadecimal(row.body, name, where)
    if row.kind == "spend" and from_json(row.body.get("event")).noise_multiplier < MIN_NOISE:
        raise VerificationError(f"{where}: a noise multiplier below {MIN_NOISE:g} gives no privacy to account for")


def _bounded_cap(row: Row, where: str) -> None:
    fields.number(row.body, "cap_epsilon", where, low=1e-9, high=1000)
    if row.kind != "ledger.cap":
        fields.number(row.body, "delta", where, low=1e-300, high=0.01)


def _bounded_import(row: Row, where: str) -> None:
    fields.hexadecimal(row.body, "ledger", where)
    events, carries, lost = (row.body.get(k, []) for k in ("events", "carries", "lost"))
    if not isinstance(lost, list) or len(lost) > _MAX_EVENTS:
        raise VerificationError(f"{where}: it does not say which lost ledgers it was charged for")
    if not isinstance(carries, list) or len(carries) > _MAX_EVENTS:
        raise VerificationError(f"{where}: it does not say which ledgers it carries along")
    covers = row.body.get("covers", [])
    if not isinstance(covers, list) or len(covers) > _MAX_EVENTS:
        raise VerificationError(f"{where}: it does not say which rows it covers")
    if not isinstance(events, list) or len(events) > _MAX_EVENTS:
        raise VerificationError(f"{where}: no list of events, or more than {_MAX_EVENTS}")
    for entry in events:
        if not isinstance(entry, list) or len(entry) != 2 or from_json(entry[0]).noise_multiplier < MIN_NOISE:
            raise VerificationError(f"{where}: an imported event gives no privacy to account for")


def _released(row: Row) -> Released:
    where, b = f"row {row.n} (data.released)", row.body
    raw = b.get("criteria")
    criteria: dict[str, dict[str, Any]] = {}
    if isinstance(raw, dict):
        if len(raw) > _MAX_CRITERIA:
            raise VerificationError(f"{where}: more than {_MAX_CRITERIA} criteria")
        for name, c in raw.items():
            entry = fields.mapping(c, where)
            if type(entry.get("met")) is not bool or not _plain(entry.get("required")) or len(name) > 64:
                raise VerificationError(f"{where}: a criterion does not say what was required and whether it was met")
            criteria[name] = {"required": entry.get("required"), "met": entry["met"]}
    factor = b.get("stability_factor")
    if factor is not None:
        factor = fields.integer(b, "stability_factor", where, low=1, high=1 << 30)
    _stages(b.get("stability"), factor, where)
    stated = "contract_hash" if "contract_hash" in b else "contract"
    return Released(
        fields.hexadecimal(b, stated, where) if stated in b else "",
        criteria,
        factor,
        fields.text(b, "unit", where, limit=1024) if "unit" in b else "",
    )


def _approvals(row: Row) -> tuple[str, ...]:
    """Who approved: the persons' keys. An older row has only the digests of their approvals; then those."""
    where = f"row {row.n} (plan.approved)"
    named = row.body.get("approvers", row.body.get("approvals"))
    if not isinstance(named, list) or not 0 < len(named) <= _MAX_APPROVALS:
        raise VerificationError(f"{where} does not name from one to {_MAX_APPROVALS} approvals")
    return tuple(fields.hexadecimal({"key": name}, "key", where) for name in named)


def _stages(stages: Any, factor: int | None, where: str) -> None:
    """The factor of the whole is the product of the stages'; not bounded if one of them is not."""
    if stages is None:
        return
    if not isinstance(stages, list) or len(stages) > _MAX_CRITERIA:
        raise VerificationError(f"{where}: the stages are no list of at most {_MAX_CRITERIA}")
    each = [fields.mapping(stage, where) for stage in stages]
    bounded_ = all(stage.get("factor") is not None for stage in each)
    product = math.prod(fields.integer(s, "factor", where, low=1, high=1 << 30) for s in each) if bounded_ else None
    if product != factor:
        raise VerificationError(f"{where}: the stages multiply to {product}, the factor is said to be {factor}")


def _table(row: Row) -> dict[str, Any]:
    """What a row says of the table itself: all of it but the commitment to the file it was released in."""
    commitments = row.body.get("commitments")
    own = {k: v for k, v in commitments.items() if k != "released"} if isinstance(commitments, dict) else commitments
    return {**row.body, "commitments": own}


def _plain(value: Any) -> bool:
    return value is None or type(value) in (int, float, bool) or (isinstance(value, str) and len(value) <= 128)
