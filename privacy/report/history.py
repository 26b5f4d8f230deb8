"""The server's journal read back as what happened: a forward-only machine that refuses any other order.

::

    run.open -> run.joined -> (round.open -> [round.set] -> round.applied | round.aborted)* -> [run.stopped] -> run.end

``run.resumed`` (the server was restarted) may stand between rounds or inside one; a round that was open goes on under
the same nonce, and its set may be announced once more. ``join.refused`` and ``site.refused`` note a peer's refusal,
``journal.repaired`` that a torn line was dropped. Nothing follows ``run.end``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from fedveil.common import fields
from fedveil.common.errors import VerificationError
from fedveil.common.journal import Row

COMPLETED, EXHAUSTED, ABORTED, STOPPED = "COMPLETED", "BUDGET_EXHAUSTED", "ABORTED", "STOPPED_EARLY"
_ENDINGS = (COMPLETED, STOPPED, EXHAUSTED, ABORTED)


@dataclass
class Round:
    """One round as the server wrote it down.

    Attributes:
        outcome: ``applied``, ``aborted``, ``interrupted`` (the run ended in between).
        members: the announced set U; None if it never came to that.
        announced: every set that was announced for the round: a second one only after a restart.
        model_in, model_out: SHA-256 of the weights before, and of those after the step (applied rounds only).
        state_in, state_out: the names of the whole model states; empty in journals of the first release.
        opened: digest of the opened sum (applied rounds only), as the server keeps it.
        noise_multiplier: the realised σ as the server states it.
    """

    number: int
    nonce: str
    model_in: str
    members: tuple[str, ...] | None = None
    announced: tuple[tuple[str, ...], ...] = ()
    outcome: str = "interrupted"
    noise_multiplier: float | None = None
    model_out: str | None = None
    reason: str = ""
    state_in: str = ""
    state_out: str = ""
    opened: str = ""


@dataclass(frozen=True)
class End:
    """``run.end``: how the run ended and the heads of the sites' ledgers."""

    status: str
    steps_done: int
    model_hash: str
    heads: dict[str, tuple[int, str]]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Refusal:
    """A site that said no: in which round (None: outside of rounds), and the name of the error."""

    round: int | None
    site: str
    code: str


@dataclass
class History:
    """The whole journal; made by :func:`replay`.

    Attributes:
        model_hash, state: the initial model's.
        debug_noise: the noise of this simulation followed from a seed: the run was NOT PRIVATE.
        times: of the first and the last row; empty for an empty journal.
        fall: the first row that is dated before the one before it; None if none is.
    """

    session: str = ""
    plan_hash: str = ""
    roster_hash: str = ""
    contract_hash: str = ""
    model_hash: str = ""
    state: str = ""
    simulated: bool = False
    debug_noise: bool = False
    joins_digest: str = ""
    joined: tuple[str, ...] = ()
    rounds: list[Round] = field(default_factory=list)
    restarts: int = 0
    repairs: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    end: End | None = None
    times: tuple[int, ...] = ()
    fall: int | None = None

    @property
    def ended(self) -> End:
        """The end of the run.

        Raises:
            VerificationError: the journal has none.
        """
        if self.end is None:
            raise VerificationError("the server's journal has no run.end: the run goes on, or the tail was cut")
        return self.end

    @property
    def applied(self) -> list[Round]:
        """The rounds whose sum moved the model."""
        return [r for r in self.rounds if r.outcome == "applied"]


def replay(rows: list[Row]) -> History:
    """Feed every row, in order.

    Raises:
        VerificationError: naming the first row that may not stand where it stands.
    """
    reader = _Reader()
    for row in rows:
        reader.feed(row)
    reader.history.times = (rows[0].at, rows[-1].at) if rows else ()
    reader.history.fall = falling(rows)
    return reader.history


def falling(rows: list[Row]) -> int | None:
    """The number of the first row that is dated before the one before it; None if none is."""
    return next((b.n for a, b in pairwise(rows) if b.at < a.at), None)


