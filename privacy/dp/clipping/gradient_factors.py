"""Gradients of one parameter, place by place, in the shortest form in which a norm and a weighted sum can be taken.

A place holds one record, or one person with several rows: then its gradient is the weighted mean of its rows'. Every
piece answers ``squares()``, the ``(B,)`` squared norms of the places, and ``add(factor, keep, out)``, which adds the
sum over places of factor times gradient to ``out``. Both are float64 and taken from the same stored values, whatever
precision these were computed in. So what is summed is exactly what was measured and bounded.

No shape here depends on what a record holds. A place that is not kept is replaced by zeros in every operand before the
sum's product: 0 · NaN would be NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

TINY = 1e-300
LARGEST_FACTOR = 1e100
_CACHED = 1 << 17
_AT_ONCE = 1 << 26  # on a GPU: half a gigabyte
_SMALL = 1 << 10


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


class Workspace:
    """Memory that every microbatch of a session uses again.

    Large blocks go back to the operating system when they are freed. Getting them anew, page by page, took up to a
    third of a step. On a GPU torch keeps freed memory by itself.
    """

    def __init__(self) -> None:
        self._held: dict[object, torch.Tensor] = {}

    def take(self, key: object, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor of ``shape``, of the type and on the device of ``like``.

        It is valid until ``key`` is taken again.
        """
        if like.device.type != "cpu":
            return like.new_empty(shape)
        size, held = math.prod(shape), self._held.get(key)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            held = self._held[key] = like.new_empty(size)
        return held[:size].view(shape)

    def release(self) -> None:
        """Give all of it back."""
        self._held.clear()


class Dense:
    """Written out. Widened to float64 a few places at a time, so that copies stay in the cache.

    Args:
        values: ``(B · R, *shape)``.
        turned: the last two axes stand the other way round than in the parameter.
    """

    def __init__(self, values: torch.Tensor, weights: torch.Tensor | None = None, *, turned: bool = False) -> None:
        self.turned = values.shape[-2:] if turned else None
        values = values.detach().reshape(len(values), -1)
        if weights is not None:
            places, rows = weights.shape
            values = torch.bmm(weights[:, None], values.double().view(places, rows, -1))[:, 0]
        self.values = values
        self._step = max(1, (_CACHED if values.device.type == "cpu" else _AT_ONCE) // values.shape[1])

    def operands(self) -> list[torch.Tensor]:
        """See :class:`Piece`."""
        return [self.values]

    def squares(self) -> torch.Tensor:
        """See :class:`Piece`."""
        if self.values.dtype == torch.float64:
            return _norms(self.values).square()
        return torch.cat([_norms(wide) for wide in self._widened()]).square()

    def add(self, factor: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Piece`."""
        if self.turned is None:
            return self._add(factor, keep, out)
        self._add(factor, keep, turned := torch.zeros_like(out))
        rows, columns = self.turned
        out.view(-1, columns, rows).add_(turned.view(-1, rows, columns).transpose(1, 2))

    def _add(self, factor: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> None:
        parts = zip(self._widened(), factor.split(self._step), _ones(keep).split(self._step), strict=True)
        for wide, f, ones in parts:
            wide.view(torch.int64).bitwise_and_(ones)
            out.addmv_(wide.T, f)

    def _widened(self) -> Iterator[torch.Tensor]:
        """A copy of a few places after the other, in one block of memory that the next ones overwrite."""
        shape = (min(self._step, len(self.values)), self.values.shape[1])
        wide = self.values.new_empty(shape, dtype=torch.float64)
        for values in self.values.split(self._step):
            yield wide[: len(values)].copy_(values)


class Part:
    """One parameter's share of small gradients that are treated together: each call of torch costs more than they do.

    The first part measures and sums for all, so parts are to be used in order.
    """

    def __init__(self, whole: Dense, sums: torch.Tensor, at: int, width: int) -> None:
        self._whole, self._sums, self._at, self._width = whole, sums, at, width

    def operands(self) -> list[torch.Tensor]:
        """See :class:`Piece`."""
        return [self._whole.values[:, self._at : self._at + self._width]]

    def squares(self) -> torch.Tensor:
        """See :class:`Piece`; the first part's are those of all, the others' are zeros."""
        if self._at:
            return self._sums.new_zeros(len(self._whole.values))
        return self._whole.squares()

    def add(self, factor: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Piece`."""
        if not self._at:
            self._whole.add(factor, keep, self._sums.zero_())
        out += self._sums[self._at : self._at + self._width]


def together(pieces: list[Piece]) -> list[Piece]:
    """The same pieces, of which the small ones that are written out are parts of one."""
    small = [p for p in pieces if isinstance(p, Dense) and p.turned is None and p.values.shape[1] <= _SMALL]
    if len(small) < 2:
        return pieces
    whole = Dense(torch.cat([p.values for p in small], 1))
    sums, at, parts = whole.values.new_zeros(whole.values.shape[1], dtype=torch.float64), 0, dict[int, Piece]()
    for p in small:
        parts[id(p)] = Part(whole, sums, at, width := p.values.shape[1])
        at += width
    return [parts.get(id(p), p) for p in pieces]


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

    def add(self, factor: torch.Tensor, keep: torch.Tensor, out: torch.Tensor, *, fresh: bool = False) -> None:
        """See :class:`Piece`; ``fresh``: what ``out`` holds is overwritten, which saves reading it."""
        scaled = _kept(self._out, keep) * factor[:, None]
        out.view(self._out.shape[1], -1).addmm_(scaled.T, _kept(self._inward, keep), beta=0 if fresh else 1)


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
        # of each position, in the order of the text: its place's first slot and its id's rank
        ranks = torch.empty_like(slots).scatter_(1, order, slots)
        ranks += torch.arange(0, ranks.numel(), ranks.shape[1], device=ranks.device)[:, None]
        summed = torch.zeros_like(values).flatten(0, 1).index_add_(0, ranks.reshape(-1), values.flatten(0, 1))
        self._values = summed.view(values.shape)
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


def _ones(keep: torch.Tensor) -> torch.Tensor:
    """``(B, 1)`` int64: all bits set for the places that are kept, none for the others."""
    return keep.long().neg_()[:, None]


def _kept(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Float64 ``values`` with zeros in the places that are not kept: by their bits, as 0 times NaN is NaN."""
    flat = values.view(len(values), -1).view(torch.int64)
    return torch.bitwise_and(flat, _ones(keep)).view(torch.float64).view(values.shape)


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
    pieces: list[Piece], sizes: list[int], keep: torch.Tensor, clip: float, out: torch.Tensor, *, fresh: bool = False
) -> torch.Tensor:
    """Add the clipped sum of ``pieces``, in parameter order, to ``out`` (``(D,)`` float64).

    With ``fresh`` it is written there instead.

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
        if isinstance(piece, Outer):
            piece.add(factor, keep, part, fresh=fresh)
        else:
            piece.add(factor, keep, part.zero_() if fresh else part)
    return keep
