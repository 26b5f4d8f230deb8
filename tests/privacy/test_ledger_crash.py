"""Death between the charge and its commit: budget may be lost, privacy never."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedveil.common.errors import JournalError, VerificationError
from fedveil.common.identity import load_signing_key, new_signing_key, save_signing_key
from fedveil.common.units import Delta, Epsilon
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.ledger import Ledger

SITE = """
import sys, os, signal
from pathlib import Path
from fedveil.common.identity import load_signing_key
from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.ledger import Ledger

folder, when = Path(sys.argv[1]), sys.argv[2]
ledger = Ledger.open(folder / "ledger", "site-a", load_signing_key(folder / "key"), lineage="x", cap=4.0, delta=1e-5)
event = SampledGaussian(1.0, 5.0)
ledger.reserve("run-1", 1, "a" * 64, event)
ledger.commit("run-1", 1)
if when == "before":
    os.kill(os.getpid(), signal.SIGKILL)
if when == "torn":
    real = os.write
    os.write = lambda fd, data: (real(fd, bytes(data)[:100]), os.kill(os.getpid(), signal.SIGKILL))[0]
ledger.reserve("run-1", 2, "a" * 64, event)
if when == "reserved":
    os.kill(os.getpid(), signal.SIGKILL)
ledger.commit("run-1", 2)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("when", "charged", "kinds"), [
    ("before", 1, ["ledger.open", "spend", "commit"]),
    ("torn", 1, ["ledger.open", "spend", "commit", "journal.repaired"]),
    ("reserved", 2, ["ledger.open", "spend", "commit", "spend"]),
    ("committed", 2, ["ledger.open", "spend", "commit", "spend", "commit"]),
])  # fmt: skip
def test_killed(tmp_path: Path, when, charged, kinds) -> None:
    save_signing_key(tmp_path / "key", new_signing_key())
    process = subprocess.run([sys.executable, "-c", SITE, str(tmp_path), when], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    # the lock died with its process; the charge did not
    ledger = Ledger.open(
        tmp_path / "ledger", "site-a", load_signing_key(tmp_path / "key"),
        lineage="x", cap=Epsilon(4.0), delta=Delta(1e-5),
    )  # fmt: skip
    assert [r.kind for r in ledger.journal.rows] == kinds
    assert ledger.tally.by_round.keys() == {("run-1", i + 1) for i in range(charged)}
    assert ledger.tally.epsilon > 0
    if when == "reserved":
        assert ("run-1", 2) not in ledger.tally.committed
    if charged == 2:
        with pytest.raises(JournalError, match="charged before"):
            ledger.reserve("run-1", 2, "a" * 64, SampledGaussian(1.0, 5.0))
    ledger.close()
    assert os.stat(tmp_path / "ledger").st_mode & 0o777 == 0o600


IMPORT = """
import sys, os, signal
from pathlib import Path
from fedveil.common.identity import load_signing_key
from fedveil.privacy.ledger import Ledger

folder, last = Path(sys.argv[1]), int(sys.argv[2])
key = load_signing_key(folder / "key")
new = Ledger.open(folder / "new", "site-a", key, lineage="new", cap=4.0, delta=1e-5)
calls, write, fsync = 0, os.write, os.fsync

def dies(half):
    global calls
    calls += 1
    if calls == last:
        half()
        os.kill(os.getpid(), signal.SIGKILL)

os.write = lambda fd, data: (dies(lambda: write(fd, bytes(data)[:100])), write(fd, data))[1]
os.fsync = lambda fd: (dies(lambda: None), fsync(fd))[1]
new.take_over(folder / "old", key)
"""


@pytest.mark.parametrize("last", [1, 2, 3, 4, 5, 6])
def test_killed_while_an_older_ledger_is_taken_over(tmp_path: Path, last: int) -> None:
    """At every write and every fsync: never imported while the old one is open, and the second attempt completes it."""
    key, event = new_signing_key(), SampledGaussian(1.0, 5.0)
    save_signing_key(tmp_path / "key", key)
    for name in ("old", "new"):
        ledger = Ledger.open(tmp_path / name, "site-a", key, lineage=name, cap=Epsilon(4.0), delta=Delta(1e-5))
        if name == "old":
            ledger.reserve("run-1", 1, "a" * 64, event)
        ledger.close()
    process = subprocess.run([sys.executable, "-c", IMPORT, str(tmp_path), str(last)], capture_output=True, text=True)
    died = process.returncode == -signal.SIGKILL
    assert died == (last < 6), process.stderr
    rows = {name: (tmp_path / name).read_bytes() for name in ("old", "new")}
    whole = {name: data[: data.rfind(b"\n") + 1] for name, data in rows.items()}
    assert b"ledger.import" not in whole["new"] or b"ledger.closed" in whole["old"]
    new = Ledger.open(tmp_path / "new", "site-a", key, lineage="new", cap=Epsilon(4.0), delta=Delta(1e-5))
    if new.tally.imported:
        with pytest.raises(VerificationError, match="counted here already"):
            new.take_over(tmp_path / "old", key)
    else:
        new.take_over(tmp_path / "old", key)
    assert new.tally.events == [event]
    new.close()
    assert (tmp_path / "old").read_bytes().count(b'"kind":"ledger.closed"') == 1
    with pytest.raises(JournalError, match="was closed"):
        Ledger.open(tmp_path / "old", "site-a", key, lineage="old", cap=Epsilon(4.0), delta=Delta(1e-5))
