"""A simulation that was killed, or stopped, goes on to its end: what was charged stays, nothing is drawn twice."""

from __future__ import annotations

import itertools
import json
import random
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import fedveil as fv
from fedveil.common import cli
from fedveil.common.errors import Interrupted, UsageError
from fedveil.common.journal import parse
from fedveil.deploy.lab import execution, resuming, simulate, together
from fedveil.deploy.lab.resuming import FOLDER
from fedveil.deploy.lab.simulate import Config
from fedveil.deploy.lab.virtual_sites import LEDGERS
from fedveil.privacy.report.verify import verify_report
from fedveil.server.job import Job
from fedveil.server.opened_sums import OpenedSums

PLAIN = Config(clients=6, dataset="trivial", sum="plain", steps=6)
KEYSUM = Config(clients=4, dataset="digits", sum="keysum", steps=4)
FEDVEIL = [sys.executable, "-m", "fedveil"]


class Killed(BaseException):
    """Stands for the end of the process."""


def charges(run: Path) -> dict[str, list[int]]:
    """By site, the rounds that its ledger was charged."""
    found = {}
    for path in sorted((run / LEDGERS).glob("*.jsonl")):
        found[path.stem] = [r.body["round"] for r in parse(path.read_bytes()) if r.kind == "spend"]
    return found


def outcomes(run: Path) -> Counter[str]:
    return Counter(row.kind for row in resuming.rows_of(run))


