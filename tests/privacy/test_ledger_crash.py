"""Death between the charge and its commit: budget may be lost, privacy never."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedveil.common.errors import JournalError
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
