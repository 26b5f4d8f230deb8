"""Neural networks by name and hyper-parameters: what travels instead of code."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

MAX_PARAMETERS = 1 << 31


class ModelSpec(BaseModel, frozen=True, extra="forbid", strict=True):
    """A network for tables (``logistic``, ``mlp``) or for one-channel square images (``cnn``).

    Attributes:
        name: which architecture.
        inputs: number of features (pixels for ``cnn``, a square number divisible by 16).
        classes: number of classes, at least 2; the network has one output for each.
        hidden: widths of the hidden layers of ``mlp`` (tanh), channels of the two convolutions of ``cnn``.
        seed: seed of the public initialisation; 0 for ``logistic`` means zeros.
    """

    name: Literal["logistic", "mlp", "cnn"]
    inputs: int = Field(ge=1, le=1 << 24)
    classes: int = Field(ge=2, le=1 << 16)
    hidden: tuple[int, ...] = Field(default=(), max_length=16)
    seed: int = Field(default=0, ge=0, lt=1 << 63)

    @property
    def widths(self) -> tuple[int, ...]:
        """Layer widths of the dense networks, inputs and outputs included."""
        return (self.inputs, *self.hidden, self.classes)

    @property
    def side(self) -> int:
        """Side of a ``cnn``'s image."""
        return round(self.inputs**0.5)

    @property
    def parameters(self) -> int:
        """D, the number of trainable values."""
        if self.name == "cnn":
            a, b = self.hidden
            return (25 * a + a) + (9 * a * b + b) + (b * (self.side // 4) ** 2 * self.classes + self.classes)
        return sum((i + 1) * o for i, o in zip(self.widths, self.widths[1:], strict=False))

    def problem(self) -> str:
        """What is inconsistent in this spec; empty if nothing is."""
        if self.name == "logistic" and self.hidden:
            return "a logistic model has no hidden layers"
        if self.name == "mlp" and not self.hidden:
            return "an mlp needs at least one hidden layer"
        if any(not 1 <= h <= 1 << 20 for h in self.hidden):
            return "a hidden width is outside 1..2^20"
        if self.name == "cnn" and (len(self.hidden) != 2 or self.side**2 != self.inputs or self.side % 4):
            return "a cnn needs two channel counts and a square image whose side is divisible by 4"
        if self.parameters > MAX_PARAMETERS:
            return f"{self.parameters} parameters are over the limit of 2^31"
        return ""
