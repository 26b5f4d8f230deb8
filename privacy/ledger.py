"""The privacy ledger: a data owner's budget, charged before anything is released.

One ledger per data-set lineage, on the signed journal of :mod:`fedveil.common.journal`. Opening fixes the cap,
δ and the Rényi order; every release is first reserved (one signed row, on disk) and only then computed with
noise and sent. A crash in between loses budget, never privacy. What was reserved for a round is spent, whether
the round succeeded or not.

Rows, by ``kind`` (everything here may leave the site: no counts, no values)::

    ledger.open     {lineage, unit, adjacency, cap_epsilon, delta, order}, and {version, subject_salt, data_set} where
                    given: data_set names the contract's data set by hash
    ledger.import   {lineage, owner, public, ledger, carries, head, events[, covers][, lost]}   what an older ledger has
                    spent; lost: the caps of lost ones that it was charged
    ledger.lost     {ledger, owner, public, head, data_set, signature, cap_epsilon, delta}   an older ledger that is
                    lost, charged at its cap, by a head of it that its owner has signed
    ledger.cap      {cap_epsilon}                      the site's policy changed its cap
    ledger.capacity {capacity}                         the most records (or persons) that the site may hold
    ledger.closed   {ledger}                           nothing more is spent: that one (its first row) counts this
    plan.accepted   {session, plan_hash, roster_hash, contract_hash[, precision]}
    data.released   {...}                              pass/fail and salted commitments of ingestion
    spend           {session, round, plan_hash, event[, state]}   state: SHA-256 of the model it is computed from
    commit          {session, round}                   the value reserved for has been handed on
    agreed          {session, round, members, digest}  the set U that was signed: its names and the whole, by hash
    refused         {session, reason}                  an error's code, no detail
    model           {session, round, model_hash}
    session.end     {session, status}
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common.errors import BudgetExhausted, JournalError, VerificationError
from fedveil.common.identity import public_hex
from fedveil.common.journal import Copy, Head, Journal, Row, RowLog, parse, verify_rows
from fedveil.common.units import Delta, Epsilon
from fedveil.privacy.dp.accounting import best_order
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.tally import Tally

CLOCK_S = 86_400  # how far the clocks of a run's machines may be apart
MAX_NAMED = 4096  # different events of one import, and ledgers that it carries: what fits into a row


class Ledger:
    """The writer's side, held open (and locked) while a site takes part in a run."""

    def __init__(self, journal: Journal, tally: Tally) -> None:
        self.journal, self.tally = journal, tally

    @classmethod
    def open(
        cls,
        path: Path,
        site: str,
        key: Ed25519PrivateKey,
        *,
        lineage: str,
        cap: Epsilon,
        delta: Delta,
        unit: str = "record",
        version: str = "",
        subject_salt: str = "",
        capacity: int = 0,
        data_set: str = "",
        durable: bool = True,
        log: RowLog | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Ledger:
        """Open or create the ledger of ``lineage``; every row is verified and composed again.

        An existing ledger keeps its δ and order. A cap lower than the one on file is obeyed from now on; a
        higher one is the owner's decision and is recorded too.

        Args:
            version: of the data set; another version of the same people's records continues the same budget only if
                its ledger is imported (:meth:`adopt`).
            subject_salt: SHA-256 (hex) of the salt under which the site tells subjects apart; not the salt itself.
            capacity: the most records (or persons) that the site may hold in this data set; a change is one row. 0:
                as it is on file.
            data_set: its name by hash, as the other sites remember it (:func:`~fedveil.privacy.joining.data_set`).
            log: as for :meth:`~fedveil.common.journal.Journal.open`.

        Raises:
            JournalError: in use, forged, closed, or of another lineage, version, subject salt, data set, unit or δ.
        """
        self = cls._replayed(Journal.open(path, site, key, durable=durable, log=log, clock=clock))
        try:
            if self.tally.closed:
                raise JournalError(
                    f"{path} was closed: ledger {self.tally.closed[:16]}... counts what was spent from it",
                    hint="go on with that ledger, and keep this one for auditors",
                )
            subjects = {"version": version, "subject_salt": subject_salt, "data_set": data_set}
            self._settle(lineage, cap, delta, unit, subjects)
            if capacity not in (0, self.tally.capacity):
                self._append("ledger.capacity", capacity=capacity)
        except BaseException:
            self.close()
            raise
        return self

    @classmethod
    def _replayed(cls, journal: Journal) -> Ledger:
        self = cls(journal, Tally())
        try:
            for row in journal.rows:
                self.tally.feed(row)
        except VerificationError as e:
            journal.close()
            raise JournalError(f"{journal.path}: {e.message}", hint="keep the file as evidence; do not edit it") from e
        return self

    def _settle(self, lineage: str, cap: Epsilon, delta: Delta, unit: str, subjects: dict[str, str]) -> None:
        f = self.tally.filter
        if f is None:
            order = best_order(cap, delta)
            self._append(
                "ledger.open",
                lineage=lineage, unit=unit, adjacency="add-or-remove-one",
                cap_epsilon=cap, delta=delta, order=order, **{k: v for k, v in subjects.items() if v},
            )  # fmt: skip
            return
        for name, asked in subjects.items():
            held = getattr(self.tally, name)
            if name == "data_set" and (not held or unit != self.tally.unit):
                continue  # an older ledger; or the unit is the first that is wrong
            if asked and asked != held:
                raise JournalError(
                    f"{self.journal.path} was opened for another {name.replace('_', ' ')} of {lineage!r}",
                    hint="a new ledger for it, and 'fedveil ledger import' for what this one has spent",
                )
        if (self.tally.lineage, self.tally.unit, f.delta) != (lineage, unit, delta):
            raise JournalError(
                f"{self.journal.path} is the ledger of lineage {self.tally.lineage!r}, unit {self.tally.unit!r}, "
                f"delta {f.delta:g}; asked for were {lineage!r}, {unit!r}, {delta:g}",
                hint="one ledger per data set; its delta is fixed when it is opened",
            )
        if f.epsilon != cap:
            self._append("ledger.cap", cap_epsilon=cap)

    def _append(self, kind: str, **body: Any) -> Row:
        self._count(kind, body)
        return self.journal.append(kind, body)

    def _count(self, kind: str, body: dict[str, Any]) -> None:
        # Counted before it is written. A row that the rules refuse must never reach the disk, where it would make the
        # ledger unreadable. And a charge whose writing failed is better kept than forgotten.
        self.tally.feed(Row(self.journal.length, self.journal.owner, 0, kind, body, "", "", ""))

    def note(self, kind: str, **body: Any) -> Row:
        """Add a row that spends nothing (``plan.accepted``, ``data.released``, ``refused``, ``model``, ...)."""
        if kind in (
            "spend",
            "commit",
            "ledger.open",
            "ledger.cap",
            "ledger.capacity",
            "ledger.import",
            "ledger.lost",
            "ledger.closed",
        ):
            raise JournalError(f"a row of kind {kind!r} cannot be added as a note")
        return self._append(kind, **body)

    def adopt(self, rows: list[Row], public: str) -> Row:
        """Count what another ledger has spent, as one signed row that names it; its imports are carried along.

        The total never falls and may pass the cap: then nothing more is admitted. The other ledger stays open, so
        whoever has its key can go on spending from it. Where that key is at hand, use :meth:`take_over`.

        Args:
            rows: the other ledger, whole.
            public: the key that signed it, 64 hexadecimal digits.

        Raises:
            VerificationError: the other ledger does not hold, or was imported before.
            JournalError: it is this ledger itself, counts another unit, or was closed in favour of another one.
        """
        return self._append("ledger.import", **self._adoption(rows, public))

    def take_over(self, path: Path, key: Ed25519PrivateKey) -> Row:
        """Close another ledger for good, then :meth:`adopt` it whole, its last row included.

        The closing row is on disk before the import is begun: a crash in between leaves a closed ledger, from which
        nobody spends, and the same call again completes the import.

        Args:
            path: the other ledger's own file, not a copy of it. key: its owner's.

        Raises:
            VerificationError, JournalError: as :meth:`adopt`, or the other ledger is in use; it then is as it was.
        """
        if path.resolve() == self.journal.path.resolve():
            raise JournalError("a ledger cannot import itself")
        if not path.is_file():
            raise JournalError(f"{path} is not a file")
        data, public = path.read_bytes(), public_hex(key)
        rows = parse(data[: data.rfind(b"\n") + 1])  # a torn last line was never acted upon; opening removes it
        self._adoption(rows, public)  # what could refuse the import must do so before the other ledger is closed
        old = Ledger._replayed(Journal.open(path, rows[0].owner, key))
        try:
            if not old.tally.closed:
                old.retire(self.journal.rows[0].hash)
            return self.adopt(old.journal.rows, public)
        finally:
            old.close()

    def charge_lost(self, known: Copy, owner: str, public: str, cap: Epsilon, delta: Delta) -> Row:
        """Charge the whole cap of a ledger that is lost, as one signed row that names it. It cannot be undone.

        Whatever was spent from it stayed under (ε, δ) of its cap, which are added here as they stand. The total may
        pass this ledger's own cap: then nothing more is admitted.

        Args:
            known: a head of the lost ledger, which its owner has signed.
            owner, public: the lost ledger's, with the key that signed it (64 hexadecimal digits).
            cap, delta: the largest cap that it may have had, and its δ.

        Raises:
            VerificationError: the head is not signed by that key or is of another data set; the ledger is counted here
                already; or the cap is below the highest that this ledger had.
            JournalError: it is this ledger itself.
        """
        if known.ledger == self.journal.rows[0].hash:
            raise JournalError("a ledger cannot be charged for itself")
        return self._append(
            "ledger.lost",
            ledger=known.ledger, owner=owner, public=public, head=list(known.head), data_set=known.data_set,
            signature=known.signature, cap_epsilon=cap, delta=delta,
        )  # fmt: skip

    def retire(self, ledger: str) -> Row:
        """Never spend from this ledger again: ``ledger`` (the hash of another's first row) is about to count it."""
        return self._append("ledger.closed", ledger=ledger)

    def _adoption(self, rows: list[Row], public: str) -> dict[str, Any]:
        """The body of the row that imports another ledger, once everything that could refuse it was looked at."""
        verified = verify_rows(rows, public, owner=rows[0].owner if rows else "")
        old = Tally()
        for row in verified:
            old.feed(row)
        if not verified or old.filter is None:
            raise VerificationError("the ledger to be imported was never opened")
        name, own = verified[0].hash, self.journal.rows[0].hash
        if name == own or old.unit != self.tally.unit:
            raise JournalError("a ledger cannot import itself, nor one that counts another unit")
        if twice := {name, *old.counted} & {*self.tally.counted, own}:
            raise VerificationError(f"the spending of ledger {min(twice)[:16]}... is counted here already")
        if old.closed not in ("", own, *self.tally.counted):  # closed for one that is counted here but lacks it
            raise JournalError(
                f"the ledger was closed in favour of another one, {old.closed[:16]}...",
                hint="import that one: it carries this one along",
            )
        counted = Counter(old.events)
        if max(len(counted), len(old.counted)) > MAX_NAMED:
            raise VerificationError(f"more than {MAX_NAMED} different events or ledgers cannot be imported at once")
        covers = [[rows_, carried] for carried, rows_ in old.covers.items()]
        body = {
            "lineage": old.lineage, "owner": verified[0].owner, "public": public, "ledger": name,
            "carries": sorted(old.counted), "head": [len(verified), verified[-1].hash],
            "events": [[e.to_json(), n] for e, n in counted.items()], **({"covers": covers} if covers else {}),
        }  # fmt: skip
        if old.lost:
            body["lost"] = [[lost, *cap] for lost, cap in old.lost.items()]
        copy.deepcopy(self.tally).feed(Row(self.head.rows, self.journal.owner, 0, "ledger.import", body, "", "", ""))
        return body

    def affords(self, event: SampledGaussian) -> int:
        """How many steps of ``event`` the cap in force still carries."""
        return self.tally.affords(event)

    def reserve(self, session: str, round_: int, plan_hash: str, event: SampledGaussian, state: str = "") -> None:
        """Charge one step; on disk when this returns. Only then may noise be drawn and a value leave.

        Args:
            state: the name of the model state that the step is computed from.

        Raises:
            BudgetExhausted: the step does not fit under the cap; a ``refused`` row is written, nothing is charged.
            JournalError: this round of this session was charged before.
        """
        if (session, round_) in self.tally.by_round:
            raise JournalError(
                f"round {round_} was charged before and its answer is not at hand",
                hint="the site sits this round out; the budget stays spent",
            )
        if not self.tally.admits(event):
            self.note("refused", session=session, reason=BudgetExhausted.__name__)
            raise BudgetExhausted(
                f"round {round_} does not fit into the privacy budget of {self.tally.lineage!r}",
                hint="a normal ending: the last model is kept",
            )
        body = _spending(session, round_, plan_hash, event, state)
        self._count("spend", body)
        self.journal.add("spend", body)

    def commit(self, session: str, round_: int) -> None:
        """Record that the value reserved for was handed on; :class:`JournalError` for a round never reserved."""
        if (session, round_) not in self.tally.by_round:
            raise JournalError(f"round {round_} was never charged")
        body = _handing_on(session, round_)
        self._count("commit", body)
        self.journal.add("commit", body)

    @property
    def head(self) -> Head:
        """Row count and last hash."""
        return self.journal.head

    def close(self) -> None:
        """Release the lock."""
        self.journal.close()


# The rows' contents, which all sites of a simulation share; nobody writes into them.
@lru_cache(maxsize=8)
def _spending(session: str, round_: int, plan_hash: str, event: SampledGaussian, state: str) -> dict[str, Any]:
    named = {"state": state} if state else {}
    return {"session": session, "round": round_, "plan_hash": plan_hash, "event": event.to_json(), **named}


@lru_cache(maxsize=8)
def _handing_on(session: str, round_: int) -> dict[str, Any]:
    return {"session": session, "round": round_}
