"""Assumption A1, tested on the machine at hand: a row's result depends on shapes, its place and its own values.

With it, a record that is added at an empty place changes no other record's gradient by a single bit, whatever the
weights are (``docs/sensitivity.md``). So the test compares bits: what an engine stores for a row, beside many kinds of
neighbours, under usual weights and under weights that cancel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedveil.common.errors import ModelError
from fedveil.privacy.dp.clipping.core import Clipper, Engine, Precision
from fedveil.privacy.dp.clipping.gradient_factors import Batch

_CANCELLING = 2.0**40
_Bits = list[NDArray[np.uint8]]


def problem(clipper: Clipper, inputs: int, places: int, rows: int = 1) -> str:
    """Why ``clipper`` fails the test at the shape that so many places have; empty if it passes.

    Every row is looked at: half of the places hold the records that are compared, the other half their neighbours, and
    then the other way round. Neighbours: all zeros, all NaN, and infinities, huge and denormal numbers, copies and
    other records in turn; for networks on tokens, several kinds of token sequences. The weights are the present ones,
    moved; and the same with units in pairs that cancel.

    Raises:
        ModelError: a planted coupling of the last bit is not found on this machine, so nothing is proven by the test.
    """
    if not _sees_planted(clipper.precision, str(clipper.device)):
        raise ModelError(
            "the test of row independence does not see a planted fault on this machine",
            hint="a microbatch of 1 in [training] of site.toml needs no such test",
        )
    _, each = clipper.shape(places, rows)
    return "" if each == 1 else _difference(clipper, inputs, each, rows)


def _difference(clipper: Clipper, inputs: int, places: int, rows: int) -> str:
    base = _records(clipper, inputs, places * rows)
    for turn, weights in enumerate(_weights(clipper.model)):
        with torch.no_grad():
            before = [p.detach().clone() for p in clipper.parameters]
            for p, value in zip(clipper.parameters, weights, strict=True):
                p.copy_(value)
        try:
            expected = _bits(clipper, base, places, rows)
            if not turn and _differ(expected, _bits(clipper, base, places, rows), slice(None)):
                return "the same rows give other bits when they are computed again"
            for name, half, neighbour in _neighbours(clipper, base, turn):
                mixed = neighbour.copy().reshape(places, rows, inputs)
                mixed[half::2] = base.reshape(places, rows, inputs)[half::2]
                if _differ(expected, _bits(clipper, mixed.reshape(-1, inputs), places, rows), slice(half, None, 2)):
                    return f"a row's bits depend on its neighbours ({name})"
        finally:
            with torch.no_grad():
                for p, value in zip(clipper.parameters, before, strict=True):
                    p.copy_(value)
    return ""


def _differ(one: _Bits, other: _Bits, where: slice) -> bool:
    return any((a[where] != b[where]).any() for a, b in zip(one, other, strict=True))


def _bits(clipper: Clipper, X: NDArray[np.float32], places: int, rows: int) -> _Bits:
    """What the engine stores for each place, as ``(places, bytes)``. Dropout's coins stay the same."""
    each = torch.full((places, rows), 1 / rows, dtype=torch.float64, device=clipper.device) if rows > 1 else None
    classes = torch.arange(len(X), device=clipper.device) % 2
    features = torch.empty(X.shape, dtype=clipper.dtype, device=clipper.device).copy_(torch.from_numpy(X))
    keep = torch.ones(places, dtype=torch.bool, device=clipper.device)
    with torch.random.fork_rng([clipper.device.index or 0] if clipper.device.type == "cuda" else []):
        torch.manual_seed(7)
        stored = clipper.backend.operands(Batch(features, classes, keep, each))
    return [t.detach().cpu().contiguous().reshape(places, -1).numpy().view(np.uint8) for t in stored]


def _records(clipper: Clipper, inputs: int, n: int) -> NDArray[np.float32]:
    """Fixed records that differ from each other, of the kind that the network takes."""
    place = np.arange(n * inputs, dtype=np.float64).reshape(n, inputs)
    wave = np.sin(place * 0.7311 + np.square(place % 97) * 0.013)  # no two alike, no symmetry
    vocabulary = int(getattr(clipper.model, "vocabulary", 0))
    return (np.floor((wave + 1) / 2 * (vocabulary - 1e-6)) if vocabulary else wave).astype(np.float32)


def _neighbours(
    clipper: Clipper, base: NDArray[np.float32], turn: int
) -> Iterator[tuple[str, int, NDArray[np.float32]]]:
    """(name, which half of the places is compared, what is in the others); the halves change sides with each turn.

    Alike in all of them, as a whole tile of a product may be treated in its own way; then several kinds one after the
    other: once all of them finite, once with infinities.
    """
    others, copies = base[::-1], np.repeat(base[:1], len(base), 0)
    if vocabulary := int(getattr(clipper.model, "vocabulary", 0)):
        mixtures = [[others, copies, np.full_like(base, vocabulary - 1)], [np.full_like(base, vocabulary - 1)]]
    else:
        yield "NaN", 1 ^ turn, np.full_like(base, np.nan)
        huge, tiny, up, down = (np.full_like(base, v) for v in (1e30, 1e-42, np.inf, -np.inf))  # tiny: denormal
        mixtures = [[others, copies, huge, tiny], [up, down, others]]
    yield "zeros", turn, np.zeros_like(base)
    for half, kinds in enumerate(mixtures):
        which = np.arange(len(base)) // 2 % len(kinds)
        mixed = np.choose(which[:, None], kinds).astype(np.float32)
        yield "others, copies, huge, tiny and infinite values", half ^ turn, mixed


def _weights(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Weights under which a difference in rounding would show: the present ones moved, and cancelling ones."""
    parameters = [p.detach() for p in model.parameters() if p.requires_grad]
    moved = []
    for p in parameters:
        steps = torch.arange(p.numel(), dtype=torch.float64).mul_(1.7).cos_().mul_(0.05).view(p.shape)
        moved.append(p + steps.to(p.device, p.dtype))
    yield moved
    yield [_cancelling(p) if p.dim() > 1 else p for p in moved]


def _cancelling(p: torch.Tensor) -> torch.Tensor:
    """Inputs two and two with opposite weights, one pair of rows alike: what is left of a sum is its rounding."""
    out = p.clone()
    flat = out.view(len(out), -1)
    even = flat.shape[1] // 2 * 2
    flat[:, 1:even:2] = -flat[:, 0:even:2]
    flat[1::2] = flat[0 : len(flat) // 2 * 2 : 2]
    return out.mul_(_CANCELLING)


class _Planted(nn.Module):
    """A layer that moves every row by the last bit of its neighbour's. Only the test's own test uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(n, 2)`` scores, of which each depends on the row before too."""
        h = torch.tanh(self.first(x))
        least = torch.finfo(h.dtype).eps
        return self.last(h * (1 + least * (h.roll(1, 0) > 0).to(h.dtype)))


@lru_cache(maxsize=8)
def _sees_planted(precision: Precision, device: str) -> bool:
    engine: Engine = "book"
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        planted = Clipper(_Planted(), engine, device, precision=precision)
    return _difference(planted, 5, 8, 1) != ""
