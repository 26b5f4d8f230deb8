"""A plan that does not fit what the site holds is refused, by its own word, before anything is written."""

from __future__ import annotations

import numpy as np
import pytest

from fedveil.client import round as line
from fedveil.common.errors import PolicyRefusal, ProtocolError


def refused(w, error, match) -> None:
    with pytest.raises(error, match=match):
        line.join(w.sites[0], w.proposal())
    assert not list(w.sites[0].ledger.journal.of_kind("plan.accepted", "spend"))


def test_a_plan_for_smaller_sites(world) -> None:
    """Its places, and what rounding adds, were computed for a smaller capacity."""
    w = world()
    w.sites[0].capacity = w.plan.capacity
    line.join(w.sites[0], w.proposal())
    w = world()
    w.sites[0].capacity = w.plan.capacity + 1
    refused(w, PolicyRefusal, f"at most {w.plan.capacity} records; this one's capacity is {w.plan.capacity + 1}")


def test_a_plan_of_records_at_a_site_of_persons(world) -> None:
    w = world()
    w.sites[0].persons = np.zeros((5, 3), np.int64)
    refused(w, ProtocolError, "1 rows of each record, this site's contract 3")
