"""What an older ledger has spent counts in the new one: once, never less, whoever reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from typer.testing import CliRunner

from fedveil.common.errors import BudgetExhausted, JournalError, VerificationError
from fedveil.common.identity import new_signing_key, public_hex, save_signing_key
from fedveil.common.journal import Row, parse, verify_rows
from fedveil.common.units import Delta, Epsilon
from fedveil.privacy.cli_ledger import app
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.ledger import MAX_IMPORTED, Ledger, Tally
from fedveil.privacy.report.charges import compose

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


def test_the_command(tmp_path: Path, old: list[Row]) -> None:
    save_signing_key(tmp_path / "signing.key", KEY)
    spent(opened(tmp_path / "new"))
    arguments = ["import", str(tmp_path / "old"), "--into", str(tmp_path / "new"), "--key",
                 str(tmp_path / "signing.key"), "--public", public_hex(OLD_KEY)]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    assert "patients-1 imported: filter ε 0.0000 before" in result.stdout
    assert isinstance(CliRunner().invoke(app, arguments).exception, VerificationError)
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "new"), "--public", public_hex(KEY)])
    assert "3 steps of 1 older ledgers" in shown.stdout


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
