"""Neural networks by name and hyper-parameters, sent instead of code. Knows their sizes. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

MAX_PARAMETERS = 1 << 31
Name = Literal["logistic", "mlp", "cnn", "resnet", "transformer", "lstm", "lora-mlp", "lora-transformer"]


class ModelSpec(BaseModel, frozen=True, extra="forbid", strict=True):
    """A network for tables, square images or sequences of token ids.

    A record is always ``inputs`` float32 values. They are features, the pixels of a (channels, side, side) image, or a
    sequence of token ids (whole numbers; 0 is padding, ignored by attention and pooling). What ``hidden`` holds:

    ================== ============================================================================================
    ``logistic``       nothing
    ``mlp``            widths of the hidden layers (tanh)
    ``cnn``            channels of the two convolutions; one-channel images whose side is divisible by 4
    ``resnet``         image channels (1 or 3), then the width of each residual stage; every stage after the first
                       halves the side; GroupNorm
    ``transformer``    vocabulary, width, heads, blocks; ``inputs`` is the sequence length; pre-LayerNorm, mean pooling
    ``lstm``           vocabulary, embedding width, units; ``inputs`` is the sequence length; mean pooling
    ``lora-mlp``       rank of the adapters, then ``hidden`` of the frozen ``mlp``
    ``lora-transformer`` rank of the adapters, then ``hidden`` of the frozen ``transformer``
    ================== ============================================================================================

    Attributes:
        name: which architecture.
        inputs: values per record.
        classes: number of classes, at least 2; the network has one output for each.
        hidden: see the table.
        seed: seed of the public initialisation; a ``logistic`` model starts at zeros.
        base: SHA-256 (hex) of the file with the frozen base's weights, for ``lora-*``; empty: drawn from ``seed``.
    """

    name: Name
    inputs: int = Field(ge=1, le=1 << 24)
    classes: int = Field(ge=2, le=1 << 16)
    hidden: tuple[int, ...] = Field(default=(), max_length=16)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    base: str = Field(default="", pattern="^([0-9a-f]{64})?$", max_length=64)

    @model_serializer(mode="wrap")
    def _without_empty_base(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        out: dict[str, Any] = handler(self)
        if not self.base:
            out.pop("base", None)  # the hash of a plan without a base does not depend on this field
        return out

    @property
    def widths(self) -> tuple[int, ...]:
        """Layer widths of the dense networks, inputs and outputs included."""
        return (self.inputs, *self.hidden, self.classes)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.hidden[0] if self.name == "resnet" else 1

    @property
    def side(self) -> int:
        """Side of an image."""
        return round((self.inputs / self.channels) ** 0.5)

    @property
    def vocabulary(self) -> int:
        """Number of token ids; 0 for networks that take no tokens."""
        inner = self.inner
        return inner.hidden[0] if inner.name in ("transformer", "lstm") else 0

    @property
    def rank(self) -> int:
        """Rank of the adapters; 0 without adapters."""
        return self.hidden[0] if self.name.startswith("lora-") else 0

    @property
    def inner(self) -> ModelSpec:
        """The frozen base of ``lora-*``; any other network itself."""
        if not self.name.startswith("lora-"):
            return self
        return self.model_copy(update={"name": self.name.removeprefix("lora-"), "hidden": self.hidden[1:], "base": ""})

    @property
    def parameters(self) -> int:
        """D, the number of trainable values (adapters only for ``lora-*``)."""
        return _trainable(self)

    @property
    def frozen(self) -> int:
        """Number of values that stay as they are: the base of ``lora-*``."""
        return self.inner.parameters if self.rank else 0

    def problem(self) -> str:
        """What is inconsistent in this spec; empty if nothing is."""
        if any(not 1 <= h <= 1 << 24 for h in self.hidden):
            return "a value of hidden is outside 1..2^24"
        if self.name.startswith("lora-"):
            return self._lora_problem()
        if self.base:
            return "only adapters (lora-*) have a frozen base"
        check = _PROBLEMS.get(self.name)
        if check and (problem := check(self)):
            return problem
        if self.parameters > MAX_PARAMETERS:
            return f"{self.parameters} parameters are over the limit of 2^31"
        return ""

    def _lora_problem(self) -> str:
        if not self.hidden:
            return "adapters need a rank and the hidden values of their base"
        if problem := self.inner.problem():
            return problem
        return "the adapters' rank is over 4096" if self.rank > 4096 else ""


@lru_cache(maxsize=256)  # asked for several times in every contribution
def _trainable(s: ModelSpec) -> int:
    if s.rank:
        return s.rank * sum(i + o for i, o in _linears(s.inner))
    return _SIZES.get(s.name, _dense_size)(s)


def _dense_size(s: ModelSpec) -> int:
    return sum((i + 1) * o for i, o in _linears(s))


def _cnn_size(s: ModelSpec) -> int:
    a, b = s.hidden
    return (25 * a + a) + (9 * a * b + b) + (b * (s.side // 4) ** 2 * s.classes + s.classes)


def _resnet_size(s: ModelSpec) -> int:
    _, first, *_ = s.hidden
    total, before = 9 * s.channels * first + 2 * first, first
    for stage, width in enumerate(s.hidden[1:]):
        total += 9 * before * width + 9 * width * width + 4 * width
        total += before * width if stage or before != width else 0
        before = width
    return total + (before + 1) * s.classes


def _transformer_size(s: ModelSpec) -> int:
    vocabulary, width, _, blocks = s.hidden
    dense = sum((i + 1) * o for i, o in _linears(s))
    return (vocabulary + s.inputs) * width + dense + (4 * blocks + 2) * width


def _lstm_size(s: ModelSpec) -> int:
    vocabulary, width, units = s.hidden
    return vocabulary * width + (width + 1) * 4 * units + units * 4 * units + (units + 1) * s.classes


def _linears(s: ModelSpec) -> Iterator[tuple[int, int]]:
    """(inputs, outputs) of the Linear layers of a dense network or a transformer, in order."""
    if s.name == "transformer":
        _, d, _, blocks = s.hidden
        for _ in range(blocks):
            yield from ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d))
        yield d, s.classes
    else:
        yield from zip(s.widths, s.widths[1:], strict=False)


def _logistic_problem(s: ModelSpec) -> str:
    return "a logistic model has no hidden layers" if s.hidden else ""


def _mlp_problem(s: ModelSpec) -> str:
    if not s.hidden:
        return "an mlp needs at least one hidden layer"
    return "a hidden width is outside 1..2^20" if max(s.hidden) > 1 << 20 else ""


def _cnn_problem(s: ModelSpec) -> str:
    if len(s.hidden) != 2 or s.side**2 != s.inputs or s.side % 4:
        return "a cnn needs two channel counts and a square image whose side is divisible by 4"
    return "a hidden width is outside 1..2^20" if max(s.hidden) > 1 << 20 else ""


def _resnet_problem(s: ModelSpec) -> str:
    if not 2 <= len(s.hidden) <= 9 or s.channels not in (1, 3):
        return "a resnet needs its image's channels (1 or 3) and one to eight stage widths"
    if s.side**2 * s.channels != s.inputs or s.side % (1 << (len(s.hidden) - 2)):
        return "a resnet needs a square image whose side every stage after the first can halve"
    return "a stage width is outside 1..65536" if max(s.hidden) > 1 << 16 else ""


def _transformer_problem(s: ModelSpec) -> str:
    if len(s.hidden) != 4:
        return "a transformer needs a vocabulary, a width, a number of heads and a number of blocks"
    _, width, heads, blocks = s.hidden
    if width % heads:
        return "a transformer's width is not divisible by its heads"
    if width > 1 << 16 or blocks > 256 or s.inputs > 1 << 16:
        return "a transformer is at most 65536 wide, 256 blocks deep and takes at most 65536 tokens"
    return ""


def _lstm_problem(s: ModelSpec) -> str:
    if len(s.hidden) != 3:
        return "an lstm needs a vocabulary, an embedding width and a number of units"
    too_large = max(s.hidden[1:]) > 1 << 16 or s.inputs > 1 << 16
    return "an lstm has at most 65536 units and takes at most 65536 tokens" if too_large else ""


_SIZES = {"cnn": _cnn_size, "resnet": _resnet_size, "transformer": _transformer_size, "lstm": _lstm_size}
_PROBLEMS = {
    "logistic": _logistic_problem,
    "mlp": _mlp_problem,
    "cnn": _cnn_problem,
    "resnet": _resnet_problem,
    "transformer": _transformer_problem,
    "lstm": _lstm_problem,
}
