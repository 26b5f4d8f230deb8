"""``fedveil ledger`` on real ledgers: what it says, and what it refuses to say anything about."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedveil.common import canonical, identity
from fedveil.common.errors import BudgetExhausted, UsageError, VerificationError
from fedveil.common.units import Delta, Epsilon, SiteId
from fedveil.deploy.cli.ledger import app
from fedveil.privacy.dp.accounting import Filter, rdp
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.ledger import Ledger

EVENT = SampledGaussian(0.1, 2.0)


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})


@pytest.fixture
def key():
    return identity.new_signing_key()


@pytest.fixture
def file(tmp_path: Path, key) -> Path:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.open(path, "alba", key, lineage="[red]heart", cap=Epsilon(3.0), delta=Delta(1e-5), durable=False)
    for session, steps in (("aa" * 32, 3), ("bb" * 32, 2)):
        ledger.note("plan.accepted", session=session, plan_hash="0" * 64, roster_hash="0" * 64, contract_hash="0" * 64)
        for r in range(1, steps + 1):
            ledger.reserve(session, r, "0" * 64, EVENT)
            ledger.commit(session, r)
    ledger.note("session.end", session="aa" * 32, status="COMPLETED")
    with pytest.raises(BudgetExhausted):
        ledger.reserve("bb" * 32, 9, "0" * 64, SampledGaussian(1.0, 0.5))
    ledger.close()
    return path


def test_show_adds_up(file, key) -> None:
    result = call("show", file, "--public", identity.public_hex(key), "--json")
    found = canonical.loads(result.stdout)
    f = Filter(3.0, 1e-5, found["order"])
    assert found["epsilon_spent"] == pytest.approx(f.epsilon_of(5 * rdp(EVENT, f.order)))
    assert found["fraction_left"] == pytest.approx(1 - 5 * rdp(EVENT, f.order) / f.budget)
    assert found["steps"] == 5
    assert found["signatures_checked"] is True
    first, second = found["sessions"]["aa" * 32], found["sessions"]["bb" * 32]
    assert first["events"] == {"q=0.1 sigma=2": 3}
    assert first["status"] == "COMPLETED"
    assert second["refused"] == 1
    assert first["epsilon_after"] < second["epsilon_after"] == found["epsilon_spent"]


def test_show_is_a_table_and_says_that_nothing_was_checked(file) -> None:
    result = call("show", file)
    assert result.exit_code == 0
    assert "[red]heart" in result.stdout, "a name is text, not markup"
    assert "NOT checked" in result.stdout
    assert "COMPLETED" in result.stdout
    assert "refused 1 times" in result.stdout


def test_verify_needs_the_right_key(file, key) -> None:
    result = call("verify", file, "--public", identity.public_hex(key))
    assert result.exit_code == 0
    assert "chain and signatures hold" in result.stdout
    wrong = identity.public_hex(identity.new_signing_key())
    assert isinstance(call("verify", file, "--public", wrong).exception, VerificationError)
    assert call("verify", file, "--public", identity.public_hex(key).upper()).exit_code == 0
    for command in ("verify", "show", "export"):
        for value in ("zz", "", "0" * 63, " "):
            refused = call(command, file, "--public", value).exception
            assert isinstance(refused, UsageError)
            assert "64 hexadecimal digits" in refused.message
    assert call("verify", file).exit_code == 2


def test_a_roster_names_the_key(file, key, tmp_path) -> None:
    def roster(**keys) -> Path:
        members = tuple(identity.Member(SiteId(s), identity.public_hex(k)) for s, k in keys.items())
        server = identity.Member(identity.SERVER, "0" * 64)
        path = tmp_path / "roster.json"
        path.write_bytes(canonical.dumps(identity.sign_roster(identity.Roster("c", server, members), key)))
        return path

    other = identity.new_signing_key()
    for command in ("verify", "show", "export"):
        assert call(command, file, "--public", roster(alba=key, berg=other)).exit_code == 0
        assert isinstance(call(command, file, "--public", roster(alba=other)).exception, VerificationError)
        assert isinstance(call(command, file, "--public", roster(berg=key)).exception, UsageError)
    for bad in (b"", b"[]", b"{}", b'{"payload": 1}', b"\xff", b"[" * 9999):
        (tmp_path / "bad").write_bytes(bad)
        assert isinstance(call("verify", file, "--public", tmp_path / "bad").exception, UsageError)
    for path in (tmp_path, "/dev/zero", "x" * 5000):
        assert isinstance(call("verify", file, "--public", path).exception, UsageError)


@pytest.mark.parametrize("row", range(3))
def test_a_changed_ledger_is_refused(file, key, row) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:row] + lines[row + 1 :]))
    result = call("verify", file, "--public", identity.public_hex(key))
    assert isinstance(result.exception, VerificationError)
    assert str(file) in result.exception.message


@pytest.mark.parametrize("data", [b"", b"{}\n", b"x", b"\xff\n"])
def test_a_file_that_is_no_ledger(tmp_path, data) -> None:
    path = tmp_path / "other"
    path.write_bytes(data)
    for command in ("show", "export"):
        assert isinstance(call(command, path).exception, VerificationError)


def test_no_file_is_a_wrong_argument_and_no_evidence(tmp_path, file, key) -> None:
    public, secret = identity.public_hex(key), tmp_path / "signing.key"
    identity.save_signing_key(secret, key)
    for path in (tmp_path / "none", tmp_path, Path("/dev/null"), file / "below"):
        for words in (
            ("show", path), ("verify", path, "--public", public), ("export", path),
            ("prove", path, 0, "--out", tmp_path / "p"), ("import", path, "--into", file, "--key", secret),
            ("import", file, "--into", path, "--key", secret),
        ):  # fmt: skip
            refused = call(*words).exception
            assert isinstance(refused, UsageError), (words, refused)
            assert "evidence" not in refused.hint


def test_without_a_key_numbering_and_chain_are_still_checked(file) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    forged = [line.replace(b'"noise_multiplier":2', b'"noise_multiplier":9') for line in lines]
    assert forged != lines
    for spoilt in (lines[:2] + lines[3:], lines[1:], [lines[0], lines[2], lines[1], *lines[3:]], forged):
        file.write_bytes(b"".join(spoilt))
        for command in ("show", "export"):
            assert isinstance(call(command, file).exception, VerificationError)


def test_export_holds_every_row_and_overwrites_nothing(file, key, tmp_path) -> None:
    out = tmp_path / "export.json"
    result = call("export", file, "--public", identity.public_hex(key), "--out", out)
    assert result.exit_code == 0
    document = canonical.loads(out.read_bytes())
    assert b"".join(canonical.dumps(r) + b"\n" for r in document["rows"]) == file.read_bytes()
    assert document["summary"]["head"] == [len(document["rows"]), document["rows"][-1]["hash"]]
    assert out.stat().st_mode & 0o077 == 0
    assert isinstance(call("export", file, "--out", out).exception, UsageError)
    assert canonical.loads(call("export", file).stdout)["rows"] == document["rows"]


@pytest.mark.parametrize("signed", [True, False])
def test_a_row_that_a_power_cut_left_unfinished_is_not_called_evidence(file, key, signed) -> None:
    whole, public = file.read_bytes(), ("--public", identity.public_hex(key)) if signed else ()
    for torn in (b'{"at":1', whole.splitlines()[0][:-1]):
        file.write_bytes(whole + torn)
        error = call("show", file, *public).exception
        assert isinstance(error, VerificationError)
        assert "was cut off" in error.message
        assert "next start drops it" in error.hint
    for changed in (whole + whole.splitlines()[0] + b" x", whole.replace(b'"n":2', b'"n":3', 1) + b'{"at":1'):
        file.write_bytes(changed)
        error = call("show", file, *public).exception
        assert isinstance(error, VerificationError)
        assert "evidence" in error.hint
