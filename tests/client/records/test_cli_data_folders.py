"""Odd column names on the terminal, and work folders whose files speak of one table."""

import json
import tomllib
import warnings

import pytest

from fedveil.client.records import lineage
from fedveil.client.records.release.pipeline import ingest
from fedveil.common import canonical, identity
from fedveil.common.contract import DataContract, load_signed, sign_contract
from fedveil.common.errors import DataError, UsageError, VerificationError

with warnings.catch_warnings():  # typer reads a name of click that click has deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    from typer.testing import CliRunner

    from fedveil.deploy.cli.data import app

ODD = ["rate [/min]", "chol [mg/dl]", "[bold]x[/bold]"]
COLUMNS = [
    {"name": "age", "role": "quasi", "type": "number", "low": 0, "high": 100, "levels": [50]},
    {"name": ODD[0], "role": "feature", "type": "number", "low": 0, "high": 300},
    {"name": ODD[1], "role": "sensitive", "type": "category", "values": ["low", "high"]},
    {"name": ODD[2], "role": "target", "type": "category", "values": ["no", "yes"]},
]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def write_table(path, rows=60):
    lines = [f"{20 + i},{i % 9},{'low' if i % 2 else 'high'},{'no' if i % 3 else 'yes'}" for i in range(rows)]
    path.write_text("\n".join([",".join(["age", *ODD]), *lines, ""]))
    return path


@pytest.fixture
def agreed(tmp_path):
    key = identity.new_signing_key()
    base = {"name": "[red]c[/red]", "version": "1", "purpose": "p", "unit": "u", "k": 5, "l": 2}
    contract = DataContract.model_validate({**base, "columns": COLUMNS})
    (tmp_path / "c.json").write_bytes(canonical.dumps(sign_contract(contract, key)))
    return ("--contract", tmp_path / "c.json", "--signer-public", identity.public_hex(key))


def test_column_names_are_shown_as_they_are(tmp_path, agreed):
    """It went wrong once: ``rate [/min]`` was a closing tag without an opening one, and ``[mg/dl]`` vanished."""
    table, work = write_table(tmp_path / "t.csv"), tmp_path / "w"
    out = tmp_path / "r.parquet"
    told = {
        "profile": run("profile", table),
        "contract check": run("contract", "check", *agreed[1:]),
        "check": run("check", table, *agreed, "--work", work),
        "report": run("report", work),
        "anonymize": run("anonymize", table, *agreed, "--work", work, "--method", "mondrian", "--out", out),
        "verify": run("verify", out, *agreed),
        "risk": run("risk", out, *agreed),
    }
    for name, result in told.items():
        assert result.exit_code == 0, (name, result.output, result.exception)
    for name in ("profile", "contract check", "report"):
        assert all(column in told[name].output for column in ODD), name
    assert all(ODD[1] in told[name].output for name in ("anonymize", "verify"))
    assert "[red]c[/red] 1" in told["contract check"].output


