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

from fedveil.common.buffers import Filled
from fedveil.common.errors import RunAborted, StoreError
from fedveil.common.threads import mapped, spans
from fedveil.common.wire import sha256
from fedveil.privacy.plan import PrivacyPlan

_DOMAIN = b"fedveil/state/1\n"
_HEAD = struct.Struct("<QQ")
_VALUES = len(_DOMAIN) + _HEAD.size  # where they begin
_CHUNK = 1 << 16  # values at a time: they stay in the cache


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
        return _VALUES + 16 * self.weights.size

    @property
    def finite(self) -> bool:
        """Whether every weight and velocity is a finite number."""
        return bool(np.isfinite(self.weights).all() and np.isfinite(self.velocity).all())

    @cached_property
    def data(self) -> bytes:
        """The whole state: a domain, the steps and D (8 bytes each), weights and velocity, all little-endian."""
        values = (self.weights.astype("<f8").data, self.velocity.astype("<f8").data)
        return b"".join((_head(self.steps, self.weights.size), *values))

    @classmethod
    def load(cls, data: bytes) -> ModelState:
        """The state of :attr:`data`, which it looks into; :class:`StoreError` for bytes that are none."""
        if len(data) < _VALUES or not data.startswith(_DOMAIN):
            raise StoreError("a stored model state is damaged", hint="restore the file, or begin a new run")
        steps, size = _HEAD.unpack_from(data, len(_DOMAIN))
        if len(data) != _VALUES + 16 * size:
            raise StoreError("a stored model state is damaged", hint="restore the file, or begin a new run")
        values = np.frombuffer(data, "<f8", offset=_VALUES)
        state = cls(values[:size], values[size:], steps)
        state.__dict__["data"] = data  # what the cached property would join again
        return state

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of :attr:`data`: the name of the state in contributions, ledgers and journals."""
        return sha256(self.data)

    def sent(self) -> bytes:
        """The weights from which gradients are computed, and which are kept as the model: D little-endian float32."""
        return self._sent

    @cached_property
    def _sent(self) -> bytes:
        out = Filled(4 * self.weights.size)
        np.copyto(np.frombuffer(out.room, "<f4"), self.weights, casting="same_kind")
        return out.value()

    @cached_property
    def hash(self) -> str:
        """SHA-256 of :meth:`sent`: the model's name in journals and reports."""
        return sha256(self.sent())

    def after(self, plan: PrivacyPlan, opened: NDArray[np.int64]) -> ModelState:
        """:meth:`step` on an opened sum in grid units, as it comes out of the secure sum.

        What was last computed from a sum that cannot be written to is remembered: the server and the sites of one
        process take the same step, and share the state.
        """
        asked = (plan.hash, self.digest)
        for before, values, known in _last:
            if before == asked and (values is opened or np.array_equal(values, opened)):
                return known
        state = self.step(plan, opened, plan.grid)
        if not opened.flags.writeable:
            _last[:] = [(asked, opened, state)]
        return state

    def step(self, plan: PrivacyPlan, opened: NDArray[np.float64 | np.int64], unit: float = 1.0) -> ModelState:
        """SGD with momentum on ``opened · unit / (q·N)``, chunk by chunk over threads.

        In mode ``client`` the sum holds model updates, not gradients: they are averaged and applied as they are.
        Statistics are their own result: the opened sum is added to zeros.

        Raises:
            RunAborted: the weights would not be finite.
        """
        out, size = Filled(self.length), self.weights.size
        out.room[:_VALUES] = _head(self.steps + 1, size)
        stats, momentum = plan.task == "stats", plan.optimizer.momentum
        rate = 1.0 if plan.mode == "client" else plan.optimizer.learning_rate

        def moved(part: slice) -> bool:
            count = part.stop - part.start
            weights = np.frombuffer(out.room, "<f8", count, _VALUES + 8 * part.start)
            velocity = np.frombuffer(out.room, "<f8", count, _VALUES + 8 * (size + part.start))
            gradient = opened[part] * unit
            if stats:
                np.add(self.weights[part], gradient, out=weights)
                velocity[:] = self.velocity[part]
                return True
            gradient /= plan.divisor
            np.multiply(self.velocity[part], momentum, out=velocity)
            np.add(velocity, gradient, out=velocity)
            np.multiply(velocity, rate, out=gradient)
            np.subtract(self.weights[part], gradient, out=weights)
            return bool(np.isfinite(weights).all())

        if not all([*mapped(moved, spans(size, _CHUNK))]):
            raise RunAborted("the model diverged", hint="choose a lower learning rate or a smaller clip")
        return ModelState.load(out.value())


_last: list[tuple[tuple[str, str], NDArray[np.int64], ModelState]] = []  # one step


def _head(steps: int, size: int) -> bytes:
    return _DOMAIN + _HEAD.pack(steps, size)
