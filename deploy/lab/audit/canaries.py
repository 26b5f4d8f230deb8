"""The one-run audit, through the real path: a coin decides if a canary takes part, and the sums betray which did."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedveil.common.errors import RunAborted, UsageError
from fedveil.deploy.lab.audit.implementation import InProcess
from fedveil.privacy.audit.evidence import Implementation
from fedveil.privacy.audit.one_run import Method, OneRun, audit, detectable
from fedveil.privacy.audit.slab import Slab, kind_of, price, slab_plan
from fedveil.privacy.dp.noise import KeyStream
from fedveil.privacy.plan import PrivacyPlan

MAX_CANARIES = 1 << 13  # a record has a feature for every canary, so their table grows with the square


@dataclass(frozen=True)
class Setting:
    """How the audit is made.

    Attributes:
        canaries: records with a coordinate of their own, spread over the sites.
        confidence: of the bound.
        steps: of the run; 0: the plan's.
    """

    canaries: int = 1000
    confidence: float = 0.95
    steps: int = 0

    def __post_init__(self) -> None:
        if not 10 <= self.canaries <= MAX_CANARIES:
            raise UsageError(f"{self.canaries} canaries are outside 10..{MAX_CANARIES}")


def one_run(
    plan: PrivacyPlan, setting: Setting | None = None, *, implementation: Implementation | None = None
) -> OneRun:
    """Run the mechanism of ``plan`` once over canaries and bound its ε from below; says what fault it would find.

    Each canary's clipped gradient lies on a coordinate that no other record touches. No place helps an attacker more;
    its score is the sum of that coordinate over all opened sums. Coins are the operating system's. How the guesses are
    read is fixed beforehand. For q = 1 it is by Gaussian trade-off functions, which are exact there. For q < 1 it is by
    the trade-off function of (ε, δ)-DP, which assumes nothing.

    Raises:
        UsageError: a plan of whole clients.
        RunAborted: a sum was not opened.
    """
    s = setting or Setting()
    kind = kind_of(plan)
    if kind == "client":
        raise UsageError("a canary is a record, and this plan protects whole clients", hint="a plan of records")
    per_site = -(-s.canaries // plan.sites)
    shape = (plan.sites, per_site)
    coins = (KeyStream().words(plan.sites * per_site) & np.uint64(1)).astype(np.int64).reshape(shape)
    real = (np.arange(coins.size) < s.canaries).reshape(shape)
    steps = s.steps or plan.steps
    inner = slab_plan(plan, inputs=coins.size, steps=steps, sample_rate=plan.sample_rate, records=s.canaries)
    slab = Slab(coins * real, coins.size, inner.clip, kind)
    run = (implementation or InProcess()).run(inner, slab.parts(), absent=[frozenset()] * steps)
    if len(run.releases) != steps:
        raise RunAborted(f"{len(run.releases)} of {steps} sums were released ({run.status})")
    scores = np.sum([slab.scores(r) for r in run.releases], axis=0)
    method: Method = "gaussian" if plan.sample_rate == 1 else "f-dp"
    claimed = inner.claim
    found = audit(
        scores[real], coins[real].astype(bool), claimed=claimed, delta=plan.delta, confidence=s.confidence,
        method=method,
    )  # fmt: skip
    least = detectable(s.canaries, price(plan), steps, claimed, plan.delta, s.confidence, method)
    return replace(found, detects=least)
