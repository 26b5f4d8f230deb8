"""The two commands of ``fedveil data``, as a user meets them."""

import json
import stat
import subprocess
import sys
import warnings

import pytest

from fedveil.common import identity
from fedveil.common.contract import load_signed
from fedveil.common.errors import AnonymityError, ContractError, DataError, IdentityError, UsageError

with warnings.catch_warnings():  # typer reads a name of click that click has deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    from typer.testing import CliRunner

    from fedveil.deploy.cli.data import app

DRAFT = """
name = "two columns"
version = "1"
purpose = "a test"
unit = "one row = one record"
k = 2
[[columns]]
name = "age"
role = "quasi"
type = "number"
low = 0
high = 100
levels = [50]
[[columns]]
name = "y"
role = "target"
type = "category"
values = ["no", "yes"]
"""


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def signed(tmp_path):
    key = identity.new_signing_key()
    identity.save_signing_key(tmp_path / "consortium.key", key)
    (tmp_path / "draft.toml").write_text(DRAFT)
    out = tmp_path / "contract.json"
    result = run("contract-sign", tmp_path / "draft.toml", "--key", tmp_path / "consortium.key", "--out", out)
    assert result.exit_code == 0, result.output
    contract = load_signed(out, identity.public_hex(key))
    assert contract.hash in result.output.replace("\n", "")
    return out, identity.public_hex(key)


def check(tmp_path, signed, text, **changes):
    (tmp_path / "t.csv").write_text(text)
    options = {"--contract": signed[0], "--signer-public": signed[1], "--work": tmp_path / "work", **changes}
    return run("check", tmp_path / "t.csv", *(a for pair in options.items() for a in pair))


def test_check_passes(tmp_path, signed):
    result = check(tmp_path, signed, "age,y\n20,no\n30,yes\n60,no\n61,no\n")
    assert result.exit_code == 0, result.output
    assert "k-anonymity" in result.output
    assert "fail" not in result.output
    assert (tmp_path / "work" / "released.csv").exists()
    assert stat.S_IMODE((tmp_path / "work" / "commitment.key").stat().st_mode) == 0o600
    again = check(tmp_path, signed, "age,y\n20,no\n30,yes\n")
    assert again.exit_code == 0


def test_check_against_an_earlier_check(tmp_path, signed):
    rows = [f"{age},{y}" for age in (20, 60) for y in ("no", "yes")]
    first = check(tmp_path, signed, "\n".join(["age,y", *rows * 200]), **{"--work": tmp_path / "first"})
    assert first.exit_code == 0, first.output
    assert "has moved" not in first.output
    text = "\n".join(["age,y", *rows * 200, *["20,no"] * 400])
    result = check(tmp_path, signed, text, **{"--against": tmp_path / "first"})
    assert result.exit_code == 0, result.output
    assert "column 'age' has moved from the earlier table by 0.167" in result.output
    told = run("report", tmp_path / "work")
    assert "against the earlier table" in told.output
    missing = check(tmp_path, signed, text, **{"--against": tmp_path / "none"})
    assert type(missing.exception) is DataError


@pytest.mark.parametrize(
    ("text", "error"),
    [("age,y\n20,no\n30,yes\n60,no\n", AnonymityError), ("age,y\n200,no\n", DataError), ("age\n20\n", DataError)],
)
def test_check_fails_with_the_documented_errors(tmp_path, signed, text, error):
    result = check(tmp_path, signed, text)
    assert type(result.exception) is error


def test_check_wants_the_pinned_signer(tmp_path, signed):
    other = identity.public_hex(identity.new_signing_key())
    assert isinstance(check(tmp_path, signed, "age,y\n", **{"--signer-public": other}).exception, ContractError)
    document = json.loads(signed[0].read_text())
    document["payload"]["contract"]["k"] = 3
    signed[0].write_text(json.dumps(document))
    assert isinstance(check(tmp_path, signed, "age,y\n").exception, ContractError)


