"""``fedveil audit`` as a user meets it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from fedveil.common import canonical, identity
from fedveil.common.errors import UsageError, VerificationError
from fedveil.deploy.cli.audit import app
from fedveil.privacy.report import row_proof
from fedveil.privacy.report.countersign import countersign, see
from fedveil.privacy.report.verify import verify_report


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_verify_says_what_was_checked(honest) -> None:
    result = call("verify", honest.report, "--consortium-key", honest.public)
    assert result.exit_code == 0
    assert "Every check passed" in result.stdout
    assert "model chain" in result.stdout
    assert "not pinned" not in result.stdout.lower()


def test_verify_takes_the_folder_and_a_key_file_and_warns_without_one(honest, tmp_path) -> None:
    pin = tmp_path / "consortium.pub"
    pin.write_text(honest.public + "\n")
    assert call("verify", honest.folder, "--consortium-key", pin).exit_code == 0
    result = call("verify", honest.folder)
    assert result.exit_code == 0
    assert "NOT pinned" in result.stdout
    assert "taken from the bundle" in result.stdout
    assert isinstance(call("verify", honest.folder, "--consortium-key", "abc").exception, UsageError)


@pytest.mark.parametrize("held", ["", "\n", "  \n\n", "abc\n", "0" * 63, "g" * 64, "0" * 300, "\ufeff" + "0" * 64])
@pytest.mark.parametrize("command", ["verify", "render", "sign", "row", "pdf"])
def test_a_key_file_without_a_key_is_no_pinned_key(spoilt, tmp_path, held, command) -> None:
    pin, key, proof = tmp_path / "empty.pub", tmp_path / "signing.key", tmp_path / "proof.json"
    pin.write_text(held, encoding="utf-8")
    identity.save_signing_key(key, spoilt.sites["alba"])
    proof.write_bytes(canonical.dumps(row_proof.prove(spoilt.folder / "journals" / "alba.jsonl", 1)))
    more = {"sign": ["--key", key], "row": ["--report", spoilt.report]}
    target = proof if command == "row" else spoilt.report
    for given in (pin, held):
        refused = call(command, target, *more.get(command, []), "--consortium-key", given)
        assert isinstance(refused.exception, UsageError), (command, held)
    assert not (spoilt.folder / "signatures.json").exists()
    assert not (spoilt.folder / "report.html").exists()


@pytest.mark.parametrize("key", ["", " ", "abc", "0" * 63])
def test_pinned_is_what_the_roster_was_checked_under(honest, tmp_path, key) -> None:
    found = verify_report(honest.report, consortium_key=key)
    assert not found.pinned
    assert found.failed is not None
    assert found.failed.name == "roster"
    with pytest.raises(VerificationError):
        see(honest.report, key)
    proof = tmp_path / "proof.json"
    proof.write_bytes(canonical.dumps(row_proof.prove(honest.folder / "journal.jsonl", 1)))
    with pytest.raises(VerificationError, match="that was given"):
        row_proof.check(proof, honest.report, key)
    assert verify_report(honest.report, consortium_key=f" {honest.public.upper()}\n").pinned
    ledger = honest.folder / "journals" / "alba.jsonl"
    for refused in (
        call("compare", ledger, ledger, "--public", key),
        call("local", tmp_path, "--ledger", ledger, "--public", key),
    ):
        assert isinstance(refused.exception, UsageError)


def test_a_failed_check_is_named_and_has_the_exit_code(spoilt) -> None:
    path = spoilt.folder / "journals" / "cava.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    result = call("verify", spoilt.report)
    assert isinstance(result.exception, VerificationError)
    assert result.exception.exit_code == 60
    assert "ledger of cava" in result.exception.message
    assert "FAILED" in result.stdout
    assert "Every check passed" not in result.stdout


def test_as_many_sites_must_have_signed_as_were_asked_for(spoilt) -> None:
    def found(required: int):
        return call("verify", spoilt.report, "--require-signatures", required)

    assert found(0).exit_code == 0
    refused = found(1)
    assert isinstance(refused.exception, VerificationError)
    assert "countersignatures: 0 of 4 sites signed, 1 are required" in refused.exception.message
    for site in ("alba", "dorn"):
        countersign(spoilt.report, spoilt.sites[site], spoilt.public)
    assert found(2).exit_code == 0
    assert "2 of 4 sites signed, 3 are required" in str(found(3).exception)
    assert isinstance(found(5).exception, VerificationError), "more than there are sites"
    assert found(-1).exit_code == 2
    held = canonical.loads((spoilt.folder / "signatures.json").read_bytes())
    spoilt.json("signatures.json", {"alba": held["alba"], "berg": held["dorn"]})
    assert "countersignatures" in str(found(2).exception), "a signature counts once, and for its own site"


def test_json_is_for_programs(spoilt) -> None:
    found = canonical.loads(call("verify", spoilt.report, "--json").stdout)
    assert found["ok"] is True
    assert found["consortium_key_pinned"] is False
    (spoilt.folder / "joins.json").write_bytes(b"{}")
    result = call("verify", spoilt.report, "--json")
    found = canonical.loads(result.stdout)
    assert found["ok"] is False
    assert found["claim"] == ""
    assert isinstance(result.exception, VerificationError)


def test_markup_in_a_report_does_not_reach_the_terminal(spoilt) -> None:
    path = spoilt.folder / "journals" / "[bold]x[/].jsonl"
    try:
        path.write_bytes(b"")
    except FileNotFoundError:
        path = spoilt.folder / "journals" / "[bold]x.jsonl"
        path.write_bytes(b"")
    result = call("verify", spoilt.report)
    assert "[bold]x" in result.stdout


def test_a_report_can_be_written_again_and_shown(spoilt, tmp_path) -> None:
    key = tmp_path / "signing.key"
    identity.save_signing_key(key, spoilt.server)
    before = canonical.loads(spoilt.report.read_bytes())["payload"]
    spoilt.report.unlink()
    result = call("report", spoilt.folder, "--key", key)
    assert result.exit_code == 0, result.exception
    after = canonical.loads(spoilt.report.read_bytes())["payload"]
    assert {**before, "written_at": 0} == {**after, "written_at": 0}
    (spoilt.folder / "report.html").unlink()
    result = call("render", spoilt.report)
    assert result.exit_code == 0
    assert str(spoilt.folder / "report.html") in result.stdout.replace("\n", "")
    assert (spoilt.folder / "report.html").is_file()


@pytest.mark.parametrize(
    "command",
    [
        ("verify",), ("render",), ("pdf",), ("report",), ("local", "--ledger", "/nope/ledger.jsonl"),
        ("sign", "--key", "/nope/signing.key"),
    ],
)  # fmt: skip
def test_a_missing_path_is_a_usage_error_that_names_it_whole_and_says_what_to_give(tmp_path, command) -> None:
    missing = tmp_path / "runs" / "nope"
    refused = call(command[0], missing, *command[1:]).exception
    assert isinstance(refused, UsageError)
    assert str(missing) in refused.message
    assert refused.hint.startswith("give ")
    assert not missing.exists()


def test_every_file_that_audit_takes_beside_a_report_is_looked_for_first(spoilt, tmp_path) -> None:
    """Each is named whole. Nothing was signed or written for it."""
    missing, key = tmp_path / "runs" / "nope.jsonl", tmp_path / "signing.key"
    identity.save_signing_key(key, spoilt.sites["alba"])
    proof = tmp_path / "proof.json"
    proof.write_bytes(canonical.dumps(row_proof.prove(spoilt.folder / "journals" / "alba.jsonl", 1)))
    before = sorted(spoilt.folder.rglob("*"))
    for refused in (
        call("row", missing, "--report", spoilt.report),
        call("row", proof, "--report", missing),
        call("compare", missing, spoilt.folder),
        call("compare", spoilt.folder, missing),
        call("local", tmp_path, "--ledger", missing),
        call("local", tmp_path, "--ledger", spoilt.folder / "journals" / "alba.jsonl", "--report", missing),
        call("sign", spoilt.report, "--key", key, "--ledger", missing),
        call("report", spoilt.folder, "--key", key, "--audit", missing),
    ):
        assert isinstance(refused.exception, UsageError), refused.exception
        assert str(missing) in refused.exception.message
        assert refused.exception.hint
    assert sorted(spoilt.folder.rglob("*")) == before


def test_a_run_whose_report_was_not_written_is_told_apart_from_one_that_fails(spoilt) -> None:
    spoilt.report.unlink()
    refused = call("verify", spoilt.folder).exception
    assert isinstance(refused, UsageError)
    assert str(spoilt.report) in refused.message


@pytest.mark.parametrize("command", [["verify"], ["report"], ["render"]])
def test_missing_arguments_are_usage_errors(command) -> None:
    assert call(*command).exit_code == 2
