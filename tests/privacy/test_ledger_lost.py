"""A ledger that is lost is charged at its whole cap: once, for good, by a head of it that its owner has signed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedveil.common import canonical
from fedveil.common.errors import BudgetExhausted, JournalError, UsageError, VerificationError
from fedveil.common.identity import new_signing_key, public_hex, save_signing_key, signed
from fedveil.common.journal import MAX_ROWS, Copy, Head, Row, parse, verify_rows
from fedveil.common.units import Delta, Epsilon
from fedveil.deploy.cli.ledger import app
from fedveil.privacy.dp.accounting import Filter
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.report import ledgers
from fedveil.privacy.report.charges import compose
from fedveil.privacy.tally import Tally

KEY, OTHER, DELTA, SET = new_signing_key(), new_signing_key(), 1e-5, "5e" * 32
STEP = SampledGaussian(1.0, 8.0)


def opened(path: Path, *, cap: float = 3.0, lineage: str = "patients", **more: Any) -> Ledger:
    return Ledger.open(
        path, "site-a", KEY, lineage=lineage, cap=Epsilon(cap), delta=Delta(DELTA), data_set=SET, durable=False, **more
    )


@pytest.fixture
def known(tmp_path: Path) -> Copy:
    """What peers hold of a ledger that is gone."""
    old = opened(tmp_path / "old", lineage="patients, before")
    old.reserve("run", 1, "a" * 64, STEP)
    copy = old.journal.copy(SET)
    old.close()
    return copy


@pytest.fixture
def new(tmp_path: Path) -> Ledger:
    return opened(tmp_path / "new")


def charge(ledger: Ledger, known: Copy, cap: float = 3.0, delta: float = DELTA, **more: Any) -> Row:
    said = {"owner": "site-a", "public": public_hex(KEY), **more}
    return ledger.charge_lost(known, said["owner"], said["public"], Epsilon(cap), Delta(delta))


def test_the_whole_cap_is_spent_whatever_was(tmp_path, known, new) -> None:
    assert new.affords(STEP) > 0
    row = charge(new, known)
    assert (row.kind, row.body["ledger"], row.body["head"]) == ("ledger.lost", known.ledger, list(known.head))
    assert (new.tally.epsilon, new.affords(STEP)) == (3.0, 0)
    with pytest.raises(BudgetExhausted):
        new.reserve("run", 1, "a" * 64, STEP)
    new.close()
    again = opened(tmp_path / "new")
    assert (again.tally.epsilon, again.tally.lost, again.affords(STEP)) == (3.0, {known.ledger: (3.0, DELTA)}, 0)
    assert again.tally.covers == {known.ledger: MAX_ROWS}
    rows = verify_rows(parse((tmp_path / "new").read_bytes()), public_hex(KEY), owner="site-a")
    c = compose(rows, "run")
    assert (c.epsilon_after, c.left, c.affords(STEP), c.lost) == (3.0, 0.0, 0, {known.ledger: (3.0, DELTA)})


def test_a_higher_cap_leaves_the_difference_and_no_more(tmp_path, known, new) -> None:
    charge(new, known)
    new.close()
    raised = opened(tmp_path / "new", cap=5.0)
    order = raised.tally.filter.order if raised.tally.filter else 0.0
    assert raised.affords(STEP) == Filter(2.0, DELTA, order).affords(STEP) > 0
    steps = 0
    while raised.tally.admits(STEP):
        steps += 1
        raised.reserve("run", steps, "a" * 64, STEP)
    assert 4.9 < raised.tally.epsilon <= 5.0 * (1 + 1e-9)
    with pytest.raises(BudgetExhausted):
        raised.reserve("run", steps + 1, "a" * 64, STEP)
    raised.close()
    rows = parse((tmp_path / "new").read_bytes())
    c = compose(rows, "run")
    assert c.tightest[1] == 2.0
    ledgers.budget("site-a", c, {"epsilon_after": c.epsilon_after})
    with pytest.raises(VerificationError, match="the report states"):
        ledgers.budget("site-a", c, {"epsilon_after": c.epsilon_after - 3.0})
    spend = next(r for r in reversed(rows) if r.kind == "spend")
    more = [*rows, Row(len(rows), "site-a", 0, "spend", {**spend.body, "round": steps + 1}, "", "", "")]
    with pytest.raises(VerificationError, match="past the cap"):
        compose(more, "run")


def test_what_was_spent_from_the_new_one_already_stays_spent(known, new) -> None:
    new.reserve("run", 1, "a" * 64, STEP)
    before = new.tally.epsilon
    charge(new, known)
    assert new.tally.epsilon == before + 3.0


def test_less_than_the_cap_is_refused(tmp_path, known, new) -> None:
    for cap, delta in ((2.999, DELTA), (3.0, DELTA / 2), (0.0, DELTA), (float("nan"), DELTA), (3.0, 1.0)):
        with pytest.raises(VerificationError):
            charge(new, known, cap, delta)
    new.close()
    lowered = opened(tmp_path / "new", cap=1.0)  # a cap that was lowered afterwards does not make it cheaper
    with pytest.raises(VerificationError, match="less than a whole cap"):
        charge(lowered, known, 1.0)
    assert not lowered.tally.lost
    charge(lowered, known, 4.0)
    assert lowered.tally.epsilon == 4.0


@pytest.mark.parametrize(
    "forge",
    [
        lambda k: k._replace(signature=""), lambda k: k._replace(ledger="ab" * 32),
        lambda k: k._replace(head=Head(k.head.rows - 1, k.head.hash)), lambda k: k.by("site-a", OTHER),
        lambda k: k.by("site-b", KEY), lambda k: k._replace(data_set="9" * 64),
        lambda k: k._replace(data_set="9" * 64).by("site-a", KEY),
    ],
    ids=["unsigned", "another ledger", "another head", "another key", "another owner", "altered data set",
         "another data set"],
)  # fmt: skip
def test_a_ledger_that_nobody_saw_signed_is_not_charged(known, new, forge) -> None:
    head = new.head
    with pytest.raises(VerificationError):
        charge(new, forge(known))
    assert (new.head, new.tally.epsilon) == (head, 0.0)
    charge(new, known)  # negative control


def test_once_and_for_good(tmp_path, known, new) -> None:
    charge(new, known)
    for again in (known, known._replace(head=Head(99, "ab" * 32)).by("site-a", KEY)):
        with pytest.raises(VerificationError, match="counted here already"):
            charge(new, again)
    with pytest.raises(VerificationError, match="counted here already"):  # the file turns up
        new.adopt(parse((tmp_path / "old").read_bytes()), public_hex(KEY))
    with pytest.raises(JournalError, match="itself"):
        charge(new, new.journal.copy(SET))
    with pytest.raises(JournalError, match="note"):
        new.note("ledger.lost", ledger="f" * 64)
    assert new.tally.epsilon == 3.0
    imported = opened(tmp_path / "third", lineage="third")
    imported.adopt(parse((tmp_path / "old").read_bytes()), public_hex(KEY))
    with pytest.raises(VerificationError, match="counted here already"):
        charge(imported, known)


def test_an_import_carries_the_charge_along(tmp_path, known, new) -> None:
    charge(new, known)
    new.close()
    third = opened(tmp_path / "third", cap=9.0, lineage="third")
    row = third.take_over(tmp_path / "new", KEY)
    assert row.body["lost"] == [[known.ledger, 3.0, DELTA]]
    assert (third.tally.epsilon, third.tally.covers[known.ledger]) == (3.0, MAX_ROWS)
    rows = list(third.journal.rows)
    assert "at 3 by an import's word" in ledgers.at_caps(rows, compose(rows, "run"))
    # An import of nothing that says it counts all rows of another ledger, whose cap it does not bring.
    for covers in ([[MAX_ROWS, known.ledger]], [[-1, known.ledger]], [[MAX_ROWS + 1, known.ledger]]):
        tally = Tally()
        tally.feed(rows[0])
        body = {**rows[1].body, "events": [], "lost": [], "covers": covers}
        with pytest.raises(VerificationError, match="does not import"):
            tally.feed(replace(rows[1], body=body))
    lied = Tally()
    lied.feed(rows[0])
    for wrong in ([["ab" * 32, 3.0, DELTA]], [[known.ledger, -1.0, DELTA]], [[known.ledger, 3.0]], [7], 7):
        with pytest.raises(VerificationError):
            lied.feed(Row(1, "site-a", 0, "ledger.import", {**row.body, "lost": wrong}, "", "", ""))


def test_the_verifier_reads_the_prices_by_itself(known, new) -> None:
    charge(new, known)
    rows = list(new.journal.rows)
    c = compose(rows, "run")
    assert f"{known.ledger[:16]}... at 3" in ledgers.at_caps(rows, c)
    cheap = Row(1, "site-a", 0, "ledger.lost", {**rows[1].body, "cap_epsilon": 0.5}, "", "", "")
    with pytest.raises(VerificationError, match="less than 3"):
        ledgers.at_caps([rows[0], cheap], c)
    with pytest.raises(VerificationError, match="add up"):
        ledgers.at_caps(rows[:1], c)


@pytest.mark.parametrize(
    "change",
    [
        {"ledger": 5}, {"ledger": ["x"]}, {"ledger": "b" * 63}, {"head": None}, {"head": [1]}, {"head": [-1, "a" * 64]},
        {"signature": 7}, {"signature": ""}, {"data_set": None}, {"cap_epsilon": None}, {"cap_epsilon": True},
        {"cap_epsilon": "9"}, {"cap_epsilon": 1e400}, {"delta": None}, {"delta": 0}, {"delta": 2}, {"owner": 7},
        {"public": None},
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_no_honest_ledger_holds(known, new, change) -> None:
    body = charge(new, known).body
    tally = Tally()
    tally.feed(new.journal.rows[0])
    with pytest.raises(VerificationError):
        tally.feed(Row(1, "site-a", 0, "ledger.lost", {**body, **change}, "", "", ""))
    assert (tally.epsilon, tally.counted) == (0.0, set())


class TestTheCommand:
    @pytest.fixture
    def heads(self, tmp_path, known, new) -> Path:
        """What a member keeps: the lost ledger, an older head of it, one of another data set, hearsay, a forgery."""
        new.close()
        save_signing_key(tmp_path / "signing.key", KEY)
        other = known._replace(ledger="ab" * 32)
        kept = [known, other, known._replace(ledger="cd" * 32, data_set="9" * 64).by("site-a", KEY)]
        (tmp_path / "peers.json").write_bytes(canonical.dumps({"site-a": [c.to_json() for c in kept]}))
        return tmp_path / "peers.json"

    def command(self, file: Path, *more: str, answer: str | None = None) -> Result:
        own = ["--into", file.parent / "new", "--key", file.parent / "signing.key"]
        return CliRunner().invoke(app, [str(a) for a in ("import", file, *own, *more)], input=answer)

    def test_it_charges_what_the_site_has_signed(self, heads, known) -> None:
        result = self.command(heads, "--lost", "--cap", "3", "--yes")
        assert result.exit_code == 0, result.exception
        assert f"lost ledger {known.ledger[:16]}... charged at its cap: ε 0.0000 before, 3.0000 now" in result.stdout
        rows = verify_rows(parse((heads.parent / "new").read_bytes()), public_hex(KEY), owner="site-a")
        assert [r.body["ledger"] for r in rows if r.kind == "ledger.lost"] == [known.ledger]
        again = self.command(heads, "--lost", "--cap", "3", "--yes")
        assert isinstance(again.exception, UsageError)
        shown = CliRunner().invoke(app, ["show", str(heads.parent / "new"), "--public", public_hex(KEY)])
        assert "charged at the whole cap" in " ".join(shown.stdout.split())
        assert "0.0%" in shown.stdout

    def test_the_join_statements_of_a_run_do_too(self, heads, known) -> None:
        statement = {
            "site": "site-b", "peers": {"site-a": [known.to_json()]}, "head": [3, "1" * 64], "ledger": "2" * 64,
            "data_set": SET, "head_signature": "3" * 128,
        }  # fmt: skip
        before = known._replace(head=Head(1, known.ledger)).by("site-a", KEY)
        own = {**statement, "site": "site-a", "peers": {}, "head": list(before.head), "ledger": before.ledger,
               "head_signature": before.signature}  # fmt: skip
        joins = {"site-b": signed(OTHER, "x", statement), "site-a": signed(KEY, "x", own)}
        file = heads.with_name("joins.json")
        file.write_bytes(canonical.dumps(joins))
        assert self.command(file, "--lost", "--cap", "3", "--yes").exit_code == 0
        assert parse((heads.parent / "new").read_bytes())[1].body["head"] == list(known.head), "the newest head"

    def test_it_asks(self, heads) -> None:
        before = (heads.parent / "new").read_bytes()
        for answer in ("n\n", "\n", ""):
            assert self.command(heads, "--lost", "--cap", "3", answer=answer).exit_code != 0
        assert (heads.parent / "new").read_bytes() == before
        assert self.command(heads, "--lost", "--cap", "3", answer="y\n").exit_code == 0

    @pytest.mark.parametrize(
        "arguments",
        [("--lost", "--yes"), ("--cap", "3"), ("--yes",), ("--delta", "1e-5"),
         ("--lost", "--cap", "3", "--yes", "--left-open"), ("--lost", "--cap", "3", "--yes", "--old-key", "x"),
         ("--lost", "--cap", "3", "--yes", "--public", "ab" * 32)],
        ids=" ".join,
    )  # fmt: skip
    def test_arguments_that_do_not_go_together(self, heads, arguments) -> None:
        before = (heads.parent / "new").read_bytes()
        assert isinstance(self.command(heads, *arguments).exception, UsageError)
        assert (heads.parent / "new").read_bytes() == before

    @pytest.mark.parametrize("cap", ["2", "0", "-1", "nan"])
    def test_a_lower_cap_charges_nothing(self, heads, cap) -> None:
        before = (heads.parent / "new").read_bytes()
        assert isinstance(self.command(heads, "--lost", "--cap", cap, "--yes").exception, VerificationError)
        assert (heads.parent / "new").read_bytes() == before

    @pytest.mark.parametrize(
        "data", [b"", b"7", b"[]", b"{", b'{"site-a":7}', b'{"site-a":[7]}', b'{"s":{}}', b'{"s":{"payload":{}}}',
                 b'{"s":{"payload":{"site":"site-a","head":7}}}', b'{"s":{"payload":7}}', b"{}"], ids=repr
    )  # fmt: skip
    def test_files_that_hold_no_heads(self, heads, data) -> None:
        heads.write_bytes(data)
        assert isinstance(self.command(heads, "--lost", "--cap", "3", "--yes").exception, UsageError)