def test_signing_refuses(tmp_path, signed):
    arguments = ["contract-sign", tmp_path / "draft.toml", "--key", tmp_path / "consortium.key", "--out"]
    assert isinstance(run(*arguments, signed[0]).exception, UsageError)  # an existing file is never overwritten
    (tmp_path / "draft.toml").write_text(DRAFT.replace("levels = [50]", "levels = [500]"))
    assert isinstance(run(*arguments, tmp_path / "new.json").exception, ContractError)
    assert not (tmp_path / "new.json").exists()
    (tmp_path / "draft.toml").write_text(DRAFT)
    (tmp_path / "consortium.key").chmod(0o644)
    assert isinstance(run(*arguments, tmp_path / "new.json").exception, IdentityError)


def test_the_module_itself_is_light():
    code = "import sys, fedveil.deploy.cli.data; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "fedveil.deploy.cli.data" in modules
    assert not {"pyarrow", "torch", "flwr", "pydantic"} & {m.partition(".")[0] for m in modules}


# A table that every command can use; its draft is answered and signed by the fixture agreed.
LINES = [f"{20 + i};{'fm'[i % 2]};{i % 7},5;{('no', 'yes')[i % 3 == 0]}" for i in range(60)]
SAMPLE = "\n".join(["age;sex;dose;y", *LINES, ""])
ANSWERS = {
    "age": 'type = "number"\nlow = 0\nhigh = 100\nlevels = { every = 50 }',
    "sex": 'type = "category"\nvalues = ["f", "m"]\nlevels = [["f", "m"]]',
    "dose": 'type = "number"\nlow = 0\nhigh = 10',
    "y": 'type = "category"\nvalues = ["no", "yes"]',
}


def drafted(tmp_path, roles):
    (tmp_path / "s.csv").write_text(SAMPLE)
    out = tmp_path / "drafted.toml"
    arguments = ["contract", "init", tmp_path / "s.csv", "--out", out, "--name", "sample"]
    result = CliRunner().invoke(app, [str(a) for a in arguments], input="\n".join(roles) + "\n")
    return out, result


def test_a_draft_guesses_no_role(tmp_path):
    out, result = drafted(tmp_path, ["", "", "nonsense", "", ""])
    assert result.exit_code == 0, result.output
    assert "4 of 4 columns still have no role" in result.output
    assert "that is no role" in result.output
    text = out.read_text()
    assert text.count('role = ""') == 4
    assert "looks like: number" in text
    for value in ("20", "fm", "79"):
        assert value not in text.split("[[columns]]", 1)[1]  # no value of the sample, no bound taken from it
    key = identity.new_signing_key()
    identity.save_signing_key(tmp_path / "k", key)
    signing = run("contract", "sign", out, "--key", tmp_path / "k", "--out", tmp_path / "c.json")
    assert isinstance(signing.exception, ContractError)
    assert "4 columns have no role" in str(signing.exception)
    assert not (tmp_path / "c.json").exists()
    assert isinstance(drafted(tmp_path, ["", "", "", ""])[1].exception, UsageError)  # never overwritten


def test_a_draft_without_questions(tmp_path):
    (tmp_path / "s.csv").write_text(SAMPLE)
    result = run("contract", "init", tmp_path / "s.csv", "--out", tmp_path / "d.toml", "--no-ask")
    assert "4 of 4 columns" in result.output


@pytest.fixture
def agreed(tmp_path):
    """A contract from a sample, answered, filled in and signed: (path, signer, table)."""
    out, result = drafted(tmp_path, ["quasi", "quasi", "feature", "target"])
    assert "0 of 4 columns" in result.output
    text = out.read_text().replace('purpose = ""', 'purpose = "a test"')
    for name, answer in ANSWERS.items():
        text = text.replace(f'name = "{name}"\n', f'name = "{name}"\n{answer}\n')
    out.write_text(text)
    key = identity.new_signing_key()
    identity.save_signing_key(tmp_path / "k", key)
    result = run("contract", "sign", out, "--key", tmp_path / "k", "--out", tmp_path / "c.json")
    assert result.exit_code == 0, (result.output, result.exception)
    return tmp_path / "c.json", identity.public_hex(key), tmp_path / "s.csv"


def options(agreed):
    return "--contract", agreed[0], "--signer-public", agreed[1]


