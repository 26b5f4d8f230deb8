"""The step on an opened sum, the same bits at server, sites and auditor: post-processing, so it costs nothing.

Everything is float64 and elementwise: + - * / in a fixed order, each correctly rounded by IEEE 754. NumPy fuses no two
of them into one. So the state after a step does not depend on the machine, its vector units or its threads.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import RunAborted, StoreError
from fedveil.common.wire import sha256
from fedveil.privacy.plan import PrivacyPlan

_DOMAIN = b"fedveil/state/1\n"
_HEAD = struct.Struct("<QQ")


@dataclass(frozen=True)
class ModelState:
    """Everything that the next step depends on.

    Attributes:
        weights, velocity: both ``(D,)`` float64.
        steps: how many sums were applied.
    """

    weights: NDArray[np.float64]
    velocity: NDArray[np.float64]
    steps: int = 0

    @classmethod
    def start(cls, weights: NDArray[np.float32]) -> ModelState:
        """The public initialisation."""
        return cls(weights.astype(np.float64), np.zeros(weights.size))

    @property
    def length(self) -> int:
        """How many bytes :attr:`data` has: those of every state of this model."""
        return len(_DOMAIN) + _HEAD.size + 16 * self.weights.size

    @property
    def finite(self) -> bool:
        """Whether every weight and velocity is a finite number."""
        return bool(np.isfinite(self.weights).all() and np.isfinite(self.velocity).all())

    @cached_property
    def data(self) -> bytes:
        """The whole state: a domain, the steps and D (8 bytes each), weights and velocity, all little-endian."""
        head = _DOMAIN + _HEAD.pack(self.steps, self.weights.size)
        return b"".join((head, self.weights.astype("<f8").tobytes(), self.velocity.astype("<f8").tobytes()))

    @classmethod
    def load(cls, data: bytes) -> ModelState:
        """The state of :attr:`data`; :class:`StoreError` for bytes that are none."""
        at = len(_DOMAIN) + _HEAD.size
        if len(data) < at or not data.startswith(_DOMAIN):
            raise StoreError("a stored model state is damaged", hint="restore the file, or begin a new run")
        steps, size = _HEAD.unpack_from(data, len(_DOMAIN))
        if len(data) != at + 16 * size:
            raise StoreError("a stored model state is damaged", hint="restore the file, or begin a new run")
        values = np.frombuffer(data, "<f8", offset=at).astype(np.float64)
        return cls(values[:size], values[size:], steps)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of :attr:`data`: the name of the state in contributions, ledgers and journals."""
        return sha256(self.data)

    def sent(self) -> bytes:
        """The weights from which gradients are computed, and which are kept as the model: D little-endian float32."""
        return self._sent

    @cached_property
    def _sent(self) -> bytes:
        return self.weights.astype("<f4").tobytes()

    @cached_property
    def hash(self) -> str:
        """SHA-256 of :meth:`sent`: the model's name in journals and reports."""
        return sha256(self.sent())

    def after(self, plan: PrivacyPlan, opened: NDArray[np.int64]) -> ModelState:
        """:meth:`step` on an opened sum in grid units, as it comes out of the secure sum."""
        return self.step(plan, opened.astype(np.float64) * plan.grid)

    def step(self, plan: PrivacyPlan, opened: NDArray[np.float64]) -> ModelState:
        """SGD with momentum on ``opened / (q·N)``.

        In mode ``client`` the sum holds model updates, not gradients: they are averaged and applied as they are.
        Statistics are their own result: the opened sum is added to zeros.

        Raises:
            RunAborted: the weights would not be finite.
        """
        if plan.task == "stats":
            return ModelState(self.weights + opened, self.velocity, self.steps + 1)
        gradient = opened / plan.divisor
        rate = 1.0 if plan.mode == "client" else plan.optimizer.learning_rate
        velocity = plan.optimizer.momentum * self.velocity + gradient
        weights = self.weights - rate * velocity
        if not np.isfinite(weights).all():
            raise RunAborted("the model diverged", hint="choose a lower learning rate or a smaller clip")
        return ModelState(weights, velocity, self.steps + 1)
