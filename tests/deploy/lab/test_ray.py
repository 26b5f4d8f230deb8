"""Virtual sites over Ray: the same sums as in one process, with a machine of the cluster lost in between."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from fedveil.common.errors import Interrupted
from fedveil.common.journal import parse
from fedveil.deploy.lab import execution, resuming, simulate
from fedveil.deploy.lab.run import Run
from fedveil.deploy.lab.simulate import Config

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
RAY = Path(sys.executable).with_name("ray")


class Machines:
    """A cluster of two Ray nodes on this machine, one processor each."""

    def __init__(self) -> None:
        quiet = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        start = lambda *how: subprocess.run(  # noqa: E731
            [RAY, "start", "--num-cpus=1", "--disable-usage-stats", *how], env=quiet, check=True, capture_output=True,
            text=True,
        ).stdout  # fmt: skip
        before = set(self._nodes())
        said = start("--head", "--port=0", "--include-dashboard=false")
        found = re.search(r"--address='([^']+)'", said)
        assert found, said
        self.address = found[1]
        head = set(self._nodes()) - before
        start(f"--address={self.address}")
        (self.second,) = set(self._nodes()) - before - head

    @staticmethod
    def _nodes() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["name"]) if p.info["name"] == "raylet"]

    def lose_the_second(self) -> None:
        """kill -9: the node and every process on it."""
        lost = [*self.second.children(recursive=True), self.second]
        for p in lost:
            p.send_signal(signal.SIGKILL)
        psutil.wait_procs(lost, timeout=30)

    def stop(self) -> None:
        subprocess.run([RAY, "stop", "--force"], check=False, capture_output=True)


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    out = Machines()
    monkeypatch.setenv("RAY_ADDRESS", out.address)
    yield out
    out.stop()


def sums(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((run / "sums").iterdir()) if p.suffix == ".bin"}


def traffic(run: Path) -> list[tuple[int, int]]:
    """Bytes to and from the clients in each round."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["bytes_sent"], r["bytes_received"]) for r in lines]


def charged(run: Path) -> list[list[int]]:
    ledgers = sorted((run / "ledgers").iterdir())
    return [[r.body["round"] for r in parse(p.read_bytes()) if r.kind == "spend"] for p in ledgers]


def test_a_thousand_clients_give_the_same_sums_with_one_machine_lost_in_between(tmp_path, machines):
    asked = Config(clients=1000, dataset="digits", sum="plain", steps=5, epsilon=4.0, debug_noise_seed=3)
    here, there = tmp_path / "here", tmp_path / "there"
    simulate.run(asked, here, report=False)
    seen = []

    def progress(kind: str, facts: dict) -> None:
        seen.append(kind)
        if seen.count("round") == 2 and kind == "round":
            machines.lose_the_second()

    simulate.run(replace(asked, engine="ray"), there, report=False, progress=progress)
    assert Run(there).status == "COMPLETED"
    assert len(sums(here)) == 5
    assert sums(there) == sums(here)
    assert (there / "model.f32").read_bytes() == (here / "model.f32").read_bytes()
    assert charged(there) == charged(here) == [[1, 2, 3, 4, 5]] * 1000
    assert traffic(there) == traffic(here)


def test_without_a_seed_workers_add_up_in_one_pass(tmp_path, machines):
    run = tmp_path / "run"
    simulate.run(Config(clients=50, dataset="digits", sum="plain", steps=3, epsilon=4.0, engine="ray"), run)
    assert Run(run).status == "COMPLETED"
    assert Run(run).report.verify().ok
    assert charged(run) == [[1, 2, 3]] * 50


def test_a_run_that_was_stopped_goes_on_over_new_workers(tmp_path, machines):
    asked = Config(clients=8, dataset="digits", sum="plain", steps=6, epsilon=4.0, debug_noise_seed=3)
    here, there = tmp_path / "here", tmp_path / "there"
    simulate.run(asked, here, report=False)

    def progress(kind: str, facts: dict) -> None:
        if kind == "round" and facts["round"] == 3:
            raise Interrupted("stopped by the test")

    with pytest.raises(Interrupted):
        simulate.run(replace(asked, engine="ray"), there, report=False, progress=progress)
    assert Run(there).status == "RUNNING"
    assert execution.go_on(resuming.find(there)).status == "COMPLETED"
    assert sums(there) == sums(here)
    assert charged(there) == charged(here)


def test_the_real_sum_over_workers(tmp_path, machines):
    run = tmp_path / "run"
    simulate.run(Config(clients=6, dataset="digits", sum="keysum", steps=3, epsilon=4.0, engine="ray"), run)
    assert Run(run).status == "COMPLETED"
    assert Run(run).report.verify().ok
    assert np.isfinite(Run(run).metrics["accuracy"])
