"""The demo: its consortium, what it does when a process dies, and (slow) the whole command."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from fedveil.common import identity
from fedveil.common.errors import DataError, RunAborted, UsageError
from fedveil.deploy.lab import demo, demo_hospitals
from fedveil.deploy.lab.demo_hospitals import HOSPITALS
from fedveil.privacy.report.verify import verify_report


class TestWorld:
    def test_the_public_quarter_belongs_to_no_hospital_and_nobody_is_lost(self):
        for seed in range(3):
            s = demo_hospitals.split(seed)
            rows = np.concatenate([s.public, *s.hospitals])
            assert sorted(rows) == list(range(442))
            assert len(s.public) == 111
            assert {len(h) for h in s.hospitals} <= {82, 83}

    def test_the_contract_holds_for_every_split_without_suppression(self):
        values, agreed = demo_hospitals.records(), demo_hospitals.contract()
        assert agreed.k == 5
        assert agreed.l == 2
        for seed in range(20):
            for rows in demo_hospitals.split(seed).hospitals:
                part = values[rows]
                for old, sex in ((False, 1), (False, 2), (True, 1), (True, 2)):
                    members = part[((part[:, 0] >= 50) == old) & (part[:, 1] == sex)]
                    assert len(members) >= 5
                    assert len(set(members[:, -1] > 140.5)) == 2

    def test_the_bounds_are_wide_enough_and_the_features_scaled(self):
        X, y = demo_hospitals.encoded(demo_hospitals.records())
        assert X.shape == (442, demo_hospitals.contract().width)
        assert np.abs(X).max() <= 1
        assert abs(y.mean() - 0.5) < 0.02

    def test_lay_out_is_repeatable_up_to_its_keys(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            demo_hospitals.lay_out(tmp_path / name, 5000, seed=4)
        for path in ("public.csv", "hospital-east/patients.csv", "federation.toml", "hospital-west/site.toml"):
            assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
        key = "pki/sites/hospital-east/signing.key"
        assert (tmp_path / "a" / key).read_bytes() != (tmp_path / "b" / key).read_bytes()
        held = {p.parent.name for p in (tmp_path / "a").rglob("patients.csv")}
        assert held == set(HOSPITALS)


FOR_EVER = "import time; time.sleep(3600)"


def process(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.fixture
def started(tmp_path, request):
    """Stand-ins for the server and the hospitals, each a line of Python."""

    def make(server: str, first: str = "", others: str = "") -> demo._Processes:
        for name in ("server", *HOSPITALS):
            (tmp_path / f"{name}.log").write_text(f"some line\n\nwhat {name} said last\n")
        sites = {h: process(first if h == HOSPITALS[0] else others) for h in HOSPITALS}
        p = demo._Processes(process(server), sites, tmp_path)
        request.addfinalizer(p.stop)
        return p

    (tmp_path / "run").mkdir()
    return make


FACTS = {"round": 1, "epsilon_opened": 0.1, "metrics": {"auc": 0.5}, "bytes_sent": 1, "bytes_received": 1}
LINE = json.dumps(FACTS) + "\n"


class TestWatching:
    def test_an_honest_end(self, started, tmp_path):
        (tmp_path / "run" / "metrics.jsonl").write_text(LINE)
        demo._watch(started(""), tmp_path / "run")

    def test_a_hospital_that_stops_before_the_run_stops_the_demo_with_its_last_words(self, started, tmp_path):
        p = started(FOR_EVER, "raise SystemExit(21)", FOR_EVER)
        with pytest.raises(RunAborted, match=f"{HOSPITALS[0]} stopped before the run began") as e:
            demo._watch(p, tmp_path / "run")
        assert f"what {HOSPITALS[0]} said last" in e.value.hint
        p.stop()
        assert all(x.poll() is not None for x in (p.server, *p.sites.values()))

    def test_one_that_dies_later_is_named_and_the_run_goes_on(self, started, tmp_path, capsys, monkeypatch):
        (tmp_path / "run" / "metrics.jsonl").write_text(LINE)
        named, real = tmp_path / "named", demo.CONSOLE.print

        def told(*words: Any, **more: Any) -> None:
            real(*words, **more)
            if "ended" in str(words):
                named.touch()

        monkeypatch.setattr(demo.CONSOLE, "print", told)
        until_named = f"import os, time\nwhile not os.path.exists({str(named)!r}):\n    time.sleep(0.01)"
        p = started(until_named, "raise SystemExit(9)")
        demo._watch(p, tmp_path / "run")
        assert f"{HOSPITALS[0]} ended (code 9); the run goes on without it" in capsys.readouterr().out

    def test_a_server_that_fails_is_quoted(self, started, tmp_path):
        with pytest.raises(RunAborted, match="server failed") as e:
            demo._watch(started("raise SystemExit(80)"), tmp_path / "run")
        assert "what server said last" in e.value.hint

    def test_a_line_that_is_being_written_waits_for_its_end(self, started, tmp_path):
        (tmp_path / "run" / "metrics.jsonl").write_text(LINE + LINE[:20])
        demo._watch(started("import time; time.sleep(0.3)"), tmp_path / "run")

    def test_patience_ends(self, started, tmp_path, monkeypatch):
        monkeypatch.setattr(demo, "_PATIENCE", 0.2)
        with pytest.raises(RunAborted, match="did not end within"):
            demo._watch(started(FOR_EVER, FOR_EVER, FOR_EVER), tmp_path / "run")


def test_a_hospital_without_a_record_of_its_checks_fails_the_demo(tmp_path):
    with pytest.raises(DataError, match="left no record"):
        demo._say_data_checks(tmp_path)


def test_a_folder_that_exists_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(UsageError, match="cannot be made"):
        demo.demo(tmp_path, 0, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_the_comparison_names_every_alternative():
    table, plan = demo._compare(2)
    assert set(map(len, table.values())) == {2}
    means = {name: float(np.mean([m["auc"] for m in rows])) for name, rows in table.items()}
    assert len(means) == 6
    assert means["majority class"] == 0.5
    assert means["pooled, no privacy"] > 0.75
    assert plan.claim <= demo_hospitals.EPSILON


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fedveil", "demo", "--folder", str(tmp_path / "demo"), "--seeds", "1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for said in (
        "federated, live",
        "central DP",
        "local DP",
        "alone, DP",
        "majority",
        "checks passed",
        "report.html",
        "audit conformance: 28 of 28",
        "signed by 4 of 4 hospitals",
        "signed by the auditor's key",
    ):
        assert said in done.stdout
    run = tmp_path / "demo" / "run"
    verified = verify_report(run / "report.json")
    assert verified.ok
    key = identity.load_signing_key(tmp_path / "demo" / "auditor" / "signing.key").public_key().public_bytes_raw()
    assert verified.auditors == {"conformance": hashlib.sha256(key).hexdigest()}
    assert "Measured noise multiplier" in (run / "report.html").read_text(encoding="utf-8")
