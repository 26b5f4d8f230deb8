"""A run that ends when a public metric no longer rises: what is charged, what the report says, and after a restart."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fedveil.common.errors import PlanError, VerificationError
from fedveil.common.journal import parse
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.bundle import REPORT
from fedveil.privacy.report.history import replay
from fedveil.privacy.report.verify import verify_report
from fedveil.server.early_stop import EarlyStop
from fedveil.server.strategy import SecureSumStrategy


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
    early = EarlyStop(2, "accuracy", path, classes=3)
    assert not early.due
    early.see({})
    assert not early.due
    early.see({"accuracy": 0.75})  # as good is not better
    assert early.due
    early.see({"accuracy": 0.8})
    assert not early.due


def test_a_metric_that_the_table_does_not_give(tmp_path):
    with pytest.raises(PlanError, match="area under the curve of 3 classes"):
        EarlyStop(1, "auc", tmp_path / "none", classes=3)
    early = EarlyStop(1, "auc", tmp_path / "none", classes=2)
    for auc in (0.7, 0.7):
        early.see({"accuracy": 0.5, "auc": auc})
    assert early.due


def test_a_server_that_stopped_after_the_decision_ends_in_the_same_way(run, monkeypatch):
    """Whatever patience it has then: the sites may have been told."""
    r = run(steps=9, durable=True, options={"evaluate": falls(1), "patience": 2})
    monkeypatch.setattr(SecureSumStrategy, "_finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        r.go()
    r.job.journal.close()
    monkeypatch.undo()
    r.options = {"evaluate": falls(50)}
    assert r.resume() == "STOPPED_EARLY"
    assert (r.bodies("run.end")[0]["steps_done"], len(r.bodies("run.stopped"))) == (3, 1)
    assert r.spends(0) == [1, 2, 3]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["run.stopped", "run.stopped"], "a second time"),
        (["run.stopped", "round.open"], "after the run was stopped"),
        (["round.open", "run.stopped"], "inside a round"),
        (["run.end"], "where a row before says so"),
    ],
)
def test_a_journal_that_stops_otherwise_is_refused(run, rows, said):
    r = run(steps=5, options={"evaluate": falls(1), "patience": 1})
    r.go()
    written = parse((r.folder / "journal.jsonl").read_bytes())
    kinds = [row.kind for row in written]
    opened, stopped, end = (written[kinds.index(k)] for k in ("round.open", "run.stopped", "run.end"))
    last = max(i for i, k in enumerate(kinds) if k == "round.applied")
    body = opened.body | {"round": written[last].body["round"] + 1, "nonce": "another"}
    more = {"run.stopped": stopped, "round.open": replace(opened, body=body), "run.end": end}
    with pytest.raises(VerificationError, match=said):
        replay([*written[: last + 1], *(more[kind] for kind in rows)])
