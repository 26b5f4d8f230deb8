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

    from fedveil.client.cli_data import app

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
    code = "import sys, fedveil.client.cli_data; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "fedveil.client.cli_data" in modules
    assert not {"pyarrow", "torch", "flwr", "pydantic"} & {m.partition(".")[0] for m in modules}
