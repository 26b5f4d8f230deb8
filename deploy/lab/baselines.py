"""What a federation is compared with: the same records without privacy, without trust limits, or alone.

All use the same network, optimiser, clipping code and noise sampler as the platform; they run in one process on
public data and make no claim of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.client.train import clipper
from fedveil.common.workload.torch.networks import unflatten
from fedveil.privacy.dp.noise import discrete_gaussian
from fedveil.privacy.dp.places import seat
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.start import start
from fedveil.server.evaluate import Evaluator

_FINE = 2.0**-30


@dataclass(frozen=True)
class Table:
    """Records ``X`` (n, features) float32 with classes ``y`` (n,)."""

    X: NDArray[np.float32]
    y: NDArray[np.int64]


def dp_sgd(plan: PrivacyPlan, table: Table, *, records: float, noise: float) -> NDArray[np.float64]:
    """``(D,)`` weights after the plan's steps on one table, by one party.

    Args:
        records: what the gradient sum is divided by (times the sample rate).
        noise: total noise multiplier on the sum; 0 trains without privacy, though still clipped.
    """
    state = start(plan)
    steps = clipper(plan.network, "closed", "cpu", places=len(table.y))
    for _ in range(plan.steps):
        unflatten(steps.model, state.weights.astype(np.float32))
        # Without noise nothing is protected: then the records sit in order, so that a run can be repeated to the bit.
        whole = noise == 0 and plan.sample_rate == 1
        seats = None if whole else seat(len(table.y), plan.sample_rate, len(table.y))
        total = steps.clipped_sum(table.X, table.y, plan.clip, seats).values
        if noise > 0:
            std = noise * plan.clip
            total = total + discrete_gaussian(std / (std * _FINE), total.size) * (std * _FINE)
        state = state.step(plan, total, plan.divisor / (plan.sample_rate * records))
    return state.result


def pooled(plan: PrivacyPlan, parts: list[Table]) -> NDArray[np.float64]:
    """All records in one place, no noise: what giving up privacy would buy."""
    return dp_sgd(plan, _pool(parts), records=_count(parts), noise=0.0)


def central(plan: PrivacyPlan, parts: list[Table]) -> NDArray[np.float64]:
    """All records in one place that everybody trusts: DP-SGD at the plan's noise multiplier."""
    return dp_sgd(plan, _pool(parts), records=_count(parts), noise=plan.noise_multiplier)


def local(plan: PrivacyPlan, parts: list[Table]) -> NDArray[np.float64]:
    """What platforms offer that add noise at every site: each site's sum carries the whole noise.

    The sum of n such sums is one sum with sqrt(n) times the noise, which is how it is computed here.
    """
    noise = plan.noise_multiplier * math.sqrt(len(parts))
    return dp_sgd(plan, _pool(parts), records=_count(parts), noise=noise)


def alone(plan: PrivacyPlan, parts: list[Table]) -> list[NDArray[np.float64]]:
    """Every site by itself with DP at the same (ε, δ)."""
    return [dp_sgd(plan, p, records=len(p.y), noise=plan.noise_multiplier) for p in parts]


def majority(parts: list[Table], test: Table) -> dict[str, float]:
    """Always the most frequent class of the training records."""
    guess = np.bincount(_pool(parts).y).argmax()
    return {"accuracy": float((test.y == guess).mean()), "auc": 0.5}


def _pool(parts: list[Table]) -> Table:
    return Table(np.concatenate([p.X for p in parts]), np.concatenate([p.y for p in parts]))


def _count(parts: list[Table]) -> int:
    return sum(len(p.y) for p in parts)


def compare(plan: PrivacyPlan, parts: list[Table], test: Table) -> dict[str, dict[str, float]]:
    """Every baseline's public test metrics; ``alone`` is the mean over sites."""
    evaluate = Evaluator(plan.network, test.X, test.y)
    single = [evaluate(w) for w in alone(plan, parts)]
    return {
        "pooled, no privacy": evaluate(pooled(plan, parts)),
        "central DP (one trusted party)": evaluate(central(plan, parts)),
        "local DP (noise at every site)": evaluate(local(plan, parts)),
        "each hospital alone, DP": {k: float(np.mean([m[k] for m in single])) for k in single[0]},
        "majority class": majority(parts, test),
    }
