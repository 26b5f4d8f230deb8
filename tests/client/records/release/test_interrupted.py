"""A release that is broken off by a signal in the middle of its writing: nothing of it stays beside the target."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedveil.common import canonical, identity
from fedveil.common.contract import DataContract, sign_contract

# The command, stopped inside the step that is named first: what it has written by then lies beside the target.
STOPPED = """
import importlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup without this one
module, name = sys.argv.pop(1).split(":")
owner = importlib.import_module(module)
*path, last = name.split(".")
for part in path:
    owner = getattr(owner, part)
changed = "changed" in sys.argv
def wait(*_, **__):
    try:
        time.sleep(600)
    except SystemExit as e:
        if changed:
            raise ImportError("what a library may make of it") from e
        raise
setattr(owner, last, wait)
sys.argv[:] = [a for a in sys.argv if a != "changed"]
from fedveil.common.cli import main
main()
"""
SPEC = "[[quasi]]\nname = 'age'\n[[criterion]]\nis = 'k-anonymity'\nk = 2\n"


def parquet(home: Path) -> tuple[list[object], str, str]:
    """Without a contract; a folder with the draft lies beside the target."""
    pq.write_table(pa.table({"age": [1, 1, 2, 2] * 10}), home / "in.parquet")
    (home / "spec.toml").write_text(SPEC)
    command: list[object] = ["data", "anonymize-parquet", home / "in.parquet", home / "out" / "r.parquet", "--spec"]
    return [*command, home / "spec.toml"], "fedveil.privacy.anonymization.stream:require", "r.parquet"


def csv(home: Path, table: Path, contract: DataContract) -> tuple[list[object], str, str]:
    """Under a contract; so does one here."""
    key = identity.new_signing_key()
    (home / "contract.json").write_bytes(canonical.dumps(sign_contract(contract, key)))
    command: list[object] = ["data", "anonymize", table, "--contract", home / "contract.json"]
    command += ["--signer-public", identity.public_hex(key), "--work", home / "work", "--method", "mondrian"]
    return (
        [*command, "--out", home / "out" / "r.csv"],
        "fedveil.client.records.release.anonymize:require_cells",
        "r.csv",
    )


@pytest.fixture(params=["parquet", "csv"])
def release(request, tmp_path, table, rows, contract) -> tuple[list[object], str, str]:
    """The command, the step in which it is stopped, and the name of what it writes into the folder ``out``."""
    (tmp_path / "out").mkdir()
    return parquet(tmp_path) if request.param == "parquet" else csv(tmp_path, table(rows), contract)


def started(command: list[object], step: str) -> subprocess.Popen[bytes]:
    said = [sys.executable, "-c", STOPPED, step, *map(str, command)]
    return subprocess.Popen(said, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def written(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until something half made lies there."""
    while not any(p.is_file() for p in folder.rglob("*")):
        assert process.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("release", "number"),
    [("parquet", signal.SIGTERM), ("csv", signal.SIGTERM), ("parquet", signal.SIGHUP), ("csv", signal.SIGINT)],
    indirect=["release"],
)
def test_a_signal_leaves_nothing_behind(tmp_path: Path, release, number: signal.Signals) -> None:
    command, step, _ = release
    process = started(command, step)
    written(tmp_path / "out", process)
    process.send_signal(number)
    assert process.wait() == 128 + number
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("release", ["parquet"], indirect=True)
def test_a_signal_that_a_library_turned_into_another_error_still_ends_as_the_signal(tmp_path: Path, release) -> None:
    command, step, _ = release
    process = started([*command, "changed"], step)
    written(tmp_path / "out", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert os.listdir(tmp_path / "out") == []


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path, release) -> None:
    command, step, name = release
    process = started(command, step)
    written(tmp_path / "out", process)
    process.kill()
    process.wait()
    assert os.listdir(tmp_path / "out")  # the control: nobody could have tidied up
    assert started(command, "fedveil.common.cli:unused").wait() == 0
    assert os.listdir(tmp_path / "out") == [name]
