"""The step on an opened sum, by whoever reads it: post-processing of a private value, so it costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import RunAborted
from fedveil.common.wire import sha256
from fedveil.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class ModelState:
    """Weights and velocity, both ``(D,)`` float64; what travels is :meth:`sent`."""

    weights: NDArray[np.float64]
    velocity: NDArray[np.float64]

    @classmethod
    def start(cls, weights: NDArray[np.float32]) -> ModelState:
        """The public initialisation."""
        return cls(weights.astype(np.float64), np.zeros(weights.size))

    def sent(self) -> bytes:
        """The weights as the sites receive them: D little-endian float32."""
        return self.weights.astype("<f4").tobytes()

    @property
    def hash(self) -> str:
        """SHA-256 of :meth:`sent`: the model's name in journals and reports."""
        return sha256(self.sent())

    def step(self, plan: PrivacyPlan, opened: NDArray[np.float64]) -> ModelState:
        """SGD with momentum on ``opened / (q·N)``.

        In mode ``client`` the sum holds model updates, not gradients: they are averaged and applied as they are.
        Statistics are their own result: the opened sum is added to zeros.

        Raises:
            RunAborted: the weights would not be finite.
        """
        if plan.task == "stats":
            return ModelState(self.weights + opened, self.velocity)
        gradient = opened / plan.divisor
        rate = 1.0 if plan.mode == "client" else plan.optimizer.learning_rate
        velocity = plan.optimizer.momentum * self.velocity + gradient
        weights = self.weights - rate * velocity
        if not np.isfinite(weights).all():
            raise RunAborted("the model diverged", hint="a lower learning rate or a smaller clip")
        return ModelState(weights, velocity)
