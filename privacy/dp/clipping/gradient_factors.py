"""Gradients of one parameter, place by place, in the shortest form in which a norm and a weighted sum can be taken.

A place holds one record, or one person with several rows: then its gradient is the weighted mean of its rows'. Every
piece answers ``squares()``, the ``(B,)`` squared norms of the places, and ``add(factor, keep, out)``, which adds the
sum over places of factor times gradient to ``out``. Both are float64 and taken from the same stored values, whatever
precision these were computed in. So what is summed is exactly what was measured and bounded.

No shape here depends on what a record holds. A place that is not kept is replaced by zeros in every operand before the
sum's product: 0 · NaN would be NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

TINY = 1e-300
LARGEST_FACTOR = 1e100
_CACHED = 1 << 17


@dataclass(frozen=True)
class Batch:
    """One microbatch: B places of R rows each.

    Attributes:
        X: ``(B · R, inputs)`` in the network's precision; a place's rows stand together.
        y: ``(B · R,)`` classes.
        keep: ``(B,)`` bool, False for empty places.
        weights: ``(B, R)`` float64, the weight of each row in its place's mean; None for one row with the weight 1.
    """

    X: torch.Tensor
    y: torch.Tensor
    keep: torch.Tensor
    weights: torch.Tensor | None = None


class Piece(Protocol):
    """Gradients of one parameter for each place of a microbatch."""

    def operands(self) -> list[torch.Tensor]:
        """What is stored, each ``(B, ...)``: all that :meth:`squares` and :meth:`add` compute from."""
        ...

    def squares(self) -> torch.Tensor:
        """``(B,)`` float64 squared L2 norms."""
        ...

    def add(self, factor: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> None:
        """Add the sum over the kept places of ``factor`` (``(B,)`` float64) times the gradient to ``out``, flat."""
        ...


class Dense:
    """Written out: ``(B · R, *shape)``. Widened to float64 a few places at a time, so that copies stay in the cache."""

    def __init__(self, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        values = values.detach().reshape(len(values), -1)
        if weights is not None:
            places, rows = weights.shape
            values = torch.bmm(weights[:, None], values.double().view(places, rows, -1))[:, 0]
        self._values = values
        self._step = max(1, _CACHED // self._values.shape[1])

    def operands(self) -> list[torch.Tensor]:
        """See :class:`Piece`."""
        return [self._values]

    def squares(self) -> torch.Tensor:
        """See :class:`Piece`."""
        return torch.cat([_norms(v.double()) for v in self._values.split(self._step)]).square()

    def add(self, factor: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Piece`."""
        parts = (t.split(self._step) for t in (self._values, factor, keep))
        for values, f, k in zip(*parts, strict=True):
            out.addmv_(_kept(values, k).double().T, f)


class Outer:
    """The gradient of a Linear layer's weight used once per record: the outer product of two vectors.

    Args:
        out: ``(B, outputs)`` gradient at the layer's output.
        inward: ``(B, inputs)`` the layer's input.
    """

    def __init__(self, out: torch.Tensor, inward: torch.Tensor) -> None:
        self._out, self._inward = out.detach().double(), inward.detach().double()

    def operands(self) -> list[torch.Tensor]:
        """See :class:`Piece`."""
        return [self._out, self._inward]

    def squares(self) -> torch.Tensor:
        """See :class:`Piece`."""
        return (_bounded(_norms(self._out)) * _bounded(_norms(self._inward))).square()

    def add(self, factor: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Piece`."""
        scaled = _kept(self._out, keep) * factor[:, None]
        out.view(self._out.shape[1], -1).addmm_(scaled.T, _kept(self._inward, keep))


def outer(out: torch.Tensor, inward: torch.Tensor, weights: torch.Tensor | None = None) -> Piece:
    """:class:`Outer`; for places of several rows their mean written out: ``(B · R, ...)`` both."""
    if weights is None:
        return Outer(out, inward)
    places, rows = weights.shape
    scaled = out.detach().double().view(places, rows, -1) * weights[:, :, None]
    return Dense(torch.bmm(scaled.transpose(1, 2), inward.detach().double().view(places, rows, -1)))


class Rows:
    """The gradient of an embedding: a few rows of a table.

    Equal ids of one place are first added up, without leaving the place: its ids are sorted, and what belongs to one
    id goes to the slot of that id's rank.

    Args:
        ids: ``(B · R, length)`` which row each position reads.
        out: ``(B · R, length, width)`` gradient at the layer's output.
        rows: height of the table.
        weights: see :class:`Batch`.
    """

    def __init__(self, ids: torch.Tensor, out: torch.Tensor, rows: int, weights: torch.Tensor | None = None) -> None:
        values = out.detach().double()
        if weights is not None:
            places, each = weights.shape
            values = (values * weights.reshape(-1, 1, 1)).view(places, each * ids.shape[1], -1)
            ids = ids.reshape(places, -1)
        ordered, order = torch.sort(ids, dim=1, stable=True)
        fresh = torch.ones_like(ordered, dtype=torch.bool)
        fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        slots = fresh.cumsum(1) - 1
        wide = (-1, -1, values.shape[2])
        moved = values.gather(1, order[:, :, None].expand(*wide))
        self._values = torch.zeros_like(values).scatter_add_(1, slots[:, :, None].expand(*wide), moved)
        # A slot that no id uses reads row 0, and adds zeros to it.
        self._ids, self._rows = torch.zeros_like(ordered).scatter_(1, slots, ordered), rows

    def operands(self) -> list[torch.Tensor]:
        """See :class:`Piece`."""
        return [self._values, self._ids]

    def squares(self) -> torch.Tensor:
        """See :class:`Piece`."""
        return _norms(self._values.flatten(1)).square()

    def add(self, factor: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Piece`."""
        scaled = _kept(self._values, keep) * factor[:, None, None]
        out.view(self._rows, -1).index_add_(0, self._ids.reshape(-1), scaled.flatten(0, 1))


def _kept(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """``values`` with zeros in the places that are not kept."""
    return torch.where(keep.view(-1, *[1] * (values.dim() - 1)), values, torch.zeros((), dtype=values.dtype))


def _norms(values: torch.Tensor) -> torch.Tensor:
    """The norm of each place in one pass: squares written out would be fetched from memory anew for every batch."""
    return torch.linalg.vector_norm(values, dim=1)


def _bounded(norms: torch.Tensor) -> torch.Tensor:
    """Infinite where a norm is above 10^100: the square of the other factor may have underflowed to nothing."""
    return torch.where(norms > LARGEST_FACTOR, torch.inf, norms)


def norms_of(pieces: list[Piece]) -> torch.Tensor:
    """``(B,)`` float64: the norm of each place's whole gradient."""
    return torch.stack([p.squares() for p in pieces]).sum(0).sqrt()


def clip_pieces(
    pieces: list[Piece], sizes: list[int], keep: torch.Tensor, clip: float, out: torch.Tensor
) -> torch.Tensor:
    """Add the clipped sum of ``pieces``, in parameter order, to ``out`` (``(D,)`` float64).

    Args:
        sizes: number of values of each parameter.
        keep: ``(B,)`` which places may add something.
        clip: C. A place's gradient is multiplied by min(1, C / norm).

    Returns:
        ``(B,)`` bool: the places that were added. One whose norm is not finite is left out by itself.
    """
    norms = norms_of(pieces)
    keep = keep & torch.isfinite(norms)
    factor = torch.where(keep, (clip / (norms + TINY)).clamp(max=1.0), torch.zeros_like(norms))
    for piece, part in zip(pieces, out.split(sizes), strict=True):
        piece.add(factor, keep, part)
    return keep