def test_a_draft_of_a_file_that_needs_declaring(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("alter;größe\n30;groß\n".encode("latin-1"))
    refused = run("contract", "init", path, "--out", tmp_path / "d.toml", "--no-ask")
    assert isinstance(refused.exception, DataError)
    done = run("contract", "init", path, "--out", tmp_path / "d.toml", "--no-ask", "--encoding", "latin-1",
               "--delimiter", ";")  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    assert 'name = "größe"' in (tmp_path / "d.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["mondrian", "optimal", "peel", "auto", "fixed"])
def test_every_method_leaves_a_signed_record_of_its_own_table(tmp_path, agreed, method):
    work, out = tmp_path / "w", tmp_path / f"{method}.csv"
    assert run("check", write_table(tmp_path / "old.csv", 80), *agreed, "--work", work).exit_code == 0
    before = (work / "lineage.json").read_bytes()
    table = write_table(tmp_path / "t.csv")
    done = run("anonymize", table, *agreed, "--work", work, "--method", method, "--out", out)
    assert done.exit_code == 0, (done.output, done.exception)
    assert (work / "lineage.json").read_bytes() != before
    assert not (work / "released.csv").exists()  # it was the earlier table's
    record = json.loads((work / "lineage.json").read_text())
    assert record["released"]["path"] == str(out)
    assert record["released"]["rows"] == 60
    assert record["evidence"]["recoding"] == method or method == "auto"
    assert record["evidence"]["stability_factor"] == (1 if method == "fixed" else None)
    assert {s["name"] for s in record["stages"]} >= {"read", "suppression"}
    assert "unchanged" in run("report", work).output
    again = run("check", table, *agreed, "--work", tmp_path / "w2", "--against", work)
    assert again.exit_code == 0, (again.output, again.exception)
    out.write_text(out.read_text() + "\n")
    assert "not the release that the signed lineage record names" in str(run("report", work).exception)


def test_a_refused_out_touches_nothing(tmp_path, agreed):
    work, table = tmp_path / "w", write_table(tmp_path / "t.csv")
    assert run("check", table, *agreed, "--work", work).exit_code == 0
    files = {p.name: p.read_bytes() for p in work.iterdir()}
    for out in (table, tmp_path / "r.xlsx", tmp_path / "misspelt" / "r.csv", work / "lineage.json"):
        refused = run("anonymize", table, *agreed, "--work", work, "--method", "mondrian", "--out", out)
        assert isinstance(refused.exception, UsageError)
    assert {p.name: p.read_bytes() for p in work.iterdir()} == files


def test_a_release_by_default_lies_in_the_folder(tmp_path, agreed):
    work, table = tmp_path / "w", write_table(tmp_path / "t.csv")
    assert run("anonymize", table, *agreed, "--work", work, "--method", "mondrian").exit_code == 0
    assert json.loads((work / "lineage.json").read_text())["released"]["path"] == "anonymized.csv"
    assert "unchanged" in run("report", work).output
    again = run("anonymize", write_table(table, 80), *agreed, "--work", work, "--method", "optimal")
    assert again.exit_code == 0, (again.output, again.exception)
    assert json.loads((work / "lineage.json").read_text())["released"]["rows"] == 80
    assert "report and release are unchanged" in run("report", work).output
    assert run("check", table, *agreed, "--work", work).exit_code == 0
    assert not (work / "anonymized.csv").exists()
    assert (work / "released.csv").exists()


def test_only_the_release_that_the_record_names_is_replaced(tmp_path, agreed):
    work, table = tmp_path / "w", write_table(tmp_path / "t.csv")
    arguments = ("anonymize", table, *agreed, "--work", work, "--method", "mondrian")
    assert run(*arguments).exit_code == 0
    (work / "anonymized.csv").write_text("a file of the site's own")
    files = {p.name: p.read_bytes() for p in work.iterdir()}
    assert isinstance(run(*arguments).exception, UsageError)
    assert {p.name: p.read_bytes() for p in work.iterdir()} == files
    outside = tmp_path / "r.csv"
    assert run(*arguments, "--out", outside).exit_code == 0
    assert run(*arguments, "--out", tmp_path / "s.csv").exit_code == 0
    assert outside.exists()
    assert (work / "anonymized.csv").read_text() == "a file of the site's own"


def test_a_release_that_is_gone_is_not_called_unchanged(tmp_path, agreed):
    """It went wrong once: the release was moved away, and the report still said that it was unchanged."""
    work, table, out = tmp_path / "w", write_table(tmp_path / "t.csv"), tmp_path / "r.csv"
    assert run("anonymize", table, *agreed, "--work", work, "--method", "mondrian", "--out", out).exit_code == 0
    out.rename(tmp_path / "moved.csv")
    told = run("report", work)
    assert told.exit_code == 0
    assert "the report is unchanged; the release" in told.output
    assert "is not there and was not compared" in told.output
    assert "release are unchanged" not in told.output


@pytest.mark.parametrize("fails", ["client.records.release.pipeline.record_of", "client.records.lineage.write_signed",
                                   "common.identity.signed"])  # fmt: skip
@pytest.mark.parametrize("method", ["fixed", "mondrian"])
def test_no_release_without_its_signed_record(tmp_path, agreed, monkeypatch, fails, method):
    work, table = tmp_path / "w", write_table(tmp_path / "t.csv")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"fedveil.{fails}", full)
    refused = run("anonymize", table, *agreed, "--work", work, "--method", method)
    assert isinstance(refused.exception, OSError)
    assert not [*work.glob("*.csv"), *work.glob(".part-*"), *work.glob("lineage*")]


def test_the_evidence_of_every_method_has_one_form(tmp_path, agreed):
    work, table = tmp_path / "w", write_table(tmp_path / "t.csv")
    said = []
    for method in ("fixed", "mondrian"):
        assert run("anonymize", table, *agreed, "--work", work, "--method", method).exit_code == 0
        said.append(json.loads((work / "lineage.json").read_text())["evidence"]["criteria"])
    assert said[0] == said[1]
    assert said[0]["k-anonymity"] == {"met": True, "required": 5}


def test_an_edited_report_is_not_called_unchanged(tmp_path, agreed):
    """It went wrong once: ``quality.json`` was edited by hand, and the lineage record still "unchanged"."""
    work, table = tmp_path / "w", write_table(tmp_path / "t.csv")
    assert run("check", table, *agreed, "--work", work).exit_code == 0
    quality = json.loads((work / "quality.json").read_text())
    (work / "quality.json").write_bytes(canonical.dumps({**quality, "notes": ["all is well"]}))
    refused = run("report", work)
    assert isinstance(refused.exception, VerificationError)
    assert "all is well" not in refused.output


@pytest.mark.parametrize(
    "what", ["{}", "[]", "x", '{"stages": [], "columns": [], "problems": [], "notes": []}', "null"]
)
def test_a_file_that_is_no_report_is_named(tmp_path, what):
    (tmp_path / "quality.json").write_text(what)
    refused = run("report", tmp_path)
    assert isinstance(refused.exception, DataError)
    assert "not a quality report" in str(refused.exception)


def test_the_report_of_a_refused_table_says_so(tmp_path, agreed):
    work, table = tmp_path / "w", write_table(tmp_path / "t.csv")
    table.write_text(table.read_text().replace("high", "unheard of"))
    assert isinstance(run("check", table, *agreed, "--work", work).exception, DataError)
    told = run("report", work)
    assert told.exit_code == 0, (told.output, told.exception)
    assert "was not accepted" in told.output


def test_a_header_with_a_control_character_gives_a_draft_that_reads(tmp_path):
    path, out = tmp_path / "t.csv", tmp_path / "d.toml"
    path.write_text('a\x7fb,"c\\d"\n1,2\n')
    assert run("contract", "init", path, "--out", out, "--no-ask", "--name", "x\x7fy").exit_code == 0
    read = tomllib.loads(out.read_text())
    assert ([c["name"] for c in read["columns"]], read["name"]) == (["a\x7fb", "c\\d"], "x\x7fy")


def test_a_record_that_the_site_signed(tmp_path, agreed):
    key, work = identity.new_signing_key(), tmp_path / "w"
    table, contract = write_table(tmp_path / "t.csv"), load_signed(agreed[1], agreed[3])
    ingest(table, contract, work, secret=lineage.site_secret(work), key=key)
    assert isinstance(run("report", work).exception, VerificationError)
    told = run("report", work, "--public", identity.public_hex(key))
    assert "signed by the given key; report and release are unchanged" in told.output


@pytest.mark.parametrize("method", ["fixed", "mondrian"])
def test_a_folder_is_not_cleared_of_the_table_that_goes_in(tmp_path, agreed, method):
    """The folder's own release as the next one's source: clearing the folder would take the only copy away."""
    work, table = tmp_path / "w", write_table(tmp_path / "t.csv")
    assert run("anonymize", table, *agreed, "--work", work, "--method", "mondrian").exit_code == 0
    own = work / "anonymized.csv"
    before = {p: p.read_bytes() for p in work.iterdir() if p.is_file()}
    refused = run("anonymize", own, *agreed, "--work", work, "--method", method, "--out", work / "again.csv")
    assert isinstance(refused.exception, UsageError), refused.output
    assert "--work" in refused.exception.hint
    assert {p: p.read_bytes() for p in work.iterdir() if p.is_file()} == before
