"""How long an auditor waits: 10,000 journal rows with 20 distinct (σ, q), in process CPU time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedveil.privacy.dp.events import SampledGaussian
from fedveil.privacy.report.bundle import lines, read

ROWS, LIMIT_S = 10_000, 4.0


@pytest.mark.bench
def test_ten_thousand_rows_with_twenty_mechanisms_are_verified_in_four_seconds(make) -> None:
    rates, noise = (1.0, 0.01, 0.02, 0.05), (400.0, 450.0, 500.0, 550.0, 600.0)
    events = tuple(SampledGaussian(q, sigma) for q in rates for sigma in noise)
    w = make(earlier_steps=ROWS // 4 - 12, earlier_events=events, cap=20.0)
    assert sum(len(lines(data)) for name, data in read(w.folder).files.items() if name.endswith("l")) >= ROWS
    # A process of its own: nothing that the builder computed is remembered, and its imports count.
    code = (
        "import sys, time; from pathlib import Path; from fedveil.privacy.report.verify import verify_report\n"
        "verify_report(Path(sys.argv[1])).raise_for_failure(); print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(w.report)], capture_output=True, text=True, check=True)
    took = float(done.stdout)
    print(f"{ROWS} rows verified in {took:.2f} s of CPU, start of the program included")
    assert took < LIMIT_S
