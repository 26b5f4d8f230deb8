"""What an older ledger has spent counts in the new one: once, never less, whoever reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from typer.testing import CliRunner

from fedveil.common.errors import BudgetExhausted, JournalError, UsageError, VerificationError
from fedveil.common.identity import new_signing_key, public_hex, save_signing_key
from fedveil.common.journal import Journal, Row, parse, verify_rows
from fedveil.common.units import Delta, Epsilon
from fedveil.deploy.cli.ledger import app
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.report.charges import compose
from fedveil.privacy.tally import MAX_IMPORTED, Tally

OLD_KEY, KEY, DELTA = new_signing_key(), new_signing_key(), 1e-5
CHEAP, DEAR = SampledGaussian(0.1, 5.0), SampledGaussian(1.0, 8.0)


def opened(path: Path, *, key=KEY, cap: float = 3.0, lineage: str = "patients-2", **more: Any) -> Ledger:
    owner = "site-a" if key is KEY else "site-a-before"
    return Ledger.open(path, owner, key, lineage=lineage, cap=Epsilon(cap), delta=Delta(DELTA), durable=False, **more)


def spent(ledger: Ledger, *events: SampledGaussian) -> list[Row]:
    """Charge the events, close, and give the rows as another reader finds them."""
    for i, e in enumerate(events):
        ledger.reserve("run", i + 1, "a" * 64, e)
    ledger.close()
    return parse(ledger.journal.path.read_bytes())


@pytest.fixture
def old(tmp_path: Path) -> list[Row]:
    return spent(opened(tmp_path / "old", key=OLD_KEY, cap=9.0, lineage="patients-1"), CHEAP, DEAR, CHEAP)


def test_the_old_spending_is_in_the_new_total(tmp_path: Path, old: list[Row]) -> None:
    """The filter of the new ledger has another order than the old one's: composed anew, by dp-accounting."""
    new = opened(tmp_path / "new")
    new.adopt(old, public_hex(OLD_KEY))
    new.reserve("run", 1, "a" * 64, DEAR)
    f = new.tally.filter
    assert f is not None
    assert f.order != old[0].body["order"]
    accountant = RdpAccountant(orders=[f.order])
    accountant.compose(dp_event.PoissonSampledDpEvent(0.1, dp_event.GaussianDpEvent(5.0)), 2)
    accountant.compose(dp_event.GaussianDpEvent(8.0), 2)
    assert new.tally.epsilon == pytest.approx(float(accountant.get_epsilon(DELTA)), abs=1e-9)
    new.close()
    rows = verify_rows(parse((tmp_path / "new").read_bytes()), public_hex(KEY), owner="site-a")
    body = rows[1].body
    assert (body["lineage"], body["owner"], body["public"]) == ("patients-1", "site-a-before", public_hex(OLD_KEY))
    assert (body["ledger"], body["head"]) == (old[0].hash, [len(old), old[-1].hash])
    again = opened(tmp_path / "new")
    assert again.tally.epsilon == new.tally.epsilon
    again.close()
    c = compose(rows, "run")
    assert sorted(c.events, key=repr) == sorted([CHEAP, CHEAP, DEAR, DEAR], key=repr)
    assert 0 < c.epsilon_before < c.epsilon_after == new.tally.epsilon


def test_twice_is_refused_also_through_a_third(tmp_path: Path, old: list[Row]) -> None:
    between = opened(tmp_path / "between", lineage="patients-1b")
    between.adopt(old, public_hex(OLD_KEY))
    rows = spent(between, DEAR)
    new = opened(tmp_path / "new")
    new.adopt(rows, public_hex(KEY))
    total, head = new.tally.spent, new.head
    for again, key in ((rows, KEY), (old, OLD_KEY)):
        with pytest.raises(VerificationError, match="counted here already"):
            new.adopt(again, public_hex(key))
    with pytest.raises(JournalError, match="itself"):
        new.adopt(list(new.journal.rows), public_hex(KEY))
    assert (new.tally.spent, new.head) == (total, head)
    assert new.tally.events == [*between.tally.events]
    rows = spent(new)
    elder = opened(tmp_path / "between", lineage="patients-1b")
    with pytest.raises(VerificationError, match="counted here already"):
        elder.adopt(rows, public_hex(KEY))  # it would count its own spending again


