"""What ``fedveil plan`` warns of is also said where a run begins: training and statistics, before a site is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedveil.common import settings as files
from fedveil.common.workload.statistics import request
from fedveil.deploy import server_process
from fedveil.deploy.lab import demo_hospitals
from fedveil.deploy.watch import display
from fedveil.privacy.planning import plan_from_settings, plan_of_statistics


@pytest.fixture
def home(tmp_path: Path) -> Path:
    demo_hospitals.lay_out(tmp_path / "home", 1, seed=0)
    return tmp_path / "home"


def begun(home: Path, name: str, epsilon: str, *, stats: bool = False) -> list[str]:
    """What is told when a job is made."""
    path = home / "federation.toml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(f"epsilon = {epsilon}" if x.startswith("epsilon = ") else x for x in lines))
    federation, told = files.load(path, files.Federation), list[tuple[str, dict[str, Any]]]()

    def make(contract, sites):
        if not stats:
            return plan_from_settings(federation, contract, sites)
        return plan_of_statistics(federation, contract, sites, request(contract, ["count"]))

    job = server_process.new_job(federation, home / name, make, progress=lambda kind, facts: told.append((kind, facts)))
    job.journal.close()
    assert [kind for kind, _ in told] == ["plan"]
    return list(told[0][1]["warnings"])


@pytest.mark.parametrize("stats", [False, True])
def test_an_epsilon_above_ten_is_told_where_a_run_begins(home, stats) -> None:
    assert not any("more than 10" in x for x in begun(home, "low", "3.0", stats=stats))
    assert any("epsilon = 12 is more than 10" in x for x in begun(home, "high", "12.0", stats=stats))


def test_the_display_prints_it(monkeypatch, capsys) -> None:
    monkeypatch.setattr(display, "CONSOLE", Console(width=200))
    with display.Display("a run", 3) as shown:
        shown.progress("plan", {"warnings": ("epsilon = 12 [is] too much",)})
    assert "warning: epsilon = 12 [is] too much" in capsys.readouterr().out