def whole(run: Path, clients: int, steps: int) -> None:
    """The run is what an uninterrupted one is: every site was charged every round once, and the report verifies."""
    assert charges(run) == {f"site-{i + 1:04d}": list(range(1, steps + 1)) for i in range(clients)}
    found = verify_report(run / "report.json")
    assert found.ok, found.failed
    assert len(found.countersigned) == clients
    assert not (run / FOLDER).exists()
    assert not (run / "checkpoints").exists()


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int):
    """The process "ends" when ``owner.name`` is called for the ``at``-th time."""
    calls, before = itertools.count(1), getattr(owner, name)

    def call(*given, **named):
        if next(calls) == at:
            raise Killed
        return before(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        with pytest.raises(Killed):
            yield


class TestWhereTheProcessEnds:
    """Each place in a round, once. What an exception leaves on disk is what a kill leaves, or more of it."""

    @pytest.mark.parametrize(
        ("owner", "name", "lost"),
        [
            (OpenedSums, "add", 1),  # charged, not opened
            (Job, "checkpoint", 1),  # the sum is on disk, the journal does not call it applied
            (Job, "metrics", 0),  # applied
            (together.TogetherGrid, "together", 0),  # announced, nothing charged
        ],
    )
    def test_a_sum_in_the_clear(self, tmp_path, monkeypatch, owner, name, lost):
        with dying(monkeypatch, owner, name, 3):
            simulate.run(PLAIN, tmp_path)
        assert (tmp_path / FOLDER).exists()
        run = fv.resume(tmp_path, quiet=True)
        assert run.status == "COMPLETED"
        whole(tmp_path, 6, 6)
        assert outcomes(tmp_path)["round.aborted"] == lost
        assert outcomes(tmp_path)["round.applied"] == 6 - lost
        assert outcomes(tmp_path)["run.resumed"] == 1

    @pytest.mark.parametrize(("owner", "name"), [(OpenedSums, "add"), (Job, "checkpoint"), (Job, "metrics")])
    def test_a_secure_sum_is_opened_from_the_bytes_that_the_sites_kept(self, tmp_path, monkeypatch, owner, name):
        with dying(monkeypatch, owner, name, 3):
            simulate.run(KEYSUM, tmp_path)
        before = {p.name: p.read_bytes() for p in (tmp_path / "sums").glob("*.bin")}
        fv.resume(tmp_path, quiet=True)
        whole(tmp_path, 4, 4)
        assert outcomes(tmp_path)["round.applied"] == 4
        assert {n: (tmp_path / "sums" / n).read_bytes() for n in before} == before  # no second draw of any step

    def test_a_ledger_that_only_the_sites_model_follows(self, tmp_path, monkeypatch):
        with dying(monkeypatch, OpenedSums, "add", 2):
            simulate.run(Config(clients=4, dataset="digits", steps=3, reveal_to="sites"), tmp_path)
        assert fv.resume(tmp_path, quiet=True).status == "COMPLETED"
        whole(tmp_path, 4, 3)

    def test_again_and_again(self, tmp_path, monkeypatch):
        with dying(monkeypatch, OpenedSums, "add", 2):
            simulate.run(PLAIN, tmp_path)
        for _ in range(2):
            with dying(monkeypatch, Job, "metrics", 2):
                fv.resume(tmp_path, quiet=True)
        fv.resume(tmp_path, quiet=True)
        whole(tmp_path, 6, 6)

    def test_after_the_last_round_only_the_report_is_missing(self, tmp_path, monkeypatch):
        with dying(monkeypatch, execution, "_write_report", 1):
            simulate.run(PLAIN, tmp_path)
        end = (tmp_path / "journal.jsonl").read_bytes()
        fv.resume(tmp_path, quiet=True)
        whole(tmp_path, 6, 6)
        assert (tmp_path / "journal.jsonl").read_bytes() == end

    def test_before_anybody_joined(self, tmp_path, monkeypatch):
        with dying(monkeypatch, execution, "warnings", 1):
            simulate.run(PLAIN, tmp_path)
        fv.resume(tmp_path, quiet=True)
        whole(tmp_path, 6, 6)

    def test_the_state_is_the_one_that_the_sums_lead_to(self, tmp_path, monkeypatch):
        """Without noise from outside: the seeded run that was killed ends in the bits of the one that was not."""
        config = Config(clients=3, dataset="digits", sum="keysum", steps=4, debug_noise_seed=5)
        simulate.run(config, tmp_path / "a", report=False)
        with dying(monkeypatch, Job, "metrics", 2):
            simulate.run(config, tmp_path / "b", report=False)
        fv.resume(tmp_path / "b", quiet=True)
        assert (tmp_path / "a" / "model.f32").read_bytes() == (tmp_path / "b" / "model.f32").read_bytes()


def test_what_is_kept_is_its_owners_only_and_goes_away(tmp_path, monkeypatch):
    with dying(monkeypatch, Job, "metrics", 2):
        simulate.run(KEYSUM, tmp_path)
    folder = tmp_path / FOLDER
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("signing.keys", "records.npz", "rows.jsonl", "stores.log"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    fv.resume(tmp_path, quiet=True)
    assert not folder.exists()


def test_a_run_that_cannot_begin_leaves_no_keys(tmp_path):
    with pytest.raises(Exception, match="does not take part"):
        simulate.run(Config(clients=4, dataset="trivial", sum="plain", steps=2, cap=0.01), tmp_path)
    assert not (tmp_path / FOLDER).exists()


class TestRefusals:
    def test_a_folder_without_a_run(self, tmp_path):
        with pytest.raises(UsageError, match="holds no run that began") as e:
            fv.resume(tmp_path)
        assert "fedveil simulate --out" in e.value.hint

    def test_a_run_that_has_ended(self, tmp_path):
        simulate.run(PLAIN, tmp_path / "run", report=False)
        with pytest.raises(UsageError, match="has ended") as e:
            fv.resume(tmp_path / "run")
        assert "fedveil.load" in e.value.hint
        with pytest.raises(UsageError, match="holds a run already") as e:
            simulate.run(PLAIN, tmp_path / "run")
        assert "fedveil.load" in e.value.hint

    def test_another_config_is_named(self, tmp_path, monkeypatch):
        with dying(monkeypatch, Job, "metrics", 1):
            simulate.run(PLAIN, tmp_path)
        with pytest.raises(UsageError, match=r"another config: epsilon = 2\.0 \(the run has 1\.0\)"):
            fv.resume(tmp_path, epsilon=2.0, sum="plain")
        with pytest.raises(UsageError, match="holds a run already") as e:
            simulate.run(PLAIN, tmp_path)
        assert "--resume" in e.value.hint
        done = CliRunner().invoke(cli.build(), ["simulate", "--resume", str(tmp_path), "--clients", "7"])
        assert isinstance(done.exception, UsageError)
        assert "clients = 7 (the run has 6)" in str(done.exception)
        done = CliRunner().invoke(cli.build(), ["simulate", "--resume", str(tmp_path), "--out", str(tmp_path / "x")])
        assert isinstance(done.exception, UsageError)
        fv.resume(tmp_path, quiet=True, epsilon=1.0, sum="plain")  # what it began with is no change
        whole(tmp_path, 6, 6)

    def test_what_has_no_keys_cannot_go_on(self, tmp_path, monkeypatch):
        """As on the engine ray, whose sites answer in other processes."""
        with dying(monkeypatch, Job, "metrics", 1):
            simulate.run(PLAIN, tmp_path)
        (tmp_path / FOLDER / "asked.json").unlink()
        with pytest.raises(UsageError, match="cannot go on"):
            fv.resume(tmp_path)

    def test_a_run_that_is_under_way(self, tmp_path, monkeypatch):
        with dying(monkeypatch, Job, "metrics", 1):
            simulate.run(PLAIN, tmp_path)
        first = resuming.find(tmp_path)
        with pytest.raises(UsageError, match="under way in another process"):
            fv.resume(tmp_path)
        execution.go_on(first)
        whole(tmp_path, 6, 6)

    def test_another_versions_config(self):
        with pytest.raises(UsageError, match="another version"):
            Config.from_json({"clients": 3})


class TestSeeds:
    WORDS = ("--dataset", "trivial", "--clients", "5", "--sum", "plain", "--steps", "3", "--seeds", "3")

    def invoke(self, *words):
        return CliRunner().invoke(cli.build(), ["simulate", *map(str, words)])

    def test_seeds_that_ended_are_kept_and_the_others_are_run(self, tmp_path, monkeypatch):
        out = tmp_path / "seeds"
        with dying(monkeypatch, Job, "metrics", 5):
            done = self.invoke(*self.WORDS, "--out", out)
            raise done.exception or AssertionError("it came to its end")
        first = (out / "seed-0" / "journal.jsonl").read_bytes()
        assert not (out / "seed-2").exists()
        assert isinstance(self.invoke(*self.WORDS, "--out", out).exception, UsageError)
        done = self.invoke("--resume", out)
        assert done.exit_code == 0, done.exception
        assert "over 3 seeds" in done.output
        assert (out / "seed-0" / "journal.jsonl").read_bytes() == first
        assert outcomes(out / "seed-1")["run.resumed"] == 1
        assert outcomes(out / "seed-2")["run.resumed"] == 0
        for seed in range(3):
            whole(out / f"seed-{seed}", 5, 3)
        runs = fv.load(out)
        assert [r.config["seed"] for r in runs] == [0, 1, 2]
        assert runs.table()[0]["seeds"] == 3
        assert runs.plot(path=tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
        assert isinstance(self.invoke("--resume", out, "--epsilon", 3).exception, UsageError)

    def test_a_sweep_goes_on_in_the_run_that_was_under_way(self, tmp_path, monkeypatch):
        sites = fv.split("trivial", clients=5)
        asked = {"epsilon": [1.0, 2.0], "sum": "plain", "steps": 3, "out": tmp_path, "workers": 1}
        with dying(monkeypatch, Job, "metrics", 5):
            fv.sweep(None, sites, **asked)
        runs = fv.sweep(None, sites, **asked)
        assert [outcomes(r.folder)["run.resumed"] for r in runs] == [0, 1]
        for run in runs:
            whole(run.folder, 5, 3)


def begun(run: Path, *words: str) -> subprocess.Popen[str]:
    command = [*FEDVEIL, "simulate", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rounds(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait(process: subprocess.Popen[str], run: Path, more: int) -> None:
    """Until so many rounds more are done, or the process has ended."""
    wanted = rounds(run) + more
    while process.poll() is None and rounds(run) < wanted:
        time.sleep(0.002)


def killed_until_done(run: Path, kills: int, *words: str) -> None:
    """Kill a real process ``kills`` times, each after a few more rounds, and resume it."""
    process = begun(run, *words, "--out", str(run))
    for _ in range(kills):
        wait(process, run, random.randint(1, 3))
        time.sleep(random.random() * 0.02)  # anywhere in a round
        process.kill()
        process.communicate()
        process = begun(run, "--resume", str(run))
    output = process.communicate()[0]
    assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("sum", ["plain", "keysum"])
def test_a_process_that_is_killed_in_any_round(tmp_path, sum):
    run = tmp_path / "run"
    killed_until_done(run, 3, "--clients", "5", "--sum", sum, "--steps", "40")
    whole(run, 5, 40)
    assert outcomes(run)["round.applied"] + outcomes(run)["round.aborted"] == 40
    assert outcomes(run)["round.aborted"] <= (3 if sum == "plain" else 0)


@pytest.mark.slow
def test_a_thousand_hidden_clients_are_killed_and_come_to_their_end(tmp_path):
    run = tmp_path / "run"
    words = ("--mode", "client", "--clients", "1000", "--sum", "plain", "--epsilon", "8", "--steps", "50")
    killed_until_done(run, 2, *words)
    found = fv.load(run)
    assert isinstance(found, fv.Run)
    assert found.status == "COMPLETED"
    assert found.epsilon <= 8
    whole(run, 1000, found.plan.steps)


@pytest.mark.slow
def test_ctrl_c_leaves_what_was_done_and_says_how_to_go_on(tmp_path):
    run = tmp_path / "run"
    process = begun(run, "--clients", "5", "--sum", "plain", "--steps", "400", "--out", str(run))
    wait(process, run, 3)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130, output
    assert f"fedveil simulate --resume {run}" in output
    so_far = fv.load(run / "so-far")
    assert isinstance(so_far, fv.Run)
    done = len(so_far.history)
    assert 3 <= done < 400
    assert so_far.status == "ABORTED"
    assert so_far.report.verify().ok
    assert so_far.model() is not None
    assert not (run / "so-far" / FOLDER).exists()
    assert fv.Run(run).status == "RUNNING"  # the copy's end is not the run's
    fv.resume(run, quiet=True)
    whole(run, 5, 400)
    assert outcomes(run)["round.applied"] == 400
    assert not (run / "so-far").exists()


def test_what_was_done_so_far_is_a_run_of_its_own(tmp_path):
    """The signal as it comes in a process; the process's own exit is the slow test above."""

    def progress(kind: str, facts: dict[str, Any]) -> None:
        if (kind, facts.get("round")) == ("round", 2):
            signal.raise_signal(signal.SIGINT)

    run, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with execution.stopping(progress, run) as told, pytest.raises(Interrupted, match="was stopped") as e:
        simulate.run(PLAIN, run, progress=told)
    assert f"--resume {run}" in e.value.hint
    assert signal.getsignal(signal.SIGINT) is before
    copy = fv.load(execution.so_far(run))
    assert isinstance(copy, fv.Run)
    assert copy.status == "ABORTED"
    assert len(copy.history) == 2
    assert copy.report.verify().ok
    assert {r.kind for r in resuming.rows_of(run)}.isdisjoint({"run.end", "run.resumed"})
    fv.resume(run, quiet=True)
    whole(run, 6, 6)
    assert outcomes(run)["round.applied"] == 6
    assert not (run / "so-far").exists()


def test_the_rows_file_drops_a_torn_line_and_gives_back_the_rest(tmp_path):
    from fedveil.common.journal import unsigned

    path = tmp_path / "rows.jsonl"
    log = resuming.Rows(path)
    with log.together():
        row = unsigned(7, "spend", {"round": 1, "x": 0.1})
        for owner in ("a", "b"):
            log.note(owner, row)
        assert path.read_bytes() == b""  # one line for both, at the end
    log.note("b", unsigned(8, "commit", {"round": 1}))
    log.close()
    assert path.read_bytes().count(b"\n") == 2
    for cut in range(1, 12):
        path.write_bytes(path.read_bytes() + b'{"at":9,"kind":"spend"'[:cut])
        again = resuming.Rows(path)
        a, b = [list(again.before(x)) for x in "ab"]
        again.close()
        assert [(r.at, r.kind, r.body) for r in a] == [(7, "spend", {"round": 1, "x": 0.1})]
        assert [(r.at, r.kind) for r in b] == [(7, "spend"), (8, "commit")]
        assert path.read_bytes().count(b"\n") == 2


def test_records_come_back_as_they_were(tmp_path):
    sites = fv.split("digits", clients=7, by=fv.Dirichlet(0.05))
    resuming._save_records(tmp_path / "r.npz", sites)
    again = resuming._load_records(tmp_path / "r.npz")
    assert repr(again) == repr(sites)
    for (X, y), (A, b) in zip(sites.parts, again.parts, strict=True):
        assert np.array_equal(X, A)
        assert np.array_equal(y, b)
        assert (X.dtype, y.dtype) == (A.dtype, b.dtype)
    assert json.loads(json.dumps(sites.labels)) == list(again.labels)
