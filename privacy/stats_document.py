"""``statistics.json``: what a run of statistics gives, as a pure function of public values.

The opened sum itself is the run's ``model.f32``, whose hash stands in the server's journal, in every site's ledger and
in the report. Everything here follows from it and from the signed plan, so that anybody can write it again.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedveil.common.errors import DataError
from fedveil.common.workload.statistics import StatsSpec
from fedveil.privacy.dp.estimates import estimate
from fedveil.privacy.plan import PrivacyPlan

STATISTICS = "statistics.json"


def noise_std(plan: PrivacyPlan, members: int) -> float:
    """Standard deviation of one coordinate of a sum of ``members`` sites: their shares, and rounding to the grid."""
    return plan.grid * math.sqrt(members * (plan.share_std**2 + 1 / 12))


def document(plan: PrivacyPlan, session: str, members: int, sums: bytes) -> dict[str, Any]:
    """The estimates of one run.

    Args:
        plan: a plan of statistics.
        members: how many sites are in the opened sum.
        sums: the opened sum, D little-endian float32.

    Raises:
        DataError: the sum does not fit the plan, or the plan trains a network.
    """
    spec = plan.model
    if not isinstance(spec, StatsSpec) or len(sums) != 4 * spec.parameters:
        raise DataError("the opened sum does not fit the plan")
    values = np.frombuffer(sums, "<f4").astype(np.float64)
    return {
        "v": 1,
        "session": session,
        "plan_hash": plan.hash,
        "epsilon": plan.claim,
        "delta": plan.delta,
        "unit": plan.unit,
        "sites": members,
        "norm_bound": spec.norm_bound,
        **estimate(spec, values, noise_std(plan, members)),
    }
