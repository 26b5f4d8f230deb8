"""A ledger says which table was used: another one after the session's first charge is found."""

from __future__ import annotations

from typing import Any

import pytest

from fedveil.common.errors import VerificationError
from fedveil.common.journal import parse
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.charges import compose

SESSION = "5e" * 32  # of the run in conftest.py


def released_again(**changes: Any):
    """After the first charge, one more row about the table."""

    def change(items: list[tuple[str, dict[str, Any]]]) -> None:
        body = next(b for kind, b in items if kind == "data.released")
        own = next(i for i, (kind, b) in enumerate(items) if kind == "commit" and b["session"] == SESSION)
        items.insert(own + 1, ("data.released", {**body, **changes}))

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {"commitments": {"source": "d" * 64}},
        {"commitments": {}},
        {"commitments": None},
        {"stability_factor": None, "stability": None},
        {"criteria": {"k-anonymity": {"required": 5, "met": False}}},
        {"contract": "e" * 64},
        {"unit": "one visit"},
    ],
)
def test_another_table_after_the_first_charge_is_found(spoilt, changes) -> None:
    spoilt.rewrite("journals/berg.jsonl", "berg", released_again(**changes))
    rows = parse((spoilt.folder / "journals" / "berg.jsonl").read_bytes())
    with pytest.raises(VerificationError, match=r"\(data\.released\) is about another table"):
        compose(rows, SESSION)
    with pytest.raises(VerificationError, match="another table"):
        build_report(spoilt.folder, spoilt.server)
    assert compose(rows, "another session").released is not None


def test_the_same_table_in_a_new_order_is_what_a_restart_gives(spoilt) -> None:
    again = released_again(commitments={"source": "c" * 64, "released": "f" * 64})
    spoilt.rewrite("journals/berg.jsonl", "berg", again)
    rows = parse((spoilt.folder / "journals" / "berg.jsonl").read_bytes())
    assert compose(rows, SESSION).released == compose(rows, "another session").released
