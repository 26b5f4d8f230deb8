"""A run that ends when a public metric no longer rises: what is charged, what the report says, and after a restart."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedveil.common.errors import PlanError
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.bundle import REPORT
from fedveil.privacy.report.verify import verify_report
from fedveil.server.early_stop import EarlyStop


def falls(after: int):
    """An evaluation whose accuracy rises for so many calls and then stays."""
    seen = []

    def evaluate(weights: np.ndarray) -> dict[str, float]:
        seen.append(weights)
        return {"accuracy": min(len(seen), after) / 100}

    return evaluate


def test_the_run_ends_and_the_rest_is_not_charged(run):
    r = run(steps=20, options={"evaluate": falls(3), "patience": 4})
    assert r.go() == "STOPPED_EARLY"
    (end,) = r.bodies("run.end")
    assert (end["status"], end["steps_done"]) == ("STOPPED_EARLY", 7)
    assert [r.spends(i) for i in range(4)] == [list(range(1, 8))] * 4
    build_report(r.folder, r.world.server)
    found = verify_report(r.folder / REPORT)
    assert found.ok
    assert "STOPPED_EARLY, 7 rounds, 7 applied" in str(found.checks)


def test_without_patience_the_plan_is_carried_out(run):
    r = run(steps=6, options={"evaluate": falls(1)})
    assert r.go() == "COMPLETED"
    assert len(r.spends(0)) == 6


def test_a_run_that_goes_on_remembers_its_best(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"round": n, "metrics": {"accuracy": a}} for n, a in enumerate([0.5, 0.75, 0.6], 1)]
    lines.append({"round": 4, "metrics": {}})  # an aborted round
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    early = EarlyStop(2, "accuracy", path)
    assert not early.due
    early.see({})
    assert not early.due
    early.see({"accuracy": 0.75})  # as good is not better
    assert early.due
    early.see({"accuracy": 0.8})
    assert not early.due


def test_a_metric_that_the_table_does_not_give(tmp_path):
    with pytest.raises(PlanError, match="gives no 'auc'"):
        EarlyStop(1, "auc", tmp_path / "none").see({"accuracy": 0.5})