def test_more_than_the_cap_is_counted_and_ends_the_budget(tmp_path: Path, old: list[Row]) -> None:
    new = opened(tmp_path / "new", cap=0.4)
    assert new.affords(CHEAP) > 0
    new.adopt(old, public_hex(OLD_KEY))
    assert new.tally.epsilon > 0.4
    assert new.affords(CHEAP) == 0
    with pytest.raises(BudgetExhausted):
        new.reserve("run", 1, "a" * 64, CHEAP)


def test_what_does_not_hold_is_not_imported(tmp_path: Path, old: list[Row]) -> None:
    new = opened(tmp_path / "new")
    head = new.head
    lowered = [*old[:2], old[3]]
    with pytest.raises(VerificationError, match="missing or moved"):
        new.adopt(lowered, public_hex(OLD_KEY))
    for rows, public in ((old, public_hex(KEY)), ([], public_hex(KEY))):
        with pytest.raises(VerificationError):
            new.adopt(rows, public)
    clients = spent(opened(tmp_path / "clients", unit="client"))
    with pytest.raises(JournalError, match="another unit"):
        new.adopt(clients, public_hex(KEY))
    with pytest.raises(JournalError, match="note"):
        new.note("ledger.import", ledger="f" * 64, events=[])
    assert new.head == head


@pytest.mark.parametrize(
    "change",
    [
        {"events": [[CHEAP.to_json(), 0]]}, {"events": [[CHEAP.to_json(), -5]]}, {"events": [[CHEAP.to_json(), 1.5]]},
        {"events": [[CHEAP.to_json(), True]]}, {"events": [[{"event": "free"}, 1]]}, {"events": None}, {"events": [[]]},
        {"events": [[CHEAP.to_json(), MAX_IMPORTED + 1]]}, {"ledger": 5}, {"ledger": ["x"]}, {"carries": [5]},
        {"carries": None}, {"ledger": "b" * 64}, {"carries": ["b" * 64]},
    ],
)  # fmt: skip
def test_import_rows_that_no_honest_ledger_holds(change: dict[str, Any]) -> None:
    tally = Tally()
    body = {"lineage": "x", "unit": "record", "cap_epsilon": 2.0, "delta": DELTA, "order": 12.0}
    good = {"ledger": "b" * 64, "carries": [], "events": [[CHEAP.to_json(), 3]]}
    for n, (kind, b) in enumerate((("ledger.open", body), ("ledger.import", good))):
        tally.feed(Row(n, "s", 0, kind, b, "", "", ""))
    before = tally.spent
    with pytest.raises(VerificationError):
        tally.feed(Row(2, "s", 0, "ledger.import", {**good, "ledger": "c" * 64, **change}, "", "", ""))
    assert tally.spent == before


def command(folder: Path, *more: str) -> Result:
    for name, key in (("signing.key", KEY), ("old.key", OLD_KEY)):
        if not (folder / name).exists():
            save_signing_key(folder / name, key)
    arguments = ["import", folder / "old", "--into", folder / "new", "--key", folder / "signing.key", *more]
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command(tmp_path: Path, old: list[Row]) -> None:
    spent(opened(tmp_path / "new"))
    result = command(tmp_path, "--old-key", str(tmp_path / "old.key"), "--public", public_hex(OLD_KEY))
    assert result.exit_code == 0, result.exception
    assert "patients-1 imported: filter ε 0.0000 before" in result.stdout
    assert "is closed" in result.stdout
    again = command(tmp_path, "--old-key", str(tmp_path / "old.key"))
    assert isinstance(again.exception, VerificationError)
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "new"), "--public", public_hex(KEY)])
    assert "3 steps of 1 older ledgers" in shown.stdout
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "old"), "--public", public_hex(OLD_KEY)])
    assert "for good" in shown.stdout
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "old"), "--public", public_hex(OLD_KEY)]).exit_code == 0


@pytest.mark.parametrize("torn", [1, 150, 300], ids=["before its end", "within it", "its beginning"])
def test_the_command_again_after_a_kill_within_the_row_that_imports(tmp_path: Path, old: list[Row], torn: int) -> None:
    new = spent(opened(tmp_path / "new"))
    assert command(tmp_path, "--old-key", str(tmp_path / "old.key")).exit_code == 0
    data = (tmp_path / "new").read_bytes()
    (tmp_path / "new").write_bytes(data[: len(data) - torn])
    again = command(tmp_path, "--old-key", str(tmp_path / "old.key"))
    assert again.exit_code == 0, again.exception
    rows = verify_rows(parse((tmp_path / "new").read_bytes()), public_hex(KEY), owner="site-a")
    assert [r.kind for r in rows] == ["ledger.open", "journal.repaired", "ledger.import"]
    assert rows[0].hash == new[0].hash
    (tmp_path / "new").write_bytes(data[:40])  # the first row itself is torn: nothing was ever opened
    assert isinstance(command(tmp_path, "--old-key", str(tmp_path / "old.key")).exception, VerificationError)


