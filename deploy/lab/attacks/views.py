"""What a curious server sees of one step: a site's gradient, an exact sum, or an opened sum of this program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.client.train import clipper
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab.audit.implementation import InProcess
from fedveil.privacy.audit.evidence import Part
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan

_UNCLIPPED = 1e9
STEPS = 60


@dataclass(frozen=True)
class World:
    """Public digits and the network that is attacked.

    Attributes:
        X: ``(n, 64)`` pixels in [0, 1]. y: ``(n,)`` classes.
        X_public: records the attacker knows of the same kind; none of them is attacked.
    """

    X: NDArray[np.float32]
    y: NDArray[np.int64]
    X_public: NDArray[np.float32]
    spec: ModelSpec


def gradient(spec: ModelSpec, weights: NDArray[np.float32], part: Part) -> NDArray[np.float64]:
    """``(D,)``: the sum of the gradients of a site's records, not clipped: what a site sends without a defence."""
    engine = clipper(spec, "closed", "cpu")
    engine.load(weights)
    return engine.clipped_sum(*part, _UNCLIPPED).values


def exact_sum(spec: ModelSpec, weights: NDArray[np.float32], parts: Sequence[Part]) -> NDArray[np.float64]:
    """``(D,)``: the sum over the sites, as any secure sum gives it: no single site's gradient, and no noise."""
    return np.sum([gradient(spec, weights, p) for p in parts], axis=0)


def one_step_plan(spec: ModelSpec, sites: int, records: int, epsilon: float) -> PrivacyPlan:
    """One step of a run that spends ``epsilon`` in :data:`STEPS` steps."""
    given = {"sites": sites, "records": records, "clip": 0.5, "model": spec, "contract_hash": "0" * 64}
    whole = make_plan(**given, epsilon=epsilon, steps=STEPS, optimizer=Optimizer(learning_rate=0.1))
    return make_plan(
        **given, noise_multiplier=whole.noise_multiplier, steps=1, optimizer=Optimizer(learning_rate=1e-12)
    )


def opened(plan: PrivacyPlan, weights: NDArray[np.float32], parts: Sequence[Part]) -> NDArray[np.float64]:
    """``(D,)``: the sum that this program opens in one step from the weights that the server chose."""
    return InProcess().run(plan, parts, weights=weights).releases[0].values