def test_a_contract_from_a_sample(tmp_path, agreed):
    result = run("contract", "check", agreed[0], "--signer-public", agreed[1])
    assert result.exit_code == 0, result.output
    assert "at most 1 released rows" in result.output
    assert "signature holds" in result.output
    assert "not signed" in run("contract", "check", tmp_path / "drafted.toml").output
    work = tmp_path / "w"
    result = run("check", agreed[2], *options(agreed), "--work", work, "--decimal", ",")
    assert result.exit_code == 0, (result.output, result.exception)
    assert isinstance(run("check", agreed[2], *options(agreed), "--work", work).exception, DataError)


def test_profile_shows_no_value(tmp_path):
    (tmp_path / "s.csv").write_text(SAMPLE.replace("age", "phone"))
    result = run("profile", tmp_path / "s.csv", "--out", tmp_path / "p.json")
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads((tmp_path / "p.json").read_text())
    assert [c["looks_like"] for c in found["columns"]] == ["number", "category", "number", "category"]
    assert "telephone" in str(found["columns"][0]["remarks"])
    assert "decimal commas" in str(found["columns"][2]["remarks"])
    assert stat.S_IMODE((tmp_path / "p.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("method", ["fixed", "mondrian", "auto", "optimal"])
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_anonymize_verify_risk_report(tmp_path, agreed, method, ending):
    work, out = tmp_path / "w", tmp_path / f"out{ending}"
    result = run(
        "anonymize", agreed[2], *options(agreed), "--work", work, "--decimal", ",", "--method", method, "--out", out
    )
    assert result.exit_code == 0, (result.output, result.exception)
    assert "k-anonymity" in result.output
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    result = run("verify", out, *options(agreed))
    assert result.exit_code == 0, (result.output, result.exception)
    result = run("risk", out, *options(agreed))
    assert result.exit_code == 0, (result.output, result.exception)
    assert "60 rows" in result.output
    highest = float(next(x for x in result.output.splitlines() if "prosecutor" in x).split()[-2])
    assert highest <= 0.2
    result = run("report", work)
    assert result.exit_code == 0, (result.output, result.exception)


def test_fixed_release_and_report(tmp_path, agreed):
    work = tmp_path / "w"
    result = run("anonymize", agreed[2], *options(agreed), "--work", work, "--decimal", ",")
    assert result.exit_code == 0, (result.output, result.exception)
    assert run("verify", work / "released.csv", *options(agreed)).exit_code == 0
    assert "unchanged" in run("report", work).output
    key = (work / "commitment.key").rename(tmp_path / "key")  # a copy of the folder, say, without its secret
    assert "cannot be checked" in run("report", work).output
    assert not (work / "commitment.key").exists()
    key.rename(work / "commitment.key")
    released = work / "released.csv"
    lines = released.read_text().splitlines()
    released.write_text(
        "\n".join([lines[0], *(x for x in lines[1:] if "[50" not in x), next(x for x in lines if "[50" in x)])
    )
    failed = run("verify", released, *options(agreed))
    assert isinstance(failed.exception, AnonymityError)
    assert "fails in 1 classes" in str(failed.exception)
    record = work / "lineage.json"
    record.write_bytes(record.read_bytes().replace(b'"rows":60', b'"rows":61'))
    assert "changed after it was signed" in str(run("report", work).exception)
    assert isinstance(run("report", tmp_path / "none").exception, DataError)


def test_sources_by_options(tmp_path, agreed):
    work = ("--work", tmp_path / "w")
    url = tmp_path / "url"
    url.write_text("sqlite:///x.db\n")
    assert "can be read by others" in str(
        run("check", "db", *options(agreed), *work, "--url-file", url, "--query", "SELECT 1").exception
    )
    url.chmod(0o600)
    assert isinstance(run("check", "db", *options(agreed), *work, "--url-file", url).exception, UsageError)
    assert isinstance(run("check", agreed[2], *options(agreed), *work, "--query", "SELECT 1").exception, UsageError)
    assert isinstance(run("check", "x.ndjson", *options(agreed), *work).exception, UsageError)
    assert isinstance(run("check", "x.duckdb", *options(agreed), *work).exception, UsageError)
    assert "unknown" in str(run("anonymize", agreed[2], *options(agreed), *work, "--method", "magic").exception)