class _Reader:
    def __init__(self) -> None:
        self.history = History()
        self._open: Round | None = None
        self._stopped = False
        self._nonces: set[str] = set()
        self._may_announce = False  # a restart in the middle of a round: its set may be announced again

    def feed(self, row: Row) -> None:
        where, h = f"row {row.n} ({row.kind[:32]})", self.history
        if h.end is not None:
            raise VerificationError(f"{where} follows the end of the run")
        steps = {
            "run.open": self._run_open,
            "run.joined": self._run_joined,
            "round.open": self._round_open,
            "round.set": self._round_set,
            "round.applied": self._round_applied,
            "round.aborted": self._round_aborted,
            "run.resumed": self._run_resumed,
            "run.stopped": self._run_stopped,
            "run.end": self._run_end,
            "journal.repaired": self._repaired,
            "join.refused": self._refused,
            "site.refused": self._refused,
        }
        if row.kind not in steps:
            raise VerificationError(f"{where} is of a kind that a server's journal does not have")
        if row.kind not in ("run.open", "journal.repaired"):
            if not h.session:
                raise VerificationError(f"{where} comes before the run was opened")
            if row.body.get("session") != h.session:
                raise VerificationError(f"{where} belongs to another session")
        steps[row.kind](row.body, where)

    def _run_open(self, b: dict[str, Any], where: str) -> None:
        h = self.history
        if h.session:
            raise VerificationError(f"{where} opens a run that is open")
        h.session = fields.text(b, "session", where, limit=128)
        if not h.session:
            raise VerificationError(f"{where}: the session has no name")
        for key in ("plan_hash", "roster_hash", "contract_hash"):
            setattr(h, key, fields.hexadecimal(b, key, where))
        h.model_hash, h.state = _model(b, where), _optional(b, "state", where)
        if type(b.get("simulated")) is not bool:
            raise VerificationError(f"{where}: simulated is neither true nor false")
        h.simulated = b["simulated"]
        if "debug_noise_seed" in b:
            fields.integer(b, "debug_noise_seed", where, high=1 << 32)
            h.debug_noise = True

    def _run_joined(self, b: dict[str, Any], where: str) -> None:
        if self.history.joins_digest:
            raise VerificationError(f"{where} comes a second time")
        self.history.joins_digest = fields.hexadecimal(b, "joins_digest", where)
        self.history.joined = fields.sites(b, "sites", where)

    def _round_open(self, b: dict[str, Any], where: str) -> None:
        h = self.history
        if not h.joins_digest:
            raise VerificationError(f"{where} comes before the sites joined")
        if self._open is not None:
            raise VerificationError(f"{where} comes while round {self._open.number} is open")
        if self._stopped:
            raise VerificationError(f"{where} comes after the run was stopped")
        nonce = fields.text(b, "nonce", where, limit=128)
        new = Round(fields.integer(b, "round", where, low=1, high=1 << 20), nonce, _model(b, where))
        if nonce in self._nonces:
            raise VerificationError(f"{where} uses the nonce of an earlier round again")
        self._nonces.add(nonce)
        last = h.rounds[-1].number if h.rounds else 0
        if new.number != last + 1:
            raise VerificationError(f"{where} opens round {new.number} after round {last}")
        new.state_in = _optional(b, "state", where)
        h.rounds.append(new)
        self._open, self._may_announce = new, False

    def _current(self, b: dict[str, Any], where: str) -> Round:
        if self._open is None or fields.integer(b, "round", where) != self._open.number:
            raise VerificationError(f"{where} is about a round that is not open")
        return self._open

    def _round_set(self, b: dict[str, Any], where: str) -> None:
        r = self._current(b, where)
        if r.members is not None and not self._may_announce:
            raise VerificationError(f"{where} announces a second set for round {r.number}")
        r.members, self._may_announce = fields.sites(b, "members", where), False
        r.announced = (*r.announced, r.members)

    def _round_applied(self, b: dict[str, Any], where: str) -> None:
        r = self._current(b, where)
        if r.members is None:
            raise VerificationError(f"{where} applies a sum whose set was never announced")
        if set(fields.sites(b, "members", where)) != set(r.members):
            raise VerificationError(f"{where} applies the sum of another set than the announced one")
        r.noise_multiplier = fields.number(b, "noise_multiplier", where, high=1e9)
        r.model_out, r.outcome = _model(b, where), "applied"
        r.state_out, r.opened = _optional(b, "state", where), _optional(b, "sum", where)
        self._open = None

    def _round_aborted(self, b: dict[str, Any], where: str) -> None:
        r = self._current(b, where)
        reason = b.get("reason")
        if not isinstance(reason, str) or len(reason) > 4096:
            raise VerificationError(f"{where}: the reason is not a text of at most 4096 characters")
        r.reason, r.outcome = "".join(c if c.isprintable() else " " for c in reason), "aborted"
        self._open = None

    def _run_resumed(self, b: dict[str, Any], where: str) -> None:
        last = self.history.rounds[-1].number if self.history.rounds else 0
        if fields.integer(b, "round", where) != (last if self._open else last + 1):
            raise VerificationError(f"{where} resumes another round than the one that was to be next")
        self._may_announce = self._open is not None
        self.history.restarts += 1

    def _refused(self, b: dict[str, Any], where: str) -> None:
        # A site that could not be authenticated has no name; an older journal may lack the code.
        site = "" if b.get("site") is None else fields.text(b, "site", where, limit=64)
        code = fields.text(b, "code", where, limit=64) if "code" in b else ""
        number = fields.integer(b, "round", where, high=1 << 20) if "round" in b else None
        self.history.refusals.append(Refusal(number, site, code))

    def _repaired(self, _: dict[str, Any], __: str) -> None:
        self.history.repairs += 1

    def _run_stopped(self, _: dict[str, Any], where: str) -> None:
        if self._open is not None or self._stopped:
            raise VerificationError(f"{where} stops a run inside a round, or a second time")
        self._stopped = True

    def _run_end(self, b: dict[str, Any], where: str) -> None:
        status = fields.text(b, "status", where, limit=32)
        if status not in _ENDINGS:
            raise VerificationError(f"{where}: the status is none of {', '.join(_ENDINGS)}")
        if (status == STOPPED) != self._stopped:
            raise VerificationError(f"{where}: a run ends as {STOPPED} where a row before says so, and only there")
        if self._open is not None and status in (COMPLETED, STOPPED):
            raise VerificationError(f"{where} completes a run while round {self._open.number} is open")
        heads = fields.mapping(b.get("heads"), f"{where}: heads")
        self.history.end = End(
            status,
            fields.integer(b, "steps_done", where, high=1 << 20),
            _model(b, where),
            {str(s): fields.head(v, where) for s, v in heads.items()},
            fields.metrics(b.get("metrics", {}), where),
        )


def _optional(b: dict[str, Any], key: str, where: str) -> str:
    return fields.hexadecimal(b, key, where) if key in b else ""


def _model(b: dict[str, Any], where: str) -> str:
    return fields.hexadecimal(b, "model_hash", where)
