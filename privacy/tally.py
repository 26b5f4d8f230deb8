"""What a list of ledger rows adds up to: the same rules for the site that writes them and for whoever verifies them."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from fedveil.common.errors import MALFORMED, ProtocolError, VerificationError
from fedveil.common.journal import MAX_ROWS, Copy, Row
from fedveil.privacy.dp.accounting import ORDERS, Filter, rdp
from fedveil.privacy.dp.events import SampledGaussian, from_json

MAX_IMPORTED = 1 << 20
_HEX = re.compile("[0-9a-f]{64}")


class Tally:
    """What a list of ledger rows adds up to; the same code enforces (at the site) and verifies (anywhere).

    Feeding rows in order raises :class:`VerificationError` for a row that the rules do not allow: spending
    before opening, twice for one round, an unknown event, past the cap in force, after the ledger was closed.
    """

    def __init__(self) -> None:
        self.lineage, self.unit = "", ""
        self.filter: Filter | None = None
        self.spent, self.overflow = 0.0, 0.0
        self.capacity = 0  # 0: none was declared
        self.by_round: dict[tuple[str, int], SampledGaussian] = {}
        self.committed: set[tuple[str, int]] = set()
        self.agreed: dict[tuple[str, int], tuple[str, str]] = {}  # by round: the signed set's names and digest
        self.last_models: set[str] = set()  # sessions whose final model was noted: nothing may follow it
        self.version, self.subject_salt, self.data_set = "", "", ""
        self.closed = ""  # the ledger that counts this one's spending from now on
        self.imported: dict[str, list[tuple[SampledGaussian, int]]] = {}
        self.counted: set[str] = set()  # every ledger whose spending is in here: the imported ones and theirs
        self.lost: dict[str, tuple[float, float]] = {}  # by ledger that is charged at its cap: that cap's ε and δ
        self.highest = 0.0  # the highest cap that this ledger had so far
        self.covers: dict[str, int] = {}  # by ledger: up to which of its rows; what was imported last stands last

    def feed(self, row: Row) -> None:
        """Apply one row."""
        step = {
            "ledger.open": self._open, "ledger.cap": self._recap, "ledger.import": self._import,
            "ledger.lost": self._lose, "ledger.closed": self._close, "spend": self._spend, "agreed": self._agree,
        }.get(row.kind)  # fmt: skip
        try:
            if step is not None:
                step(row)
            elif row.kind == "ledger.capacity":
                self._filter(row)
                self.capacity = _capacity(row.body["capacity"])
            else:
                self._round(row)
        except MALFORMED as e:
            raise VerificationError(f"row {row.n} ({row.kind}) is malformed") from e

    def _round(self, row: Row) -> None:
        """What becomes of a charged round, and of a session."""
        b = row.body
        if row.kind == "model":
            self.last_models.add(str(b.get("session")))
        elif row.kind == "commit":
            key = _key(b)
            if key not in self.by_round:
                raise VerificationError(f"row {row.n} commits a round that was never charged")
            self.committed.add(key)

    def _open(self, row: Row) -> None:
        if self.filter is not None:
            raise VerificationError(f"row {row.n} opens a ledger that is open")
        b = row.body
        if b["order"] not in ORDERS:
            raise VerificationError(f"row {row.n} names a Rényi order that is not in the table")
        self.filter = Filter(_number(b["cap_epsilon"]), _number(b["delta"]), _number(b["order"]))
        self.highest = self.filter.epsilon
        self.lineage, self.unit = str(b["lineage"]), str(b["unit"])
        self.version, self.subject_salt = str(b.get("version", "")), str(b.get("subject_salt", ""))
        self.data_set = str(b.get("data_set", ""))

    def _recap(self, row: Row) -> None:
        f = self._filter(row)
        self.filter = Filter(_number(row.body["cap_epsilon"]), f.delta, f.order)
        self.highest = max(self.highest, self.filter.epsilon)

    def _agree(self, row: Row) -> None:
        b = row.body
        said = str(b["members"]), str(b["digest"])
        if self.agreed.setdefault(_key(b), said) != said:
            raise VerificationError(f"row {row.n} signs another set for round {b['round']} than a row before")

    def _filter(self, row: Row) -> Filter:
        if self.filter is None:
            raise VerificationError(f"row {row.n} ({row.kind}) comes before the ledger was opened")
        return self.filter

    def _open_filter(self, row: Row) -> Filter:
        if self.closed:
            raise VerificationError(f"row {row.n} ({row.kind}) comes after the ledger was closed")
        return self._filter(row)

    def _close(self, row: Row) -> None:
        self._open_filter(row)
        name = row.body["ledger"]
        if not isinstance(name, str) or not _HEX.fullmatch(name):
            raise TypeError
        self.closed = name

    def _spend(self, row: Row) -> None:
        f, room = self._open_filter(row), self.room
        key, event = _key(row.body), from_json(row.body["event"])
        if key in self.by_round:
            raise VerificationError(f"row {row.n} charges round {key[1]} a second time")
        after, overflow = self.spent + rdp(event, f.order), self.overflow + event.overflow
        if room is None or not room.admits(after, overflow):
            raise VerificationError(f"row {row.n} spends past the cap of epsilon = {f.epsilon:g}")
        self.spent, self.overflow, self.by_round[key] = after, overflow, _same(event)

    def _import(self, row: Row) -> None:
        """Add the spending of another ledger, whatever the cap says: it has happened. Once for each ledger."""
        f, b = self._open_filter(row), row.body
        names, covers = {b["ledger"], *b["carries"]}, [*b.get("covers", []), [b.get("head", [0])[0], b["ledger"]]]
        if not all(isinstance(name, str) for name in names) or names & self.counted:
            raise VerificationError(f"row {row.n} imports a ledger that was imported before")
        events = [(from_json(e), n) for e, n in b["events"]]
        before = sum(n for old in self.imported.values() for _, n in old)
        if any(type(n) is not int or n < 1 for _, n in events) or before + sum(n for _, n in events) > MAX_IMPORTED:
            raise VerificationError(f"row {row.n} imports fewer than one or more than {MAX_IMPORTED} steps")
        lost = {name: _cap(cap, delta) for name, cap, delta in b.get("lost", [])}
        # All rows of a ledger are counted only where its whole cap is.
        if any(
            type(rows) is not int or name not in names or not 0 <= rows <= MAX_ROWS - (name not in lost)
            for rows, name in covers
        ):
            raise VerificationError(f"row {row.n} covers rows of a ledger that it does not import")
        if not names >= lost.keys():
            raise VerificationError(f"row {row.n} brings the cap of a ledger that it does not import")
        self.spent += sum(n * rdp(e, f.order) for e, n in events)
        self.overflow += sum(n * e.overflow for e, n in events)
        if not f.holds(self.overflow):
            raise VerificationError(
                f"row {row.n} imports samples that outgrow their places more often than delta = {f.delta:g} allows",
                hint="a new ledger with a larger delta",
            )
        self.lost |= lost
        self.imported[b["ledger"]] = events
        self.counted |= names
        self.covers |= {name: rows for rows, name in covers}

    def _lose(self, row: Row) -> None:
        """Charge the whole cap of a ledger that is lost, by a head of it that its owner has signed. Once for each."""
        f, b = self._open_filter(row), row.body
        name, cap = b["ledger"], _cap(b["cap_epsilon"], b["delta"])
        try:
            known = Copy.from_json([*b["head"], name, b["data_set"], b["signature"]])
        except ProtocolError as e:
            raise VerificationError(f"row {row.n} names no head of a lost ledger") from e
        if not known.signed_by(str(b["owner"]), str(b["public"])):
            raise VerificationError(f"row {row.n} names a head of a lost ledger that its owner has not signed")
        if self.data_set not in ("", known.data_set):
            raise VerificationError(f"row {row.n} charges a ledger of another data set")
        if name in self.counted:
            raise VerificationError(
                f"row {row.n} charges ledger {name[:16]}..., whose spending is counted here already",
                hint="a ledger is charged at its cap, or imported, once and for good",
            )
        if cap[0] < self.highest or cap[1] < f.delta:
            raise VerificationError(
                f"row {row.n} charges a lost ledger less than a whole cap: epsilon = {cap[0]:g} at delta = {cap[1]:g}; "
                f"this ledger's own was up to {self.highest:g} at {f.delta:g}",
                hint="name the largest cap that the lost ledger may have had; it is not below this one's",
            )
        self.lost[name] = cap
        self.counted.add(name)
        self.covers[name] = MAX_ROWS  # whatever its rows were, they stayed under its cap

    @property
    def at_caps(self) -> float:
        """ε of all lost ledgers that are charged at their caps; their δ's add to this ledger's as well."""
        return sum(epsilon for epsilon, _ in self.lost.values())

    @property
    def room(self) -> Filter | None:
        """The filter for what is spent from this ledger itself: the cap less :attr:`at_caps`; None if nothing is left.

        A lost ledger may have had any Rényi order, so its cap is added as it stands (basic composition).
        """
        f = self.filter
        if f is None or not self.lost:
            return f
        left = f.epsilon - self.at_caps
        return Filter(left, f.delta, f.order) if left > 0 else None

    @property
    def events(self) -> list[SampledGaussian]:
        """Every charge there is, imported ones first."""
        old = [e for events in self.imported.values() for e, n in events for _ in range(n)]
        return old + list(self.by_round.values())

    @property
    def epsilon(self) -> float:
        """ε spent so far over all runs, by the filter, and :attr:`at_caps`; 0 before the first release."""
        return self.at_caps + (self.filter.after(self.overflow).epsilon_of(self.spent) if self.filter else 0.0)

    def affords(self, event: SampledGaussian) -> int:
        """How many steps of ``event`` the cap in force still carries; none before opening and after closing."""
        room = self.room
        return room.affords(event, self.spent, self.overflow) if room and not self.closed else 0

    def admits(self, event: SampledGaussian) -> bool:
        """Whether one more step of ``event`` fits under the cap in force."""
        f = self.room
        return f is not None and f.admits(self.spent + rdp(event, f.order), self.overflow + event.overflow)


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError
    return float(value)


def _cap(epsilon: Any, delta: Any) -> tuple[float, float]:
    """The cap of a lost ledger: positive ε and δ below 1."""
    found = Filter(_number(epsilon), _number(delta), 2.0)
    return found.epsilon, found.delta


def _capacity(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 1 << 48:
        raise TypeError
    return value


def _key(body: dict[str, Any]) -> tuple[str, int]:
    session, round_ = body["session"], body["round"]
    if type(session) is not str or type(round_) is not int:
        raise TypeError
    return _one(session, round_)


@lru_cache(maxsize=4096)  # the ledgers of a simulation hold the same keys and events: one object each
def _one(session: str, round_: int) -> tuple[str, int]:
    return session, round_


@lru_cache(maxsize=64)
def _same(event: SampledGaussian) -> SampledGaussian:
    return event
