"""The layers of :mod:`.networks`: every one treats a record by itself, so that it can be clipped.

No layer mixes the records of a batch (GroupNorm and LayerNorm, never BatchNorm). Every parameter belongs to one
plain layer that sees a leading batch dimension: positions are an embedding of an index per record, attention is
two Linear layers. There are no buffers. So every clipping engine can treat them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

PADDING = 0


class Residual(nn.Module):
    """Two 3x3 convolutions with GroupNorm beside a shortcut: (n, before, s, s) to (n, width, s/stride, s/stride)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.norm1 = group_norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = group_norm(width)
        plain = before == width and stride == 1
        self.shortcut = nn.Identity() if plain else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One residual step."""
        return functional.relu(self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


def group_norm(width: int) -> nn.GroupNorm:
    """GroupNorm with the largest number of groups up to 8 that divides ``width`` (Wu & He 2018)."""
    return nn.GroupNorm(max(g for g in range(1, 9) if width % g == 0), width)


class ResNet(nn.Module):
    """A small residual network (He et al. 2016) for (n, channels · side²) images, without BatchNorm."""

    def __init__(self, channels: int, side: int, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.image = (channels, side, side)
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.norm = group_norm(widths[0])
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.stages = nn.Sequential(*[Residual(b, w, 2 if i else 1) for i, (b, w) in enumerate(pairs)])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, classes) logits."""
        x = functional.relu(self.norm(self.stem(x.unflatten(1, self.image))))
        return self.head(self.stages(x).mean((2, 3)))


class Tokens(nn.Module):
    """A network on (n, length) token ids, given as floats. :meth:`usable` says which records hold valid token ids."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def usable(self, X: NDArray[np.float32]) -> NDArray[np.bool_]:
        """``(n,)`` mask: every value is a whole number in [0, vocabulary). Call it before the forward pass."""
        with np.errstate(invalid="ignore"):
            return ((X >= 0) & (X < self.vocabulary) & (X == np.floor(X))).all(axis=1)


def _pool(h: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean of (n, length, d) over the tokens that are no padding; zeros for a record of padding only."""
    keep = (ids != PADDING).to(h.dtype).unsqueeze(-1)
    return (h * keep).sum(1) / keep.sum(1).clamp(min=1)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) from two Linear layers; padding is never attended to."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(n, length, width) to the same shape."""
        n, length, width = x.shape
        q, k, v = (t.reshape(n, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        # finite, so that a record that is only padding attends evenly and does not give NaN
        scores = scores.masked_fill((ids == PADDING)[:, None, None, :], -1e9)
        return self.out((torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    """Attention and a fourfold wider feed-forward layer, each after LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(n, length, width) to the same shape."""
        x = x + self.attention(self.norm1(x), ids)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(Tokens):
    """A text classifier: embeddings of tokens and positions, blocks, LayerNorm, mean pooling, Linear."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, blocks: int, classes: int) -> None:
        super().__init__(vocabulary)
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """(n, classes) logits."""
        ids = X.long()
        places = torch.arange(ids.shape[1], device=ids.device).repeat(ids.shape[0], 1)
        x = self.tokens(ids) + self.positions(places)
        for block in self.blocks:
            x = block(x, ids)
        return self.head(_pool(self.norm(x), ids))


class Lstm(Tokens):
    """One layer of long short-term memory (Hochreiter & Schmidhuber 1997) from two Linear layers, mean pooling.

    torch's own LSTM hides its matrices in one fused kernel, so no method per record can reach them.
    """

    def __init__(self, vocabulary: int, width: int, units: int, classes: int) -> None:
        super().__init__(vocabulary)
        self.tokens = nn.Embedding(vocabulary, width)
        self.inward, self.recurrent = nn.Linear(width, 4 * units), nn.Linear(units, 4 * units, bias=False)
        self.head = nn.Linear(units, classes)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """(n, classes) logits."""
        ids = X.long()
        gates = self.inward(self.tokens(ids))
        h = c = torch.zeros_like(gates[:, 0, : gates.shape[2] // 4])
        states = []
        for inward in gates.unbind(1):  # by index, each step's gradient would be a tensor of zeros for all steps
            i, f, g, o = (inward + self.recurrent(h)).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(h)
        return self.head(_pool(torch.stack(states, 1), ids))


class Adapter(nn.Module):
    """A frozen Linear layer plus a trainable product of two thin ones: W x + U (V x) (LoRA, Hu et al. 2022).

    Why our own few lines and not ``peft``: that package wraps whole pretrained models by matching names, and brings
    transformers and accelerate. It also hides the two matrices behind dictionaries of adapters and dropouts. Here they
    must be plain Linear layers that every clipping engine knows, and their number must follow from the spec alone.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.inward = nn.Linear(base.in_features, rank, bias=False)
        self.outward = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs)."""
        return self.base(x) + self.outward(self.inward(x))


def adapt(model: nn.Module, rank: int) -> list[Adapter]:
    """Freeze ``model`` and replace each of its Linear layers by an :class:`Adapter`, in order; returns them."""
    model.requires_grad_(False)
    found: list[Adapter] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and not isinstance(parent, Adapter):
                found.append(Adapter(child, rank))
                setattr(parent, name, found[-1])
    return found