def test_a_ledger_whose_key_is_not_at_hand_is_left_open_only_in_so_many_words(tmp_path: Path, old: list[Row]) -> None:
    spent(opened(tmp_path / "new"))
    files = {p: p.read_bytes() for p in (tmp_path / "old", tmp_path / "new")}
    for arguments in (
        ("--public", public_hex(OLD_KEY)),
        ("--left-open",),
        ("--left-open", "--public", public_hex(OLD_KEY), "--old-key", str(tmp_path / "old.key")),
    ):
        assert isinstance(command(tmp_path, *arguments).exception, UsageError)
    assert command(tmp_path).exit_code != 0  # the new ledger's key is not the older one's
    assert {p: p.read_bytes() for p in files} == files
    result = command(tmp_path, "--left-open", "--public", public_hex(OLD_KEY))
    assert result.exit_code == 0, result.exception
    assert "LEFT OPEN" in result.stdout
    assert (tmp_path / "old").read_bytes() == files[tmp_path / "old"]


class TestTakenOver:
    """An imported ledger is closed first, and never spent from again."""

    @pytest.fixture
    def new(self, tmp_path: Path) -> Ledger:
        return opened(tmp_path / "new")

    def test_nothing_is_spent_beside_the_new_ledger(self, tmp_path, old, new):
        row = new.take_over(tmp_path / "old", OLD_KEY)
        rows = verify_rows(parse((tmp_path / "old").read_bytes()), public_hex(OLD_KEY), owner="site-a-before")
        assert [r.hash for r in rows[:-1]] == [r.hash for r in old]
        assert (rows[-1].kind, rows[-1].body) == ("ledger.closed", {"ledger": new.journal.rows[0].hash})
        assert row.body["head"] == [len(rows), rows[-1].hash], "the import names the row that closed the old ledger"
        with pytest.raises(JournalError, match="was closed"):
            opened(tmp_path / "old", key=OLD_KEY, cap=9.0, lineage="patients-1")
        tally = Tally()
        for r in rows[:-1]:
            tally.feed(r)
        assert tally.affords(CHEAP) > 0
        tally.feed(rows[-1])
        assert tally.affords(CHEAP) == 0  # what 'fedveil plan --ledger' says of it
        other = opened(tmp_path / "other", lineage="patients-3")
        with pytest.raises(JournalError, match="in favour of another"):
            other.take_over(tmp_path / "old", OLD_KEY)
        with pytest.raises(JournalError, match="in favour of another"):
            other.adopt(rows, public_hex(OLD_KEY))
        assert len(other.journal.rows) == 1

    def test_a_process_that_holds_the_old_ledger_is_waited_for(self, tmp_path, old, new):
        holder = Ledger.open(
            tmp_path / "old", "site-a-before", OLD_KEY, lineage="patients-1", cap=Epsilon(9.0), delta=Delta(DELTA)
        )
        with pytest.raises(JournalError, match="in use"):
            new.take_over(tmp_path / "old", OLD_KEY)
        holder.close()
        assert len(new.journal.rows) == 1
        assert len(parse((tmp_path / "old").read_bytes())) == len(old)

    def test_what_could_not_be_imported_is_not_closed(self, tmp_path, old, new):
        new.adopt(old, public_hex(OLD_KEY))
        before = (tmp_path / "old").read_bytes()
        for key in (OLD_KEY, KEY):
            with pytest.raises(VerificationError):
                new.take_over(tmp_path / "old", key)
        for path in (tmp_path / "new", tmp_path / "nowhere"):
            with pytest.raises(JournalError):
                new.take_over(path, KEY)
        assert (tmp_path / "old").read_bytes() == before
        assert not (tmp_path / "nowhere").exists()

    @pytest.mark.parametrize("torn", [0, 1, 150], ids=["after the closing row", "before its end", "within it"])
    def test_a_crash_between_closing_and_import_is_gone_over_again(self, tmp_path, old, new, monkeypatch, torn):
        with monkeypatch.context() as m:
            m.setattr(Ledger, "adopt", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                new.take_over(tmp_path / "old", OLD_KEY)
        assert len(new.journal.rows) == 1
        closed = (tmp_path / "old").read_bytes()
        (tmp_path / "old").write_bytes(closed[: len(closed) - torn])
        new.take_over(tmp_path / "old", OLD_KEY)
        kinds = [r.kind for r in parse((tmp_path / "old").read_bytes())]
        assert kinds.count("ledger.closed") == 1
        assert kinds[-1] == "ledger.closed"
        assert new.tally.events == [CHEAP, CHEAP, DEAR]
        assert [r.kind for r in new.journal.rows] == ["ledger.open", "ledger.import"]

    def test_what_a_crash_left_behind_is_counted_by_the_next_ledger(self, tmp_path, old, new, monkeypatch):
        """Closed in favour of one that was itself taken over before it counted it: no spending is lost for that."""
        with monkeypatch.context() as m:
            m.setattr(Ledger, "adopt", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                new.take_over(tmp_path / "old", OLD_KEY)
        new.close()
        third = opened(tmp_path / "third", lineage="patients-3")
        with pytest.raises(JournalError, match="in favour of another"):  # not before that one is counted
            third.take_over(tmp_path / "old", OLD_KEY)
        third.take_over(tmp_path / "new", KEY)
        assert third.tally.events == []
        third.take_over(tmp_path / "old", OLD_KEY)
        assert third.tally.events == [CHEAP, CHEAP, DEAR]
        with pytest.raises(VerificationError, match="counted here already"):
            third.take_over(tmp_path / "old", OLD_KEY)

    def test_a_ledger_that_took_one_over_can_be_taken_over_itself(self, tmp_path, old, new):
        new.take_over(tmp_path / "old", OLD_KEY)
        new.close()
        third = opened(tmp_path / "third", lineage="patients-3")
        third.take_over(tmp_path / "new", KEY)
        assert third.tally.events == [CHEAP, CHEAP, DEAR]
        assert third.tally.counted == {old[0].hash, new.journal.rows[0].hash}

    @pytest.mark.parametrize(
        ("kind", "body"),
        [
            ("spend", {"session": "run", "round": 9, "plan_hash": "a" * 64, "event": CHEAP.to_json()}),
            ("ledger.import", {"ledger": "c" * 64, "carries": [], "events": [[CHEAP.to_json(), 1]]}),
            ("ledger.closed", {"ledger": "c" * 64}),
        ],
    )
    def test_rows_after_the_last_one_do_not_verify(self, tmp_path, old, new, kind, body):
        new.take_over(tmp_path / "old", OLD_KEY)
        with Journal.open(tmp_path / "old", "site-a-before", OLD_KEY) as journal:
            compose(journal.rows, "run")  # closed, it does
            journal.append(kind, body)
            with pytest.raises(VerificationError, match="after the ledger was closed"):
                compose(journal.rows, "run")
        verified = CliRunner().invoke(app, ["verify", str(tmp_path / "old"), "--public", public_hex(OLD_KEY)])
        assert isinstance(verified.exception, VerificationError)

    @pytest.mark.parametrize("body", [{}, {"ledger": 5}, {"ledger": "x"}, {"ledger": "B" * 64}, {"ledger": None}])
    def test_closing_rows_that_no_honest_ledger_holds(self, new, body):
        with pytest.raises(VerificationError, match="malformed"):
            new.tally.feed(Row(1, "site-a", 0, "ledger.closed", body, "", "", ""))
        with pytest.raises(JournalError, match="note"):
            new.note("ledger.closed", **body)


def test_a_lineage_is_a_version_and_a_subject_salt_too(tmp_path: Path) -> None:
    first = opened(tmp_path / "l", version="2024-1", subject_salt="e" * 64)
    assert {k: first.journal.rows[0].body[k] for k in ("version", "subject_salt")} == {
        "version": "2024-1", "subject_salt": "e" * 64,
    }  # fmt: skip
    first.close()
    others: list[dict[str, Any]] = [{"version": "2024-2"}, {"subject_salt": "d" * 64}]
    for wrong in others:
        with pytest.raises(JournalError, match="opened for another"):
            opened(tmp_path / "l", **wrong)
    opened(tmp_path / "l", version="2024-1").close()
    opened(tmp_path / "l").close()
