"""What comes from outside is judged at a decent speed: cells, queries, plans. Ratios of two times of one run.

The best of three counts on both sides: another program can only make a run slower, never faster.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from fedveil.client.records.read import pii, statements
from fedveil.common.errors import PlanError, UsageError
from fedveil.common.workload.model import ModelSpec
from fedveil.privacy.dp import accounting
from fedveil.privacy.plan import Optimizer, from_json, make_plan

pytestmark = pytest.mark.bench


def best(work: Callable[[], Any]) -> float:
    """CPU seconds of the quickest of three runs."""
    took = []
    for _ in range(3):
        start = time.process_time()
        work()
        took.append(time.process_time() - start)
    return min(took)


def test_cells_are_searched_for_identifiers_about_as_quickly_as_by_a_few_patterns() -> None:
    """Distinct notes of ordinary length, one in ten with an identifier; against one plain pattern, cell by cell."""
    notes = [
        f"patient at 10:30:0{i % 7}: mild pain, dose {i} mg 1:2:1, follow-up in {i % 9} weeks" for i in range(90_000)
    ]
    notes += [f"call back under {i % 900 + 100}-555-{i % 10_000:04d}, letter sent" for i in range(10_000)]
    column, pattern = pa.array(notes), re.compile(r"\d{3}-\d{3}-\d{4}")
    assert pii.scan(column)["phone"] == 10_000
    scan, plain = best(lambda: pii.scan(column)), best(lambda: [pattern.search(x) for x in notes])
    print(f"\nscan for identifiers: {len(notes) / scan:,.0f} cells/s, {scan / plain:.1f} times one pattern")
    assert scan < 40 * plain


@pytest.mark.parametrize("piece", ["'", '"', "`", "[", "/*", "$a$", "$a", "--", "#", "x.", "''[", "$$'"])
@pytest.mark.parametrize("database", ["", "sqlite", "duckdb"])
def test_long_queries_are_judged_in_linear_time(piece: str, database: str) -> None:
    """Sixteen times the length takes sixteen times as long, and not 256 times."""

    def seconds(length: int) -> float:
        def judge() -> None:
            with contextlib.suppress(UsageError):
                statements.require_select("SELECT " + piece * (length // len(piece)), database)

        return best(judge)

    assert seconds(400_000) < 64 * max(seconds(25_000), 1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 1e-6, "epsilon": 600}, {"noise_multiplier": 0.05, "steps": 1 << 20},
        {"noise_multiplier": 0.2, "steps": 1 << 20, "sample_rate": 0.9, "epsilon": 600},
    ],
    ids=str,
)  # fmt: skip
def test_a_hostile_plan_costs_less_than_an_honest_one(change: dict[str, Any]) -> None:
    model = ModelSpec(name="logistic", inputs=20, classes=2)
    given: dict[str, Any] = {"sites": 5, "records": 2000, "steps": 30, "clip": 1.0, "contract_hash": "c" * 64}
    honest = make_plan(epsilon=2.0, model=model, optimizer=Optimizer(learning_rate=0.5), **given).to_json()

    def parse() -> None:
        accounting._pld.cache_clear()
        from_json(honest)

    def refuse() -> None:
        with pytest.raises(PlanError):
            from_json(honest | change)

    assert best(refuse) < 2 * best(parse)
