"""A ledger that another one took over is still evidence: ``audit verify`` reads its last row, and nothing after it."""

from __future__ import annotations

from typing import Any

import pytest

from fedveil.common import canonical
from fedveil.common.errors import VerificationError
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.verify import verify_report

CLOSED = ("ledger.closed", {"ledger": "c" * 64})


def report(w: Any, *extra: tuple[str, dict[str, Any]]) -> list[str]:
    """Build a run's report anew, one of its ledgers handed in with ``extra`` at its end; the checks that fail."""
    name = "journals/berg.jsonl"
    w.rewrite(name, "berg", lambda items: items.extend(extra))
    lines = (w.folder / name).read_bytes().splitlines()
    head = [len(lines), canonical.loads(lines[-1])["hash"]]
    w.rewrite("journal.jsonl", "server", lambda items: items[-1][1]["heads"].update(berg=head))
    w.report.unlink()
    build_report(w.folder, w.server)
    return [f"{c.name}: {c.detail}" for c in verify_report(w.report).checks if not c.passed]


def test_the_row_that_closes_a_ledger_verifies(spoilt) -> None:
    assert report(spoilt, CLOSED) == []


@pytest.mark.parametrize("kind", ["spend", "ledger.closed"])
def test_nothing_counts_after_it(spoilt, kind) -> None:
    body = {"session": "later", "round": 1, "plan_hash": "a" * 64, "event": spoilt.plan.event.to_json()}
    with pytest.raises(VerificationError, match="after the ledger was closed"):
        report(spoilt, CLOSED, (kind, {**body, **CLOSED[1]}))
