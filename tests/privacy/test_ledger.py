"""The ledger: the budget is charged before anything leaves, over runs and restarts, and ends where the filter says."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from fedveil.common import journal
from fedveil.common.errors import BudgetExhausted, JournalError, VerificationError
from fedveil.common.identity import new_signing_key, public_hex
from fedveil.common.journal import Journal, Row, parse, verify_rows
from fedveil.common.units import Delta, Epsilon
from fedveil.privacy.dp.accounting import Filter, best_order, rdp
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.tally import Tally

KEY = new_signing_key()
CAP, DELTA = 2.0, 1e-5
EVENT = SampledGaussian(1.0, 5.0)
PLAN = "a" * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.jsonl"


def opened(path: Path, cap: float = CAP, **changes: Any) -> Ledger:
    values: dict[str, Any] = {"lineage": "patients-2024", "cap": Epsilon(cap), "delta": Delta(DELTA)} | changes
    return Ledger.open(path, "site-a", KEY, **values)


def spends(path: Path) -> int:
    rows = verify_rows(parse(path.read_bytes()), public_hex(KEY), owner="site-a")
    return sum(r.kind == "spend" for r in rows)


def exhaust(ledger: Ledger, session: str, event: SampledGaussian = EVENT, first: int = 1) -> int:
    """Charge rounds until the budget ends; how many were charged."""
    for round_ in range(first, 100_000):
        try:
            ledger.reserve(session, round_, PLAN, event)
        except BudgetExhausted:
            return round_ - first
        ledger.commit(session, round_)
    raise AssertionError("the budget never ended")


def test_the_budget_ends_exactly_where_the_filter_says(path: Path) -> None:
    ledger = opened(path, durable=False)
    f = Filter(CAP, DELTA, best_order(CAP, DELTA))
    promised = ledger.affords(EVENT)
    assert promised == f.affords(EVENT) > 3
    assert exhaust(ledger, "run-1") == promised
    assert ledger.affords(EVENT) == 0
    assert ledger.tally.epsilon <= CAP < f.epsilon_of(ledger.tally.spent + rdp(EVENT, f.order))
    assert [r.body for r in ledger.journal.of_kind("refused")] == [{"session": "run-1", "reason": "BudgetExhausted"}]
    cheaper = SampledGaussian(1.0, 50.0)  # a cheaper step may still fit: exhaustion is about a step, not a switch
    assert exhaust(ledger, "run-1", cheaper, first=1000) > 0
    assert ledger.tally.epsilon <= CAP
    ledger.close()
    assert spends(path) == len(ledger.tally.by_round)


def test_runs_share_one_budget_over_restarts(path: Path) -> None:
    ledger = opened(path)
    promised = ledger.affords(EVENT)
    ledger.reserve("run-1", 1, PLAN, EVENT)
    ledger.commit("run-1", 1)
    before = ledger.tally.epsilon
    ledger.close()

    again = opened(path)
    assert again.tally.epsilon == before > 0
    assert again.affords(EVENT) == promised - 1
    again.reserve("run-2", 1, PLAN, EVENT)  # the same round number of another session
    assert again.tally.epsilon > before
    again.close()

    last = opened(path, durable=False)
    assert exhaust(last, "run-3") == promised - 2
    assert [session for session, _ in last.tally.by_round][:2] == ["run-1", "run-2"]
    assert last.tally.committed >= {("run-1", 1)}
    assert ("run-2", 1) not in last.tally.committed
    last.close()
    assert opened(path).affords(EVENT) == 0


def test_a_round_is_charged_once_and_answered_once(path: Path) -> None:
    ledger = opened(path)
    ledger.reserve("run-1", 1, PLAN, EVENT)
    spent = ledger.tally.spent
    for _ in range(2):
        with pytest.raises(JournalError, match="charged before"):
            ledger.reserve("run-1", 1, PLAN, EVENT)
    assert ledger.tally.spent == spent
    ledger.close()
    again = opened(path)
    with pytest.raises(JournalError, match="charged before"):
        again.reserve("run-1", 1, PLAN, EVENT)
    assert spends(path) == 1


def test_a_lowered_cap_is_obeyed_and_a_raised_one_recorded(path: Path) -> None:
    ledger = opened(path)
    promised = ledger.affords(EVENT)
    ledger.reserve("run-1", 1, PLAN, EVENT)
    ledger.close()

    lower = opened(path, cap=CAP / 2)
    order = lower.tally.filter.order if lower.tally.filter else 0
    assert order == best_order(CAP, DELTA)  # fixed when the ledger was opened
    assert lower.affords(EVENT) == Filter(CAP / 2, DELTA, order).affords(EVENT, lower.tally.spent) < promised - 1
    lower.close()

    spent_out = opened(path, cap=0.01)
    assert spent_out.affords(EVENT) == 0
    with pytest.raises(BudgetExhausted):
        spent_out.reserve("run-2", 1, PLAN, EVENT)
    assert spent_out.tally.epsilon > 0.01  # what was spent before stays spent
    spent_out.close()

    raised = opened(path, cap=CAP)
    assert raised.affords(EVENT) == promised - 1
    assert [r.body["cap_epsilon"] for r in raised.journal.of_kind("ledger.cap")] == [CAP / 2, 0.01, CAP]


@pytest.mark.parametrize(
    "change", [{"lineage": "patients-2025"}, {"delta": Delta(1e-6)}, {"delta": Delta(1e-4)}, {"unit": "client"}]
)
def test_another_data_set_delta_or_unit_has_another_ledger(path: Path, change) -> None:
    opened(path).close()
    before = path.read_bytes()
    with pytest.raises(JournalError, match="is the ledger of lineage"):
        opened(path, **change)
    assert path.read_bytes() == before
    opened(path).close()  # and the lock was let go


def test_a_second_process_or_another_site_is_refused(path: Path) -> None:
    ledger = opened(path)
    with pytest.raises(JournalError, match="in use"):
        opened(path)
    ledger.close()
    with pytest.raises(JournalError, match="evidence"):
        Ledger.open(path, "site-b", KEY, lineage="patients-2024", cap=Epsilon(CAP), delta=Delta(DELTA))
    with pytest.raises(JournalError, match="evidence"):
        Ledger.open(path, "site-a", new_signing_key(), lineage="patients-2024", cap=Epsilon(CAP), delta=Delta(DELTA))
    opened(path).close()


@pytest.mark.parametrize("kind", ["spend", "commit", "ledger.open", "ledger.cap"])
def test_a_note_cannot_spend(path: Path, kind) -> None:
    ledger = opened(path)
    with pytest.raises(JournalError, match="cannot be added as a note"):
        ledger.note(kind, session="run-1", round=1, plan_hash=PLAN, event=EVENT.to_json(), cap_epsilon=1000.0)
    ledger.note("model", session="run-1", round=1, model_hash="b" * 64)
    ledger.note("anything", text="spend")
    assert ledger.tally.spent == 0
    ledger.close()
    assert opened(path).tally.spent == 0


def test_what_the_rules_refuse_never_reaches_the_disk(path: Path) -> None:
    """A row that makes the ledger unreadable would lock the site out of its own budget."""
    ledger = opened(path)
    ledger.reserve("run-1", 1, PLAN, EVENT)
    before = path.read_bytes()
    with pytest.raises(JournalError, match="never charged"):
        ledger.commit("run-1", 2)
    for session, round_ in (("run-1", True), ("run-1", 1.5), (7, 3), ("run-1", None)):
        with pytest.raises((VerificationError, JournalError)):
            ledger.reserve(session, round_, PLAN, EVENT)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    ledger.reserve("run-1", 2, PLAN, EVENT)
    ledger.close()
    assert opened(path).tally.by_round.keys() == {("run-1", 1), ("run-1", 2)}


@pytest.mark.parametrize("part", [0, 50, 10_000])
def test_a_full_disk_forgets_no_charge(path: Path, monkeypatch, part) -> None:
    ledger = opened(path)
    ledger.reserve("run-1", 1, PLAN, EVENT)
    spent, real, left = ledger.tally.spent, journal.os.write, [part]

    def write(fd: int, data: bytes) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(fd, bytes(data)[: left[0]])
        left[0] -= written
        return written

    def fsync(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(journal.os, "write", write)
        m.setattr(journal.os, "fsync", fsync)
        with pytest.raises(JournalError, match="No space left"):
            ledger.reserve("run-1", 2, PLAN, EVENT)
    assert ledger.tally.spent >= 2 * spent  # whether or not it reached the disk: it counts here
    with pytest.raises(JournalError):
        ledger.reserve("run-1", 2, PLAN, EVENT)
    with pytest.raises(JournalError, match="closed"):
        ledger.reserve("run-1", 3, PLAN, EVENT)
    again = opened(path)
    assert again.tally.spent == pytest.approx(spent if part < 10_000 else 2 * spent)
    again.close()


def test_a_simulated_ledger_writes_the_same_rows_when_it_closes(path: Path, tmp_path: Path) -> None:
    def run(where: Path, durable: bool) -> bytes:
        ledger = opened(where, durable=durable, clock=lambda: 1e9)
        for round_ in (1, 2):
            ledger.reserve("run-1", round_, PLAN, EVENT)
            ledger.commit("run-1", round_)
        ledger.note("session.end", session="run-1", status="COMPLETED")
        assert where.exists() == durable
        ledger.close()
        return where.read_bytes()

    assert run(path, True) == run(tmp_path / "simulated.jsonl", False)


def test_affords_nothing_before_it_is_open(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "j", "site-a", KEY, durable=False) as j:
        ledger = Ledger(j, Tally())
        assert ledger.affords(EVENT) == 0
        assert ledger.tally.epsilon == 0
        with pytest.raises(BudgetExhausted):
            ledger.reserve("run-1", 1, PLAN, EVENT)


def test_the_head_follows_every_row(path: Path) -> None:
    ledger = opened(path)
    heads = [ledger.head]
    ledger.reserve("run-1", 1, PLAN, EVENT)
    heads.append(ledger.head)
    ledger.commit("run-1", 1)
    heads.append(ledger.head)
    assert [h.rows for h in heads] == [1, 2, 3]
    assert len({h.hash for h in heads}) == 3


def test_everything_that_is_written_may_leave_the_site(path: Path) -> None:
    """No field but the documented ones: nothing can carry a count or a value by accident."""
    ledger = opened(path)
    ledger.reserve("run-1", 1, PLAN, EVENT)
    ledger.commit("run-1", 1)
    fields = {r.kind: set(r.body) for r in ledger.journal.rows}
    assert fields == {
        "ledger.open": {"lineage", "unit", "adjacency", "cap_epsilon", "delta", "order"},
        "spend": {"session", "round", "plan_hash", "event"},
        "commit": {"session", "round"},
    }


def row(n: int, kind: str, **body: Any) -> Row:
    return Row(n, "site-a", 0, kind, body, "", "", "")


OPEN = {
    "lineage": "x",
    "unit": "record",
    "adjacency": "add-or-remove-one",
    "cap_epsilon": 2.0,
    "delta": 1e-5,
    "order": 12.0,
}
TINY = {"event": "sampled-gaussian", "sample_rate": 0.5, "noise_multiplier": 1e-200}
SPEND = {"session": "s", "round": 1, "plan_hash": PLAN, "event": EVENT.to_json()}


@pytest.mark.parametrize(
    "rows",
    [
        [("spend", SPEND)],
        [("ledger.cap", {"cap_epsilon": 1.0})],
        [("ledger.open", OPEN), ("ledger.open", OPEN)],
        [("ledger.open", OPEN), ("spend", SPEND), ("spend", SPEND)],
        [("ledger.open", OPEN), ("commit", {"session": "s", "round": 1})],
        [("ledger.open", OPEN | {"cap_epsilon": 0.3}), *[("spend", SPEND | {"round": i}) for i in range(50)]],
        [("ledger.open", OPEN), ("spend", SPEND | {"event": {"event": "other"}})],
        [("ledger.open", OPEN), ("spend", SPEND | {"event": EVENT.to_json() | {"noise_multiplier": 1e-300}})],
        [("ledger.open", OPEN), ("spend", SPEND | {"event": EVENT.to_json() | {"noise_multiplier": 10**400}})],
        [("ledger.open", OPEN), ("spend", SPEND | {"event": TINY})],
        [("ledger.open", OPEN), ("spend", SPEND | {"round": "1"})],
        [("ledger.open", OPEN), ("spend", SPEND | {"round": 1.0})],
        [("ledger.open", OPEN), ("spend", SPEND | {"session": 1})],
        [("ledger.open", OPEN), ("spend", {k: v for k, v in SPEND.items() if k != "round"})],
        *[[("ledger.open", OPEN | {k: v})] for k, v in (
            ("cap_epsilon", "inf"), ("cap_epsilon", "nan"), ("cap_epsilon", 0), ("cap_epsilon", -1),
            ("cap_epsilon", 10**400), ("cap_epsilon", True), ("cap_epsilon", None), ("delta", 0), ("delta", 1),
            ("delta", "1e-5"), ("order", 1),
            ("order", 1e9), ("order", 2.0000001), ("order", "2"), ("order", [2.0]), ("order", "nan"),
        )],
        [("ledger.open", {})],
        [("ledger.open", OPEN), ("ledger.cap", {"cap_epsilon": "inf"})],
        [("ledger.open", OPEN), ("ledger.cap", {})],
    ],
    ids=lambda rows: "+".join(k for k, _ in rows)[:40],
)  # fmt: skip
def test_rows_that_no_honest_ledger_holds(rows) -> None:
    """The auditor's reading of a stranger's journal: refused as such, never a crash, never an endless computation."""
    tally = Tally()

    def feed() -> None:
        for i, (kind, body) in enumerate(rows):
            tally.feed(row(i, kind, **body))

    with pytest.raises(VerificationError):
        feed()


def test_a_lowered_cap_in_a_journal_binds_what_follows() -> None:
    tally = Tally()
    tally.feed(row(0, "ledger.open", **OPEN))
    tally.feed(row(1, "spend", **SPEND))
    tally.feed(row(2, "ledger.cap", cap_epsilon=0.01))
    with pytest.raises(VerificationError, match="past the cap"):
        tally.feed(row(3, "spend", **SPEND | {"round": 2}))
    tally.feed(row(4, "unknown.kind", anything=1))
    assert tally.by_round.keys() == {("s", 1)}


def test_a_ledger_with_a_forbidden_row_is_kept_as_evidence(path: Path) -> None:
    """Signed and chained, and still against the rules: a site's own faulty or altered program wrote it."""
    opened(path).close()
    with Journal.open(path, "site-a", KEY) as j:
        j.append("spend", SPEND | {"event": EVENT.to_json() | {"noise_multiplier": 0.01}})
    before = path.read_bytes()
    with pytest.raises(JournalError, match="past the cap") as e:
        opened(path)
    assert "evidence" in e.value.hint
    assert path.read_bytes() == before


def test_the_cheapest_steps_are_charged_too(path: Path) -> None:
    """q = 10^-6, σ = 100: each costs about 10^-15, and once cost nothing at all."""
    ledger = opened(path, durable=False)
    ledger.reserve("run-1", 1, PLAN, SampledGaussian(1e-6, 100.0))
    assert 0 < ledger.tally.spent < 1e-11
    assert 0 < ledger.affords(SampledGaussian(1e-6, 100.0)) < 10**13
